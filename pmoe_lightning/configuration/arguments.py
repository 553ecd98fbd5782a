"""From the words of a command line to Hydra overrides, whoever wrote them: a user, ``mlflow run`` or Lightning."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from pmoe_lightning.configuration.groups import group_options
from pmoe_lightning.errors import ConfigurationError

# What `mlflow run -P` is given; empty means "not given".
_PARAMETERS = ("algo", "env", "total_frames", "seed", "overrides")
_HYDRA_FLAGS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info"),
    *("--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun"),
)


def normalise_argv(arguments: Sequence[str]) -> list[str]:
    """Rewrite a command line as Hydra overrides and flags.

    * ``--key value`` becomes ``key=value``: how ``mlflow run -P key=value`` passes what MLproject does not declare.
    * ``overrides=a=1 b=2`` becomes ``a=1 b=2``: one MLflow parameter that carries any number of overrides.
    * ``env=Hopper-v5`` becomes ``env.id=Hopper-v5`` unless conf/env holds such a file.
    * ``data=ray`` becomes ``data.backend=ray``, because it goes with every kind of data.
    * ``callbacks.nonfinite=skip`` becomes ``callbacks.nonfinite.mode=skip``.
    * Flags move in front of the overrides, which Hydra reads in one piece: ``algo=sac -m seed=1,2`` is as good.
    * Empty values of algo, env, total_frames, seed and overrides are dropped: a script may pass them always.

    Raises:
        ConfigurationError: a ``--key`` without a value, or quotes in ``overrides`` that do not close.
    """
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if word.startswith("--") and word.split("=")[0] not in _HYDRA_FLAGS:
            word = word.removeprefix("--")
            if "=" not in word:
                value = next(rest, None)
                if value is None:
                    raise ConfigurationError(f"--{word} has no value: write {word}=value")
                word = f"{word}={value}"
        key, equals, value = word.partition("=")
        if not word.strip() or (key in _PARAMETERS and equals and not value.strip()):
            continue
        words += _split(value) if key == "overrides" else [word]
    return sorted((_spell_out(word) for word in words), key=_is_override)


def read_override(word: str) -> tuple[str, Any]:
    """The dotted key, without its plus signs, and the value of one override.

    Raises:
        ConfigurationError: it cannot be read, or has several values.
    """
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        raise ConfigurationError(f"cannot read {word!r}: write +env.key=value") from None
    if override.is_sweep_override():
        key, _, value = word.partition("=")
        raise ConfigurationError(f"{key} has several values, {value}: give one, or a list in brackets")
    return override.key_or_group, override.value()


def _is_override(word: str) -> bool:
    return word.startswith("~") or ("=" in word and not word.startswith("-"))


def _split(overrides: str) -> list[str]:
    try:
        return normalise_argv(shlex.split(overrides))
    except ValueError as error:
        raise ConfigurationError(f"cannot read overrides={overrides!r}: {error}") from None


def _spell_out(word: str) -> str:
    key, _, value = word.partition("=")
    if key == "callbacks.nonfinite":
        return f"{key}.mode={value}"
    if word == "data=ray":
        return "data.backend=ray"
    if key != "env" or not value or set(value.split(",")) & set(group_options()["env"]):
        return word
    return f"env.id={value}"
