"""Checkpoints: what a file holds, how it is written without ever being half-written, and how a policy comes back.

Light to import: only :mod:`pmoe_lightning.checkpoints.io` needs Lightning, and only a reference to the tracking store
needs MLflow.
"""

from pmoe_lightning.lazy import load_on_first_use

_HOMES = {
    "AtomicCheckpointIO": "io",
    "load_policy": "policy",
    "read_checkpoint": "files",
    "resolve_checkpoint": "resolve",
    "write_checkpoint": "files",
}
__all__ = sorted(_HOMES)
__getattr__ = load_on_first_use(__name__, _HOMES)
