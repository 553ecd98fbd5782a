"""A batch of Gymnasium environments as one TorchRL environment, at about the speed of the bare Gymnasium loop.

TorchRL's generic wrapper spends several times the cost of a MuJoCo step on specs and bookkeeping. Here one TensorDict
is built per batched step, directly from NumPy arrays, and :meth:`GymnasiumEnv.step_and_maybe_reset` replaces the
generic machinery. Our collector does without that TensorDict too: :meth:`GymnasiumEnv.step_into`. A transform around
the environment would bypass both, so what a trainer needs from every step (float32 observations, episode return and
length) is computed inside.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.spaces.utils import flatten

from pmoe_lightning.envs import meta_world, mujoco_warnings, rendering
from pmoe_lightning.envs.base import AbstractEnvironment, Arrays
from pmoe_lightning.envs.contract import (
    check_action_space,
    check_observation,
    check_reset,
    check_step,
    default_dtype_kept,
    has_images,
    one_flag,
    one_line,
    one_number,
    vector_size,
    warn_of_lost_precision,
)
from pmoe_lightning.envs.packages import closest, mend, package
from pmoe_lightning.envs.pixels import see_pixels
from pmoe_lightning.envs.pybullet_greetings import import_quietly, quiet_connection
from pmoe_lightning.envs.simulator_state import capture, is_mujoco, restore
from pmoe_lightning.envs.velocity import VelocityCost
from pmoe_lightning.envs.wrappers import Wrap, find_wrappers
from pmoe_lightning.errors import ConfigurationError, error_line, is_exit

__all__ = ["GymnasiumEnv", "make_env"]

_log = logging.getLogger(__name__)
_STEPPED = ("observation", "reward", "done", "terminated", "truncated", "episode_return", "episode_length")
_FLAGS = (bool, np.bool_)
_NOT_A_VECTOR = (-1,)  # the shape of no array
_BAD_STATES = slice(3, 7)  # mjWARN_BADQPOS, BADQVEL, BADQACC and BADCTRL


class GymnasiumEnv(AbstractEnvironment):
    """N Gymnasium environments with continuous actions, stepped together; keys as of :class:`AbstractEnvironment`.

    Observations of any other kind than a flat vector are flattened as :class:`gymnasium.wrappers.FlattenObservation`
    does. They must be of the declared shape; all that the first reset and step of every environment return is checked.
    A MuJoCo state that is NaN, infinite or huge is a breakdown, too.

    Args:
        envs: the Gymnasium environments; all must have the same spaces. They are closed with this environment.
        seed: environment i receives ``seed + i`` at its first reset (None: nondeterministic).
        carry: entries handed on to the next step.
        cost: what a step costs, from the information that it returns.

    Raises:
        ConfigurationError: if there is no environment, the action space is not a bounded vector, the observations
            cannot be flattened to a vector or are images, or the environments differ in their spaces; when an
            environment returns what it should not, or fails in its first reset or step.
        NonFiniteError: when stepped with an action that is not finite, or reset in vain.
    """

    def __init__(
        self,
        envs: Sequence[gymnasium.Env],
        *,
        seed: int | None = None,
        carry: Sequence[str] = (),
        cost: Callable[[Mapping[str, Any]], float] | None = None,
    ) -> None:
        if not envs:
            raise ConfigurationError("GymnasiumEnv needs at least one environment (num_envs >= 1)")
        action_space, observation_space = _shared_spaces(envs)
        size = vector_size(observation_space, _name(envs[0]))
        super().__init__(
            num_envs=len(envs),
            observation_dim=size,
            low=action_space.low,
            high=action_space.high,
            name=_name(envs[0]),
            carry=carry,
            has_cost=cost is not None,
        )
        self.envs, self._observation_space, self.cost = list(envs), observation_space, cost
        is_vector = isinstance(observation_space, Box) and len(observation_space.shape) == 1
        self._vector_shape = (size,) if is_vector else _NOT_A_VECTOR
        self._never_reset, self._never_stepped = set(range(len(envs))), set(range(len(envs)))
        self._is_drawn = False
        self._set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        super()._set_seed(seed)
        for env, env_seed in zip(self.envs, self._seeds, strict=True):
            if env_seed is not None:
                env.action_space.seed(env_seed)

    def _simulate(self, action: np.ndarray, outcome: Arrays) -> list[int]:
        observation, reward, done, terminated, truncated, episode_return, episode_length = (
            outcome[key] for key in _STEPPED
        )
        ended, never_stepped, shape = [], self._never_stepped, self._vector_shape
        # Scalar by scalar and with the totals, because one NumPy operation costs as much as a dozen assignments.
        for i, env in enumerate(self.envs):
            stepped = self._first_step(i, action[i]) if i in never_stepped else env.step(action[i])
            observed, value, ends, is_cut, info = stepped
            observation[i] = observed if getattr(observed, "shape", None) == shape else self._flat(observed)
            value = float(value) if isinstance(value, float) else one_number(value, self.name)
            ends = bool(ends) if isinstance(ends, _FLAGS) else one_flag(ends, "terminated", self.name)
            is_cut = bool(is_cut) if isinstance(is_cut, _FLAGS) else one_flag(is_cut, "truncated", self.name)
            self._returns[i] += value
            self._lengths[i] += 1
            reward[i, 0], episode_return[i, 0], episode_length[i, 0] = value, self._returns[i], self._lengths[i]
            done[i, 0], terminated[i, 0], truncated[i, 0] = ends or is_cut, ends, is_cut
            if self.cost is not None:
                cost = self.cost(info)
                self._costs[i] += cost
                outcome["cost"][i, 0], outcome["episode_cost"][i, 0] = cost, self._costs[i]
            if ends or is_cut:
                ended.append(i)
                self.ended_in[i] = info.get("mode", -1)
        return ended

    def _may_have_broken_down(self, outcome: Arrays) -> bool:
        return bool(mujoco_warnings.breakdowns) or super()._may_have_broken_down(outcome)

    def _broken_down(self, outcome: Arrays) -> np.ndarray:
        mujoco_warnings.breakdowns.clear()
        return super()._broken_down(outcome) | [_was_reset_by_mujoco(env) for env in self.envs]

    def _begin(self, i: int, seed: int | None, observation: np.ndarray) -> None:
        if i in self._never_reset:
            with quiet_connection(), one_line(self.name, "reset"):
                result = self.envs[i].reset(seed=seed)
                check_reset(self._observation_space, result, self.name)
        else:
            result = self.envs[i].reset(seed=seed)
            check_reset(self._observation_space, result, self.name)
        self._never_reset.discard(i)
        warn_of_lost_precision(self._observation_space, result[0], self.name)
        observation[...] = self._flat(result[0])

    def _first_step(self, i: int, action: np.ndarray) -> tuple:
        with one_line(self.name, "step"):
            result = self.envs[i].step(action)
            check_step(self._observation_space, result, self.name)
        warn_of_lost_precision(self._observation_space, result[0], self.name)
        self._never_stepped.discard(i)
        return result

    def _flat(self, observed: Any) -> Any:
        """A checked observation as a vector."""
        check_observation(self._observation_space, observed, self.name)
        return flatten(self._observation_space, observed) if self._vector_shape == _NOT_A_VECTOR else observed

    @property
    def is_mujoco(self) -> bool:  # type: ignore[override]  # nobody sets it
        """Whether MuJoCo simulates all of the environments."""
        return all(is_mujoco(env) for env in self.envs)

    @property
    def task(self) -> gymnasium.Env:
        return self.envs[0].unwrapped

    def _capture(self) -> Any:
        return capture(self.envs)

    def _restore(self, state: Any) -> None:
        restore(self.envs, state)

    @property
    def seconds_per_step(self) -> float:
        """Simulated seconds of a step: ``dt`` of the environment, or what its rendering metadata say."""
        return rendering.seconds_per_step(self.envs[0])

    def picture(self) -> np.ndarray:
        """The first environment as it is now.

        Raises:
            RunError: this machine or environment cannot render; says what to do.
        """
        if not self._is_drawn:
            rendering.follow_the_body(self.envs[0])
            rendering.coarsen_shadows(self.envs[0])
            self._is_drawn = True
        return rendering.render(self.envs[0], self.name)

    def scene(self) -> rendering.Scene | None:
        return rendering.scene_of(self.envs[0])

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close every Gymnasium environment; that one cannot be closed is a warning."""
        super().close(raise_if_closed=raise_if_closed)
        failure = None
        for env in self.envs:
            try:
                env.close()
            except Exception as error:
                failure = error
        if failure is not None:
            _log.warning("environment %r failed to close: %s", self.name, error_line(failure, named=True))


def make_env(
    id: str,
    *,
    num_envs: int = 1,
    seed: int | None = None,
    render_mode: str | None = None,
    carry: Sequence[str] = (),
    velocity_limit: float | str | None = None,
    wrappers: Sequence[str | Mapping[str, Any]] = (),
    pixels: Mapping[str, Any] | None = None,
    **kwargs,
) -> AbstractEnvironment:
    """Make a batch of one registered Gymnasium environment.

    Args:
        id: Gymnasium id, such as ``"HalfCheetah-v5"`` (``"module:Name-v0"`` imports ``module`` first).
        num_envs: number of environments stepped together.
        seed: environment i receives ``seed + i`` at its first reset.
        render_mode: as in :func:`gymnasium.make`.
        carry: entries of the policy handed on to its next step, see :class:`GymnasiumEnv`.
        velocity_limit: in m/s, or ``published``: steps that are faster cost 1, see :class:`VelocityCost`.
        wrappers: put around each environment, the first innermost: ``"module:Wrapper"``, or
            ``{"wrapper": "module:Wrapper", **arguments}``. The modules are imported.
        pixels: what is seen in place of the state: size, grey, stack and look, see :class:`PixelEnvironment`.
        **kwargs: passed to :func:`gymnasium.make`.

    Raises:
        ConfigurationError: if the id is unknown, a package it needs is missing, an argument is not accepted, or the
            spaces are not supported (see :class:`GymnasiumEnv`); if its velocity cannot be limited; if a wrapper is
            none or cannot be made.

    Example:
        >>> env = make_env("Pendulum-v1", num_envs=2, seed=0)
        >>> env.rollout(5)["next", "reward"].shape
        torch.Size([2, 5, 1])
    """
    is_seen = isinstance(pixels, Mapping) and pixels.get("size") is not None
    others: dict[str, Any] = {"wrappers": find_wrappers(wrappers), "is_seen": is_seen}
    make = partial(_make_gymnasium, id, velocity_limit=velocity_limit, **others, **kwargs)
    return see_pixels(make, pixels, num_envs=num_envs, seed=seed, carry=carry, render_mode=render_mode)


def _make_gymnasium(
    id: str,
    *,
    num_envs: int,
    seed: int | None,
    carry: Sequence[str],
    render_mode: str | None,
    velocity_limit: float | str | None,
    wrappers: Sequence[Wrap],
    is_seen: bool,
    **kwargs,
) -> GymnasiumEnv:
    """``make_env`` of what observes its state; one that ``is_seen`` may observe images, which nobody looks at."""
    envs: list[gymnasium.Env] = []
    if render_mode is not None:  # an environment that draws nothing need not know the word
        kwargs["render_mode"] = render_mode
    if meta_world.is_meta_world(id):
        kwargs, wrappers = meta_world.ARGUMENTS | kwargs, [meta_world.SeededByReset, *wrappers]
    mujoco_warnings.send_to_logging()
    import_quietly(id)
    try:
        with quiet_connection(), default_dtype_kept(id):
            for _ in range(num_envs):
                env = gymnasium.make(id, disable_env_checker=True, **kwargs)
                envs.append(_Unobserved(env) if is_seen and has_images(env.observation_space) else env)
    except ConfigurationError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise ConfigurationError(
            f"environment {id!r} needs a package that is not installed: {error_line(error)}"
        ) from error
    except gymnasium.error.UnregisteredEnv as error:
        raise ConfigurationError(f"unknown environment id {id!r}{package(id) or closest(id)}") from error
    except ImportError as error:
        raise ConfigurationError(f"environment {id!r} cannot be imported: {error_line(error)}{package(id)}") from error
    except BaseException as error:  # whatever somebody's constructor may raise
        if not (isinstance(error, Exception) or is_exit(error)):
            raise
        raise ConfigurationError(
            f"environment {id!r} cannot be made with {kwargs}: {error_line(error, named=True)}{mend(id)}"
        ) from error
    envs = [reduce(lambda env, wrap: wrap(env), wrappers, env) for env in envs]
    if velocity_limit is None:
        return GymnasiumEnv(envs, seed=seed, carry=carry)
    cost = VelocityCost(id, velocity_limit)
    with one_line(id, "reset"):  # what it reports is known after a step, and should be known before a run
        envs[0].reset()
    with one_line(id, "step"):
        *_, info = envs[0].step(envs[0].action_space.sample())
    cost(info)
    return GymnasiumEnv(envs, seed=seed, carry=carry, cost=cost)


class _Unobserved(gymnasium.ObservationWrapper):
    """An environment of images, seen through its camera: what it observes itself is not copied."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)

    def observation(self, observation: Any) -> np.ndarray:
        return np.zeros(1, np.float32)


def _was_reset_by_mujoco(env: gymnasium.Env) -> bool:
    """Whether MuJoCo found a NaN, infinite or huge state and quietly went back to the initial one."""
    unwrapped: Any = env.unwrapped
    return is_mujoco(env) and bool(unwrapped.data.warning.number[_BAD_STATES].any())


def _shared_spaces(envs: Sequence[gymnasium.Env]) -> tuple[Box, gymnasium.Space]:
    """The action space and the observation space of all environments."""
    observed: Any = getattr(envs[0], "observation_space", None)
    acted: Any = getattr(envs[0], "action_space", None)
    check_action_space(acted, _name(envs[0]))
    if any((env.action_space, env.observation_space) != (acted, observed) for env in envs):
        raise ConfigurationError("all environments of a GymnasiumEnv must have the same spaces")
    return acted, observed


def _name(env: gymnasium.Env) -> str:
    return env.spec.id if env.spec is not None else str(env)
