"""A module that another one uses and does not own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Borrowed(Generic[M]):
    """Keeps a module out of the module that has this as an attribute.

    A module that is an attribute itself becomes a part: it is trained, moved and saved with the whole, and whoever puts
    other tensors into the parts meets it. What is borrowed is a part of something else, which does all that, or no more
    than the architecture for tensors that are kept elsewhere. Copies and pickles of the whole keep what it shares with
    its parts shared.

    Example:
        >>> self.critics = Borrowed(critics)
        >>> self.critics.module(observation)
    """

    module: M
