"""A picture of a Gymnasium environment: the camera, the cost of shadows, and what a machine that cannot draw lacks."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
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
    with drawing(name):
        frame = env.render()
    if frame is None:
        raise RunError(f"environment {name} cannot render to arrays")
    return frame


class ModelCamera:
    """The first camera of a MuJoCo model, or the free one where it has none.

    Gymnasium's renderer, because it looks at ``MUJOCO_GL`` when it first draws; MuJoCo's own does when it is imported.

    Args:
        model, data: an ``MjModel`` and the ``MjData`` that it looks at.
        name: what messages call the environment.
    """

    def __init__(self, model: Any, data: Any, name: str) -> None:
        from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

        model.vis.quality.shadowsize = min(model.vis.quality.shadowsize, 1024)  # as in coarsen_shadows
        camera = 0 if model.ncam else -1
        self._renderer, self._name = MujocoRenderer(model, data, width=640, height=480, camera_id=camera), name

    def picture(self) -> np.ndarray:
        """What it sees now, [height, width, 3] of bytes.

        Raises:
            RunError: this machine cannot render; says what to do.
        """
        with drawing(self._name):
            picture: Any = self._renderer.render("rgb_array")
        return picture

    def close(self) -> None:
        """Let go of the renderer."""
        self._renderer.close()


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Whatever a renderer raises where the machine cannot draw, as one line.

    Raises:
        RunError: says what to do.
    """
    try:
        yield
    except Exception as error:
        # A missing library, a missing device, a half-initialised context: each renderer has its own exception.
        _discard(error)
        backend = os.environ.get("MUJOCO_GL", "unset")
        raise RunError(
            f"cannot render {name} (MUJOCO_GL={backend}): {error_line(error)}; install libegl1 and set MUJOCO_GL=egl, "
            "or libosmesa6 and MUJOCO_GL=osmesa"
        ) from None


def _discard(error: Exception) -> None:
    """Let go of the half-made renderer now: its destructor fails too, and would print that at some later moment."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook
