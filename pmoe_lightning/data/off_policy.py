"""Replay data for off-policy learning: collected transitions go to a buffer, updates draw from it at a fixed ratio."""

import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import EnvBase

from pmoe_lightning.checkpoints.blocks import FOLDER, remove_unnamed
from pmoe_lightning.data.collection import CollectedData, Source, round_up
from pmoe_lightning.data.frames import FrameStore, check_memory, pictures_of, random_shift
from pmoe_lightning.data.n_step import NStepTransitions
from pmoe_lightning.errors import ConfigurationError, NonFiniteError
from pmoe_lightning.limits import Limit, NonNegativeInt, Of, PositiveFloat, PositiveInt, checked
from pmoe_lightning.modules.normalization import ObservationNormalizer

__all__ = ["OffPolicyData", "Pictures"]

_log = logging.getLogger(__name__)
Shift = Annotated[int, Limit(low=0, high=16)]

_NEXT_KEYS = ("observation", "reward", "done", "terminated", "truncated")
_KEYS = ("observation", "action", *(("next", key) for key in _NEXT_KEYS))
_COST = ("next", "cost")


class Pictures(NamedTuple):
    """What a buffer must know of environments that show pixels."""

    shape: tuple[int, ...]
    """Of an observation, [S C, H, W]."""
    stack: int
    """S: the pictures in it."""
    folder: Path | None = None
    """Of the checkpoints, which then name the pictures (``checkpoints.blocks``); None: they hold them."""


class OffPolicyData(CollectedData):
    """Yields stacks of U minibatches [U, B] drawn uniformly from a replay buffer, U being the updates owed.

    Every frame owes ``utd_ratio`` updates; fractions are carried over exactly, and while none is owed the loader
    collects on. Warm-up: until the buffer was given ``init_random_frames`` transitions no updates are owed, and in a
    fresh run these frames take uniformly random actions. Warm-up frames are counted in ``env_frames``; they never owe
    updates later. The warm-up is made of whole iterations, that is, rounded up to a multiple of ``frames_per_batch``.

    With P processes each has a buffer of its own, a P-th of ``buffer_size``, and draws a P-th of every minibatch.

    A minibatch holds observation [O], action [A] and next: observation [O], reward [1], done [1], terminated [1],
    truncated [1], and cost [1] where the environment writes it. ``next.observation`` is the true last observation where
    an episode ended. With ``n_step`` above 1 it also holds ``steps_to_next_obs`` [1], reward and cost are discounted
    sums over these steps, and the rest of next is that of the last of them (``n_step.NStepTransitions``). With a
    ``normalizer``, which the policy must contain, every rollout enters its statistics, and minibatches hold
    ``observation_normalized`` and next.observation_normalized by the newest ones.

    With ``pictures`` it holds ``pixels`` [S C, H, W] in place of both observations, each moved by up to
    ``random_shift`` pixels, drawn anew every time. The buffer stores every picture once (``frames.FrameStore``); where
    an episode ends there is one more than transitions, and so many fewer transitions fit.

    The buffer lies on the policy's device and holds at most ``buffer_size`` transitions, or all of the run if that is
    fewer.

    Args: as :class:`pmoe_lightning.data.collection.CollectedData`, and
        init_random_frames: frames of the warm-up.
        buffer_size: capacity of the replay buffer, in transitions.
        batch_size: B, with one process.
        utd_ratio: updates per environment frame after the warm-up.
        n_step: the most steps of a transition.
        gamma, cost_gamma: discounts of reward and cost per step, where there are several.
        random_shift: the most pixels by which observations of pixels are moved, either way.
        normalizer: the one inside ``policy``, or None.
        pictures: of environments that show pixels.

    Attributes:
        planned_minibatches: about how many the whole run will draw.

    Raises:
        ConfigurationError: also if a number is out of range, or the warm-up does not fit into the run or the buffer.
    """

    on_policy = False

    @checked
    def __init__(
        self,
        make_env: Callable[..., EnvBase],
        policy: TensorDictModuleBase,
        *,
        total_frames: int,
        frames_per_batch: PositiveInt = 16,
        num_envs: PositiveInt = 1,
        init_random_frames: NonNegativeInt = 1000,
        buffer_size: PositiveInt = 1_000_000,
        batch_size: PositiveInt = 256,
        utd_ratio: PositiveFloat = 1.0,
        n_step: PositiveInt = 1,
        gamma: float = 0.99,
        cost_gamma: float | None = None,
        random_shift: Shift = 4,
        normalizer: ObservationNormalizer | None = None,
        pictures: Pictures | None = None,
        **arguments: Annotated[Any, Of(CollectedData)],
    ) -> None:
        super().__init__(
            make_env,
            policy,
            total_frames=total_frames,
            frames_per_batch=frames_per_batch,
            num_envs=num_envs,
            **arguments,
        )
        capacity = min(buffer_size, round_up(total_frames, frames_per_batch))
        self.warm_up = round_up(init_random_frames, frames_per_batch)
        if self.warm_up >= total_frames:
            raise ConfigurationError(
                f"data.init_random_frames={init_random_frames} leaves nothing of total_frames={total_frames} "
                "to train on: lower it"
            )
        self.planned_minibatches = (total_frames - init_random_frames) * utd_ratio
        self.utd_ratio = Fraction(utd_ratio).limit_denominator(1_000_000)
        learned_from = round_up(total_frames, frames_per_batch) - self.warm_up
        if learned_from * self.utd_ratio < 1:
            raise ConfigurationError(
                f"data.utd_ratio={utd_ratio} owes no update for the {learned_from} frames after the warm-up: raise it, "
                f"or total_frames={total_frames}"
            )
        if max(self.warm_up, frames_per_batch) > capacity:
            raise ConfigurationError(
                f"data.buffer_size={buffer_size} must hold at least data.init_random_frames={init_random_frames} "
                f"and data.frames_per_batch={frames_per_batch}"
            )
        self.capacity, self.batch_size = capacity, batch_size
        self.n_step = NStepTransitions(n_step, gamma, cost_gamma) if n_step > 1 else None
        self.normalizer, self.pictures, self.random_shift = normalizer, pictures, random_shift
        if pictures is not None:
            number = pictures_of(buffer_size, round_up(total_frames, frames_per_batch))
            _log.info("%s", check_memory(number, pictures.shape, pictures.stack, torch.device("cpu"), refuse=False))
            self._num_pictures = number
        self.frames: FrameStore | None = None
        OffPolicyData.check_processes(self, 1)
        self.updates_owed = Fraction(0)
        self.buffer: ReplayBuffer | None = None
        self._given = 0  # frames of all processes that were for their buffers, whether or not they could be used

    def check_processes(self, number: int) -> None:
        super().check_processes(number)
        if self.batch_size % number:
            raise ConfigurationError(f"data.batch_size={self.batch_size} must be a multiple of the {number} processes")
        begun = max(self.warm_up, self.frames_per_batch) // (self.environments * number)
        if self.n_step is not None and self.n_step.n > begun:
            raise ConfigurationError(
                f"data.n_step={self.n_step.n} needs as many steps of each environment before the first update, and "
                f"{begun} are taken: raise data.init_random_frames"
            )

    def make_batch(self, rollout: TensorDictBase) -> TensorDictBase | None:
        """Store the rollout; return as many minibatches [U, B] as updates are owed, or None."""
        if self.buffer is None:
            if self.pictures is None and "pixels" in rollout.keys():  # noqa: SIM118 (a TensorDict iterates over its batch)
                raise ConfigurationError(
                    "the environment shows pixels: give OffPolicyData(pictures=Pictures(shape, stack))"
                )
            self.buffer = self._make_buffer()
        frames = rollout.numel() * self.world_size
        if self._given >= self.warm_up:
            self.updates_owed += frames * self.utd_ratio
        self._given += frames
        keys = (*_KEYS, _COST) if _COST in rollout.keys(include_nested=True) else _KEYS
        if self.frames is not None:
            rollout = self.frames.number(rollout)
        if self.normalizer is not None:
            self.normalizer.update(self._gather(rollout.get("observation")))
        transitions = self._transitions(rollout.select(*keys, "unusable", strict=False))
        if len(transitions):
            self.buffer.extend(transitions.to(self.device))
        updates = int(self.updates_owed)
        if updates == 0:
            return None
        if not len(self.buffer):
            raise NonFiniteError(
                f"none of the {self._given:,} transitions so far is finite, so there is nothing to learn from: look at "
                "the observations and rewards of the environment"
            )
        self.updates_owed -= updates
        share = self.batch_size // self.world_size
        batch = self._sample(updates * share).view(updates, share)
        if self.normalizer is not None:
            for part in (batch, batch.get("next")):
                self.normalizer(part)
        return batch

    def _sample(self, size: int) -> TensorDictBase:
        """Transitions drawn uniformly, [size]."""
        assert self.buffer is not None  # who asks has filled it
        if self.frames is None:
            return self.buffer.sample(size)
        stored = self.buffer[: len(self.buffer)]
        whole = (stored.get("observation")[:, 0] >= self.frames.oldest).nonzero().squeeze(1)
        batch = stored[whole[torch.randint(len(whole), (size,), device=whole.device)]]
        for part in (batch, batch.get("next")):
            pixels = self.frames.look_up(part.get("observation"))
            part.set("pixels", random_shift(pixels, self.random_shift) if self.random_shift else pixels)
            part.pop("observation")
        return batch

    def _transitions(self, rollout: TensorDictBase) -> TensorDictBase:
        """What of a rollout goes into the buffer now, [M]."""
        if self.n_step is not None:
            return self.n_step(rollout)
        unusable = rollout.get("unusable", None)
        transitions = rollout.exclude("unusable").reshape(-1)
        return transitions if unusable is None else transitions[~unusable.reshape(-1)]

    def _make_collector(self, init_random_frames: int = 0) -> Source:
        # A run that goes on without its experience refills its buffer with the policy it has already learned.
        refills = self.env_frames > 0 and self._experience is None
        return super()._make_collector(init_random_frames=0 if refills else self.warm_up // self.world_size)

    def _make_buffer(self) -> ReplayBuffer:
        capacity = -(-self.capacity // self.world_size)
        if self.pictures is not None:
            shape, stack, _ = self.pictures
            steps = 1 if self.n_step is None else self.n_step.n
            # Beside the transitions' own, those that the oldest of them began with.
            number = -(-self._num_pictures // self.world_size) + self.environments * (stack + steps)
            check_memory(number, shape, stack, self.device)
            self.frames = FrameStore(number, shape, stack=stack, num_envs=self.environments, device=self.device)
        return ReplayBuffer(storage=LazyTensorStorage(capacity, device=self.device))

    def experience(self) -> dict[str, Any]:
        experience = super().experience()
        if experience and self.buffer is not None:
            filled = self.buffer[: len(self.buffer)].flatten_keys(".") if len(self.buffer) else {}
            # As tensors of their own over the same memory: saving a slice would save all that it is a slice of.
            transitions = {key: torch.from_numpy(value.numpy(force=True)) for key, value in filled.items()}
            cursor = self.buffer.writer.state_dict()["_cursor"]
            experience["replay"] = {"transitions": transitions, "cursor": cursor, "given": self._given}
            if self.n_step is not None:
                experience["replay"]["waiting"] = self.n_step.state_dict()
            if self.frames is not None and self.pictures is not None:
                folder = None if self.pictures.folder is None else self.pictures.folder / FOLDER
                if folder is not None and (self.trainer is None or self.trainer.is_global_zero):
                    remove_unnamed(folder)
                experience["replay"]["frames"] = self.frames.state_dict(folder)
        return experience

    def _restore(self) -> None:
        replay = (self._experience or {}).get("replay")
        if replay is not None:
            self.buffer = self._make_buffer()
            if replay["transitions"]:  # none where the first are still incomplete
                _refill(self.buffer, replay["transitions"], replay["cursor"])
            self._given = replay["given"]
            if self.frames is not None:
                frames = replay["frames"]
                self.frames.load_state_dict(frames, Path(frames["folder"]) if "folder" in frames else None)
            if self.n_step is not None:
                self.n_step.load_state_dict(replay.get("waiting", {}))
        super()._restore()

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "updates_owed": float(self.updates_owed)}
        return state if self.normalizer is None else {**state, "normalizer": self.normalizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.updates_owed = Fraction(state_dict["updates_owed"]).limit_denominator(1_000_000)
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state_dict["normalizer"])


def _refill(buffer: ReplayBuffer, transitions: dict[str, Tensor], cursor: int) -> None:
    """Put saved transitions where they were; into a buffer of another size the newest that fit, the oldest first."""
    capacity = buffer.storage.max_size
    saved = TensorDict(transitions).auto_batch_size_(1).unflatten_keys(".")
    if len(saved) == capacity:
        buffer.extend(saved)
        buffer.writer.load_state_dict({"_cursor": cursor % capacity})
    else:
        oldest_first = (torch.arange(len(saved)) + cursor).remainder(len(saved))
        buffer.extend(saved[oldest_first[-capacity:]])
