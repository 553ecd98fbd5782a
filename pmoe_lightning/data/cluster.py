"""Environments on the nodes of a Ray cluster: TorchRL's Ray collector, with our own collector in every actor."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors.distributed import RayCollector
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from pmoe_lightning.data.workers import Worker, seeded_environments
from pmoe_lightning.errors import ConfigurationError, RunError, first_line
from pmoe_lightning.modules.networks import matmul_precision

__all__ = ["ClusterCollector"]

_START_SECONDS = 120.0
#: Ray starts a worker that is lost anew, wherever there is a node, and repeats what it was asked.
_OUTLIVES_ITS_NODE = {"max_restarts": -1, "max_task_retries": -1}


class ClusterCollector(RayCollector):
    """W Ray actors, each with a ``RolloutCollector`` of N environments; yields rollouts [W N, T], on the CPU.

    As ``WorkerCollector``, past one machine. The newest weights travel with every request, through Ray's object store,
    so a worker that Ray has started anew acts with them too; it has lost its episodes and starts new ones, with random
    numbers of its own. The rollout that was lost with it never arrived: every frame is counted once.

    The cluster is that of the environment variable ``RAY_ADDRESS``; without it, one on this machine alone.

    Args: as ``WorkerCollector``.

    Raises:
        RunError: the cluster cannot be reached, has no room, or has lost a worker for good.
    """

    def __init__(
        self,
        make_env: Callable[..., EnvBase],
        policy: TensorDictModuleBase,
        *,
        num_workers: int,
        num_envs: int,
        seed: int,
        frames_per_batch: int,
        init_random_frames: int,
        compile: bool,
    ) -> None:
        environments = seeded_environments(num_workers, num_envs, seed)
        shared = {"seed": seed, "precision": matmul_precision(), "compile": compile}
        shared |= {"use_buffers": False, "return_same_td": True, "auto_register_policy_transforms": False}
        self._live = policy
        with _ray_errors(), _own_sigterm():
            if not ray.is_initialized():
                # Told nothing, Ray would look for the last cluster of this machine first, dead or alive.
                address = os.environ.get("RAY_ADDRESS", "local")
                arguments: dict[str, Any] = {} if address != "local" else {"include_dashboard": False}
                ray.init(address, logging_level=logging.WARNING, **arguments)
            super().__init__(
                [make_env] * num_workers,
                deepcopy(policy).to("cpu"),
                collector_class=_Actor,
                collector_kwargs=[{**shared, "create_env_kwargs": each} for each in environments],
                remote_configs=[{**_OUTLIVES_ITS_NODE, "scheduling_strategy": node} for node in _places(num_workers)],
                weight_sync_schemes={},
                sync=True,
                frames_per_batch=frames_per_batch,
                exploration_type=ExplorationType.RANDOM,
                policy_device="cpu",
                env_device="cpu",
                storing_device="cpu",
            )
            self._wait_for_workers()
        self._random_frames, self.closed = init_random_frames, False

    def _wait_for_workers(self) -> None:
        asked = [actor.get_distant_attr.remote("is_mujoco") for actor in self.remote_collectors]
        try:
            self.is_mujoco = all(ray.get(asked, timeout=_START_SECONDS))
        except GetTimeoutError as error:
            self.shutdown()
            raise RunError(
                f"the Ray cluster has not started {len(asked)} workers in {_START_SECONDS:.0f} s: "
                "`ray status` shows what it has; lower data.num_workers or add nodes"
            ) from error

    def iterator(self) -> Iterator[TensorDictBase]:
        while True:
            with self._attended():
                weights = ray.put(TensorDict.from_module(self._live).data.cpu())
                at_random = self.collected_frames < self._random_frames
                asked = [actor.collect.remote(weights, at_random) for actor in self.remote_collectors]
                rollout = torch.cat(ray.get(asked))
            self.collected_frames += rollout.numel()
            yield rollout

    def experience(self) -> dict[str, Any]:
        """What every worker needs to go on exactly."""
        with self._attended():
            return {"workers": self.map_fn("experience"), "collected_frames": self.collected_frames}

    def load_experience(self, experience: dict[str, Any]) -> str | None:
        """Go on from an :meth:`experience`; returns why environments start a new episode, where they do."""
        with self._attended():
            reasons = self.map_fn("load_experience", [(worker,) for worker in experience["workers"]])
        self.collected_frames = experience["collected_frames"]
        return next(filter(None, reasons), None)

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """End the workers. A cluster that was started here ends with the process."""
        self.closed = True
        super().shutdown(*args, **kwargs)

    @contextmanager
    def _attended(self) -> Iterator[None]:
        """No worker outlives an error."""
        try:
            with _ray_errors():
                yield
        except BaseException:
            self.shutdown()
            raise


def _places(number: int) -> list[NodeAffinitySchedulingStrategy]:
    """The nodes for so many workers, in proportion to their cores; others where one of them is lost."""
    cores = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]}
    placed: Counter[str] = Counter()
    for _ in range(number):
        placed[max(cores, key=lambda node: cores[node] / (placed[node] + 1))] += 1
    return [NodeAffinitySchedulingStrategy(node, soft=True) for node in placed.elements()]


class _Actor(Worker):
    """The collector of one Ray actor."""

    def __init__(self, make_env: Callable[..., EnvBase], *, seed: int, **settings: Any) -> None:
        with warnings.catch_warnings(action="ignore"):  # Ray warns of what it uses itself
            started_anew = ray.get_runtime_context().was_current_actor_reconstructed
        if started_anew:
            # What the lost one has drawn and played is not to be repeated.
            seed = secrets.randbits(31)
            settings["create_env_kwargs"] = {**settings["create_env_kwargs"], "seed": seed}
        super().__init__(make_env, seed=seed, **settings)

    def __repr__(self) -> str:
        """What Ray puts before a line that the worker prints."""
        return f"collection worker {self.worker_idx}"

    def collect(self, weights: TensorDictBase, at_random: bool) -> TensorDictBase:
        """A rollout with these weights, or of uniformly random actions."""
        TensorDict.from_module(self.policy).data.update_(weights)
        self.init_random_frames = math.inf if at_random else 0
        return self.rollout().exclude("collector")


@contextmanager
def _ray_errors() -> Iterator[None]:
    """What Ray reports, as what it means to the user."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, (ConfigurationError, RunError)):
            raise error.cause from None
        raise
    except (RayError, ConnectionError) as error:
        raise RunError(f"the Ray cluster has failed: {first_line(error)}") from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray's own handler would end the process on the spot."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
