"""Tasks of the DeepMind Control Suite, stepped by dm_control itself, at about the speed of its bare loop.

Tassa et al. 2018, arXiv 1801.00690. The 28 tasks of its benchmark, and the others that have bounded actions.
"""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from typing import Any

import numpy as np

from pmoe_lightning.envs import mujoco_state, mujoco_warnings
from pmoe_lightning.envs.base import AbstractEnvironment, Arrays
from pmoe_lightning.envs.object_graph import Decoder, Encoder
from pmoe_lightning.envs.object_parts import NotCaptured
from pmoe_lightning.envs.pixels import see_pixels
from pmoe_lightning.envs.rendering import ModelCamera, Scene
from pmoe_lightning.errors import ConfigurationError, error_line
from pmoe_lightning.limits import PositiveFloat, PositiveInt, Text, checked

__all__ = ["DMControlEnv", "control_suite", "make_dm_control"]

_INSTALL = 'pip install "pmoe-lightning[dm_control]"'
_NAMED = "a task is named by its domain and its task, such as env.task=cheetah-run or env.task=ball_in_cup-catch"
_UNBOUNDED = 1e10  # what MuJoCo, and with it dm_control, says in place of a bound


class DMControlEnv(AbstractEnvironment):
    """N environments of one task of the suite, stepped together; keys as of :class:`AbstractEnvironment`.

    The observation is the vector of the task's entries, in the order of its ``observation_spec()``, each flattened row
    by row: of cheetah-run ``position`` (8) and ``velocity`` (9). The suite's episodes end at their time limit, which
    truncates them; a discount of 0 terminates. A state that MuJoCo calls invalid is a breakdown.

    An action is repeated ``action_repeat`` times, or until the episode ends. The rewards of the repetitions are
    summed; the observation is the one after the last.

    Args:
        make: makes one ``dm_control.rl.control.Environment``; called N times.
        num_envs: N.
        name: of the task, domain-task.
        seed: environment i receives ``seed + i`` at its first reset (None: nondeterministic).
        action_repeat: how often.
        carry: entries handed on to the next step.

    Raises:
        ConfigurationError: the task's actions have no bounds.
        NonFiniteError: when stepped with an action that is not finite, or reset in vain.
    """

    is_mujoco = True

    def __init__(
        self,
        make: Callable[[], Any],
        *,
        num_envs: int = 1,
        name: str,
        seed: int | None = None,
        action_repeat: int = 1,
        carry: Sequence[str] = (),
    ) -> None:
        if num_envs < 1:
            raise ConfigurationError("DMControlEnv needs at least one environment (num_envs >= 1)")
        self.envs = [make() for _ in range(num_envs)]
        low, high = _bounds(self.envs[0].action_spec(), name)
        self._places, size = _places(self.envs[0].observation_spec())
        super().__init__(num_envs=num_envs, observation_dim=size, low=low, high=high, name=name, seed=seed, carry=carry)
        self.action_repeat = action_repeat
        self._camera: ModelCamera | None = None

    def _begin(self, i: int, seed: int | None, observation: np.ndarray) -> None:
        env = self.envs[i]
        if seed is not None:
            env.task.random.seed(seed)
        try:
            self._write(env.reset().observation, observation)
        except _physics_error():
            observation[...] = np.nan  # and begun anew

    def _simulate(self, action: np.ndarray, outcome: Arrays) -> list[int]:
        observation, reward = outcome["observation"], outcome["reward"]
        for i, env in enumerate(self.envs):
            total = 0.0
            try:
                for _ in range(self.action_repeat):
                    step = env.step(action[i])
                    total += step.reward
                    if step.last():
                        break
            except _physics_error():
                observation[i], reward[i, 0] = np.nan, np.nan
                outcome["terminated"][i, 0] = outcome["truncated"][i, 0] = False
                continue
            self._write(step.observation, observation[i])
            reward[i, 0] = total
            ends = step.last()
            outcome["terminated"][i, 0] = ends and step.discount == 0
            outcome["truncated"][i, 0] = ends and step.discount != 0
        return self._count(outcome)

    def _write(self, observed: Mapping[str, Any], row: np.ndarray) -> None:
        for value, place in zip(observed.values(), self._places, strict=True):
            row[place] = value if np.ndim(value) < 2 else value.reshape(-1)

    def _capture(self) -> Any:
        return {"mujoco": mujoco_state.version(), "envs": [_capture(env) for env in self.envs]}

    def _restore(self, state: Any) -> None:
        if state.get("mujoco") != mujoco_state.version():
            captured, ours = state.get("mujoco"), mujoco_state.version()
            raise NotCaptured(f"is of MuJoCo {captured}, and this is MuJoCo {ours}", "its state")
        try:
            for env, saved in zip(self.envs, state["envs"], strict=True):
                _restore(env, saved)
        except (KeyError, ValueError) as error:
            raise NotCaptured(f"is of another environment: {error_line(error)}", "its state") from error

    @property
    def seconds_per_step(self) -> float:
        """Simulated seconds of a step, all of its repetitions."""
        return self.envs[0].control_timestep() * self.action_repeat

    def picture(self) -> np.ndarray:
        """Environment 0 through the first camera of its model.

        Raises:
            RunError: this machine cannot render; says what to do.
        """
        physics = self.envs[0].physics
        if self._camera is None:
            self._camera = ModelCamera(physics.model.ptr, physics.data.ptr, self.name)
        return self._camera.picture()

    def scene(self) -> Scene:
        """Environment 0 through the first camera of its model, as :meth:`picture` has it."""
        import mujoco

        model, data = self.envs[0].physics.model.ptr, self.envs[0].physics.data.ptr
        camera = mujoco.MjvCamera()
        if model.ncam:
            camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
        else:
            mujoco.mjv_defaultFreeCamera(model, camera)
        return Scene(model, data, camera)

    def close(self, *, raise_if_closed: bool = True) -> None:
        super().close(raise_if_closed=raise_if_closed)
        for env in self.envs:
            env.close()
        if self._camera is not None:
            self._camera.close()
            self._camera = None


@checked
def make_dm_control(
    task: Text,
    *,
    action_repeat: PositiveInt = 1,
    time_limit: PositiveFloat | None = None,
    id: str | None = None,
    num_envs: int = 1,
    seed: int | None = None,
    render_mode: str | None = None,
    carry: Sequence[str] = (),
    pixels: Mapping[str, Any] | None = None,
) -> AbstractEnvironment:
    """Make a batch of one task of the DeepMind Control Suite.

    Args:
        task: domain and task of the suite, such as cheetah-run or ball_in_cup-catch.
        action_repeat: how often the simulator steps with the same action; a step counts as so many frames.
        time_limit: simulated seconds of an episode; null: those of the task.
        id: what stands for the task elsewhere, in place of its name.
        num_envs: number of environments stepped together.
        seed: environment i receives ``seed + i`` at its first reset.
        render_mode: needs no preparation.
        carry: entries of the policy handed on to its next step.
        pixels: what is seen in place of the state: size, grey, stack and look, see :class:`PixelEnvironment`.

    Raises:
        ConfigurationError: dm_control is missing or does not work with the installed MuJoCo, the task is unknown or
            cannot be trained.

    Example:
        >>> env = make_dm_control("cheetah-run", num_envs=2, seed=0)
        >>> env.rollout(5)["next", "reward"].shape
        torch.Size([2, 5, 1])
    """
    suite = control_suite()
    domain, _, name = task.partition("-")
    if (domain, name) not in suite.ALL_TASKS:
        raise ConfigurationError(f"unknown task of dm_control {task!r}{_closest(task, suite.ALL_TASKS)}")
    limit = {} if time_limit is None else {"time_limit": time_limit}

    def load() -> Any:
        with _of_this_pair():
            return suite.load(domain, name, task_kwargs=limit)

    def make(render_mode: str | None, **of_environment: Any) -> DMControlEnv:
        return DMControlEnv(load, name=id or task, action_repeat=action_repeat, **of_environment)

    return see_pixels(make, pixels, num_envs=num_envs, seed=seed, carry=carry, render_mode=render_mode)


def control_suite() -> Any:
    """``dm_control.suite``, imported quietly.

    Raises:
        ConfigurationError: it is missing, or not made for the installed MuJoCo.
    """
    # What absl logs to when it is imported, it closes once logging is configured, unless that is Python's own stream.
    with _of_this_pair(), warnings.catch_warnings(), redirect_stderr(sys.__stderr__ or sys.stderr):
        warnings.simplefilter("ignore")  # GLFW warns that there is no display; what draws here is another library
        try:
            from dm_control import suite
        except ModuleNotFoundError as error:
            if error.name not in ("dm_control", "dm_env"):
                raise
            raise ConfigurationError(
                f"env=dm_control needs a package that is not installed: {_INSTALL}; {_NAMED}"
            ) from error
    mujoco_warnings.send_to_logging(instead=True)  # dm_control has set a callback of its own
    return suite


@contextmanager
def _of_this_pair() -> Iterator[None]:
    """What goes wrong where dm_control meets a MuJoCo that it was not made for, as one line."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        pair = " and ".join(f"{name} {version(name)}" for name in ("dm_control", "mujoco"))
        raise ConfigurationError(
            f"{pair} do not work together here: {error_line(error, named=True)}; every release of dm_control needs the "
            "MuJoCo it was made for: pip install dm_control==1.0.44 mujoco==3.11.0"
        ) from error


def _physics_error() -> type[Exception]:
    from dm_control.rl.control import PhysicsError

    return PhysicsError


def _closest(task: str, known: Sequence[tuple[str, str]]) -> str:
    names = {name.lower().replace("-", "_"): name for name in map("-".join, known)}
    found = difflib.get_close_matches(task.lower().replace("-", "_"), names, n=3, cutoff=0.5)
    return f": did you mean {', '.join(names[match] for match in found)}?" if found else f": {_NAMED}"


def _bounds(spec: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the action, as float32.

    Raises:
        ConfigurationError: there are none.
    """
    low, high = spec.minimum.astype(np.float32), spec.maximum.astype(np.float32)
    unbounded = np.flatnonzero((low <= -_UNBOUNDED) | (high >= _UNBOUNDED))
    if len(unbounded):
        raise ConfigurationError(
            f"task {name!r} of dm_control cannot be trained: dimension {unbounded[0]} of its action has no bounds"
        )
    return low, high


def _places(spec: Mapping[str, Any]) -> tuple[list[int | slice], int]:
    """Where each entry of an observation lies in the vector, and the vector's size."""
    places: list[int | slice] = []
    size = 0
    for entry in spec.values():
        length = math.prod(entry.shape)
        places.append(slice(size, size + length) if entry.shape else size)
        size += length
    return places, size


def _capture(env: Any) -> dict[str, Any]:
    """Model, data, the attributes of the task with its random numbers, and where in its episode it is."""
    physics, encoder = env.physics, Encoder()
    task = {name: encoder.encode(value) for name, value in vars(env.task).items()}
    return {
        "model": mujoco_state.capture_model(physics.model.ptr),
        "data": mujoco_state.capture_data(physics.data.ptr),
        "task": task,
        "nodes": encoder.nodes,
        "steps": env._step_count,
        "is_over": env._reset_next_step,
    }


def _restore(env: Any, state: Mapping[str, Any]) -> None:
    model, data = env.physics.model.ptr, env.physics.data.ptr
    mujoco_state.check_model(model, state["model"])
    mujoco_state.check_data(data, state["data"])
    decoder = Decoder(state["nodes"])
    task = {name: decoder.decode(value) for name, value in state["task"].items()}
    if task.keys() != vars(env.task).keys():
        raise ValueError("is of another task")
    mujoco_state.restore_model(model, state["model"])
    mujoco_state.restore_data(data, state["data"], halfway=True)
    vars(env.task).update(task)
    env._step_count, env._reset_next_step = state["steps"], state["is_over"]
