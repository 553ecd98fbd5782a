"""What both kinds of data share: a TorchRL collector driven by Lightning's training loop, frame by counted frame.

One item of the loader is one collector iteration (or the few it takes until there is something to train on), and it is
collected only when the training loop asks for it: never ahead, because data collected ahead is data of a stale policy.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union

import torch
from lightning.pytorch import LightningDataModule
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from pmoe_lightning.checkpoints.random_states import capture_random_states, restore_random_states
from pmoe_lightning.data.collector import RolloutCollector
from pmoe_lightning.data.workers import WorkerCollector
from pmoe_lightning.envs import with_memory
from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.limits import NonNegativeInt, PositiveInt, checked

if TYPE_CHECKING:
    from pmoe_lightning.data.cluster import ClusterCollector

__all__ = ["CollectedData", "CollectorLoader"]

_log = logging.getLogger(__name__)

#: What a data module collects with: three ways to the same rollouts.
Source = Union[RolloutCollector, WorkerCollector, "ClusterCollector"]


class CollectedData(LightningDataModule, ABC):
    """A data module whose training data are collected with the policy being trained.

    The collector is made at the first iteration, when the policy is on its device; environments stay on the CPU. It
    always acts with the newest weights: in this process with the policy object itself, or in ``num_workers`` processes
    of its own as :class:`WorkerCollector` and :class:`ClusterCollector` do.

    A Lightning epoch ends at the next multiple of ``frames_per_epoch``. The run ends at ``total_frames``: no iteration
    starts once they are reached, and the trainer is told to stop. Iterations are never cut short: if ``total_frames``
    is not a multiple of ``frames_per_batch``, up to ``frames_per_batch - 1`` frames more are collected, and counted.

    With P training processes, or W workers in each, every one has ``num_envs`` environments and collects its share of
    the frames. Every other number is that of all together, so that P W workers with n environments do what one process
    does with P W n.

    Attributes:
        on_policy: whether it yields rollouts of the present policy, or minibatches of a replay buffer.
        env_frames: environment steps taken, over all environments, warm-up included.
        epoch_end: the ``env_frames`` at which the Lightning epoch under way ends.
        episodes: episodes finished.
        breakdowns: transitions left out because the simulator broke down in them.
        violations: steps with a cost; None where the environment writes no cost.
        total_frames: as given.
        collector: a TorchRL collector, None before the first iteration and after teardown.

    Args:
        make_env: called as ``make_env(num_envs=..., seed=...)``; the environment must write ``episode_return`` and
            ``episode_length`` beside the reward, as :class:`pmoe_lightning.envs.AbstractEnvironment` does. For a policy
            with memory also with ``carry=...``.
        policy: the module that acts and is trained.
        total_frames: environment steps of the whole run.
        frames_per_epoch: environment steps of a Lightning epoch.
        frames_per_batch: environment steps of a collector iteration, over all environments and processes.
        num_envs: number of environments stepped together, in each worker; in each process without workers.
        num_workers: processes that collect for this one; 0: it collects itself.
        backend: where they are: ``process``, on this machine, or ``ray``, on the nodes of a Ray cluster.
        seed: environment i receives ``seed + i``.
        compile: act with a compiled policy.

    Raises:
        ConfigurationError: if a number is out of range, ``frames_per_batch`` is not a multiple of ``num_envs``, or
            ``frames_per_epoch`` is smaller than ``frames_per_batch``.
    """

    on_policy: ClassVar[bool]

    @checked
    def __init__(
        self,
        make_env: Callable[..., EnvBase],
        policy: TensorDictModuleBase,
        *,
        total_frames: int,
        frames_per_epoch: PositiveInt,
        frames_per_batch: PositiveInt,
        num_envs: PositiveInt,
        num_workers: NonNegativeInt = 0,
        backend: Literal["process", "ray"] = "process",
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if total_frames < 1:
            raise ConfigurationError(f"total_frames={total_frames} must be at least 1")
        if frames_per_epoch < frames_per_batch:
            raise ConfigurationError(
                f"data.frames_per_epoch={frames_per_epoch} must not be smaller than "
                f"data.frames_per_batch={frames_per_batch}"
            )
        self.num_envs, self.num_workers, self.backend = num_envs, num_workers, backend
        self.frames_per_batch = frames_per_batch
        CollectedData.check_processes(self, 1)  # what a subclass adds is not there yet
        self.make_env, self.policy, self.compile = make_env, policy, compile
        self.total_frames, self.frames_per_epoch, self.seed = total_frames, frames_per_epoch, seed
        self.env_frames = self.epoch_end = 0
        self.episodes = 0
        self.breakdowns = 0
        self.violations: int | None = None
        self.collector: Source | None = None
        self._iterations: Iterator[TensorDictBase] | None = None
        self._finished_episodes: list[tuple[float, ...]] = []
        self._experience: dict[str, Any] | None = None

    @abstractmethod
    def make_batch(self, rollout: TensorDictBase) -> TensorDictBase | None:
        """Turn one rollout [N, T], on the CPU, into a training batch on the policy's device; None: collect again."""

    @property
    def device(self) -> torch.device:
        """Where the policy is, and where training batches are put."""
        tensor = next(chain(self.policy.parameters(), self.policy.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def environments(self) -> int:
        """The number of environments of this training process: the rows of its rollouts."""
        return self.num_envs * max(self.num_workers, 1)

    @property
    def world_size(self) -> int:
        """The number of training processes; each collects its own share of the frames."""
        return 1 if self.trainer is None else self.trainer.world_size

    def check_processes(self, number: int) -> None:
        """Refuse a number of training processes that cannot share the work evenly.

        Raises:
            ConfigurationError: with the number that is not a multiple.
        """
        together = self.environments * number
        if self.frames_per_batch % together:
            workers = f" in each of {self.num_workers} workers" if self.num_workers else ""
            processes = f" on each of {number} processes" if number > 1 else ""
            raise ConfigurationError(
                f"data.frames_per_batch={self.frames_per_batch} must be a multiple of data.num_envs={self.num_envs}"
                f"{workers}{processes}: use {round_up(self.frames_per_batch, together)}"
            )

    def setup(self, stage: str) -> None:
        """Refuse a trainer with too many processes."""
        self.check_processes(self.world_size)

    @property
    def simulated_by_mujoco(self) -> bool:
        """Whether the environments are MuJoCo's, whose instabilities are part of life."""
        return self.collector is not None and self.collector.is_mujoco

    @property
    def epoch_is_over(self) -> bool:
        """Whether the frames of the Lightning epoch under way have been collected."""
        return self.env_frames >= self.epoch_end

    def train_dataloader(self) -> "CollectorLoader":
        return CollectorLoader(self)

    def collect(self) -> TensorDictBase:
        """Run one collector iteration, count its frames and episodes, and return the rollout [N, T]."""
        if self._iterations is None:
            self.collector = self._make_collector()
            self._restore()
            self._iterations = iter(self.collector)
        rollout = next(self._iterations)
        rollout.names = None
        self.env_frames += rollout.numel() * self.world_size
        self._count_episodes(rollout)
        self._count_violations(rollout)
        self._set_aside_breakdowns(rollout)
        if self.env_frames >= self.total_frames and self.trainer is not None:
            self.trainer.should_stop = True
        return rollout

    def drain_episodes(self) -> list[tuple[float, ...]]:
        """(return, length) of every training episode finished since the last call, in the order they finished.

        (return, length, cost) where the environment writes a cost.
        """
        finished, self._finished_episodes = self._finished_episodes, []
        return finished

    def _gather(self, values: Tensor) -> Tensor:
        """The values of all processes, because every process normalises by the statistics of all."""
        if self.trainer is None or self.world_size == 1:
            return values
        return self.trainer.strategy.all_gather(values.to(self.device))

    def _set_aside_breakdowns(self, rollout: TensorDictBase) -> None:
        """Where a simulator broke down, make the numbers harmless and mark them by ``unusable`` [N, T, 1]."""
        following = rollout.get("next")
        broken = following.get("reward").isnan()
        if broken.any():
            self.breakdowns += int(broken.sum())
            if "observation" in rollout.keys():  # noqa: SIM118 (a TensorDict iterates over its batch)
                observation = torch.where(broken, rollout.get("observation"), following.get("observation"))
                following.set("observation", observation)
            following.set("reward", following.get("reward").masked_fill(broken, 0.0))
            rollout.set("unusable", broken)

    def _make_collector(self, init_random_frames: int = 0) -> Source:
        make_env = with_memory(self.make_env, self.policy)
        settings: dict[str, Any] = {
            "frames_per_batch": self.frames_per_batch // self.world_size,
            "init_random_frames": init_random_frames,
            "compile": self.compile,
        }
        if self.num_workers:
            sizes: dict[str, Any] = {"num_workers": self.num_workers, "num_envs": self.num_envs}
            return _workers_on(self.backend)(make_env, self.policy, seed=self.seed, **sizes, **settings)
        devices: dict[str, Any] = {}
        if self.device.type != "cpu":
            devices = {"policy_device": self.device, "env_device": "cpu", "storing_device": "cpu"}
        return RolloutCollector(
            make_env(num_envs=self.num_envs, seed=self.seed),
            self.policy,
            total_frames=-1,
            exploration_type=ExplorationType.RANDOM,
            track_traj_ids=False,
            use_buffers=False,  # a preallocated rollout would make up what random warm-up frames lack
            return_same_td=True,  # no copy: every rollout has storage of its own
            auto_register_policy_transforms=False,
            **settings,
            **devices,
        )

    def _count_episodes(self, rollout: TensorDictBase) -> None:
        # An episode that a broken simulator ended has no return.
        done = rollout.get(("next", "done")) & ~rollout.get(("next", "reward")).isnan()
        done = done.squeeze(-1).T
        if done.any():
            totals = (rollout.get(("next", key), None) for key in ("episode_return", "episode_length", "episode_cost"))
            totals = (total.squeeze(-1).T for total in totals if total is not None)
            finished = list(zip(*(total[done].tolist() for total in totals), strict=True))
            self.episodes += len(finished)
            self._finished_episodes += finished

    def _count_violations(self, rollout: TensorDictBase) -> None:
        cost = rollout.get(("next", "cost"), None)
        if cost is not None:
            counted = (cost > 0) & ~rollout.get(("next", "reward")).isnan()
            self.violations = (self.violations or 0) + int(counted.sum())

    def on_exception(self, exception: BaseException) -> None:
        """Close the environments: an error ends a run without :meth:`teardown`."""
        self.teardown("fit")

    def teardown(self, stage: str) -> None:
        """Close the environments. A later fit starts new episodes and goes on counting."""
        if self.collector is not None:
            self.collector.shutdown()
        self.collector = self._iterations = None

    def experience(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly, besides :meth:`state_dict`: simulators, random numbers, replay.

        Plain values and tensors. Tensors may share memory with the live ones: write them before training goes on.

        Raises:
            RunError: an error has cut a rollout short, and with it the state from which one could go on exactly.
        """
        if self.collector is None:
            return {}
        if self.collector.closed:
            raise RunError("a rollout was cut short by an error: not saved, the last checkpoint is kept")
        return {
            **self.collector.experience(),
            "finished_episodes": list(self._finished_episodes),
            "counters": self.state_dict(),
            "random_states": capture_random_states(),
        }

    def load_experience(self, experience: dict[str, Any]) -> None:
        """Go on from an :meth:`experience` of this same process, when the collector is made."""
        self._experience = experience or None
        if experience:  # these are reported even where nothing is left to be collected
            self._finished_episodes = [tuple(episode) for episode in experience["finished_episodes"]]

    def _restore(self) -> None:
        if self._experience is None:
            return
        experience, self._experience = self._experience, None
        assert self.collector is not None  # who made it asks
        reason = self.collector.load_experience(experience)
        if reason is not None and (self.trainer is None or self.trainer.is_global_zero):
            _log.warning("%s", reason)
        # What Lightning and its strategy have given to every process by now is the first one's.
        self.load_state_dict(experience["counters"])
        # Last, because what was made up to here may have drawn.
        restore_random_states(experience["random_states"])

    def state_dict(self) -> dict[str, Any]:
        counters = {"env_frames": self.env_frames, "episodes": self.episodes, "breakdowns": self.breakdowns}
        return counters if self.violations is None else counters | {"violations": self.violations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.env_frames, self.episodes = state_dict["env_frames"], state_dict["episodes"]
        self.breakdowns = state_dict.get("breakdowns", 0)  # of earlier versions
        self.violations = state_dict.get("violations")


class CollectorLoader:
    """Iterates over the batches of one epoch of a :class:`CollectedData`."""

    def __init__(self, data: CollectedData) -> None:
        self.data = data

    def __len__(self) -> int:
        """The most batches an epoch can have. Its being defined also keeps Lightning from fetching a batch ahead."""
        return -(-self.data.frames_per_epoch // self.data.frames_per_batch)

    def __iter__(self) -> Iterator[TensorDictBase]:
        data = self.data
        # From the counter alone, because Lightning abandons the iterator at the last batch of an epoch.
        epoch_end = (data.env_frames // data.frames_per_epoch + 1) * data.frames_per_epoch
        data.epoch_end = min(epoch_end, data.total_frames)
        while not data.epoch_is_over:
            batch = data.make_batch(data.collect())
            if batch is not None:
                yield batch


def _workers_on(backend: str) -> "type[WorkerCollector] | type[ClusterCollector]":
    if backend == "process":
        return WorkerCollector
    from pmoe_lightning.data.cluster import ClusterCollector  # Ray is an extra

    return ClusterCollector


def round_up(frames: int, multiple: int) -> int:
    return -(-frames // multiple) * multiple
