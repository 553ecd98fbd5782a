"""Pictures: the camera, the cost of shadows, and what a machine that cannot draw lacks."""

from __future__ import annotations

import atexit
import math
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakSet

import gymnasium
import numpy as np

from pmoe_lightning.errors import RunError, error_line

if TYPE_CHECKING:
    from pmoe_lightning.envs.base import AbstractEnvironment

#: How much of a picture is drawn: all that the model asks for, or no shadows and one sample of every pixel.
Look = Literal["default", "fast"]
_MAX_GEOMS = 10_000  # shapes of a scene, as in mujoco.Renderer
_opened: WeakSet[SceneRenderer] = WeakSet()
_CAMERA_ARGUMENTS = {"camera_id", "camera_name", "default_camera_config"}


class Scene(NamedTuple):
    """What MuJoCo draws: a model, its data, and the camera, an ``MjvCamera``."""

    model: Any
    data: Any
    camera: Any


class SceneRenderer:
    """Square pictures of a scene, drawn by MuJoCo itself.

    With ``look="fast"`` no shadow is drawn and every pixel is sampled once: their cost is that of the map of shadows
    and of the samples, and not of the size. A process must not fork once there is a renderer.

    Args:
        scene: see above. Its model keeps the number of samples.
        size: of the pictures, in pixels.
        look: see above.
        name: of the environment, for messages.

    Raises:
        RunError: this machine cannot render; says what to do.
    """

    def __init__(self, scene: Scene, size: int, look: Look, name: str) -> None:
        self.scene = scene
        self._pixels = np.empty((size, size, 3), np.uint8)
        if look == "fast":
            scene.model.vis.quality.offsamples = 0  # read when the context is made
        self._gl, self._context = drawn(lambda: _open(scene.model, size), name)
        _opened.add(self)
        atexit.unregister(_close_all)  # to be called before what the graphics library has just registered
        atexit.register(_close_all)
        mujoco = _mujoco()
        self._rectangle = mujoco.MjrRect(0, 0, size, size)
        self._scene, self._option = mujoco.MjvScene(scene.model, maxgeom=_MAX_GEOMS), mujoco.MjvOption()
        if look == "fast":
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0

    def picture(self) -> np.ndarray:
        """The scene as it is now, uint8 [size, size, 3]; the next call writes over it."""
        mujoco, (model, data, camera) = _mujoco(), self.scene
        self._gl.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, self._option, None, camera, everything, self._scene)
        mujoco.mjr_render(self._rectangle, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rectangle, self._context)
        return self._pixels[::-1]  # OpenGL counts rows from below

    def close(self) -> None:
        """Give back what the graphics library holds."""
        _opened.discard(self)
        self._gl.make_current()
        self._context.free()
        self._gl.free()


def _close_all() -> None:
    """Of environments that nobody has closed: left to the end of Python, a context complains on its way."""
    for renderer in list(_opened):
        renderer.close()


def _open(model: Any, size: int) -> tuple[Any, Any]:
    """What draws off screen: an OpenGL context, by the library that ``MUJOCO_GL`` names now, and MuJoCo's in it.

    ``mujoco.Renderer`` goes by what it named when MuJoCo was imported, perhaps long before anybody was to draw.
    """
    library = os.environ.get("MUJOCO_GL", "glfw").lower()
    gl = import_module(f"mujoco.{library if library in ('egl', 'osmesa', 'cgl') else 'glfw'}").GLContext(size, size)
    gl.make_current()
    context = _mujoco().MjrContext(model, _mujoco().mjtFontScale.mjFONTSCALE_100)
    _mujoco().mjr_resizeOffscreen(size, size, context)
    _mujoco().mjr_setBuffer(_mujoco().mjtFramebuffer.mjFB_OFFSCREEN, context)
    return gl, context


def scene_of(env: gymnasium.Env) -> Scene | None:
    """What MuJoCo draws of a Gymnasium environment, through the camera that its own pictures have; None without MuJoCo.

    That is ``follow_the_body``'s, or the free camera as the environment sets it up.
    """
    renderer: Any = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is None:
        return None
    follow_the_body(env)
    data: Any = getattr(env.unwrapped, "data", None)
    camera = _mujoco().MjvCamera()
    if renderer.camera_id is not None and renderer.camera_id >= 0:
        camera.type, camera.fixedcamid = _mujoco().mjtCamera.mjCAMERA_FIXED, renderer.camera_id
        return Scene(renderer.model, data, camera)
    _mujoco().mjv_defaultFreeCamera(renderer.model, camera)
    for key, value in (renderer.default_cam_config or {}).items():
        if isinstance(value, np.ndarray):
            getattr(camera, key)[:] = value
        else:
            setattr(camera, key, value)
    return Scene(renderer.model, data, camera)


def choose_headless_renderer() -> None:
    """Without a display, let MuJoCo render with EGL and pygame with memory only, unless the user chose otherwise.

    Sets ``MUJOCO_GL`` and ``SDL_VIDEODRIVER``. They are read when the first renderer opens, so this also works after
    MuJoCo was imported, and no environment that is not drawn depends on a graphics library.
    """
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def checked_picture(env: AbstractEnvironment) -> np.ndarray:
    """What an environment draws, if it is a picture.

    Raises:
        RunError: it is not.
    """
    picture: Any = env.picture()
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
        if picture.ndim == 3 and picture.shape[2] == 3 and picture.size:
            return picture
        said = f"an array of shape {picture.shape}"
    else:
        said = f"an array of {picture.dtype}" if isinstance(picture, np.ndarray) else f"a {type(picture).__name__}"
    raise RunError(f"environment {env.name} draws {said}, not a picture: uint8 [height, width, 3]")


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
    frame = drawn(env.render, name)
    if frame is None:
        raise RunError(f"environment {name} cannot render to arrays")
    return frame


def drawn(draw: Callable[[], Any], name: str) -> Any:
    """What a call of a renderer returns.

    Raises:
        RunError: this machine cannot render; says what to do.
    """
    try:
        return draw()
    except Exception as error:
        # A missing library, a missing device, a half-initialised context: each renderer has its own exception.
        _discard(error)
        backend = os.environ.get("MUJOCO_GL", "unset")
        raise RunError(
            f"cannot render {name} (MUJOCO_GL={backend}): {error_line(error)}; install libegl1 and set MUJOCO_GL=egl, "
            "or libosmesa6 and MUJOCO_GL=osmesa"
        ) from None


def _mujoco() -> Any:
    import mujoco

    return mujoco


def _discard(error: Exception) -> None:
    """Let go of the half-made renderer now: its destructor fails too, and would print that at some later moment."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook
