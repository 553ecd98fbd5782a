"""The configuration of a run: schemas, command-line words, composition and validation.

Everything here runs before a run begins and raises ``ConfigurationError`` with one line. Only train.py and evaluate.py
use it: constructors below them take objects and numbers, never a configuration.
"""

from pmoe_lightning.configuration.arguments import is_set_by, normalise_argv, quote_value, read_value, with_value
from pmoe_lightning.configuration.composition import compose_jobs, output_folder, read_choice
from pmoe_lightning.configuration.explanation import chosen_groups, describe_keys, describe_root
from pmoe_lightning.configuration.groups import describe_groups
from pmoe_lightning.configuration.schemas import register
from pmoe_lightning.configuration.validation import validate

__all__ = [
    "chosen_groups",
    "compose_jobs",
    "describe_groups",
    "describe_keys",
    "describe_root",
    "is_set_by",
    "normalise_argv",
    "output_folder",
    "quote_value",
    "read_choice",
    "read_value",
    "register",
    "validate",
    "with_value",
]
