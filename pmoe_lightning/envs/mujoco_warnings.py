"""What MuJoCo says while it simulates, through logging."""

from __future__ import annotations

import logging

__all__ = ["breakdowns", "send_to_logging"]

_log = logging.getLogger(__name__)
breakdowns: list[str] = []  # those that end an episode, since this was last looked at


def send_to_logging(*, instead: bool = False) -> None:
    """Else they go to stderr past Python, and into a MUJOCO_LOG.TXT in whatever folder the process runs in.

    Args:
        instead: also where something else was told to receive them.
    """
    try:
        import mujoco
    except ImportError:
        return
    if instead or mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(log_warning)


def log_warning(message: str) -> None:
    """Log what MuJoCo says, and keep it where its state has become NaN, infinite or huge."""
    if "simulation is unstable" in message:
        breakdowns.append(message)
    # Gymnasium's own models use compiler attributes that MuJoCo is about to drop: nothing a user can mend.
    _log.log(logging.DEBUG if "is deprecated" in message else logging.WARNING, "MuJoCo: %s", message)
