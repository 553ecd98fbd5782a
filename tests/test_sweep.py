"""Sweeps: child runs below one parent run, compared at the end; what a failing, a stopped and a wrong job do."""

from __future__ import annotations

import csv
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from waiting import HANG_SECONDS, wait_until

from pmoe_lightning.configuration import compose_jobs, register
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.run.sweep import as_csv, by_configuration, check_sweep, read_children
from pmoe_lightning.tracking import MLflowLogger

SHORT = ("debug=default", "callbacks=[minimal,evaluation]", "callbacks.evaluation.episodes=1", "total_frames=256")
CRASHING_ENV = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv


class CrashingEnv(PendulumEnv):
    def __init__(self, last_step, **arguments):
        super().__init__(**arguments)
        self.last_step, self.steps = last_step, 0

    def step(self, action):
        self.steps += 1
        if self.steps > self.last_step:
            raise ZeroDivisionError("a bug in the environment")
        return super().step(action)


gymnasium.register("Crashing-v0", CrashingEnv, max_episode_steps=200)
"""


def family(store: Path) -> tuple[Run, list[Run], MlflowClient]:
    """The only run without a parent, its children in the order of their start, and a client."""
    client = MlflowClient(f"sqlite:///{store}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, order_by=["start_time ASC"])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1
    return parent, children, client


def table(client: MlflowClient, run: Run, folder: Path) -> list[dict[str, str]]:
    with open(client.download_artifacts(run.info.run_id, "sweep.csv", str(folder))) as file:
        return list(csv.DictReader(file))


def test_a_job_that_fails_leaves_the_others_alone(run_module, tmp_path, store, clean_environ):
    (tmp_path / "crashing.py").write_text(CRASHING_ENV)
    path = os.pathsep.join([clean_environ["PYTHONPATH"], str(tmp_path)])
    words = ["-m", *SHORT, "env=crashing:Crashing-v0", "+env.last_step=50,1000000"]
    done = run_module("pmoe_lightning.train", *words, PYTHONPATH=path)
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug in the environment" in done.stderr and "crashing.py" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: jobs of the sweep have failed")

    parent, children, client = family(store)
    assert parent.info.status == "FAILED"
    assert [child.info.status for child in children] == ["FAILED", "FINISHED"]
    assert parent.info.run_name.startswith("sweep debug=default")
    assert "sweep.csv" in parent.data.tags["mlflow.note.content"]
    for child, last in zip(children, (50, 1000000), strict=True):
        assert child.info.run_name.startswith("ppo crashing:Crashing-v0 pmoe marginalized debug=default")
        assert f"+env.last_step={last}" in child.info.run_name and "seed=" in child.info.run_name
        assert child.info.run_name in child.data.tags["mlflow.note.content"]
    rows = table(client, parent, tmp_path)
    assert [row["job"] for row in rows] == ["+env.last_step=50", "+env.last_step=1000000"]
    assert [row["run_id"] for row in rows] == [child.info.run_id for child in children]
    evaluated = client.get_metric_history(children[1].info.run_id, "eval/episode_return")
    assert float(rows[1]["final_return"]) == max(evaluated, key=lambda point: point.step).value
    assert rows[0]["final_return"] == "nan"
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "figures")] == ["figures/sweep.png"]
    assert all(row["job"] in done.stdout for row in rows)


@pytest.mark.slow
def test_a_sweep_through_mlflow_run_has_its_run_as_parent(tmp_path, store, clean_environ):
    uri = f"sqlite:///{store}"
    MlflowClient(uri).create_experiment("sweep", artifact_location=(tmp_path / "artifacts").as_uri())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "--env-manager", "local", "--experiment-name", "sweep"]
    command += ["-P", f"overrides=-m {' '.join(SHORT)} seed=1,2 hydra.sweep.dir='{tmp_path / 'sweep'}'"]
    environ = clean_environ | {"MLFLOW_TRACKING_URI": uri, "PATH": path}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parent, children, client = family(store)
    assert "mlflow.project.entryPoint" in parent.data.tags
    assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * 3
    assert [child.data.params["seed"] for child in children] == ["1", "2"]
    assert [row["job"] for row in table(client, parent, tmp_path)] == ["seed=1", "seed=2"]


@pytest.mark.slow
def test_a_stopped_sweep_starts_no_further_job(tmp_path, store, clean_environ):
    words = ["-m", *SHORT, "total_frames=1_000_000", "seed=1,2", "hydra.sweep.dir=sweep"]
    command = [sys.executable, "-m", "pmoe_lightning.train", *words]
    with subprocess.Popen(command, cwd=tmp_path, env=clean_environ, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: list(tmp_path.glob("sweep/0-*/checkpoints/last.ckpt")), process)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=HANG_SECONDS)[1]
    assert process.returncode == 143 and "Traceback" not in errors
    parent, children, _ = family(store)
    assert [run.info.status for run in (parent, *children)] == ["KILLED", "KILLED"]


def test_a_killed_sweep_is_closed_from_its_folder(run_module, tmp_path, store, clean_environ):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environ = clean_environ | {"TMPDIR": str(temporary)}
    words = ["-m", *SHORT, "seed=1,2", "hydra.sweep.dir=sweep-${algo.gamma}", "logger.flush_seconds=1000"]
    command = [sys.executable, "-m", "pmoe_lightning.train", *words, "total_frames=1_000_000"]
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: list(tmp_path.glob("sweep-0.99/0-*/checkpoints/last.ckpt")), process)
        process.kill()
        process.communicate(timeout=HANG_SECONDS)
    parent, (child,), client = family(store)
    assert parent.info.status == child.info.status == "RUNNING"
    assert not list(temporary.glob("mlflow-spool*"))
    done = run_module("pmoe_lightning.tracking.resend", "sweep-0.99")
    assert done.returncode == 0, done.stderr
    killed = [client.get_run(run.info.run_id) for run in (parent, child)]
    assert [run.info.status for run in killed] == ["KILLED", "KILLED"]
    assert killed[1].data.tags["overrides"] and killed[0].data.tags["platform"]
    assert not list(tmp_path.rglob("run.json"))


# -- the table ---------------------------------------------------------------------------------------------------------
def record(client: MlflowClient, parent: Run, command: str, returns: list[tuple[int, float]]) -> None:
    tags = {"mlflow.parentRunId": parent.info.run_id, "overrides": command}
    run = client.create_run(parent.info.experiment_id, tags=tags)
    for step, value in returns:
        client.log_metric(run.info.run_id, "eval/episode_return", value, step=step)
    client.set_terminated(run.info.run_id)


def test_the_table_tells_jobs_apart_and_finds_their_final_and_best_return(store):
    client = MlflowClient(f"sqlite:///{store}")
    parent = client.create_run("0")
    client.create_run("0")  # not a child
    record(client, parent, "algo=sac seed=1 estimator=frequency", [(0, 9.0), (10, 3.0), (20, 2.0)])
    record(client, parent, "algo=sac seed=2 estimator=frequency", [(20, 5.0), (10, 1.0)])
    record(client, parent, "algo=sac seed=1 'estimator=two words'", [(0, 9.0)])
    children = read_children(client, parent.info.run_id)
    assert [child.job for child in children] == [
        "seed=1 estimator=frequency",
        "seed=2 estimator=frequency",
        "seed=1 'estimator=two words'",
    ]
    assert [(child.final_return, child.best_return, child.env_frames) for child in children[:2]] == [
        (2.0, 3.0, 20),  # the evaluation before training does not count
        (5.0, 5.0, 20),
    ]
    lines = as_csv(children).splitlines()
    assert lines[0] == "job,status,env_frames,final_return,best_return,run_id"
    assert lines[3].startswith("seed=1 'estimator=two words',FINISHED,0,nan,nan,")
    groups = by_configuration(children)
    assert groups["estimator=frequency"] == [(2.0, 3.0), (5.0, 5.0)]
    assert list(groups) == ["estimator=frequency", "estimator=two words"]


def test_seeds_alone_are_one_configuration(store):
    client = MlflowClient(f"sqlite:///{store}")
    parent = client.create_run("0")
    for seed in (1, 2):
        record(client, parent, f"algo=sac seed={seed}", [(10, float(seed))])
    children = read_children(client, parent.info.run_id)
    assert by_configuration(children) == {"all seeds": [(1.0, 1.0), (2.0, 2.0)]}


def test_a_command_of_any_length_is_told_apart(store, tmp_path):
    uri = f"sqlite:///{store}"
    parent = MLflowLogger("sweep", tracking_uri=uri)
    long = f"+note={'it is long ' * 900}"
    for seed in (1, 2):
        client = parent.experiment
        child = MLflowLogger(tracking_uri=uri, tags={"mlflow.parentRunId": parent.run_id}, experiment_name="sweep")
        words = [long, f"seed={seed}"]
        child.set_tags({"overrides": shlex.join(words)})
        child.log_dict({"overrides": words}, "overrides.json")
        child.finish("FINISHED")
        assert client.get_run(child.run_id).data.tags["overrides"].endswith("characters)")
    assert [child.job for child in read_children(client, parent.run_id)] == ["seed=1", "seed=2"]
    parent.finish("FINISHED")


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("word", ["logger=mlflow,none", "logger.experiment_name=a,b", "logger.tracking_uri=a,b"])
def test_jobs_recorded_in_different_places_are_refused(word):
    register()
    with pytest.raises(ConfigurationError, match="must be the same for all"):
        check_sweep(compose_jobs(["seed=1", word], multirun=True))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("seed=1,2", "algo.gamma=0.9,2"), "algo.gamma=2.0"),
        (("seed=1,2", "resume=null,auto"), "resume continues one run"),
        (("--config-name", "mine", "seed=1,2"), "--config-dir"),
    ],
)
def test_a_wrong_job_is_refused_before_the_first_one_starts(run_module, tmp_path, words, named):
    done = run_module("pmoe_lightning.train", "-m", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("configuration error: ") and named in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
