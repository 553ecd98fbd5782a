"""From the words of a command line to Hydra overrides, whoever wrote them: a user, ``mlflow run`` or Lightning."""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Iterator, Mapping, Sequence, Set
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from pmoe_lightning.configuration.groups import group_choices
from pmoe_lightning.errors import ConfigurationError, error_line

# What `mlflow run -P` is given; empty means "not given".
_PARAMETERS = ("algo", "env", "total_frames", "seed", "overrides")
_HYDRA_FLAGS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info"),
    *("--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun"),
)

#: How a user may write true and false.
TRUTH_VALUES = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}

#: What Hydra's grammar takes for text, without quotes: the slash makes it no number and no null.
_PLAIN_PATH = re.compile(r"[\w.@%-]*/[\w/.:@%-]*", re.ASCII)
_PLAIN_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)  # module:Name


class Word(NamedTuple):
    """A word of a command line, or the two of ``--key value``: as written, and what it says."""

    text: str
    key: str
    value: str | None  # None: only a key


def read_words(
    arguments: Sequence[str], *, flags: Container[str] = (), switches: Container[str] = ()
) -> Iterator[Word]:
    """``key=value``, ``--key=value`` and ``--key value`` alike: MLflow passes parameters in all of these forms.

    Args:
        arguments: the command line; empty words, which a script passes for what nobody gave, are left out.
        flags: begin with two dashes and are no keys.
        switches: keys that are true where no value follows.
    """
    rest = list(arguments)
    while rest:
        text = rest.pop(0)
        is_key = text.startswith("--") and text.split("=")[0] not in flags
        key, equals, value = (text.removeprefix("--") if is_key else text).partition("=")
        if is_key and not equals:
            if key in switches and (not rest or rest[0].lower() not in TRUTH_VALUES):
                equals, value = "=", "true"
            elif rest:
                equals, value = "=", rest.pop(0)
        if text.strip():
            yield Word(text, key, value if equals else None)


def normalise_argv(arguments: Sequence[str]) -> list[str]:
    """Rewrite a command line as Hydra overrides and flags.

    * ``--key value`` becomes ``key=value``: how ``mlflow run -P key=value`` passes what MLproject does not declare.
    * ``overrides=a=1 b=2`` becomes ``a=1 b=2``: one MLflow parameter that carries any number of overrides.
    * ``env=Hopper-v5`` becomes ``env.id=Hopper-v5`` unless conf/env, or that of ``--config-dir``, holds such a file.
    * ``data=ray`` becomes ``data.backend=ray``, because it goes with every kind of data.
    * ``callbacks.nonfinite=skip`` becomes ``callbacks.nonfinite.mode=skip``.
    * Flags move in front of the overrides, which Hydra reads in one piece: ``algo=sac -m seed=1,2`` is as good.
    * Empty values of algo, env, total_frames, seed and overrides are dropped: a script may pass them always.

    Raises:
        ConfigurationError: a ``--key`` without a value, or quotes in ``overrides`` that do not close.
    """
    words: list[str] = []
    for text, key, value in read_words(arguments, flags=_HYDRA_FLAGS):
        if value is None:
            if text == f"--{key}":
                raise ConfigurationError(needs_value(key))
            words.append(text)
        elif key == "overrides":
            words += _split(value)
        elif value.strip() or key not in _PARAMETERS:
            words.append(f"{key}={value}")
    environments = {*group_choices()["env"], *_own_choices(words, "env")}
    return sorted((_spell_out(word, environments) for word in words), key=_is_override)


def needs_value(key: str) -> str:
    """The line for ``--key`` with nothing behind it."""
    return f"--{key} needs a value: write {key}=value"


def quote_value(text: str) -> str:
    """The text as a value that Hydra's grammar and OmegaConf's interpolation both read as this text."""
    if _PLAIN_PATH.fullmatch(text):
        return text
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    # Backslashes have a meaning before a quote only, the closing one included.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", r"\'"), text) + "'"


def write_value(value: Any) -> str:
    """A plain value as the right side of an override."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{write_value(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(write_value, value)) + "]"
    if isinstance(value, str):
        return value if _PLAIN_NAME.fullmatch(value) else quote_value(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def read_value(words: Sequence[str], key: str) -> str | None:
    """The value that an override gives to ``key``, without its quotes; None where none does."""
    for word in reversed(words):
        if key in word:
            try:
                override = OverridesParser.create().parse_override(word)
            except HydraException:
                continue  # composing reports it
            if override.key_or_group == key:
                return str(override.value())
    return None


def with_value(words: Sequence[str], key: str, text: str) -> list[str]:
    """The words with this value for ``key``, and with no other."""
    return [*(word for word in words if not is_set_by(word, key)), f"{key}={quote_value(text)}"]


def is_set_by(word: str, *keys: str) -> bool:
    """Whether this override sets one of the keys."""
    return word.lstrip("+").startswith(tuple(f"{key}=" for key in keys))


def _own_choices(words: Sequence[str], group: str) -> list[str]:
    """The choices that the folder of ``--config-dir`` adds to a group."""
    folder = get_args_parser().parse_known_args(words)[0].config_dir
    return [] if folder is None else [file.stem for file in Path(folder, group).glob("*.yaml")]


def read_override(word: str) -> tuple[str, Any]:
    """The dotted key, without its plus signs, and the value of one override.

    Raises:
        ConfigurationError: it cannot be read, or has several values.
    """
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        key = word.partition("=")[0]
        wanted = "+env.key" if key.lstrip("+").startswith("env.") else key
        raise ConfigurationError(f"cannot read {word!r}: write {wanted}=value") from None
    if override.is_sweep_override():
        key, _, value = word.partition("=")
        raise ConfigurationError(f"{key} has several values, {value}: give one, or a list in brackets")
    return override.key_or_group, override.value()


def check_finite(key: str, value: Any) -> None:
    """Refuse a number that is infinite or not a number: nothing can be done with it, an environment included.

    Raises:
        ConfigurationError: it is.
    """
    if isinstance(value, float) and not isfinite(value):
        raise ConfigurationError(f"{key}={value} must be a finite number")


def _is_override(word: str) -> bool:
    return word.startswith("~") or ("=" in word and not word.startswith("-"))


def _split(overrides: str) -> list[str]:
    try:
        return normalise_argv(shlex.split(overrides))
    except ValueError as error:
        raise ConfigurationError(f"cannot read overrides={overrides!r}: {error_line(error)}") from None


def _spell_out(word: str, environments: Set[str]) -> str:
    key, _, value = word.partition("=")
    if key == "callbacks.nonfinite":
        return f"{key}.mode={value}"
    if word == "data=ray":
        return "data.backend=ray"
    if key != "env" or not value or not environments.isdisjoint(value.split(",")):
        return word
    return f"env.id={value}"
