"""The configuration of a run: schemas, command-line words, composition and validation.

Everything here runs before a run begins and raises ``ConfigurationError`` with one line. Only train.py and evaluate.py
use it: constructors below them take objects and numbers, never a configuration.
"""

from pmoe_lightning.configuration.arguments import normalise_argv, quote_value, read_value
from pmoe_lightning.configuration.composition import compose_jobs, read_option
from pmoe_lightning.configuration.groups import describe_groups
from pmoe_lightning.configuration.schemas import register
from pmoe_lightning.configuration.validation import validate

__all__ = [
    "compose_jobs",
    "describe_groups",
    "normalise_argv",
    "quote_value",
    "read_option",
    "read_value",
    "register",
    "validate",
]
