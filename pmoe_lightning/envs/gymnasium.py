"""A batch of Gymnasium environments as one TorchRL environment, at about the speed of the bare Gymnasium loop.

TorchRL's generic wrapper spends several times the cost of a MuJoCo step on specs and bookkeeping. Here one TensorDict
is built per batched step, directly from NumPy arrays, and :meth:`GymnasiumEnv.step_and_maybe_reset` replaces the
generic machinery. Our collector does without that TensorDict too: :meth:`GymnasiumEnv.step_into`. A transform around
the environment would bypass both, so what a trainer needs from every step (float32 observations, episode return and
length) is computed inside.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.spaces.utils import flatten
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from pmoe_lightning.envs.contract import (
    check_action_space,
    check_observation,
    check_reset,
    check_step,
    one_line,
    one_number,
    vector_size,
    warn_of_lost_precision,
)
from pmoe_lightning.envs.packages import closest, package
from pmoe_lightning.envs.simulator_state import NotCaptured, capture, is_mujoco, restore
from pmoe_lightning.envs.velocity import VelocityCost
from pmoe_lightning.errors import ConfigurationError, NonFiniteError

__all__ = ["GymnasiumEnv", "carried_entries", "make_env", "with_memory"]

_log = logging.getLogger(__name__)
_FLAGS = ("done", "terminated", "truncated")
_TOTALS = ("episode_return", "episode_length")
_STEPPED = ("observation", "reward", *_FLAGS, *_TOTALS)
_COSTS = ("cost", "episode_cost")
_PREVIOUS = "_previous"
_RESETS = 10  # in a row, until an observation is finite
_NOT_A_VECTOR = (-1,)  # the shape of no array
_BAD_STATES = slice(3, 7)  # mjWARN_BADQPOS, BADQVEL, BADQACC and BADCTRL
_mujoco_breakdowns: list[str] = []  # what MuJoCo has said since this was last looked at
Arrays = Mapping[str, np.ndarray]


class GymnasiumEnv(EnvBase):
    """N Gymnasium environments with continuous actions, stepped together.

    Root keys: ``observation`` float32 [N, O], ``done``, ``terminated``, ``truncated`` bool [N, 1], and the running
    totals since the start of the episode, ``episode_return`` float32 [N, 1] and ``episode_length`` int64 [N, 1].
    ``next`` holds the same, the final totals where ``done`` is set, plus ``reward`` float32 [N, 1].
    ``done = terminated | truncated``. Where an episode ends, ``next`` holds its true last observation and the following
    root the first observation of the next episode.

    ``action`` is float32 [N, A] within the bounds of the Gymnasium space, which need not be +-1. Actions are clipped to
    these bounds on their way to the environment (the stored action is left as it is), so that float rounding in a
    squashed policy never reaches an environment that checks its input. Observations of any other kind than a flat
    vector are flattened as :class:`gymnasium.wrappers.FlattenObservation` does.

    Observations must be of the declared shape; all that the first reset and step of every environment return is
    checked. A reset whose observation is not finite is repeated, with the random numbers that come next.

    Where a simulator breaks down (an observation or reward that is not finite, a MuJoCo state that is NaN, infinite or
    huge), the episode is truncated, non-finite parts of ``next.observation`` become 0, and ``next.reward`` is NaN:
    such a transition is to be dropped, as this package's data modules do.

    With a ``cost``, ``next`` also holds ``cost`` float32 [N, 1] of the step, and its running total ``episode_cost``; so
    does every root, for the step that led to it.

    A policy with memory names in ``carry`` the integer entries [N, 1] that it writes and wants to read one step later.
    Every root then holds ``<name>_previous`` int64 [N, 1]: what the policy wrote in the step before, or -1 in the first
    step of an episode, and wherever nothing was written.

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
        super().__init__(device=None, batch_size=torch.Size([len(envs)]))
        self.envs = list(envs)
        action_space, self._observation_space = _shared_spaces(self.envs)
        size = vector_size(self._observation_space, _name(envs[0]))
        is_vector = isinstance(self._observation_space, Box) and len(self._observation_space.shape) == 1
        self._vector_shape = (size,) if is_vector else _NOT_A_VECTOR
        self._observation_shape = (len(envs), size)
        self._never_reset, self._never_stepped = set(range(len(envs))), set(range(len(envs)))
        self._action_low, self._action_high = action_space.low, action_space.high
        self._returns, self._lengths = [0.0] * len(envs), [0] * len(envs)
        self.cost, self._costs = cost, [0.0] * len(envs)
        self.carry = tuple(carry)
        self._carried = {name: f"{name}{_PREVIOUS}" for name in carry}
        totals = _TOTALS if cost is None else (*_TOTALS, *_COSTS)
        self._at_start = dict.fromkeys(totals, 0) | dict.fromkeys(self._carried.values(), -1)
        self._make_specs()
        self._set_seed(seed)

    def _make_specs(self) -> None:
        n = len(self.envs)

        def bound(values: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.float32).expand(n, -1).clone()

        low, high = bound(self._action_low), bound(self._action_high)
        flags = {key: Categorical(2, shape=(n, 1), dtype=torch.bool) for key in _FLAGS}
        carried = {key: Unbounded(shape=(n, 1), dtype=torch.int64) for key in self._carried.values()}
        # To TorchRL totals are observations, as those of its own RewardSum and StepCounter are: what stands in the
        # reward spec is summed, scaled and skipped by its transforms.
        self.observation_spec = Composite(
            observation=Unbounded(shape=self._observation_shape),
            episode_return=Unbounded(shape=(n, 1)),
            episode_length=Unbounded(shape=(n, 1), dtype=torch.int64),
            **{key: Unbounded(shape=(n, 1)) for key in _COSTS if self.cost is not None},
            **carried,
            shape=(n,),
        )
        self.action_spec = Bounded(low=low, high=high, shape=low.shape, dtype=torch.float32)
        self.reward_spec = Composite(reward=Unbounded(shape=(n, 1)), shape=(n,))
        self.full_done_spec = Composite(**flags, shape=(n,))

    def _set_seed(self, seed: int | None) -> None:
        self._seeds = [None if seed is None else seed + i for i in range(len(self.envs))]
        for env, env_seed in zip(self.envs, self._seeds, strict=True):
            if env_seed is not None:
                env.action_space.seed(env_seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        rows = range(len(self.envs)) if mask is None else mask.reshape(-1).nonzero().reshape(-1).tolist()
        # EnvBase.reset keeps the caller's values in the rows outside the mask.
        root = self.empty_root()
        self._start_episodes(root, rows)
        return self._tensordict(root)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        outcome = self.empty_outcome()
        self._step_envs(*self._read(tensordict), outcome)
        return self._tensordict(outcome)

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """Step all environments, write ``next``, reset those that are done; returns (the input, the next root)."""
        outcome, root = self.empty_outcome(), self.empty_root()
        self.step_into(*self._read(tensordict), outcome, root)
        # Unchecked like the constructor below, and for the same reason.
        following = self._tensordict(outcome)
        tensordict._set_str("next", following, validated=True, inplace=False, non_blocking=False)
        return tensordict, self._tensordict(root)

    def step_into(self, action: np.ndarray, carried: Arrays, outcome: Arrays, root: Arrays) -> None:
        """``step_and_maybe_reset`` on NumPy arrays that the caller owns, for whoever stores every step anyway.

        Args:
            action: [N, A].
            carried: what the policy wrote under the names of ``carry``; nothing after a random action.
            outcome: as made by ``empty_outcome``; the entries of ``next`` are written here.
            root: as made by ``empty_root``; the next root is written here, with new episodes where any have ended.
        """
        ended = self._step_envs(action, carried, outcome)
        root["observation"][...] = outcome["observation"]
        for key in self._at_start:
            root[key][...] = outcome[key]
        if ended:
            self._start_episodes(root, ended)

    def empty_root(self, *steps: int) -> dict[str, np.ndarray]:
        """Arrays [*steps, N, ...] for the entries of a root, before anything is observed."""
        n = len(self.envs)
        arrays = {"observation": _aligned((*steps, *self._observation_shape), torch.float32)}
        arrays |= zip(_FLAGS, np.zeros((3, *steps, n, 1), np.bool_), strict=True)
        arrays["episode_return"] = np.zeros((*steps, n, 1), np.float32)
        arrays["episode_length"] = np.zeros((*steps, n, 1), np.int64)
        if self.cost is not None:
            arrays |= zip(_COSTS, np.zeros((2, *steps, n, 1), np.float32), strict=True)
        return arrays | {key: np.full((*steps, n, 1), -1, np.int64) for key in self._carried.values()}

    def empty_outcome(self, *steps: int) -> dict[str, np.ndarray]:
        """Arrays [*steps, N, ...] for the entries of ``next``, before anything has happened."""
        arrays = self.empty_root(*steps)
        arrays["reward"] = _aligned((*steps, len(self.envs), 1), torch.float32)
        return arrays

    def _read(self, tensordict: TensorDictBase) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The action and what the policy wrote under the names of ``carry``; random actions come without it."""
        written = {name: tensordict.get(name, None) for name in self._carried}
        carried = {name: value.numpy(force=True) for name, value in written.items() if value is not None}
        return tensordict.get("action").numpy(force=True), carried

    def _step_envs(self, action: np.ndarray, carried: Arrays, outcome: Arrays) -> list[int]:
        """Step all environments into ``outcome``; returns those whose episodes ended."""
        if not np.isfinite(action).all():  # before the bounds make an infinite one harmless here, but not in replay
            i = int(np.flatnonzero(~np.isfinite(action).all(-1))[0])
            raise NonFiniteError(f"the policy's action for environment {i} is not finite: {action[i].tolist()}")
        actions = np.minimum(np.maximum(action, self._action_low), self._action_high)
        observation, reward, done, terminated, truncated, episode_return, episode_length = (
            outcome[key] for key in _STEPPED
        )
        ended, never_stepped, shape = [], self._never_stepped, self._vector_shape
        # Scalar by scalar, because one NumPy operation costs as much as a dozen assignments.
        for i, env in enumerate(self.envs):
            stepped = self._first_step(i, actions[i]) if i in never_stepped else env.step(actions[i])
            observed, value, ends, is_cut, info = stepped
            observation[i] = observed if getattr(observed, "shape", None) == shape else self._flat(i, observed)
            value = float(value) if isinstance(value, float) else one_number(value, _name(env))
            ends, is_cut = bool(ends), bool(is_cut)
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
        if _mujoco_breakdowns or not (np.isfinite(observation).all() and np.isfinite(reward).all()):
            ended = self._contain_breakdowns(outcome)
        for name, value in carried.items():
            outcome[self._carried[name]][...] = value
        return ended

    def _contain_breakdowns(self, outcome: Arrays) -> list[int]:
        """End the episodes of simulators that broke down, and mark their transitions; returns all that ended."""
        broken = ~(np.isfinite(outcome["observation"]).all(-1) & np.isfinite(outcome["reward"][:, 0]))
        _mujoco_breakdowns.clear()
        for i, env in enumerate(self.envs):
            broken[i] |= _was_reset_by_mujoco(env)
        for i in np.flatnonzero(broken):
            name, steps = _name(self.envs[i]), self._lengths[i]
            _log.warning("the simulator of %s broke down after %d steps: the episode is truncated", name, steps)
        outcome["observation"][broken] = np.nan_to_num(outcome["observation"][broken], nan=0.0, posinf=0.0, neginf=0.0)
        outcome["terminated"][broken], outcome["truncated"][broken], outcome["done"][broken] = False, True, True
        outcome["reward"][broken] = np.nan
        outcome["episode_return"][broken] = np.nan_to_num(outcome["episode_return"][broken])
        return np.flatnonzero(outcome["done"][:, 0]).tolist()

    def _start_episodes(self, root: Arrays, rows: Iterable[int]) -> None:
        for i in rows:
            self._reset_env(i, root["observation"][i])
            self._returns[i], self._lengths[i], self._costs[i] = 0.0, 0, 0.0
            for key, value in self._at_start.items():
                root[key][i] = value

    def _reset_env(self, i: int, observation: np.ndarray) -> None:
        """Start an episode of one environment, and write the first observation that is finite."""
        env, name = self.envs[i], _name(self.envs[i])
        for resets in range(_RESETS):
            with one_line(name, "reset") if i in self._never_reset else nullcontext():
                result = env.reset(seed=self._seeds[i])
                check_reset(self._observation_space, result, name)
            self._never_reset.discard(i)
            self._seeds[i] = None  # later episodes continue the environment's own random stream
            warn_of_lost_precision(self._observation_space, result[0], name)
            observation[...] = self._flat(i, result[0])
            if np.isfinite(observation).all():
                if resets:
                    _log.warning("%s was reset %d times until its observation was finite", name, resets + 1)
                return
        entry = int(np.flatnonzero(~np.isfinite(observation))[0])
        raise NonFiniteError(
            f"environment {name!r}: entry {entry} of the observation is {observation[entry]} after each of {_RESETS} "
            "resets in a row: mend the environment, or what it is made with"
        )

    def _first_step(self, i: int, action: np.ndarray) -> tuple:
        name = _name(self.envs[i])
        with one_line(name, "step"):
            result = self.envs[i].step(action)
            check_step(self._observation_space, result, name)
        warn_of_lost_precision(self._observation_space, result[0], name)
        self._never_stepped.discard(i)
        return result

    def _flat(self, i: int, observed: Any) -> Any:
        """A checked observation as a vector."""
        check_observation(self._observation_space, observed, _name(self.envs[i]))
        return flatten(self._observation_space, observed) if self._vector_shape == _NOT_A_VECTOR else observed

    def _tensordict(self, arrays: Arrays) -> TensorDict:
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        if self.device is not None and self.device.type != "cpu":
            tensors = {key: tensor.to(self.device) for key, tensor in tensors.items()}
        # The checked constructor costs as much as a MuJoCo step; here shapes and device are right by construction.
        return TensorDict._new_unsafe(tensors, batch_size=self.batch_size, device=self.device)

    @property
    def is_mujoco(self) -> bool:
        """Whether MuJoCo simulates all of the environments."""
        return all(is_mujoco(env) for env in self.envs)

    def simulator_state(self) -> dict[str, Any]:
        """Everything the next step depends on, as plain values and tensors; see :mod:`.simulator_state`."""
        episodes = {"returns": list(self._returns), "lengths": list(self._lengths), "seeds": list(self._seeds)}
        if self.cost is not None:
            episodes["costs"] = list(self._costs)
        try:
            return {"simulators": capture(self.envs), **episodes}
        except NotCaptured as reason:
            return {"not_captured": f"{reason}, which cannot be captured", **episodes}

    def load_simulator_state(self, state: dict[str, Any]) -> str | None:
        """Go on where :meth:`simulator_state` was taken.

        Returns:
            why that is not possible, where the environments must be reset: one line. None where it is.
        """
        self._returns, self._lengths = list(state["returns"]), list(state["lengths"])
        if self.cost is not None:
            self._costs = list(state["costs"])
        try:
            if "not_captured" in state:
                raise NotCaptured(state["not_captured"])
            restore(self.envs, state.get("simulators", {}))
        except NotCaptured as reason:
            # Neither episodes that have been seen, nor others each time that the same run is resumed.
            self._seeds = torch.randint(1 << 31, (len(self.envs),)).tolist()
            return f"environment {_name(self.envs[0])} starts a new episode: {reason}"
        self._seeds = list(state["seeds"])
        return None

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close every Gymnasium environment."""
        super().close(raise_if_closed=raise_if_closed)
        for env in self.envs:
            env.close()


def carried_entries(policy: TensorDictModuleBase) -> list[str]:
    """The entries that a policy reads again one step later: ``carry`` of its environment, empty without memory."""
    return [key.removesuffix(_PREVIOUS) for key in policy.in_keys if str(key).endswith(_PREVIOUS)]


def with_memory(make_env: Callable[..., EnvBase], policy: TensorDictModuleBase) -> Callable[..., EnvBase]:
    """``make_env``, with the ``carry`` that the policy needs; unchanged for a policy without memory."""
    carry = carried_entries(policy)
    return partial(make_env, carry=carry) if carry else make_env


def make_env(
    id: str,
    *,
    num_envs: int = 1,
    seed: int | None = None,
    render_mode: str | None = None,
    carry: Sequence[str] = (),
    velocity_limit: float | str | None = None,
    **kwargs,
) -> GymnasiumEnv:
    """Make a batch of one registered Gymnasium environment.

    Args:
        id: Gymnasium id, such as ``"HalfCheetah-v5"`` (``"module:Name-v0"`` imports ``module`` first).
        num_envs: number of environments stepped together.
        seed: environment i receives ``seed + i`` at its first reset.
        render_mode: as in :func:`gymnasium.make`.
        carry: entries of the policy handed on to its next step, see :class:`GymnasiumEnv`.
        velocity_limit: in m/s, or ``published``: steps that are faster cost 1, see :class:`VelocityCost`.
        **kwargs: passed to :func:`gymnasium.make`.

    Raises:
        ConfigurationError: if the id is unknown, a package it needs is missing, an argument is not accepted, or the
            spaces are not supported (see :class:`GymnasiumEnv`); if its velocity cannot be limited.

    Example:
        >>> env = make_env("Pendulum-v1", num_envs=2, seed=0)
        >>> env.rollout(5)["next", "reward"].shape
        torch.Size([2, 5, 1])
    """
    envs: list[gymnasium.Env] = []
    if render_mode is not None:  # an environment that draws nothing need not know the word
        kwargs["render_mode"] = render_mode
    _send_mujoco_warnings_to_logging()
    try:
        for _ in range(num_envs):
            envs.append(gymnasium.make(id, disable_env_checker=True, **kwargs))
    except gymnasium.error.DependencyNotInstalled as error:
        raise ConfigurationError(f"environment {id!r} needs a package that is not installed: {_line(error)}") from error
    except gymnasium.error.UnregisteredEnv as error:
        raise ConfigurationError(f"unknown environment id {id!r}{package(id) or closest(id)}") from error
    except ImportError as error:
        raise ConfigurationError(f"environment {id!r} cannot be imported: {_line(error)}{package(id)}") from error
    except Exception as error:  # whatever somebody's constructor may raise
        reason = f"{type(error).__name__}: {_line(error)}"
        raise ConfigurationError(f"environment {id!r} cannot be made with {kwargs}: {reason}") from error
    if velocity_limit is None:
        return GymnasiumEnv(envs, seed=seed, carry=carry)
    cost = VelocityCost(id, velocity_limit)
    with one_line(id, "reset"):  # what it reports is known after a step, and should be known before a run
        envs[0].reset()
    with one_line(id, "step"):
        *_, info = envs[0].step(envs[0].action_space.sample())
    cost(info)
    return GymnasiumEnv(envs, seed=seed, carry=carry, cost=cost)


def _send_mujoco_warnings_to_logging() -> None:
    """Else they go to stderr past Python, and into a MUJOCO_LOG.TXT in whatever folder the process runs in."""
    try:
        import mujoco
    except ImportError:
        return
    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(_log_mujoco_warning)


def _aligned(shape: Sequence[int], dtype: torch.dtype) -> np.ndarray:
    """An array that begins on a cache line, as every tensor does, and as NumPy's do or do not from run to run.

    On some processors the last bit of a matrix product depends on that; a resumed run must not.
    """
    return torch.empty(*shape, dtype=dtype).numpy()


def _was_reset_by_mujoco(env: gymnasium.Env) -> bool:
    """Whether MuJoCo found a NaN, infinite or huge state and quietly went back to the initial one."""
    return is_mujoco(env) and bool(env.unwrapped.data.warning.number[_BAD_STATES].any())


def _log_mujoco_warning(message: str) -> None:
    if "simulation is unstable" in message:
        _mujoco_breakdowns.append(message)
    # Gymnasium's own models use compiler attributes that MuJoCo is about to drop: nothing a user can mend.
    _log.log(logging.DEBUG if "is deprecated" in message else logging.WARNING, "MuJoCo: %s", message)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _shared_spaces(envs: Sequence[gymnasium.Env]) -> tuple[Box, gymnasium.Space]:
    """The action space and the observation space of all environments."""
    observed, acted = (getattr(envs[0], name, None) for name in ("observation_space", "action_space"))
    check_action_space(acted, _name(envs[0]))
    if any((env.action_space, env.observation_space) != (acted, observed) for env in envs):
        raise ConfigurationError("all environments of a GymnasiumEnv must have the same spaces")
    return acted, observed


def _name(env: gymnasium.Env) -> str:
    return env.spec.id if env.spec is not None else str(env)
