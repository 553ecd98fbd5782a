"""The groups of ``conf/`` and the files in each: what ``group=choice`` can choose."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def group_choices() -> dict[str, list[str]]:
    """Choices of every group, sorted."""
    folders = (folder for folder in files("pmoe_lightning.conf").iterdir() if folder.is_dir())
    found = {folder.name: sorted(_yaml_names(folder)) for folder in folders}
    return {group: choices for group, choices in sorted(found.items()) if choices}


def _yaml_names(folder) -> list[str]:
    return [file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")]


def describe_groups() -> str:
    """A line per group with its choices, for ``--help``."""
    return "\n".join(f"  {group:<17} {' | '.join(choices)}" for group, choices in group_choices().items())
