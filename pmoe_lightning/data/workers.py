"""Environments in worker processes: TorchRL's multi-process collector, with our own collector in every process."""

from __future__ import annotations

import atexit
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import connection, resource_tracker
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import MultiSyncCollector
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType
from torchrl.weight_update import SharedMemWeightSyncScheme

from pmoe_lightning.checkpoints.random_states import capture_random_states, restore_random_states
from pmoe_lightning.data.collector import RolloutCollector
from pmoe_lightning.errors import RunError, describe_end, first_line
from pmoe_lightning.modules.networks import MatmulPrecision, matmul_precision, set_matmul_precision
from pmoe_lightning.processes.orphans import end_with, kill_families
from pmoe_lightning.processes.output import outlive_output
from pmoe_lightning.processes.stopping import STOPS, Stopped, stop

__all__ = ["Worker", "WorkerCollector", "seeded_environments"]

#: What the training process alone answers. Ctrl-C, a batch system and `timeout` send them to all of its processes.
_LEFT_TO_TRAINING = {*STOPS, signal.SIGUSR1}
_ENDING_SECONDS = 1.0


class WorkerCollector(MultiSyncCollector):
    """W processes, each with a ``RolloutCollector`` of N environments; yields rollouts [W N, T], on the CPU.

    All workers collect at the same time, when asked, and the next iteration waits for the slowest. They act with the
    policy's newest weights and buffers: these lie in shared memory, where they are brought up to date before every
    iteration, while no worker acts. Row w N + i is environment i of worker w, which receives ``seed + w N + i``, so W
    workers with N environments step the environments that one process would with W N.

    Args:
        make_env: called in every worker, with ``num_envs`` and ``seed``.
        policy: what acts; it may be on another device and must be picklable.
        num_workers, num_envs: W and N.
        seed: of the first environment, and of the random numbers of the workers, which differ.
        frames_per_batch: W N T.
        init_random_frames: frames of all workers that take uniformly random actions.
        compile: act with a compiled policy.

    Raises:
        RunError: a worker cannot start or has died; the others have been ended then.
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
        self._weights, self._num_threads = SharedMemWeightSyncScheme(), torch.get_num_threads()
        self._settled = not compile
        try:
            with stop.interruptible(), _without_signals():
                super().__init__(
                    [make_env] * num_workers,
                    policy,
                    create_env_kwargs=seeded_environments(num_workers, num_envs, seed),
                    collector_class=partial(Worker, seed=seed, compile=compile, precision=matmul_precision()),
                    weight_sync_schemes={"policy": self._weights},
                    frames_per_batch=frames_per_batch,
                    total_frames=-1,
                    init_random_frames=init_random_frames,
                    exploration_type=ExplorationType.RANDOM,
                    policy_device="cpu",
                    env_device="cpu",
                    storing_device="cpu",
                    use_buffers=False,
                    cat_results="stack",
                    num_threads=self._num_threads,
                    num_sub_threads=self._num_threads,
                    auto_register_policy_transforms=False,
                )
        except RunError:
            raise
        except (EOFError, OSError, RuntimeError) as error:
            raise RunError(f"a collection worker could not start: {first_line(error)}") from error
        atexit.register(self.shutdown)  # before Python waits for its children, which wait for a word

    def _run_processes(self) -> None:
        others = {process.pid for process in multiprocessing.active_children()}
        try:
            super()._run_processes()
        except BaseException as error:
            ends = self._ends()
            # Before anything is closed: those that are still starting would find it gone, and say so at length.
            started = [process.pid for process in multiprocessing.active_children() if process.pid not in others]
            kill_families(pid for pid in started if pid is not None)
            if isinstance(error, RuntimeError):
                self._raise_for(ends, error)
            raise

    @property
    def is_mujoco(self) -> bool:
        """Whether the environments are MuJoCo's."""
        with self._attended():
            return all(self.get_distant_attr("is_mujoco"))

    def iterator(self) -> Iterator[TensorDictBase]:
        rollouts = super().iterator()
        while True:
            with self._attended():
                self._weights.shared_transport.send_weights(TensorDict.from_module(self.policy).data)
                acts = self._frames >= self.init_random_frames
                # When they act first they compile, half a minute in which a signal is not to wait for them.
                with nullcontext() if self._settled or not acts else stop.interruptible():
                    rollout = next(rollouts)
                self._settled = self._settled or acts
            rollout.names = None
            yield rollout.exclude("collector").reshape(-1, rollout.shape[-1])

    def experience(self) -> dict[str, Any]:
        """What every worker needs to go on exactly: see ``RolloutCollector``; and its random numbers."""
        with self._attended():
            return {"workers": self.map_fn("experience"), "collected_frames": self._frames}

    def load_experience(self, experience: dict[str, Any]) -> str | None:
        """Go on from an :meth:`experience`; returns why environments start a new episode, where they do."""
        with self._attended():
            reasons = self.map_fn("load_experience", [(worker,) for worker in experience["workers"]])
        self._frames = experience["collected_frames"]
        return next(filter(None, reasons), None)

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """End the workers, within ten seconds."""
        atexit.unregister(self.shutdown)
        self._weights.shutdown()  # left to the end of Python, it waits for threads that no longer run
        super().shutdown(*args, **kwargs)
        torch.set_num_threads(self._num_threads)

    @contextmanager
    def _attended(self) -> Iterator[None]:
        """No worker outlives an error; the error is the worker that has died, where one has."""
        try:
            yield
        except Stopped:
            kill_families(process.pid for process in self.procs if not process._closed)
            self.shutdown()
            raise
        except BaseException as error:
            ends = self._ends()
            self.shutdown()
            self._raise_for(ends, error)
            raise

    def _ends(self) -> dict[int, int]:
        """Exit codes of the workers that have ended; one whose pipe has closed takes a moment to."""
        open_ones = {w: process for w, process in enumerate(self.procs) if not process._closed}
        ending = connection.wait([process.sentinel for process in open_ones.values()], _ENDING_SECONDS)
        for process in open_ones.values():
            if process.sentinel in ending:
                process.join()
        return {w: process.exitcode for w, process in open_ones.items() if process.exitcode is not None}

    def _raise_for(self, ends: dict[int, int], error: BaseException) -> None:
        """Raise for the first worker that has ended, if one has."""
        for w, code in ends.items():
            raise RunError(f"collection worker {w} of {self.num_workers} {describe_end(code)}") from error


class Worker(RolloutCollector):
    """The collector of one worker, whose process it makes like the training process, but for its random numbers.

    Args:
        make_env: called with ``create_env_kwargs``.
        seed: of all workers.
        worker_idx: which of them this is.
        precision: for ``set_matmul_precision``.
        **settings: as for ``RolloutCollector``.
    """

    def __init__(
        self,
        make_env: Callable[..., EnvBase],
        *,
        seed: int,
        worker_idx: int,
        precision: MatmulPrecision,
        **settings: Any,
    ) -> None:
        if (parent := multiprocessing.parent_process()) is not None and parent.pid is not None:
            end_with(parent.pid)
        outlive_output()  # what an environment prints
        set_matmul_precision(precision)
        torch.set_flush_denormal(True)
        # Python's and NumPy's are for environments that draw from them.
        of_python, of_numpy, of_torch = np.random.SeedSequence((seed, worker_idx)).generate_state(3).tolist()
        random.seed(of_python)
        np.random.seed(of_numpy)
        torch.manual_seed(of_torch)
        super().__init__(make_env, worker_idx=worker_idx, track_traj_ids=False, **settings)

    def rollout(self) -> TensorDictBase:
        rollout = super().rollout()
        # By this entry MultiSyncCollector counts the frames.
        return rollout.set(("collector", "traj_ids"), torch.zeros(rollout.shape, dtype=torch.int64))

    def experience(self) -> dict[str, Any]:
        return {**super().experience(), "random_states": capture_random_states()}

    def load_experience(self, experience: dict[str, Any]) -> str | None:
        reason = super().load_experience(experience)
        restore_random_states(experience["random_states"])
        return reason


def seeded_environments(num_workers: int, num_envs: int, seed: int) -> list[dict[str, int]]:
    """What each worker's environments are made with."""
    return [{"num_envs": num_envs, "seed": seed + worker * num_envs} for worker in range(num_workers)]


@contextmanager
def _without_signals() -> Iterator[None]:
    """Processes started in here never get the signals; this one gets them afterwards."""
    resource_tracker.ensure_running()  # as it starts, it lets signals through again
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_TRAINING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
