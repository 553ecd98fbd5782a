"""What ``--help`` says of keys: the value of each, what it may be and what it is, as its class states it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pmoe_lightning.configuration.groups import group_choices
from pmoe_lightning.configuration.schemas import parameters_of, root_schema

#: These are made of keys of other groups.
_WITHOUT_KEYS = ("experiment", "debug")


def chosen_groups(overrides: Sequence[str]) -> list[str]:
    """The groups of which an override chooses a file."""
    groups = [word.partition("=")[0] for word in overrides]
    return [group for group in dict.fromkeys(groups) if group in group_choices() and group not in _WITHOUT_KEYS]


def describe_root() -> str:
    """A line for each key at the top, with what it may be."""
    return "\n".join(f"  {name:<17} {parameter}" for name, parameter in parameters_of(root_schema()).items())


def describe_keys(cfg: DictConfig, group: str) -> str:
    """Every key of what is chosen in a group of a composed configuration."""
    parts = []
    for path, node in _parts(cfg[group], group):
        lines = list(_describe(path, node))
        parts.append("\n".join([f"{path}: {node._target_}", *lines]) + ", of which nothing can be set" * (not lines))
    return "\n\n".join(parts) or f"{group}: nothing can be set"


def _parts(node: DictConfig | None, path: str) -> Iterator[tuple[str, DictConfig]]:
    """The node, or every one of those below it, that has a ``_target_``."""
    if node is not None and "_target_" in node:
        yield path, node
    elif isinstance(node, DictConfig):
        for key in map(str, node):
            yield from _parts(node[key], f"{path}.{key}")


def _describe(path: str, node: DictConfig) -> Iterator[str]:
    schema: Any = OmegaConf.get_type(node)
    stated = parameters_of(schema)
    for key in map(str, node):
        value = _value(node, key)
        if isinstance(value, DictConfig):
            if not OmegaConf.is_interpolation(node, key):
                yield from _describe(f"{path}.{key}", value)
        elif not key.startswith("_"):
            yield f"  {path}.{key}={_shown(value)}"
            if key in stated:
                said = ": ".join(filter(None, [str(stated[key]), stated[key].meaning]))
                yield textwrap.indent(textwrap.fill(said, 110, break_on_hyphens=False), " " * 6)


def _value(node: DictConfig, key: str) -> Any:
    try:
        return node[key]
    except OmegaConfBaseException:  # known only in a run
        unresolved: Any = node._get_node(key)
        return unresolved._value()


def _shown(value: Any) -> str:
    """As one would write it on the command line."""
    if isinstance(value, ListConfig):
        return f"[{','.join(map(_shown, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
