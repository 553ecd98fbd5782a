"""The groups of ``conf/`` and the files in each: what ``group=option`` can choose."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def group_options() -> dict[str, list[str]]:
    """Options of every group, sorted."""
    folders = (folder for folder in files("pmoe_lightning.conf").iterdir() if folder.is_dir())
    found = {folder.name: sorted(_yaml_names(folder)) for folder in folders}
    return {group: options for group, options in sorted(found.items()) if options}


def _yaml_names(folder) -> list[str]:
    return [file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")]


def describe_groups() -> str:
    """A line per group with its options, for ``--help``."""
    return "\n".join(f"  {group:<17} {' | '.join(options)}" for group, options in group_options().items())
