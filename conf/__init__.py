"""Configuration files of the train command; installs as ``pmoe_lightning.conf``."""
