"""Shapes are code: the annotations of arrays are enforced in every room of the mathematics while the tests run.

``install`` makes the rooms check themselves as they are imported, so it comes before them; ``unchecked`` is for what
traces Python, as ``torch.compile`` does, and cannot trace the checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import jaxtyping
from beartype import beartype
from jaxtyping._array_types import _MetaAbstractArray

ROOMS = [f"pmoe_lightning.{room}" for room in ("modules", "estimators", "hamiltonian", "safe", "losses", "updates")]
ROOMS.append("pmoe_lightning.evaluation.statistics")


def install() -> None:
    jaxtyping.install_import_hook(ROOMS, f"{__name__}.check")


@contextmanager
def unchecked() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def check(function: Callable) -> Callable:
    """The function with its arrays checked; other wrong arguments it must refuse itself, as it does for a user."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint if has_shape(hint) else Any for name, hint in hints.items()}
    return beartype(function)


def has_shape(hint: Any) -> bool:
    return isinstance(hint, _MetaAbstractArray) or any(map(has_shape, get_args(hint)))
