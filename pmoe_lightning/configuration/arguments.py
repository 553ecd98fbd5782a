"""From the words of a command line to Hydra overrides, whoever wrote them: a user, ``mlflow run`` or Lightning."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
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
    * ``env=Hopper-v5`` becomes ``env.id=Hopper-v5`` unless conf/env, or that of ``--config-dir``, holds such a file.
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
    environments = {*group_options()["env"], *_own_options(words, "env")}
    return sorted((_spell_out(word, environments) for word in words), key=_is_override)


def quote_value(text: str) -> str:
    """The text as a value that Hydra's grammar and OmegaConf's interpolation both read as this text."""
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    # Backslashes have a meaning before a quote only, the closing one included.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", r"\'"), text) + "'"


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


def _own_options(words: Sequence[str], group: str) -> list[str]:
    """The options that the folder of ``--config-dir`` adds to a group."""
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


def _spell_out(word: str, environments: Set[str]) -> str:
    key, _, value = word.partition("=")
    if key == "callbacks.nonfinite":
        return f"{key}.mode={value}"
    if word == "data=ray":
        return "data.backend=ray"
    if key != "env" or not value or not environments.isdisjoint(value.split(",")):
        return word
    return f"env.id={value}"
