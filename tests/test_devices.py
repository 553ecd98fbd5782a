"""Two training processes (gloo, on the CPU), started by the command a user types: one result, one end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from test_resume import LAST, differing, state_of
from waiting import HANG_SECONDS, wait_until

SAC = [
    "algo=sac",
    "data.init_random_frames=320",
    "data.batch_size=16",
    "data.frames_per_batch=64",
    "data.utd_ratio=0.25",
]
PPO = ["algo=ppo", "data.frames_per_batch=128", "data.num_envs=2", "algo.num_epochs=2", "algo.minibatch_size=32"]
SMALL = ["algo.hidden_sizes=[16]", "actor.hidden_sizes=[16]", "env=Pendulum-v1", "callbacks=minimal", "logger=none"]


@pytest.fixture
def start(tmp_path: Path, clean_environ: dict[str, str]) -> Callable[..., subprocess.Popen]:
    """Starts the train command with two processes, unless told otherwise, and returns the first."""

    def start(*words: str, devices: int = 2, **environ: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "pmoe_lightning.train", *SMALL, *words, f"trainer.devices={devices}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=clean_environ | environ, **pipes)

    return start


def other_process(first: subprocess.Popen) -> int | None:
    """The process that trains with the first. Before it has become that, its parent is in the kernel, deaf."""
    for pid in map(int, Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()):
        with suppress(OSError):  # another child, which has just ended
            if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
    return None


def wait_for_other_process(first: subprocess.Popen) -> int:
    wait_until(lambda: other_process(first), first)
    return other_process(first)


def is_alive(pid: int) -> bool:
    """Whether it runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# SAC: an update for four frames after the warm-up, whatever the number of processes. PPO: two epochs of four
# minibatches for each rollout but the first, which only initialises the statistics.
@pytest.mark.parametrize(
    "words, updates",
    [
        pytest.param(SAC, (1280 - 320) // 4, id="sac"),
        pytest.param(PPO, 9 * 2 * 4, id="ppo", marks=pytest.mark.slow),
    ],
)
def test_two_processes_share_the_frames_and_take_the_updates_of_one(words, updates, start, tmp_path):
    process = start(*words, "total_frames=1280", "data.frames_per_epoch=640", "hydra.run.dir=run")
    out, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, errors
    assert out.count("results ") == 1  # the first process alone reports
    checkpoint = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert checkpoint["policy"]["env_frames"] == 1280 and checkpoint["policy"]["updates"] == updates
    assert checkpoint["run"]["processes"] == 2
    first, second = checkpoint["experience"]
    assert not torch.equal(first["root"]["observation"], second["root"]["observation"])
    if "replay" in first:
        assert len(first["replay"]["transitions"]["action"]) == len(second["replay"]["transitions"]["action"]) == 640
        assert not torch.equal(*(each["replay"]["transitions"]["action"] for each in (first, second)))


@pytest.mark.slow
@pytest.mark.parametrize("words", [SAC, PPO], ids=["sac", "ppo"])
def test_compiled_processes_learn_what_readable_ones_do(words, start, tmp_path):
    """To rounding, of which every action hands some on to the next."""
    for name, compile in {"compiled": "true", "readable": "false"}.items():
        run = [f"compile={compile}", f"hydra.run.dir={name}", "total_frames=640", "data.frames_per_epoch=640"]
        process = start(*words, *run)
        errors = process.communicate(timeout=HANG_SECONDS)[1]
        assert process.returncode == 0, errors
    compiled, readable = (state_of(tmp_path / name) for name in ("compiled", "readable"))
    assert compiled["updates"] == readable["updates"] > 0
    torch.testing.assert_close(compiled["state_dict"], readable["state_dict"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        PPO,
        pytest.param(SAC, marks=pytest.mark.slow),
        pytest.param([*PPO, "data.num_workers=2", "data.num_envs=1"], marks=pytest.mark.slow),
    ],
    ids=["ppo", "sac", "ppo-with-workers"],
)
def test_a_stopped_run_of_two_processes_goes_on_exactly(words, start, tmp_path):
    """SIGTERM to the first process alone; both stop after the same iteration, and both go on as they would have."""
    words = [*words, "data.frames_per_epoch=640", "compile=false"]
    process = start(*words, "total_frames=1_000_000", "hydra.run.dir=stopped")
    wait_until((tmp_path / "stopped" / LAST).exists, process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=HANG_SECONDS)[1]
    assert process.returncode == 143 and "stopping after this iteration" in errors, errors
    words.append(f"total_frames={state_of(tmp_path / 'stopped')['policy']['env_frames'] + 640}")
    for more in (["resume=stopped"], ["hydra.run.dir=whole"]):
        process = start(*words, *more)
        errors = process.communicate(timeout=HANG_SECONDS)[1]
        assert process.returncode == 0, errors
    assert differing(state_of(tmp_path / "whole"), state_of(tmp_path / "stopped")) == []


def test_another_number_of_processes_cannot_go_on(run_module, tmp_path):
    words = [*PPO, *SMALL, "total_frames=256", "data.frames_per_epoch=128"]
    assert run_module("pmoe_lightning.train", *words, "hydra.run.dir=run").returncode == 0
    words[words.index("total_frames=256")] = "total_frames=512"
    done = run_module("pmoe_lightning.train", *words, "trainer.devices=2", "resume=run")
    assert done.returncode == 2 and "the experience of 1 training processes, and this run has 2" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_dies_takes_the_other_with_it(rank, start, tmp_path):
    process = start(*PPO, "total_frames=1_000_000", "data.frames_per_epoch=256", "hydra.run.dir=run")
    wait_until((tmp_path / "run" / LAST).exists, process)
    second = other_process(process)
    os.kill(second if rank else process.pid, signal.SIGKILL)
    errors = process.communicate(timeout=HANG_SECONDS)[1]
    wait_until(lambda: not is_alive(second))
    if rank == 1:
        assert process.returncode == 1
        assert errors.splitlines()[-1] == "error: training process 1 of 2 was killed by SIGKILL"
        assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_before_they_are_together_takes_the_other_with_it(rank, start):
    """The second has just been started, and waits for nobody yet."""
    process = start(*PPO, "hydra.run.dir=run")
    second = wait_for_other_process(process)
    os.kill(second, signal.SIGSTOP)
    os.kill(second if rank else process.pid, signal.SIGKILL)
    os.kill(second, signal.SIGCONT)
    errors = process.communicate(timeout=HANG_SECONDS)[1]
    wait_until(lambda: not is_alive(second))
    if rank == 1:
        assert process.returncode == 1
        assert errors.splitlines()[-1] == "error: training process 1 of 2 was killed by SIGKILL"


def test_a_signal_ends_the_wait_for_a_process_that_does_not_come(start, tmp_path, store):
    process = start(*PPO, "hydra.run.dir=run", "logger=mlflow")
    second = wait_for_other_process(process)
    os.kill(second, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=HANG_SECONDS)[1]
    assert process.returncode == 143 and "Traceback" not in errors, errors
    wait_until(lambda: not is_alive(second))
    (run,) = MlflowClient(f"sqlite:///{store}").search_runs(["1"])
    assert run.info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_two_machines_train_together_and_end_together(killed, start, tmp_path):
    """The same command on each, which know of each other by an address alone: here both are this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = [*PPO, "trainer.num_nodes=2", "total_frames=1_000_000", "data.frames_per_epoch=256"]
    nodes = [start(*words, f"hydra.run.dir=node{i}", devices=1, NODE_RANK=str(i), **address) for i in range(2)]
    wait_until((tmp_path / "node0" / LAST).exists, nodes[0])
    checkpoint = torch.load(tmp_path / "node0" / LAST, weights_only=True)
    first, second = checkpoint["experience"]
    assert checkpoint["run"]["processes"] == 2
    assert not torch.equal(first["root"]["observation"], second["root"]["observation"])
    assert not (tmp_path / "node1" / LAST).exists()  # the first machine alone writes
    nodes[killed].kill()
    errors = nodes[1 - killed].communicate(timeout=HANG_SECONDS)[1]
    assert nodes[1 - killed].returncode == 1
    assert "Traceback" not in errors
    if killed == 1:
        assert errors.splitlines()[-1] == "error: contact with another training process was lost"
    nodes[killed].communicate(timeout=HANG_SECONDS)
