"""A picture of a Gymnasium environment: the camera, the cost of shadows, and what a machine that cannot draw lacks."""

from __future__ import annotations

import math
import os
import sys
import traceback
from typing import Any

import gymnasium
import numpy as np

from pmoe_lightning.errors import RunError, error_line

_CAMERA_ARGUMENTS = {"camera_id", "camera_name", "default_camera_config"}


def follow_the_body(env: gymnasium.Env) -> None:
    """Look through the camera that a MuJoCo model calls "track", unless one was chosen or there is none.

    The free camera of some tasks stays where it is, and a policy that runs well leaves the picture.
    """
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    chosen = _CAMERA_ARGUMENTS & set(env.spec.kwargs if env.spec is not None else ())
    if renderer is not None and renderer.camera_id == -1 and not chosen:  # -1: the free camera
        import mujoco

        renderer.camera_id = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")


def coarsen_shadows(env: gymnasium.Env) -> None:
    """Let MuJoCo compute shadows on 1024 x 1024 points, twice as finely as the picture, and not on 4096 x 4096.

    Without a GPU these take half of the time of a film.
    """
    model: Any = getattr(env.unwrapped, "model", None)
    if hasattr(model, "vis"):
        model.vis.quality.shadowsize = min(model.vis.quality.shadowsize, 1024)


def seconds_per_step(env: gymnasium.Env) -> float:
    """Simulated seconds of a step: ``dt`` of the environment, or what its rendering metadata say."""
    seconds, rate = _positive(getattr(env.unwrapped, "dt", None)), _positive(env.metadata.get("render_fps"))
    return seconds or 1 / (rate or 30.0)


def _positive(value: Any) -> float | None:
    """The value, if it is a positive number."""
    return float(value) if isinstance(value, int | float | np.number) and 0 < value < math.inf else None


def render(env: gymnasium.Env, name: str) -> Any:
    """The environment as it is now.

    Raises:
        RunError: this machine or environment cannot render; says what to do.
    """
    try:
        frame = env.render()
    except Exception as error:
        # A missing library, a missing device, a half-initialised context: each renderer has its own exception.
        _discard(error)
        backend = os.environ.get("MUJOCO_GL", "unset")
        raise RunError(
            f"cannot render {name} (MUJOCO_GL={backend}): {error_line(error)}; install libegl1 and set MUJOCO_GL=egl, "
            "or libosmesa6 and MUJOCO_GL=osmesa"
        ) from None
    if frame is None:
        raise RunError(f"environment {name} cannot render to arrays")
    return frame


def _discard(error: Exception) -> None:
    """Let go of the half-made renderer now: its destructor fails too, and would print that at some later moment."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook
