"""Checkpoints: what a file holds, how it is written without ever being half-written, and how a policy comes back.

Light to import: only :mod:`pmoe_lightning.checkpoints.io` needs Lightning, and only a reference to the tracking store
needs MLflow.
"""

from importlib import import_module

_HOMES = {
    "load_policy": "policy",
    "read_checkpoint": "files",
    "resolve_checkpoint": "resolve",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
