"""What a run, an evaluation and a film need of an environment, whatever simulates it."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from pmoe_lightning.envs.object_parts import NotCaptured
from pmoe_lightning.envs.rendering import Scene
from pmoe_lightning.errors import NonFiniteError, RunError, is_exit

__all__ = ["AbstractEnvironment", "Entry", "NotCaptured", "carried_entries", "with_memory"]

_log = logging.getLogger(__name__)
_FLAGS = ("done", "terminated", "truncated")
_TOTALS = ("episode_return", "episode_length")
_COSTS = ("cost", "episode_cost")
_PREVIOUS = "_previous"
_RESETS = 10  # in a row, until an observation is finite
Arrays = Mapping[str, np.ndarray]


class Entry(NamedTuple):
    """One entry of a root: its shape behind the environments, and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class AbstractEnvironment(EnvBase):
    """N simulated environments with continuous actions, stepped together: the whole of what other parts ask of them.

    Root keys: ``observation`` float32 [N, O], or in its place the entry that ``observed`` names; ``done``,
    ``terminated``, ``truncated`` bool [N, 1]; and the running totals since the start of the episode, ``episode_return``
    float32 [N, 1] and ``episode_length`` int64 [N, 1].
    ``next`` holds the same, the final totals where ``done`` is set, plus ``reward`` float32 [N, 1].
    ``done = terminated | truncated``. Where an episode ends, ``next`` holds its true last observation and the following
    root the first observation of the next episode.

    ``action`` is float32 [N, A] within the bounds of the environment, which need not be +-1. Actions are clipped to
    these bounds on their way to the simulator (the stored action is left as it is), so that float rounding in a
    squashed policy never reaches a simulator that checks its input.

    A reset whose observation is not finite is repeated, with the random numbers that come next. Where a simulator
    breaks down (an observation or reward that is not finite), the episode is truncated, non-finite parts of
    ``next.observation`` become 0, and ``next.reward`` is NaN: such a transition is to be dropped, as this package's
    data modules do.

    With ``has_cost``, ``next`` also holds ``cost`` float32 [N, 1] of the step, and its running total ``episode_cost``;
    so does every root, for the step that led to it.

    A policy with memory names in ``carry`` the integer entries [N, 1] that it writes and wants to read one step later.
    Every root then holds ``<name>_previous`` int64 [N, 1]: what the policy wrote in the step before, or -1 in the first
    step of an episode, and wherever nothing was written.

    A simulator is one subclass: :meth:`_begin` and :meth:`_simulate`; :meth:`_capture` and :meth:`_restore` if its
    runs are to be resumed in the middle of an episode; :meth:`picture` and ``seconds_per_step`` for films and
    :meth:`picture` or :meth:`scene` for pixels (``envs.pixels``). What makes
    it, ``_target_`` of a file in ``conf/env``, is called with ``id``, ``num_envs``, ``seed`` and the other values of
    that file; for a policy with memory with ``carry``, and for a film with ``render_mode="rgb_array"``.

    Attributes:
        name: what messages call it.
        entries: of every root, by key.
        observed: the key of what is observed.
        is_mujoco: whether MuJoCo simulates, whose breakdowns never end a run.
        ended_in: of every environment, the mode in which its last episode ended, -1 for none (``envs.modes``); a
            simulator that names modes writes it.

    Args:
        num_envs: N.
        observation_dim: O, where vectors are observed.
        low, high: bounds of the action, [A].
        name: as above.
        seed: environment i receives ``seed + i`` at its first reset (None: nondeterministic).
        carry: entries handed on to the next step.
        has_cost: whether steps have a cost.
        observed: another entry in place of ``observation``, such as ``("pixels", Entry((9, 84, 84), torch.uint8))``.

    Raises:
        NonFiniteError: when stepped with an action that is not finite, or reset in vain.
    """

    is_mujoco: bool = False

    def __init__(
        self,
        *,
        num_envs: int,
        observation_dim: int = 0,
        low: np.ndarray,
        high: np.ndarray,
        name: str,
        seed: int | None = None,
        carry: Sequence[str] = (),
        has_cost: bool = False,
        observed: tuple[str, Entry] | None = None,
    ) -> None:
        super().__init__(device=None, batch_size=torch.Size([num_envs]))
        self.name = name
        self._action_low, self._action_high = low, high
        self._returns, self._lengths, self._costs = [0.0] * num_envs, [0] * num_envs, [0.0] * num_envs
        self._has_cost = has_cost
        self.ended_in = [-1] * num_envs
        self.carry = tuple(carry)
        self._carried = {name: f"{name}{_PREVIOUS}" for name in carry}
        number, count, flag = (Entry((1,), dtype) for dtype in (torch.float32, torch.int64, torch.bool))
        self.observed, entry = observed or ("observation", Entry((observation_dim,), torch.float32))
        self.entries = {self.observed: entry}
        self.entries |= dict.fromkeys(_FLAGS, flag) | dict(zip(_TOTALS, (number, count), strict=True))
        self.entries |= dict.fromkeys(_COSTS if has_cost else (), number) | dict.fromkeys(self._carried.values(), count)
        totals = (*_TOTALS, *_COSTS) if has_cost else _TOTALS
        self._at_start = dict.fromkeys(totals, 0) | dict.fromkeys(self._carried.values(), -1)
        self._make_specs()
        AbstractEnvironment._set_seed(self, seed)  # what a subclass seeds is not there yet

    # -- what a simulator does -----------------------------------------------------------------------------------------
    @abstractmethod
    def _begin(self, i: int, seed: int | None, observation: np.ndarray) -> None:
        """Start an episode of environment i and write its first observation [O].

        With a ``seed`` everything random in it, and in those that follow, comes from there; without one its random
        numbers go on.
        """

    @abstractmethod
    def _simulate(self, action: np.ndarray, outcome: Arrays) -> list[int]:
        """Step all environments by actions [N, A] within the bounds.

        Writes ``observation``, ``reward``, ``terminated`` and ``truncated``, with a cost also ``cost``, and returns
        :meth:`_count`.
        """

    def _capture(self) -> Any:
        """Everything the next step depends on, as plain values and tensors.

        Raises:
            NotCaptured: what cannot be captured, and the run that goes on starts a new episode.
        """
        raise NotCaptured("does not say its state", self.name)

    def _restore(self, state: Any) -> None:
        """Go on where :meth:`_capture` was called.

        Raises:
            NotCaptured: that is not possible here.
        """
        raise NotCaptured("does not say its state", self.name)

    @property
    def task(self) -> Any:
        """What may name its modes, see ``envs.modes``."""
        return self

    @property
    def seconds_per_step(self) -> float:
        """Simulated seconds of a step."""
        return 1 / 30

    def picture(self) -> np.ndarray:
        """Environment 0 as it is now, [height, width, 3] of bytes.

        Raises:
            RunError: this machine or environment cannot draw; says what to do.
        """
        raise RunError(f"environment {self.name} cannot render to arrays")

    def scene(self) -> Scene | None:
        """What MuJoCo draws of environment 0, for pictures of any size; None: it is drawn by :meth:`picture` alone."""
        return None

    # -- what others ask -----------------------------------------------------------------------------------------------
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
        root[self.observed][...] = outcome[self.observed]
        for key in self._at_start:
            root[key][...] = outcome[key]
        if ended:
            self._start_episodes(root, ended)

    def empty_root(self, *steps: int) -> dict[str, np.ndarray]:
        """Arrays [*steps, N, ...] for the entries of a root, before anything is observed."""
        n = self.batch_size[0]
        shape, dtype = self.entries[self.observed]
        arrays = {self.observed: _aligned((*steps, n, *shape), dtype)}
        arrays |= zip(_FLAGS, np.zeros((3, *steps, n, 1), np.bool_), strict=True)
        arrays["episode_return"] = np.zeros((*steps, n, 1), np.float32)
        arrays["episode_length"] = np.zeros((*steps, n, 1), np.int64)
        if self._has_cost:
            arrays |= zip(_COSTS, np.zeros((2, *steps, n, 1), np.float32), strict=True)
        return arrays | {key: np.full((*steps, n, 1), -1, np.int64) for key in self._carried.values()}

    def empty_outcome(self, *steps: int) -> dict[str, np.ndarray]:
        """Arrays [*steps, N, ...] for the entries of ``next``, before anything has happened."""
        arrays = self.empty_root(*steps)
        arrays["reward"] = _aligned((*steps, self.batch_size[0], 1), torch.float32)
        return arrays

    def simulator_state(self) -> dict[str, Any]:
        """Everything the next step depends on, as plain values and tensors, or why that cannot be captured."""
        episodes = {"returns": list(self._returns), "lengths": list(self._lengths), "seeds": list(self._seeds)}
        if self._has_cost:
            episodes["costs"] = list(self._costs)
        try:
            return {"simulators": self._capture(), **episodes}
        except NotCaptured as reason:
            return {"not_captured": f"{reason}, which cannot be captured", **episodes}

    def load_simulator_state(self, state: dict[str, Any]) -> str | None:
        """Go on where :meth:`simulator_state` was taken.

        Returns:
            why that is not possible, where the environments must be reset: one line. None where it is.
        """
        self._returns, self._lengths = list(state["returns"]), list(state["lengths"])
        if self._has_cost:
            self._costs = list(state["costs"])
        try:
            if "not_captured" in state:
                raise NotCaptured(state["not_captured"])
            self._restore(state.get("simulators", {}))
        except NotCaptured as reason:
            # Neither episodes that have been seen, nor others each time that the same run is resumed.
            self._seeds = torch.randint(1 << 31, (self.batch_size[0],)).tolist()
            return f"environment {self.name} starts a new episode: {reason}"
        self._seeds = list(state["seeds"])
        return None

    # -- TorchRL's ways to it ------------------------------------------------------------------------------------------
    def _make_specs(self) -> None:
        n = self.batch_size[0]

        def bound(values: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.float32).expand(n, -1).clone()

        low, high = bound(self._action_low), bound(self._action_high)
        flags = {key: Categorical(2, shape=(n, 1), dtype=torch.bool) for key in _FLAGS}
        # To TorchRL totals are observations, as those of its own RewardSum and StepCounter are: what stands in the
        # reward spec is summed, scaled and skipped by its transforms.
        observed = {key: entry for key, entry in self.entries.items() if key not in _FLAGS}
        self.observation_spec = Composite(
            {key: Unbounded(shape=(n, *entry.shape), dtype=entry.dtype) for key, entry in observed.items()}, shape=(n,)
        )
        self.action_spec = Bounded(low=low, high=high, shape=low.shape, dtype=torch.float32)
        self.reward_spec = Composite(reward=Unbounded(shape=(n, 1)), shape=(n,))
        self.full_done_spec = Composite(**flags, shape=(n,))

    def _set_seed(self, seed: int | None) -> None:
        self._seeds = [None if seed is None else seed + i for i in range(self.batch_size[0])]

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        rows = range(self.batch_size[0]) if mask is None else mask.reshape(-1).nonzero().reshape(-1).tolist()
        # EnvBase.reset keeps the caller's values in the rows outside the mask.
        root = self.empty_root()
        self._start_episodes(root, rows)
        return self._tensordict(root)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        outcome = self.empty_outcome()
        self._step_envs(*self._read(tensordict), outcome)
        return self._tensordict(outcome)

    def _read(self, tensordict: TensorDictBase) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The action and what the policy wrote under the names of ``carry``; random actions come without it."""
        written = {name: tensordict.get(name, None) for name in self._carried}
        carried = {name: value.numpy(force=True) for name, value in written.items() if value is not None}
        return tensordict.get("action").numpy(force=True), carried

    def _tensordict(self, arrays: Arrays) -> TensorDict:
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        if self.device is not None and self.device.type != "cpu":
            tensors = {key: tensor.to(self.device) for key, tensor in tensors.items()}
        # The checked constructor costs as much as a MuJoCo step; here shapes and device are right by construction.
        return TensorDict._new_unsafe(tensors, batch_size=self.batch_size, device=self.device)

    # -- the rules of an episode ---------------------------------------------------------------------------------------
    def _step_envs(self, action: np.ndarray, carried: Arrays, outcome: Arrays) -> list[int]:
        """Step all environments into ``outcome``; returns those whose episodes ended."""
        if not np.isfinite(action).all():  # before the bounds make an infinite one harmless here, but not in replay
            i = int(np.flatnonzero(~np.isfinite(action).all(-1))[0])
            raise NonFiniteError(f"the policy's action for environment {i} is not finite: {action[i].tolist()}")
        bounded = np.minimum(np.maximum(action, self._action_low), self._action_high)
        try:
            ended = self._simulate(bounded, outcome)
        except SystemExit as ending:
            self._refuse_exit(ending)
        if self._may_have_broken_down(outcome):
            ended = self._contain_breakdowns(outcome)
        for name, value in carried.items():
            outcome[self._carried[name]][...] = value
        return ended

    def _refuse_exit(self, ending: SystemExit) -> NoReturn:
        """In the middle of a run ``sys.exit()`` would end it as if it were done."""
        if not is_exit(ending):
            raise ending
        raise RunError(f"environment {self.name!r} called sys.exit({ending.code!r})") from ending

    def _count(self, outcome: Arrays) -> list[int]:
        """Write ``done`` and the totals of the episodes; returns the environments whose episodes ended."""
        outcome["done"][...] = outcome["terminated"] | outcome["truncated"]
        for i, reward in enumerate(outcome["reward"][:, 0].tolist()):
            self._returns[i] += reward
            self._lengths[i] += 1
            if self._has_cost:
                self._costs[i] += float(outcome["cost"][i, 0])
        outcome["episode_return"][:, 0], outcome["episode_length"][:, 0] = self._returns, self._lengths
        if self._has_cost:
            outcome["episode_cost"][:, 0] = self._costs
        return np.flatnonzero(outcome["done"][:, 0]).tolist()

    def _may_have_broken_down(self, outcome: Arrays) -> bool:
        return not (np.isfinite(outcome["observation"]).all() and np.isfinite(outcome["reward"]).all())

    def _broken_down(self, outcome: Arrays) -> np.ndarray:
        """Which environments' simulators broke down, [N]."""
        return ~(np.isfinite(outcome["observation"]).all(-1) & np.isfinite(outcome["reward"][:, 0]))

    def _contain_breakdowns(self, outcome: Arrays) -> list[int]:
        """End the episodes of simulators that broke down, and mark their transitions; returns all that ended."""
        broken = self._broken_down(outcome)
        for i in np.flatnonzero(broken):
            steps = self._lengths[i]
            _log.warning("the simulator of %s broke down after %d steps: the episode is truncated", self.name, steps)
            self.ended_in[i] = -1
        outcome["observation"][broken] = np.nan_to_num(outcome["observation"][broken], nan=0.0, posinf=0.0, neginf=0.0)
        outcome["terminated"][broken], outcome["truncated"][broken], outcome["done"][broken] = False, True, True
        outcome["reward"][broken] = np.nan
        outcome["episode_return"][broken] = np.nan_to_num(outcome["episode_return"][broken])
        return np.flatnonzero(outcome["done"][:, 0]).tolist()

    def _start_episodes(self, root: Arrays, rows: Iterable[int]) -> None:
        for i in rows:
            self._start_episode(i, root[self.observed][i])
            self._returns[i], self._lengths[i], self._costs[i] = 0.0, 0, 0.0
            for key, value in self._at_start.items():
                root[key][i] = value

    def _start_episode(self, i: int, observation: np.ndarray) -> None:
        """Start an episode of one environment, and write the first observation that is finite."""
        for resets in range(_RESETS):
            try:
                self._begin(i, self._seeds[i], observation)
            except SystemExit as ending:
                self._refuse_exit(ending)
            self._seeds[i] = None  # later episodes continue the environment's own random stream
            if np.isfinite(observation).all():
                if resets:
                    _log.warning("%s was reset %d times until its observation was finite", self.name, resets + 1)
                return
        entry = int(np.flatnonzero(~np.isfinite(observation))[0])
        raise NonFiniteError(
            f"environment {self.name!r}: entry {entry} of the observation is {observation[entry]} after each of "
            f"{_RESETS} resets in a row: mend the environment, or what it is made with"
        )


def carried_entries(policy: TensorDictModuleBase) -> list[str]:
    """The entries that a policy reads again one step later: ``carry`` of its environment, empty without memory."""
    return [key.removesuffix(_PREVIOUS) for key in policy.in_keys if str(key).endswith(_PREVIOUS)]


def with_memory(make_env: Callable[..., EnvBase], policy: TensorDictModuleBase) -> Callable[..., EnvBase]:
    """``make_env``, with the ``carry`` that the policy needs; unchanged for a policy without memory."""
    carry = carried_entries(policy)
    return partial(make_env, carry=carry) if carry else make_env


def _aligned(shape: Sequence[int], dtype: torch.dtype) -> np.ndarray:
    """An array that begins on a cache line, as every tensor does, and as NumPy's do or do not from run to run.

    On some processors the last bit of a matrix product depends on that; a resumed run must not.
    """
    return torch.empty(*shape, dtype=dtype).numpy()
