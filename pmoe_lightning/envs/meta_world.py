"""MetaWorld's environments, which take no seed in ``reset``, with their random numbers from the seed of a run."""

from __future__ import annotations

from typing import Any

import gymnasium

__all__ = ["ARGUMENTS", "SeededByReset", "is_meta_world"]

#: Of ``gymnasium.make``: the fifty goals of a task are drawn from this, and so are the same wherever it is made.
ARGUMENTS = {"seed": 0}


def is_meta_world(id: str) -> bool:
    """Whether an id is MetaWorld's."""
    return id.rpartition(":")[2].startswith("Meta-World/")


class SeededByReset(gymnasium.Wrapper):
    """Which goal an episode has comes from the seed of a ``reset``, and goes on from there."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            inner: Any = self.unwrapped
            inner.seed(seed)
        return self.env.reset(options=options)
