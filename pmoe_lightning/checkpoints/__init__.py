"""Checkpoints: what a file holds, how it is written without ever being half-written, and how a policy comes back.

Light to import: only :mod:`pmoe_lightning.checkpoints.io` needs Lightning. What a user types may name the tracking
store, so ``pmoe_lightning.load_policy`` is at home in :mod:`pmoe_lightning.tracking.references`.
"""

from typing import TYPE_CHECKING

from pmoe_lightning.lazy import load_on_first_use

if TYPE_CHECKING:
    from pmoe_lightning.checkpoints.files import read_checkpoint as read_checkpoint
    from pmoe_lightning.checkpoints.files import write_checkpoint as write_checkpoint
    from pmoe_lightning.checkpoints.io import AtomicCheckpointIO as AtomicCheckpointIO

_HOMES = {
    "AtomicCheckpointIO": "io",
    "read_checkpoint": "files",
    "write_checkpoint": "files",
}
__all__ = sorted(_HOMES)
__getattr__ = load_on_first_use(__name__, _HOMES)
