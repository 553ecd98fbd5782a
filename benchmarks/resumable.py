"""The cells of a study: a result in a file of its own, so that an interrupted study continues where it stopped."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

R = TypeVar("R")


def fill(cell: Path, measure: Callable[[], R], to_text: Callable[[R], str] = json.dumps) -> R | None:
    """Measure the cell unless its file is there, which appears only when it is complete; None where it was there."""
    if cell.exists():
        return None
    cell.parent.mkdir(parents=True, exist_ok=True)
    result = measure()
    partial = cell.with_suffix(".partial")
    partial.write_text(to_text(result), newline="")
    partial.rename(cell)
    return result


def indented(result: dict) -> str:
    """The result as JSON that is easy to compare."""
    return json.dumps(result, indent=1)


def finished(folder: Path, pattern: str = "*.json") -> Iterator[dict]:
    """The finished cells of a folder, in the order of their names."""
    for path in sorted(folder.glob(pattern)):
        yield json.loads(path.read_text())


def processor_seconds() -> float:
    """Of all the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
