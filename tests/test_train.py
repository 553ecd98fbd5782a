"""The train command from end to end: what a run leaves behind, how it ends, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
import pytest
from lightning.pytorch import Callback
from mlflow.tracking import MlflowClient
from tensordict import TensorDict
from waiting import HANG_SECONDS, RETRIES_SECONDS, wait_until

import pmoe_lightning.callbacks.evaluation
import pmoe_lightning.run.training
import pmoe_lightning.train
from pmoe_lightning import load_policy
from pmoe_lightning.algorithms.base import AbstractAlgorithm
from pmoe_lightning.algorithms.on_policy import OnPolicyAlgorithm
from pmoe_lightning.callbacks import Evaluation, FinalPolicy, FramesProgressBar
from pmoe_lightning.data.collection import CollectedData
from pmoe_lightning.data.on_policy import OnPolicyData

ROOT = Path(__file__).resolve().parents[1]
CRASHING_ENV = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv


class CrashingEnv(PendulumEnv):
    def step(self, action):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps > 300:
            raise ZeroDivisionError("a bug in the environment")
        return super().step(action)


gymnasium.register("Crashing-v0", CrashingEnv, max_episode_steps=200)
"""


def the_run(folder: Path):
    """The only MLflow run recorded in the folder's store, and a client for it."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len(runs) == 1
    return runs[0], client


def artifacts(client: MlflowClient, run_id: str, folder: str = "") -> set[str]:
    return {file.path for file in client.list_artifacts(run_id, folder or None)}


def assert_complete(run, client: MlflowClient, loss: str) -> None:
    """Metrics against environment frames, parameters, figures, video, checkpoints, configuration and the model."""
    assert run.info.status == "FINISHED"
    assert run.data.params["env.id"] == "Pendulum-v1" and run.data.params["actor.num_components"] == "4"
    assert {
        "eval/episode_return",
        loss,
        "train/episode_return",
        "train/mixture/router_entropy",
    } <= set(run.data.metrics)
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "eval/episode_return")]
    assert steps == [0, 640, 1280]
    found = artifacts(client, run.info.run_id)
    assert {"config.yaml", "versions.json", "figures", "videos", "checkpoints"} <= found
    assert artifacts(client, run.info.run_id, "checkpoints") == {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert "figures/learning_curve.png" in artifacts(client, run.info.run_id, "figures")
    models = client.search_logged_models([run.info.experiment_id])
    assert [model.source_run_id for model in models] == [run.info.run_id]


def assert_acts(checkpoint: Path) -> None:
    policy = load_policy(checkpoint)
    action = policy(TensorDict({"observation": [[0.1, 0.2, 0.3]]}, batch_size=[1]))["action"]
    assert action.shape == (1, 1) and action.abs().max() <= 2


# -- runs --------------------------------------------------------------------------------------------------------------
def test_sac_from_the_command_line(run_module, tmp_path):
    done = run_module("pmoe_lightning.train", "debug=default", "algo=sac", "seed=3")
    assert done.returncode == 0, done.stderr
    run, client = the_run(tmp_path)
    assert_complete(run, client, "train/loss_frequency")
    assert (run.data.params["algo"], run.data.params["seed"]) == ("sac", "3")
    (folder,) = (tmp_path / "outputs").glob("sac-Pendulum-v1/*")
    assert_acts(folder / "checkpoints" / "best.ckpt")
    for shown in (f"{folder}", "checkpoints/best.ckpt", run.info.run_id, "mlflow ui", "pmoe_lightning.evaluate"):
        assert shown in done.stdout
    assert "Warning" not in done.stderr and "INFO" not in done.stderr


def test_a_safe_run_logs_what_it_costs(run_module, tmp_path, store):
    """And what it leaves behind is the safe policy, whose evaluation says what it costs, too."""
    words = ["algo=sac", "safe=velocity", "env=Hopper-v5", "env.velocity_limit=0.001", "algo.hidden_sizes=[16]"]
    words += ["total_frames=600", "data.frames_per_epoch=300", "data.init_random_frames=200", "data.batch_size=16"]
    words += ["callbacks=[metrics,evaluation,checkpoint_last]", "callbacks.metrics.every_frames=100", "safe.gamma=0.5"]
    done = run_module("pmoe_lightning.train", *words, "callbacks.evaluation.episodes=2")
    assert done.returncode == 0, done.stderr
    run, client = the_run(tmp_path)
    assert run.data.params["safe"] == "velocity" and run.data.params["env.velocity_limit"] == "0.001"

    def history(name: str) -> list[float]:
        return [point.value for point in client.get_metric_history(run.info.run_id, name)]

    assert history("train/violations") == sorted(history("train/violations"))
    assert max(history("train/violations")) > 0 and max(history("train/episode_cost")) > 0
    assert history("eval/episode_cost") == history("eval/violations") and len(history("eval/violations")) == 3
    assert min(history("train/loss_cost")) > 0 and max(history("train/predicted_cost")) < 1
    assert min(history("train/multiplier")) >= 0 < max(history("train/multiplier"))
    (checkpoint,) = (tmp_path / "outputs").glob("*/*/checkpoints/last.ckpt")
    done = run_module("pmoe_lightning.evaluate", f"checkpoint={checkpoint}", "episodes=2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["costs"] == result["violations"] and len(result["costs"]) == 2


def test_ppo_through_mlflow_run_is_one_run(tmp_path, store, clean_environ):
    uri = f"sqlite:///{store}"
    MlflowClient(uri).create_experiment("through mlflow run", artifact_location=(tmp_path / "artifacts").as_uri())
    python = Path(sys.executable).parent
    environ = clean_environ | {"MLFLOW_TRACKING_URI": uri, "PATH": f"{python}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "--env-manager", "local"]
    command += ["--experiment-name", "through mlflow run", "-P", "algo=ppo", "-P", "env=Pendulum-v1", "-P", "seed=5"]
    command += ["-P", f"overrides=debug=default hydra.run.dir='{tmp_path / 'a folder'}'"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run, client = the_run(tmp_path)
    assert_complete(run, client, "train/loss_objective")
    assert (run.data.params["algo"], run.data.params["seed"], run.data.params["env"]) == ("ppo", "5", "Pendulum-v1")
    assert "changed_params" not in run.data.tags
    assert_acts(tmp_path / "a folder" / "checkpoints" / "last.ckpt")


@contextmanager
def started(command: list[str], **arguments) -> Iterator[subprocess.Popen]:
    """A process group of its own that ends here, and that obeys Ctrl-C even where the tests themselves ignore it."""

    def obey_ctrl_c() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, start_new_session=True, preexec_fn=obey_ctrl_c, **arguments) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for_first_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    wait_until((folder / "checkpoints" / "last.ckpt").exists, process)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
        pytest.param(signal.SIGINT, 130, id="Ctrl-C behind tee", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, id="SIGHUP", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_is_closed_and_keeps_its_policy(number, code, tmp_path, store, clean_environ):
    """Ctrl-C ends the ``tee`` behind a run too, and SIGHUP comes from a terminal that is gone."""
    words = ["debug=default", "callbacks=[minimal,final_policy]", "total_frames=1000000", "hydra.run.dir=run"]
    command = [sys.executable, "-m", "pmoe_lightning.train", *words]
    reads, writes = os.openpty() if number == signal.SIGHUP else os.pipe()
    os.set_blocking(reads, False)
    said = b""

    def read_on() -> None:
        nonlocal said
        with suppress(BlockingIOError):
            said += os.read(reads, 65536)

    with started(command, cwd=tmp_path, env=clean_environ, stdout=writes, stderr=writes) as process:
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"
        wait_until(lambda: read_on() or last.exists(), process)
        if number != signal.SIGTERM:
            os.close(reads)
        os.close(writes)
        process.send_signal(number)
        process.wait(HANG_SECONDS)
    if number == signal.SIGTERM:
        read_on()
        os.close(reads)
        assert b"stopping after this iteration" in said and b"results  " in said
    assert process.returncode == code
    assert b"Traceback" not in said
    run, client = the_run(tmp_path)
    assert run.info.status == "KILLED"
    assert "checkpoints" in artifacts(client, run.info.run_id)
    assert_acts(last)


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGINT, id="Ctrl-C"), pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow)],
)
def test_a_run_stopped_under_mlflow_run_ends_as_killed(number, tmp_path, store, clean_environ):
    """``mlflow run`` itself records FAILED for whatever does not exit with 0."""
    uri = f"sqlite:///{store}"
    MlflowClient(uri).create_experiment("stopped", artifact_location=(tmp_path / "artifacts").as_uri())
    environ = clean_environ | {"MLFLOW_TRACKING_URI": uri}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "--env-manager", "local"]
    command += ["--experiment-name", "stopped", "-P", "algo=ppo", "-P", "total_frames=1000000"]
    command += ["-P", f"overrides=debug=default callbacks=minimal hydra.run.dir='{tmp_path / 'run'}'"]
    with started(command, env=environ, stderr=subprocess.DEVNULL) as process:
        wait_for_first_checkpoint(tmp_path / "run", process)
        os.killpg(process.pid, number)  # as a terminal or a scheduler does: to every process of the group
        process.wait(HANG_SECONDS)
        # On SIGTERM ``mlflow run`` is gone at once, while the training still saves and closes.
        wait_until(lambda: the_run(tmp_path)[0].info.status == "KILLED")


def test_a_bug_keeps_its_traceback_and_the_run_is_failed(run_module, tmp_path, store, clean_environ):
    (tmp_path / "crashing.py").write_text(CRASHING_ENV)
    words = ["env=crashing:Crashing-v0", "debug=default", "callbacks=minimal"]
    path = os.pathsep.join([clean_environ["PYTHONPATH"], str(tmp_path)])
    done = run_module("pmoe_lightning.train", *words, PYTHONPATH=path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "crashing.py" in done.stderr and "ZeroDivisionError" in done.stderr
    assert the_run(tmp_path)[0].info.status == "FAILED"


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_two_processes_are_one_run(run_module, tmp_path, algo):
    words = [f"algo={algo}", "debug=default", "actor=gaussian", "estimator=marginalized", "trainer.devices=2"]
    done = run_module("pmoe_lightning.train", *words, "trainer.accelerator=cpu")
    assert done.returncode == 0, done.stderr
    run, client = the_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert max(point.step for point in client.get_metric_history(run.info.run_id, "eval/episode_return")) == 1280
    (checkpoint,) = (tmp_path / "outputs").rglob("last.ckpt")
    assert_acts(checkpoint)


# -- runs that end early -----------------------------------------------------------------------------------------------
STAGES = {
    "the trainer is made": (pmoe_lightning.run.training, "make_trainer"),
    "networks are made": (pmoe_lightning.run.training, "make_run"),
    "parameters are logged": (pmoe_lightning.run.training, "_parameters"),
    "data are set up": (OnPolicyData, "setup"),
    "callbacks are set up": (FramesProgressBar, "setup"),
    "the fit starts": (AbstractAlgorithm, "on_fit_start"),
    "the first policy is evaluated": (pmoe_lightning.callbacks.evaluation, "evaluate_policy"),
    "the first rollout is collected": (CollectedData, "collect"),
    "the first update is made": (OnPolicyAlgorithm, "training_step"),
    "the policy is evaluated again": (Evaluation, "on_train_epoch_end"),
    "the best policy is kept": (FinalPolicy, "on_train_end"),
}
ENDS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "a bug": None, "SIGHUP": signal.SIGHUP}
SHORT = ["env=Pendulum-v1", "+env.max_episode_steps=20", "algo.hidden_sizes=[8]", "algo.num_epochs=1"]
SHORT += ["data.num_envs=2"]
SHORT += ["data.frames_per_batch=64", "data.frames_per_epoch=128", "total_frames=256"]


@pytest.mark.parametrize(
    ("stage", "end"),
    [
        pytest.param(stage, end, marks=[] if (i + j) % len(ENDS) == 0 else pytest.mark.slow)
        for i, stage in enumerate(STAGES)
        for j, end in enumerate(ENDS)
    ],
)
def test_at_whatever_stage_a_run_ends_it_says_why(stage, end, train, tmp_path, store, monkeypatch):
    owner, name = STAGES[stage]
    method, calls = getattr(owner, name), []

    def ends(*arguments, **keywords):
        calls.append(name)
        if len(calls) > 1:
            return method(*arguments, **keywords)
        if ENDS[end] is None:
            raise ZeroDivisionError("a bug in this stage")
        os.kill(os.getpid(), ENDS[end])
        return method(*arguments, **keywords)

    monkeypatch.setattr(owner, name, ends)
    words = [*SHORT, "callbacks=[default,final_policy]", "callbacks.final_policy.video=false", "hydra.run.dir=run"]
    words += ["callbacks.final_policy.model=false", "callbacks.evaluation.episodes=1"]
    said = ""
    if ENDS[end] is None:
        with pytest.raises(ZeroDivisionError, match="a bug in this stage"):
            train(*words)
    else:
        said = train(*words, code=128 + ENDS[end])
    assert calls and "Error" not in said and "failed" not in said
    if "made" in stage and "update" not in stage:
        return
    assert the_run(tmp_path)[0].info.status == ("FAILED" if end == "a bug" else "KILLED")
    if said:
        assert f"results    {tmp_path / 'run'}" in said
        assert (
            ("resume  " in said) == ("evaluate  " in said) == (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
        )


class FailsAtEveryEnd(Callback):
    """A callback that answers an error with another one, before it has even begun."""

    def on_exception(self, trainer, pl_module, exception) -> None:
        raise AttributeError(f"{self} was never started")


def test_an_error_in_answer_to_an_error_is_a_line(train, tmp_path, store, monkeypatch, capfd):
    def breaks(self, *_):
        raise ZeroDivisionError("the reason")

    monkeypatch.setattr(CollectedData, "teardown", breaks)
    monkeypatch.setattr(OnPolicyAlgorithm, "training_step", breaks)
    words = [*SHORT, "callbacks=minimal", "+callbacks.mine._target_=test_train.FailsAtEveryEnd"]
    with pytest.raises(ZeroDivisionError, match="the reason") as caught:
        train(*words)
    assert caught.value.__context__ is None
    lines = [line.partition(" - ")[2] for line in capfd.readouterr().out.splitlines() if " failed: " in line]
    assert len(lines) == 2 and lines[0].startswith("FailsAtEveryEnd.on_exception failed: AttributeError: ")
    assert lines[1] == "OnPolicyData.on_exception failed: ZeroDivisionError: the reason"
    assert the_run(tmp_path)[0].info.status == "FAILED"


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """``refused("seed=abc")`` returns the exit code and the one line; nothing may be left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: f"sqlite:///{tmp_path / 'mlflow.db'}")

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train", *words])
        with pytest.raises(SystemExit) as stop:
            pmoe_lightning.train.main()
        printed = capfd.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        assert not list(tmp_path.iterdir())
        return stop.value.code, printed.err

    return run


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("algo.gama=0.9", "algo.gamma"),
        ("algo.lr=high", "algo.lr"),
        ("algo.lr=-1", "algo.lr=-1.0"),
        ("algo.clip_epsilon=nan", "algo.clip_epsilon=nan"),
        ("estimator=pathwise", "actor.num_components"),
        ("env=HalfCheeta-v5", "HalfCheetah-v5"),
        ("env=CartPole-v1", "action space"),
        ("+env.no_such_argument=1", "no_such_argument"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_leaves_nothing(refused, word, named):
    code, line = refused(word)
    assert code == 2 and line.startswith("configuration error: ") and named in line


def test_a_current_folder_that_was_deleted_is_one_line(refused, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert refused("algo=sac") == (1, "error: the current folder was deleted: go to one that exists\n")


def test_an_unreachable_server_is_one_line_and_leaves_nothing(refused):
    start = time.monotonic()
    code, line = refused("logger.tracking_uri=http://127.0.0.1:9")
    assert code == 1 and line.startswith("error: ") and "127.0.0.1:9" in line
    assert time.monotonic() - start < RETRIES_SECONDS


@pytest.mark.parametrize(("content", "named"), [(None, "missing.ckpt"), (b"not a checkpoint", "damaged.ckpt")])
def test_a_checkpoint_that_cannot_be_read_is_one_line(run_module, tmp_path, content, named):
    if content is not None:
        (tmp_path / named).write_bytes(content)
    done = run_module("pmoe_lightning.evaluate", f"checkpoint={named}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and named in done.stderr


# -- questions ---------------------------------------------------------------------------------------------------------
def test_help_is_quick_and_complete(run_module, tmp_path):
    start = time.process_time(), os.times().children_user
    done = run_module("pmoe_lightning.train", "--help")
    seconds = os.times().children_user - start[1]
    assert done.returncode == 0 and "estimator" in done.stdout and "| marginalized |" in done.stdout
    assert seconds < 1.0
    assert not list(tmp_path.iterdir())


def test_the_configuration_can_be_printed(run_module, tmp_path):
    done = run_module("pmoe_lightning.train", "algo=sac", "env=Hopper-v5", "--cfg", "job")
    assert done.returncode == 0 and "id: Hopper-v5" in done.stdout and "utd_ratio: 1.0" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_refusal_in_a_process_of_its_own(run_module, tmp_path):
    done = run_module("pmoe_lightning.train", "algo=sca")
    assert done.returncode == 2
    assert done.stderr == "configuration error: algo=sca is not one of dac, ppo, sac; did you mean sac?\n"
    assert not list(tmp_path.iterdir())
