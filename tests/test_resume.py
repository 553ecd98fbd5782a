"""A run that was stopped and resumed ends, to the last bit, as the run that was not."""

from __future__ import annotations

import gc
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from alignment import numpy_memory_begins, products_depend_on_alignment
from conftest import ROOT
from gymnasium.envs.classic_control import PendulumEnv
from hydra.core.override_parser.overrides_parser import OverridesParser
from mlflow import MlflowClient
from omegaconf import DictConfig, OmegaConf
from waiting import HANG_SECONDS, wait_until

from pmoe_lightning.algorithms.sac import SAC as SAC_ALGORITHM
from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.checkpoints.files import previous_checkpoint, write_checkpoint
from pmoe_lightning.configuration import normalise_argv, quote_value
from pmoe_lightning.data.collection import CollectedData
from pmoe_lightning.envs import GymnasiumEnv
from pmoe_lightning.evaluate import main as evaluate
from pmoe_lightning.evaluate import parse
from pmoe_lightning.run.resume import command

SAC = ["algo=sac", "data.init_random_frames=64", "data.batch_size=16", "data.frames_per_epoch=160"]
PPO = ["data.frames_per_batch=64", "data.frames_per_epoch=128", "algo.num_epochs=2", "algo.minibatch_size=32"]
SAFE = ["safe=velocity", "env.velocity_limit=0.1"]
#: Stopped after 19 updates, one after a turn of the actor.
CROSSQ = ["critic=crossq", "data.utd_ratio=0.1", "data.n_step=3", "data.normalize_observation=true"]
QUIET = ["algo.hidden_sizes=[16]", "data.num_envs=2", "logger=none", "callbacks=minimal"]
LAST, BEST = Path("checkpoints", "last.ckpt"), Path("checkpoints", "best.ckpt")
# Counted by Lightning, and other where a run ended in the middle of an epoch before it was extended.
LIGHTNINGS_OWN = ("loops", "epoch", "callbacks", "pytorch-lightning_version")


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}.{key}" for key in a.keys() ^ b.keys()]
        return missing + [where for key in a.keys() & b.keys() for where in differing(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [where for i, pair in enumerate(zip(a, b, strict=True)) for where in differing(*pair, f"{path}[{i}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        return [] if same else [path]
    return [] if a == b or a != a and b != b else [path]


def state_of(folder: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(folder / LAST)
    return {key: value for key, value in checkpoint.items() if key not in LIGHTNINGS_OWN}


@pytest.mark.parametrize(
    "words",
    [
        [*SAC, "env=Ant-v5", "actor=pmoe", "estimator=gumbel_softmax"],
        [*PPO, "env=Humanoid-v5", "actor=pmoe"],
        [*PPO, "env=Pendulum-v1", "algo=dac", "env.max_episode_steps=50"],
        [*SAC, "env=Walker2d-v5", "action_transform=hamiltonian_raw", "data.utd_ratio=0.1"],
        [*SAC, *SAFE, "env=Hopper-v5", "action_transform=hamiltonian_gated", "data.utd_ratio=0.1"],
        [*SAC, *CROSSQ, "env=Hopper-v5", "actor=pmoe"],
    ],
    ids=["sac", "ppo", "dac", "hamiltonian", "safe", "crossq"],
)
def test_a_run_that_is_extended_is_the_run_that_was_longer(words, train, tmp_path):
    words = ["+" + word if word.startswith("env.max") else word for word in [*words, *QUIET]]
    train(*words, "total_frames=450", "hydra.run.dir=whole")
    train(*words, "total_frames=256", "hydra.run.dir=extended")
    half = state_of(tmp_path / "extended")
    said = train(*words, "total_frames=450", "resume=extended")
    assert "resume     python -m pmoe_lightning.train" in said and "resume=extended" not in said.split("resume     ")[0]
    whole, extended = state_of(tmp_path / "whole"), state_of(tmp_path / "extended")
    assert differing(whole, extended) == []
    assert {"simulators", "random_states", "root"} <= extended["experience"][0].keys()
    assert differing(whole, half), "the second part of the run changed nothing"


@pytest.mark.parametrize(
    "words",
    [
        [*SAC, "env=Hopper-v5", "data.utd_ratio=0.1", "data.num_envs=2"],
        [*PPO, "env=Hopper-v5", "actor=pmoe", "data.num_envs=1", "data.normalize_observation=false"],
    ],
    ids=["sac", "ppo"],
)
def test_a_resumed_run_does_not_depend_on_where_its_process_has_memory(words, train, tmp_path):
    """On a processor whose products do, and in a process that hands NumPy other addresses than the first one."""
    words = [*words, "algo.hidden_sizes=[16]", "logger=none", "callbacks=minimal"]
    with products_depend_on_alignment():
        with numpy_memory_begins(0):
            train(*words, "total_frames=320", "hydra.run.dir=whole")
        with numpy_memory_begins(16):
            train(*words, "total_frames=192", "hydra.run.dir=resumed")
        with numpy_memory_begins(48):
            train(*words, "total_frames=320", "resume=resumed")
    assert differing(state_of(tmp_path / "whole"), state_of(tmp_path / "resumed")) == []


@pytest.mark.parametrize(
    "how", [pytest.param("resume=run", marks=pytest.mark.slow), "resume=run/checkpoints/last.ckpt", "resume=auto"]
)
def test_a_resume_reads_its_checkpoint_once_and_lets_it_go(how, train, tmp_path, monkeypatch):
    words = [*SAC, *QUIET, "env=Pendulum-v1"]
    folder = "outputs/sac-Pendulum-v1/first" if how == "resume=auto" else "run"
    train(*words, "total_frames=128", f"hydra.run.dir={folder}")
    reads, torch_load = [], torch.load
    weights: list[weakref.ref] = []

    def load(file: Any, *arguments: Any, **named: Any) -> Any:
        reads.append(Path(file).absolute().relative_to(tmp_path))
        checkpoint = torch_load(file, *arguments, **named)
        weights.append(weakref.ref(next(iter(checkpoint["state_dict"].values()))))
        return checkpoint

    alive: list[bool] = []
    start = SAC_ALGORITHM.training_step

    def training_step(self: Any, *arguments: Any) -> None:
        gc.collect()
        alive.append(weights[0]() is not None)
        start(self, *arguments)

    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(SAC_ALGORITHM, "training_step", training_step)
    train(*words, "total_frames=192", how)
    assert reads == [Path(folder, LAST)]
    assert alive and not any(alive)


@pytest.mark.parametrize("algo", ["ppo", "dac"])
def test_a_run_of_one_rollout_or_less_is_trained_on(algo, train, tmp_path):
    """The first rollout of a longer run only initialises the normalisation."""
    words = [*PPO, "env=Pendulum-v1", f"algo={algo}", "algo.hidden_sizes=[8]", "logger=none", "callbacks=minimal"]
    for frames, updates in [(1, 4), (64, 4), (65, 4), (129, 8)]:
        train(*words, "data.num_envs=2", f"total_frames={frames}", f"hydra.run.dir=run{frames}")
        assert read_checkpoint(tmp_path / f"run{frames}" / LAST)["policy"]["updates"] == updates
    train(*words, "data.num_envs=2", "total_frames=128", "resume=run64")
    assert read_checkpoint(tmp_path / "run64" / LAST)["policy"]["updates"] == 8


def test_a_run_that_would_train_nothing_is_refused(train, tmp_path):
    words = [*SAC, *QUIET, "env=Pendulum-v1", "total_frames=96"]
    assert "data.utd_ratio=0.03 owes no update for the 32 frames" in train(*words, "data.utd_ratio=0.03", code=2)
    rounded = ["total_frames=65", "data.frames_per_batch=40"]
    assert "leaves nothing of total_frames=65" in train(*SAC, *QUIET, *rounded, code=2)
    train(*words, "data.utd_ratio=0.04", "hydra.run.dir=run")
    said = train(*words, "data.utd_ratio=0.04", "total_frames=97", "resume=run", code=1)
    assert "error: nothing was trained: no update was due by frame 112; raise total_frames" in said


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="Ctrl-C", marks=pytest.mark.slow),  # what SIGTERM does
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGKILL, id="SIGKILL"),
    ],
)
def test_a_run_that_is_stopped_at_any_moment_goes_on_exactly(number, clean_environ, train, tmp_path):
    """Its own end is out of reach until it is stopped: on a busy machine it could be over before."""
    words = [*SAC, *QUIET, "env=Hopper-v5", "data.utd_ratio=0.25", "data.buffer_size=20000", "compile=false"]
    endless = [*words, "total_frames=1_000_000", "hydra.run.dir=stopped"]
    command = [sys.executable, "-m", "pmoe_lightning.train", *endless]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=clean_environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    last = tmp_path / "stopped" / LAST
    wait_until(last.exists, process)
    time.sleep(0.3)  # for the signal to come at any moment of an iteration
    process.send_signal(number)
    process.wait(HANG_SECONDS)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    words.append(f"total_frames={read_checkpoint(last)['policy']['env_frames'] + 320}")
    train(*words, "resume=auto", "hydra.run.dir=stopped")
    train(*words, "hydra.run.dir=whole")
    whole, stopped = state_of(tmp_path / "whole"), state_of(tmp_path / "stopped")
    assert differing(whole, stopped) == []
    assert sorted(os.listdir(last.parent)) == ["last.ckpt", "last.previous.ckpt"]


def test_a_stop_in_the_last_iteration_of_an_epoch_loses_no_evaluation(train, tmp_path, monkeypatch):
    words = [*SAC, "env=Pendulum-v1", "data.utd_ratio=0.25", "total_frames=480", "algo.hidden_sizes=[16]"]
    words += ["+env.max_episode_steps=50", "logger=none", "callbacks=[evaluation,checkpoint_last]"]
    words += ["callbacks.evaluation.episodes=1"]
    train(*words, "hydra.run.dir=whole")
    collect = CollectedData.collect

    def stopped_while_collecting(self):
        if self.env_frames == 304:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(self)

    with monkeypatch.context() as patch:
        patch.setattr(CollectedData, "collect", stopped_while_collecting)
        train(*words, "hydra.run.dir=stopped", code=143)
    assert read_checkpoint(tmp_path / "stopped" / LAST)["policy"]["env_frames"] == 320
    train(*words, "resume=stopped")
    assert differing(state_of(tmp_path / "whole"), state_of(tmp_path / "stopped")) == []
    whole, stopped = histories(tmp_path / "whole", tmp_path / "stopped")
    assert whole[:, 0].tolist() == [0, 160, 320, 480] and torch.equal(whole, stopped)


def histories(*folders: Path) -> list[torch.Tensor]:
    """Frames and mean returns of the evaluations of runs."""
    states = [state for folder in folders for state in read_checkpoint(folder / LAST)["callbacks"].values()]
    return [state["history"][:, :2] for state in states if "history" in state]


def test_a_run_of_the_time_when_ppos_default_was_frequency_goes_on_with_it(train, tmp_path):
    words = [*PPO, *QUIET, "env=Pendulum-v1", "algo=ppo"]
    train(*words, "estimator=frequency", "total_frames=128", "hydra.run.dir=run")
    said = train(*words, "total_frames=256", "resume=run", "estimator=marginalized", code=2)
    assert "is a run with another estimator._target_" in said
    train(*words, "total_frames=256", "resume=run")  # as its command was then
    train(*words, "total_frames=384", "resume=auto", "hydra.run.dir=run")
    last = read_checkpoint(tmp_path / "run" / LAST)
    assert last["run"]["configuration"]["estimator._target_"].endswith("Frequency")
    assert last["policy"]["env_frames"] == 384 and last["policy"]["action_values"]
    train(*words, "estimator=frequency", "estimator.weight=0.5", "total_frames=128", "hydra.run.dir=other")
    assert "another estimator.weight" in train(*words, "total_frames=256", "resume=other", code=2)


@pytest.mark.slow
def test_a_stop_ends_a_measurement_of_modes_and_the_resumed_run_makes_it(train, tmp_path, monkeypatch):
    words = [*SAC, "env=MultiGoal-v0", "data.utd_ratio=0.25", "total_frames=480", "algo.hidden_sizes=[16]"]
    words += ["logger=none", "callbacks=[modes,checkpoint_last]", "callbacks.modes.points=3"]
    words += ["callbacks.modes.episodes=2"]
    train(*words, "hydra.run.dir=whole")
    step, measured = GymnasiumEnv.step_and_maybe_reset, []  # for training has a faster way

    def step_and_stop(self, root):
        measured.append(1)
        if len(measured) == 70:  # drawn, then by the rule, 30 steps each: in the second measurement
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, root)

    with monkeypatch.context() as patch:
        patch.setattr(GymnasiumEnv, "step_and_maybe_reset", step_and_stop)
        train(*words, "hydra.run.dir=stopped", code=143)
    assert len(measured) == 70  # it ended there and then
    stopped = read_checkpoint(tmp_path / "stopped" / LAST)
    (rows,) = (state["history"] for state in stopped["callbacks"].values() if "history" in state)
    assert stopped["policy"]["env_frames"] == 320 and rows[:, 0].tolist() == [160]
    train(*words, "resume=stopped")
    assert differing(state_of(tmp_path / "whole"), state_of(tmp_path / "stopped")) == []
    of_modes = [
        next(
            state["history"]
            for state in read_checkpoint(tmp_path / run / LAST)["callbacks"].values()
            if "frames" in state
        )
        for run in ("whole", "stopped")
    ]
    assert of_modes[0][:, 0].tolist() == [160, 320, 480]
    # What was broken off is measured after the next iteration, with the policy of then.
    assert of_modes[1][[0, 2]].equal(of_modes[0][[0, 2]]) and 320 < of_modes[1][1, 0] < 480


@pytest.mark.parametrize(
    ("number", "code", "frames", "evaluations"),
    [(signal.SIGINT, 130, 0, 0), (signal.SIGTERM, 143, 320, 2), (signal.SIGINT, 130, 480, 3)],
)
def test_a_stop_ends_an_evaluation_and_the_resumed_run_makes_up_for_it(
    number, code, frames, evaluations, train, tmp_path, monkeypatch
):
    """Here an evaluation of what turns out to be the best policy: with seed 0 after 320 frames, with 4 after 480."""
    words = [*SAC, "env=Pendulum-v1", "data.utd_ratio=0.25", "total_frames=480", "algo.hidden_sizes=[16]"]
    words += ["+env.max_episode_steps=50", "logger=none", "callbacks=[evaluation,checkpoint_best,checkpoint_last]"]
    words += ["callbacks.evaluation.episodes=1", "callbacks.evaluation.rule=trained"]
    words += [f"seed={0 if frames == 320 else 4}"]
    step, steps = GymnasiumEnv.step_and_maybe_reset, []  # for training has a faster way; 50 of the rule, 50 drawn

    def step_and_stop(self, root):
        steps.append(1)
        if len(steps) == 100 * evaluations + 10:
            os.kill(os.getpid(), number)
        return step(self, root)

    with monkeypatch.context() as patch:
        patch.setattr(GymnasiumEnv, "step_and_maybe_reset", step_and_stop)
        train(*words, "hydra.run.dir=stopped", code=code)
    assert len(steps) == 100 * evaluations + 10
    if frames == 0:
        assert not (tmp_path / "stopped" / LAST).exists(), "there is nothing to go on from"
        return
    assert read_checkpoint(tmp_path / "stopped" / LAST)["policy"]["env_frames"] == frames
    assert [len(history) for history in histories(tmp_path / "stopped")] == [evaluations]
    train(*words, "hydra.run.dir=whole")
    train(*words, "resume=stopped")
    assert differing(state_of(tmp_path / "whole"), state_of(tmp_path / "stopped")) == []
    if frames < 480:
        assert torch.equal(*histories(tmp_path / "whole", tmp_path / "stopped"))
    whole, stopped = (read_checkpoint(tmp_path / name / BEST)["policy"] for name in ("whole", "stopped"))
    assert whole["env_frames"] == stopped["env_frames"] == frames
    assert differing(whole["state_dict"], stopped["state_dict"]) == []


SLURM = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NODELIST": "here"}
SLURM |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NODELIST": "here"}


def test_a_preempted_slurm_job_is_saved_requeued_and_goes_on_exactly(train, tmp_path, monkeypatch):
    words = [*SAC, *QUIET, "env=Pendulum-v1", "total_frames=480", "data.utd_ratio=0.25"]
    train(*words, "hydra.run.dir=whole")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" $(ls {tmp_path}/outputs/*/*/{LAST}) >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    collect = CollectedData.collect

    def preempted_while_collecting(self):
        if self.env_frames == 304:
            os.kill(os.getpid(), signal.SIGUSR1)
        return collect(self)

    with monkeypatch.context() as patch:
        patch.setattr(CollectedData, "collect", preempted_while_collecting)
        said = train(*words, "resume=auto", code=143)
    last = run_folder(tmp_path) / LAST
    assert "SLURM job 4711 is saved and requeued" in said
    assert (tmp_path / "requeued").read_text() == f"requeue 4711 {last}\n", "saved first, then requeued, once"
    assert read_checkpoint(last)["policy"]["env_frames"] == 320, "after the iteration in which the signal came"
    train(*words, "resume=auto")
    assert differing(state_of(tmp_path / "whole"), state_of(last.parent.parent)) == []
    assert not list(tmp_path.rglob("hpc_ckpt*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, clean_environ) -> Path:
    """A run of 256 frames in outputs/, tracked in mlflow.db."""
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, "-m", "pmoe_lightning.train", *TRACKED, "total_frames=256"]
    done = subprocess.run(command, cwd=folder, env=clean_environ, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    return folder


TRACKED = [*PPO, "env=Pendulum-v1", "algo.hidden_sizes=[16]", "callbacks=[metrics,checkpoint_last]"]
TRACKED += ["callbacks.metrics.every_frames=64", "data.num_envs=2"]


def run_folder(root: Path) -> Path:
    (folder,) = (path.parent.parent for path in root.glob(f"outputs/*/*/{LAST}"))
    return folder


def test_the_same_mlflow_run_goes_on_without_gap_or_overlap(train, tmp_path):
    train(*TRACKED, "total_frames=256")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (before,) = client.search_runs(["1"])
    # As if killed before the last checkpoint: the points beyond it are known already.
    shutil.copy(previous_checkpoint(run_folder(tmp_path) / LAST), run_folder(tmp_path) / LAST)
    train(*TRACKED, "total_frames=512", f"resume={before.info.run_id}")
    (after,) = client.search_runs(["1"])
    assert after.info.run_id == before.info.run_id and after.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(after.info.run_id, "train/loss_critic")]
    assert steps == list(range(steps[0], 513, 64))
    assert "changed_params" in after.data.tags, "total_frames"


def test_auto_finds_the_unfinished_run_of_this_configuration(finished, train, tmp_path):
    shutil.copytree(finished / "outputs", tmp_path / "outputs")
    folder = run_folder(tmp_path)
    quiet = [*TRACKED, "logger=none", "total_frames=320", "resume=auto"]
    assert "starting a new one" in train(*quiet, "seed=5")
    other = {path.parent.parent for path in tmp_path.glob(f"outputs/*/*/{LAST}")} - {folder}
    assert len(other) == 1, "a run of another seed is another run"
    train(*quiet)
    assert read_checkpoint(folder / LAST)["policy"]["env_frames"] == 320
    assert "starting a new one" in train(*quiet), "a finished run is not resumed"


def test_auto_finds_runs_of_environments_of_any_name(train, tmp_path):
    """A slash in the id makes a folder more, and a folder that is given may have a name that has to be quoted."""
    gymnasium.register("some-one/Pendulum_of.theirs-v3", PendulumEnv, max_episode_steps=20)
    words = [*TRACKED, "env=some-one/Pendulum_of.theirs-v3", "logger=none", "resume=auto"]
    for given in ([], ["hydra.run.dir='runs, of ${algo.gamma}/seed=${seed}'"]):
        train(*words, *given, "total_frames=128")
        train(*words, *given, "total_frames=192")
    found = sorted(tmp_path.rglob("last.ckpt"))
    assert len(found) == 2 and (tmp_path / "runs, of 0.99" / "seed=0" / LAST) in found
    assert [read_checkpoint(path)["policy"]["env_frames"] for path in found] == [192, 192]


ODDITIES = [*" ,=[]{}()$#;~&*é日\"'", "${", "\\", "\\'"]


def odd_names(number: int) -> list[str]:
    generator = random.Random(0)
    names = ["".join(generator.choices([*ODDITIES, "a"], k=generator.randint(1, 8))) for _ in range(number)]
    return [*ODDITIES, *names]


def as_hydra_reads(words: list[str]) -> DictConfig:
    overrides = OverridesParser.create().parse_overrides(words)
    return OmegaConf.create({override.get_key_element(): override.value() for override in overrides})


def test_the_printed_lines_name_any_folder(tmp_path):
    """Pasted into a shell, and read by Hydra and by the evaluate command, they are about the same folder."""
    for name in odd_names(40):
        folder = tmp_path / name / "run"
        words = shlex.split(command(["env.id=Pendulum-v1", "hydra.run.dir=x"], folder, ["--config-dir", name]))
        assert words[:5] == ["python", "-m", "pmoe_lightning.train", "--config-dir", name]
        assert as_hydra_reads(normalise_argv(words[5:])).resume == str(folder)
        (word,) = shlex.split(shlex.quote(f"checkpoint={folder}"))
        assert parse([word]).checkpoint == str(folder)


def test_a_plain_folder_is_printed_as_it_is():
    """And read as it is, whatever stands beside its slashes."""
    folder = "/home/me/outputs/dm_control/2026-11-26_10-00-00"
    assert command([], Path(folder)).endswith(f" -m pmoe_lightning.train resume={folder}")
    generator = random.Random(0)
    for _ in range(40):
        folder = "/" + "".join(generator.choices("a0_/.:@%-e", k=12))
        assert quote_value(folder) == folder
        assert as_hydra_reads([f"resume={folder}"]).resume == folder


def test_a_run_in_an_odd_folder_is_resumed_and_evaluated_by_its_printed_lines(train, tmp_path, capfd):
    folder = tmp_path / "a b,c=d'e\"[f]{g}$h\\i é"
    said = train(*TRACKED, "logger=none", "total_frames=128", f"hydra.run.dir={quote_value(str(folder))}")
    lines = {line.split()[0]: shlex.split(line)[1:] for line in said.splitlines() if " -m pmoe_lightning." in line}
    train(*lines["resume"][3:], "total_frames=192")
    assert read_checkpoint(folder / LAST)["policy"]["env_frames"] == 192
    assert evaluate([*lines["evaluate"][3:], "episodes=1"]) == 0
    assert str(folder) in capfd.readouterr().out


def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished, train, tmp_path):
    shutil.copytree(finished / "outputs", tmp_path / "outputs")
    folder = run_folder(tmp_path)
    intact = (folder / LAST).read_bytes()
    assert previous_checkpoint(folder / LAST).exists()
    (folder / LAST).write_bytes(intact[:-9] + b"123456789")
    (folder / "checkpoints" / ".last.ckpt.partial").write_bytes(intact[:1000])
    said = train(*TRACKED, "logger=none", "total_frames=320", f"resume={folder}")
    assert "SHA-256 does not match" in said and "using the one before it" in said and "removed" in said
    assert read_checkpoint(folder / LAST)["policy"]["env_frames"] == 320


REFUSED = [
    (["resume=nowhere"], 1, "checkpoint nowhere does not exist"),
    (["resume={folder}", "total_frames=512", "algo.gamma=0.5"], 2, "another algo.gamma: repeat its command, with algo"),
    (["resume={folder}", "total_frames=512", "env=Hopper-v5"], 2, "with env.id=Pendulum-v1"),
    (["resume={folder}", "total_frames=512", "-m"], 2, "leave out --multirun"),
    (["resume={acting}", "total_frames=512"], 1, "holds a policy but not the run that made it"),
    (["resume={newer}", "total_frames=512"], 1, "format 2 is not 1, the one this version reads"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "message"), REFUSED)
def test_what_cannot_be_resumed_is_one_line(words, code, message, finished, train, tmp_path):
    folder = run_folder(finished)
    checkpoint = read_checkpoint(folder / LAST)
    checkpoint["policy"]["description"]["format"] += 1
    write_checkpoint(checkpoint, tmp_path / "newer.ckpt")
    checkpoint["policy"]["description"]["format"] -= 1
    del checkpoint["experience"]
    write_checkpoint(checkpoint, tmp_path / "acting.ckpt")
    words = [word.format(folder=folder, acting="acting.ckpt", newer="newer.ckpt") for word in words]
    said = train(*TRACKED, "logger=none", *words, code=code)
    assert message in said and said.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["acting.ckpt", "newer.ckpt"]


FIXTURE = ["algo=sac", "algo.hidden_sizes=[32,32]", "data.init_random_frames=256", "data.batch_size=64"]
FIXTURE += ["data.frames_per_epoch=512", "logger=none", "callbacks=minimal", "compile=false"]


def test_what_learned_from_actions_in_units_of_the_environment_is_not_resumed(train):
    """Its bounds are +-2; the entropy it aimed at and the actions its critics read are of another size."""
    checkpoint = ROOT / "tests" / "fixtures" / "sac-pendulum.ckpt"
    words = [*FIXTURE, "env.id=Pendulum-v1", "total_frames=1056", f"resume={checkpoint}"]
    assert "it can be evaluated, not resumed" in train(*words, code=2)


def test_a_run_of_an_earlier_version_goes_on_where_the_bounds_are_one(train, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "fixtures" / "sac-halfcheetah.ckpt", folder / "last.ckpt")
    train(*FIXTURE, "total_frames=1056", f"resume={folder.parent}", f"hydra.run.dir={folder.parent}")
    checkpoint = read_checkpoint(folder / "last.ckpt")
    assert checkpoint["policy"]["env_frames"] == 1056 and checkpoint["updates"] == 768 + 32
    assert checkpoint["policy"]["description"]["action_units"] == "normalized"
