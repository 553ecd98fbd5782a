"""Compose the configuration before Hydra does, so that a mistake is one line and leaves nothing behind."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from pmoe_lightning.configuration.arguments import is_set_by, quote_value
from pmoe_lightning.configuration.groups import group_choices
from pmoe_lightning.configuration.schemas import fields_of, register, schemas
from pmoe_lightning.errors import ConfigurationError, error_line, first_line

_CONFIG_MODULE = "pmoe_lightning.conf"
#: What a run can do without, and ``~key`` may leave out.
_OPTIONAL = ("callbacks", "logger", "debug", "experiment", "env", "hydra")


def compose_jobs(
    overrides: Sequence[str], *, multirun: bool = False, config_dir: str | None = None
) -> list[DictConfig]:
    """The configuration of every job that a command line asks for: one, or one per combination of a sweep.

    Raises:
        ConfigurationError: naming the key, what is wrong with it, and the nearest valid key or choice.
    """
    register()
    extra = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    with initialize_config_module(_CONFIG_MODULE, version_base="1.3"):
        return [_compose([*job, *extra]) for job in (_sweep(overrides) if multirun else [list(overrides)])]


def output_folder(overrides: Sequence[str], *, multirun: bool = False, config_dir: str | None = None) -> Path | None:
    """The folder that Hydra would write to, of a run or of a whole sweep, filled in from configuration and clock.

    None where only Hydra can know it, in its job.
    """
    extra = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    words = [word for word in overrides if not _is_sweep(word)]
    with initialize_config_module(_CONFIG_MODULE, version_base="1.3"):
        try:
            cfg = compose("config", [*words, *extra], return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            return Path(cfg.hydra.sweep.dir if multirun else cfg.hydra.run.dir)
        except (HydraException, OmegaConfBaseException, ValueError):
            return None
        finally:
            HydraConfig.instance().cfg = None


def read_choice(group: str, name: str, config_dir: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The target of a choice in the user's folder, and the values beside it that stand for themselves.

    Raises:
        ConfigurationError: it does not compose, or its target cannot be imported.
    """
    (cfg,) = compose_jobs([f"{group}={name}"], config_dir=config_dir)
    node = cfg[group]
    try:
        target = get_object(node._target_)
    except Exception as error:  # whatever importing a user's module raises
        raise ConfigurationError(f"{group}={name} of {config_dir}: {node._target_}: {error_line(error)}") from error
    values = cast(dict[str, Any], OmegaConf.to_container(node))
    own = [key for key in node if not key.startswith("_") and not OmegaConf.is_interpolation(node, key)]
    return target, {key: value for key, value in values.items() if key in own}


def _compose(overrides: list[str]) -> DictConfig:
    for word in overrides:
        if word.startswith("~") and re.split("[./@=]", word[1:])[0] not in _OPTIONAL or word == "~env":
            key = word[1:].partition("=")[0]
            raise ConfigurationError(f"{word} leaves out what every run needs: choose a value, {key}=...")
    try:
        return compose("config", overrides)
    except OverrideParseException as error:
        key, equals, value = error.override.partition("=")
        wanted = f"put the value into quotes of its own, {key}={quote_value(value)}" if equals else "write key=value"
        raise ConfigurationError(f"cannot read {error.override!r}: {wanted}") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigurationError(_explain(error, overrides)) from None


def _sweep(overrides: Sequence[str]) -> Iterator[list[str]]:
    choices = []
    for word in overrides:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            override = None  # composing reports it
        if override is not None and override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        elif override is None or not override.is_sweep_override():
            choices.append([word])
    return map(list, itertools.product(*choices))


def _is_sweep(word: str) -> bool:
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        return False


def _explain(error: Exception, overrides: list[str]) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key, text = getattr(cause, "full_key", None), str(error)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and key:
        return _unknown_key(key, overrides)
    if isinstance(cause, ValidationError) and key:
        return f"{key}: {_wrong_type(cause)}"
    if sets := re.match(r"In '(\w+)/(\w+)': .*Key '(\w+)' not in '(\w+)'\s+full_key: (\w+)\.", text, re.DOTALL):
        return f"{sets[1]}={sets[2]} sets {sets[5]}.{sets[3]}, which {sets[5]}={sets[4]} does not have"
    if ambiguous := re.match("Ambiguous value for argument '(.*)'", text):
        if is_set_by(ambiguous[1], "resume"):
            return f"{ambiguous[1]} has several values: resume continues one run"
        return f"{ambiguous[1]} has several values: add --multirun to run each, or write a list with brackets"
    for word in overrides:
        name, _, value = word.partition("=")
        name = name.lstrip("+~")
        if name in group_choices() and "Could not find" in text and f"'{name}/" in text:
            known = group_choices()[name]
            return f"{name}={value} is not one of {', '.join(known)}{nearest(value, known)}"
        if f"'{name}'" in text and "No match in the defaults list" in text:
            return _unknown_key(name, overrides)
    return error_line(cause)


def _wrong_type(error: ValidationError) -> str:
    line = first_line(error)
    whole = re.match(r"Value '(\d+)\.0' of type 'float' could not be converted to Integer", line)
    return f"{line}; write {whole[1]}" if whole else line


def _unknown_key(key: str, overrides: list[str]) -> str:
    group, _, name = key.partition(".")
    owners = [choice for choice, schema in schemas().get(group, {}).items() if name in fields_of(schema)]
    if owners and group != "callbacks":
        chosen = next((word for word in overrides if word.startswith(f"{group}=")), f"the chosen {group}")
        return f"unknown key {key}: {chosen} has no {name}, {group}={owners[0]} has"
    if group == "env" and _chosen_env(overrides) and key in _keys(compose("config")):
        return f"unknown key {key}: env={_chosen_env(overrides)} has no {name}, environments of Gymnasium have"
    choices = [word for word in overrides if word.split("=")[0].lstrip("+~") in group_choices()]
    try:
        known = list(_keys(compose("config", choices)))
    except (HydraException, OmegaConfBaseException):
        known = list(_keys(compose("config")))
    takes_any = group == "env" and _chosen_env(overrides) not in schemas()["env"]
    hint = f"; an argument of the environment is added with a plus sign: +{key}=..." if takes_any else ""
    return f"unknown key {key}{nearest(key, [*group_choices(), *known])}{hint}"


def _chosen_env(overrides: Sequence[str]) -> str | None:
    """The choice of ``conf/env``; None for the first one."""
    chosen = [word.removeprefix("env=") for word in overrides if word.startswith("env=")]
    return chosen[-1] if chosen and chosen[-1] != "gymnasium" else None


def nearest(word: str, candidates: Sequence[str]) -> str:
    """``; did you mean ...?`` with the candidate closest in spelling, or nothing.

    Looked for beside the word first, then under its last name anywhere, then anywhere.
    """
    parent, _, last = word.rpartition(".")
    split = [(candidate.rpartition("."), candidate) for candidate in reversed(candidates)]
    names = {name: candidate for (_, _, name), candidate in split}
    siblings = {name: candidate for (above, _, name), candidate in split if above == parent}
    close = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1)]
    close = close or [names[name] for name in difflib.get_close_matches(last, names, n=1, cutoff=0.75)]
    close = close or difflib.get_close_matches(word, candidates, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, node):
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not OmegaConf.is_missing(node, key) and not child._is_none():
            yield from _keys(child, f"{prefix}{key}.")
