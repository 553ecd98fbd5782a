"""Collection by worker processes: what they yield, the weights they act with, how they go on and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from probe_envs import expected_transitions, make_forgetful_env
from tensordict import TensorDictBase, assert_close
from tensordict.nn import TensorDictModuleBase
from test_collector import POLICIES, ROUNDING
from test_data import make_policy, off_policy, on_policy
from test_devices import is_alive
from test_resume import LAST, differing, state_of
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType
from waiting import HANG_SECONDS, wait_until

from pmoe_lightning.data.collection import CollectedData
from pmoe_lightning.data.off_policy import OffPolicyData
from pmoe_lightning.data.workers import Worker, WorkerCollector
from pmoe_lightning.envs import make_env, with_memory
from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.modules.normalization import RewardScaler

MakeEnv = Callable[..., EnvBase]
FRAMES = 32  # of each of the two workers in an iteration


@pytest.fixture
def closing() -> Iterator[Callable]:
    """Closes what it was given at the end, so that a failing test leaves no process."""
    opened: list[Any] = []
    yield lambda each: opened.append(each) or each
    for each in opened:
        each.teardown("fit") if isinstance(each, CollectedData) else each.shutdown()


def workers(make: MakeEnv, policy: TensorDictModuleBase, **changes: Any) -> WorkerCollector:
    settings = {"num_workers": 2, "num_envs": 2, "seed": 7, "compile": False}
    frames = {"frames_per_batch": 2 * FRAMES, "init_random_frames": 0}
    return WorkerCollector(make, policy, **(settings | frames | changes))


def alone(make: MakeEnv, policy: TensorDictModuleBase, worker: int, train: Callable[[], None]) -> list[TensorDictBase]:
    """The first rollouts of one worker, collected in this process, training in between."""
    settings = {"frames_per_batch": FRAMES, "exploration_type": ExplorationType.RANDOM, "use_buffers": False}
    collector = Worker(
        make,
        policy=policy,
        worker_idx=worker,
        seed=7,
        compile=False,
        precision="float32",
        create_env_kwargs={"num_envs": 2, "seed": 7 + 2 * worker},
        total_frames=-1,
        auto_register_policy_transforms=False,
        **settings,
    )
    return [rollout.exclude("collector") for rollout in trained_between(collector, train)]


def trained_between(rollouts: Any, train: Callable[[], None]) -> list[TensorDictBase]:
    rollouts, collected = iter(rollouts), []
    for _ in range(3):
        collected.append(next(rollouts).clone())
        train()
    return collected


def change_everything(policy: TensorDictModuleBase) -> None:
    """What updates do: another value for every parameter and statistic, in place."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in [*policy.parameters(), *policy.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.5 * torch.rand(tensor.shape, generator=generator))


@pytest.mark.parametrize("name", ["ppo-pmoe", pytest.param("dac", marks=pytest.mark.slow), "sac-gated-safe"])
def test_workers_yield_what_their_collectors_would_here_with_the_live_policy(name, closing):
    """Actions, log-probabilities, memory: with the weights, critics and statistics that training has just changed."""
    torch.manual_seed(0)
    policy = POLICIES[name]()
    initial = {key: value.clone() for key, value in policy.state_dict().items()}
    make = with_memory(make_forgetful_env, policy)
    train = partial(change_everything, policy)
    together = trained_between(closing(workers(make, policy)), train)
    for worker in range(2):
        policy.load_state_dict(initial)
        for actual, expected in zip(together, alone(make, policy, worker, train), strict=True):
            assert_close(actual[2 * worker : 2 * worker + 2], expected, rtol=ROUNDING, atol=ROUNDING)
    assert not torch.equal(together[0][:2]["action"], together[0][2:]["action"])


@pytest.mark.slow
def test_workers_act_with_a_compiled_policy_that_is_the_live_one(closing):
    torch.manual_seed(0)
    policy = POLICIES["sac-gated-safe"]()
    initial = {key: value.clone() for key, value in policy.state_dict().items()}
    make = with_memory(make_forgetful_env, policy)
    collected = []
    for compile in (True, False):
        policy.load_state_dict(initial)
        collector = closing(workers(make, policy, compile=compile))
        collected.append(trained_between(collector, partial(change_everything, policy)))
    for compiled, readable in zip(*collected, strict=True):
        assert_close(compiled, readable, rtol=ROUNDING, atol=ROUNDING)


def test_every_frame_of_every_worker_is_counted_once(closing):
    data = closing(off_policy(num_workers=2, num_envs=2, frames_per_batch=40, total_frames=120, init_random_frames=40))
    rollouts = [data.collect() for _ in range(3)]
    assert all(rollout.shape == (4, 10) for rollout in rollouts) and data.env_frames == 120
    # Worker w plays the same two scripts as the other one, with seeds of its own.
    expected = [expected_transitions(30, seed=2 * (row // 2), index=row % 2) for row in range(4)]
    actual = torch.cat([rollout["observation"] for rollout in rollouts], 1)
    assert actual.tolist() == [[step.observation for step in steps] for steps in expected]
    assert data.episodes == sum(step.terminated or step.truncated for steps in expected for step in steps)
    assert len(data.drain_episodes()) == data.episodes
    # Uniform over the bounds in the warm-up, by the policy afterwards.
    low, high = torch.tensor([-0.5, -2.0]), torch.tensor([0.25, 3.0])
    drawn = (rollouts[0]["action"] - low) / (high - low)
    assert drawn.reshape(-1, 2).var(0).allclose(torch.tensor(1 / 12), atol=0.035)  # four standard errors of 40 draws
    assert not torch.equal(rollouts[0]["action"][:2], rollouts[0]["action"][2:])


def hopper_data() -> OffPolicyData:
    sizes = {"total_frames": 1000, "frames_per_epoch": 100, "frames_per_batch": 32, "init_random_frames": 0}
    policy = POLICIES["sac"]()
    return OffPolicyData(partial(make_env, "Hopper-v5"), policy, num_workers=2, batch_size=4, **sizes)


def test_a_resumed_collection_goes_on_exactly(closing):
    torch.manual_seed(0)
    first = closing(hopper_data())
    first.make_batch(first.collect())
    experience, weights = first.experience(), first.policy.state_dict()
    expected = [first.collect() for _ in range(2)]
    second = closing(hopper_data())
    second.policy.load_state_dict(weights)
    second.load_experience(experience)
    for rollout in expected:
        assert_close(second.collect(), rollout, rtol=0, atol=0)
    assert second.env_frames == first.env_frames == 96


def test_a_worker_that_dies_is_named_and_takes_the_others_with_it(closing):
    data = closing(on_policy(num_workers=2))
    data.collect()
    victim, other = (process.pid for process in data.collector.procs)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(RunError, match=r"^collection worker 0 of 2 was killed by SIGKILL$"):
        data.collect()
    assert not is_alive(other)
    with pytest.raises(RunError, match="not saved"):
        data.experience()


def test_a_worker_that_dies_as_it_starts_is_named_and_the_others_say_nothing(capfd):
    """The other is still importing what it needs, and would not find what it is to share."""
    others = set(multiprocessing.active_children())

    def kill() -> None:
        wait_until(lambda: set(multiprocessing.active_children()) - others)
        min(set(multiprocessing.active_children()) - others, key=lambda process: process.pid).kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RunError, match=r"^collection worker 0 of 2 was killed by SIGKILL$"):
        workers(make_forgetful_env, make_policy())
    killer.join()
    assert not set(multiprocessing.active_children()) - others
    assert "Traceback" not in capfd.readouterr().err


def test_numbers_that_the_workers_cannot_share_are_refused():
    with pytest.raises(ConfigurationError, match="num_envs=2 in each of 3 workers: use 12"):
        off_policy(num_workers=3, num_envs=2, frames_per_batch=8)
    with pytest.raises(ConfigurationError, match="num_envs=1 in each of 4 workers on each of 4 processes: use 16"):
        off_policy(num_workers=4, frames_per_batch=8).check_processes(4)
    with pytest.raises(ConfigurationError, match="num_workers=-1"):
        off_policy(num_workers=-1)
    with pytest.raises(ConfigurationError, match="4 environments, but the RewardScaler is made for 2"):
        on_policy(make_policy(return_log_prob=True), num_workers=2, num_envs=2, reward_scaler=RewardScaler(2))


SMALL = ["algo.hidden_sizes=[16]", "actor.hidden_sizes=[16]", "callbacks=minimal", "data.num_workers=2"]
SAC = ["algo=sac", "env=Hopper-v5", "data.init_random_frames=64", "data.batch_size=16", "data.frames_per_epoch=160"]
PPO = ["env=Hopper-v5", "data.num_envs=2", "data.frames_per_batch=64", "data.frames_per_epoch=128"]
PPO += ["algo.num_epochs=2", "algo.minibatch_size=32"]


@pytest.fixture
def start(tmp_path: Path, clean_environ: dict[str, str]) -> Callable[..., subprocess.Popen]:
    """Starts the train command in a process group of its own."""

    def start(*words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "pmoe_lightning.train", *words, *SMALL]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=clean_environ, start_new_session=True, **pipes)

    return start


def children(process: subprocess.Popen) -> list[int]:
    """Its workers, and Python's own keeper of shared memory."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for_the_end_of(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)))


@pytest.mark.slow
def test_a_run_whose_worker_dies_fails_with_one_line_and_leaves_no_process(start, store, tmp_path):
    process = start(*PPO, "total_frames=1_000_000", "hydra.run.dir=run")
    wait_until((tmp_path / "run" / LAST).exists, process)
    pids = children(process)
    worker = next(pid for pid in pids if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(worker, signal.SIGKILL)
    errors = process.communicate(timeout=HANG_SECONDS)[1]
    wait_for_the_end_of(pids)
    assert process.returncode == 1 and "Traceback" not in errors, errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert lines in [[f"error: collection worker {w} of 2 was killed by SIGKILL"] for w in (0, 1)]
    runs = MlflowClient(f"sqlite:///{store}").search_runs(["1"])
    assert [run.info.status for run in runs] == ["FAILED"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [SAC, PPO], ids=["sac", "ppo"])
def test_a_run_stopped_by_ctrl_c_goes_on_exactly(words, start, tmp_path):
    """Ctrl-C reaches the workers too, which leave it to the training process."""
    words = [*words, "logger=none", "compile=false"]
    process = start(*words, "total_frames=1_000_000", "hydra.run.dir=stopped")
    wait_until((tmp_path / "stopped" / LAST).exists, process)
    pids = children(process)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=HANG_SECONDS)[1]
    assert process.returncode == 130 and "stopping after this iteration" in errors, errors
    assert "Traceback" not in errors
    wait_for_the_end_of(pids)
    words.append(f"total_frames={state_of(tmp_path / 'stopped')['policy']['env_frames'] + 640}")
    for more in (["resume=stopped"], ["hydra.run.dir=whole"]):
        process = start(*words, *more)
        errors = process.communicate(timeout=HANG_SECONDS)[1]
        assert process.returncode == 0, errors
    assert differing(state_of(tmp_path / "whole"), state_of(tmp_path / "stopped")) == []
