"""What a run could not deliver: kept whole, sent to no other run, and sent when the store takes it."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from policies import make_policy
from waiting import HANG_SECONDS

from pmoe_lightning.tracking import MLflowLogger, close_what_was_left, queue_policy_model
from pmoe_lightning.tracking.resend import main as resend
from pmoe_lightning.tracking.spool import Spool


@pytest.fixture
def uri(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A SQLite store with its artifacts in a folder of the test's own."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{store}"


@pytest.fixture
def abandoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loggers of this test send nothing at the end of the process, as if it had been killed."""
    monkeypatch.setattr("atexit.register", lambda *_: None)
    yield


def points(uri: str, run_id: str, name: str = "a") -> list[float]:
    return [point.value for point in MlflowClient(uri).get_metric_history(run_id, name)]


def run_of(uri: str, run_id: str) -> Run:
    return MlflowClient(uri).get_run(run_id)


def log(logger: MLflowLogger, *steps: int) -> None:
    for step in steps:
        logger.log_metrics({"a": float(step)}, step=step)


KILLED = """
import os, signal, sys
from pmoe_lightning.tracking import MLflowLogger, spool
uri, folder, moment = sys.argv[1:]
logger = MLflowLogger(tracking_uri=uri, spool=folder, flush_seconds=1000.0)
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if moment == "opening":  # the store has the run, the process does not know it yet
    identify = spool.Spool.identify
    spool.Spool.identify = lambda self, uri, run_id, **more: kill() if run_id else identify(self, uri, run_id, **more)
logger.start()
print(logger.run_id, flush=True)
for step in range(20):
    logger.log_metrics({"a": float(step)}, step=step)
kill()
"""


HOLDER = """
import sys
from pmoe_lightning.processes import run_folder
run_folder.hold(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def kill_a_run(uri: str, spool: Path, moment: str) -> str:
    """Start a run and kill it; its id."""
    command = [sys.executable, "-c", KILLED, uri, str(spool), moment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (run,) = MlflowClient(uri).search_runs(["1"])
    assert run.info.status == "RUNNING"
    return run.info.run_id


@pytest.mark.parametrize("moment", ["opening", "running"])
def test_the_next_start_delivers_a_killed_run_and_closes_it(uri: str, tmp_path: Path, moment: str) -> None:
    killed = kill_a_run(uri, tmp_path / "run" / "mlflow-spool", moment)
    logger = MLflowLogger(tracking_uri=uri, spool=tmp_path / "run" / "mlflow-spool", flush_seconds=1000.0)
    logger.start()
    assert logger.run_id != killed
    assert json.loads((tmp_path / "run" / "mlflow-spool" / "run.json").read_text())["run_id"] == logger.run_id
    log(logger, 100)
    logger.finish("FINISHED")
    assert points(uri, killed) == ([float(step) for step in range(20)] if moment == "running" else [])
    assert points(uri, logger.run_id) == [100.0]
    assert run_of(uri, killed).info.status == "KILLED" and run_of(uri, logger.run_id).info.status == "FINISHED"
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("by", ["resend", "another start"])
def test_what_cannot_be_delivered_at_a_start_is_renamed_and_sent_later(
    uri: str, store: Path, tmp_path: Path, abandoned: None, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    folder = tmp_path / "run" / "mlflow-spool"
    first = MLflowLogger(tracking_uri=uri, spool=folder, flush_seconds=1000.0)
    log(first, 1, 2)
    away = store.rename(tmp_path / "elsewhere.db")
    close_what_was_left(tmp_path / "run")
    assert f"python -m pmoe_lightning.tracking.resend {folder}-1" in caplog.text and "is gone" in caplog.text
    assert not folder.exists() and not store.exists()
    close_what_was_left(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mlflow-spool-1"]
    assert resend([str(tmp_path)]) == 1
    away.rename(store)
    if by == "resend":
        assert resend([str(tmp_path)]) == 0
    else:
        second = MLflowLogger(tracking_uri=uri, spool=folder)
        second.start()
        second.finish("FINISHED")
    assert points(uri, first.run_id) == [1.0, 2.0] and run_of(uri, first.run_id).info.status == "KILLED"
    assert list((tmp_path / "run").iterdir()) == []


def test_a_store_that_does_not_know_the_run_confirms_nothing(
    uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spool = Spool(tmp_path / "spool")
    spool.identify(uri, "0" * 32)
    spool.put("points", {"points": [["a", 1.0, 0, 1]]})
    assert resend([str(tmp_path)]) == 1
    printed = capfd.readouterr()
    assert "sent" not in printed.out
    assert printed.err.count("\n") == 1
    assert "2 of 2 entries could not be sent" in printed.err and "not found" in printed.err
    assert [entry.kind for entry in Spool(tmp_path / "spool").entries()] == ["points", "status"]
    MlflowClient(uri).create_experiment("other")
    assert resend([str(tmp_path)]) == 1


def test_a_run_that_goes_on_is_left_to_its_process(
    uri: str, tmp_path: Path, abandoned: None, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = MLflowLogger(tracking_uri=uri, spool=tmp_path / "run" / "mlflow-spool", flush_seconds=1000.0)
    log(logger, 1)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert resend([str(tmp_path)]) == 0
        assert f"left to process {process.pid}" in capfd.readouterr().out
        assert (points(uri, logger.run_id), run_of(uri, logger.run_id).info.status) == ([], "RUNNING")
        process.kill()
    assert resend([str(tmp_path)]) == 0
    assert (points(uri, logger.run_id), run_of(uri, logger.run_id).info.status) == ([1.0], "KILLED")


def test_the_run_that_finished_keeps_its_status(uri: str, tmp_path: Path, abandoned: None) -> None:
    logger = MLflowLogger(tracking_uri=uri, spool=tmp_path / "spool", flush_seconds=1000.0)
    logger.start()
    MlflowClient(uri).set_terminated(logger.run_id, "FINISHED", end_time=5)
    assert resend([str(tmp_path)]) == 0
    assert (run_of(uri, logger.run_id).info.status, run_of(uri, logger.run_id).info.end_time) == ("FINISHED", 5)


def damage_key(text: bytes, rng: random.Random) -> bytes:
    return text.replace(b'"points"', b'"pionts"', 1)


def flip(text: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(text))
    return text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1 :]


def cut(text: bytes, rng: random.Random) -> bytes:
    return text[: rng.randrange(len(text))]


@pytest.mark.parametrize("damage", [damage_key, flip, cut])
def test_a_damaged_entry_is_set_aside_and_the_others_arrive(
    uri: str, tmp_path: Path, abandoned: None, caplog: pytest.LogCaptureFixture, damage: Callable
) -> None:
    rng = random.Random(3)
    logger = MLflowLogger(tracking_uri=uri, spool=tmp_path / "run" / "mlflow-spool", flush_seconds=1000.0)
    log(logger, *range(40))
    logger.log_text("text", "a.txt")
    logger.log_text("text", "b.txt")
    files = sorted((tmp_path / "run" / "mlflow-spool").glob("*.entry"))
    (content, _) = sorted((tmp_path / "run" / "mlflow-spool").glob("*.content"))
    wrong = [*files[:40:5], content, tmp_path / "run" / "mlflow-spool" / "run.json"]
    for path in wrong:
        path.write_bytes(damage(path.read_bytes(), rng) if damage is not damage_key or path in files else b"x")
    # A resumed run goes on with what an earlier process has left.
    again = MLflowLogger(tracking_uri=uri, spool=tmp_path / "run" / "mlflow-spool", run_id=logger.run_id)
    log(again, 40)
    again.finish("FINISHED")
    lost = range(0, 40, 5)
    assert points(uri, logger.run_id) == [float(step) for step in range(41) if step not in lost]
    assert [file.path for file in MlflowClient(uri).list_artifacts(logger.run_id)] == ["b.txt"]
    aside = tmp_path / "run" / "mlflow-spool" / "set-aside"
    assert len(list(aside.glob("*.entry"))) == 9 and not (aside.parent / "run.json").exists()
    assert all(path.name in caplog.text for path in files[:40:5])


def test_an_entry_of_another_run_is_set_aside(uri: str, tmp_path: Path, abandoned: None) -> None:
    first, second = (MLflowLogger(tracking_uri=uri, spool=tmp_path / name, flush_seconds=1000.0) for name in "ab")
    log(first, 1)
    log(second, 2)
    (entry,) = (tmp_path / "a").glob("*.entry")
    entry.rename(tmp_path / "b" / entry.name)
    second.finish("FINISHED")
    assert resend([str(tmp_path / "b")]) == 0
    assert points(uri, second.run_id) == [2.0] and points(uri, first.run_id) == []
    assert resend([str(tmp_path / "a")]) == 0


# ------------------------------------------------------------------ SQLite


def lock(store: Path) -> Callable[[], None]:
    connection = sqlite3.connect(store)
    connection.execute("begin exclusive")
    return lambda: (connection.rollback(), connection.close())


def move(store: Path) -> Callable[[], None]:
    elsewhere = store.rename(store.with_name("elsewhere.db"))
    return lambda: elsewhere.rename(store)


def replace(store: Path) -> Callable[[], None]:
    back = move(store)
    store.write_bytes((store.parent / "empty.db").read_bytes())
    return back


def restore_a_copy(store: Path) -> Callable[[], None]:
    content = store.read_bytes()
    store.unlink()
    return lambda: store.write_bytes(content)


def damage(store: Path) -> Callable[[], None]:
    content = store.read_bytes()
    with open(store, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(len(content) - 4096))
    return lambda: store.write_bytes(content)


def fill_up(store: Path) -> Callable[[], None]:
    """The file may not grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("trouble", [lock, move, replace, restore_a_copy, damage, fill_up])
def test_a_database_in_trouble_is_one_line_and_then_the_spool(
    uri: str, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: Callable
) -> None:
    (tmp_path / "empty.db").write_bytes(store.read_bytes())
    logger = MLflowLogger(tracking_uri=f"{uri}?timeout=1", spool=tmp_path / "spool", flush_seconds=1000.0)
    logger.start()
    log(logger, 0)
    assert logger.flush(HANG_SECONDS)
    caplog.clear()
    over = trouble(store)
    try:
        for step in range(1, 4):
            log(logger, step)
            if trouble is not lock or step == 1:  # MLflow waits for a lock for 20 s
                assert not logger.flush(HANG_SECONDS)
        said = [line for line in caplog.text.splitlines() if "memory" not in line]
        assert len(said) == 1 and "everything is kept and sent later" in said[0], caplog.text
    finally:
        over()
    log(logger, 4)
    logger.finish("FINISHED")
    assert points(uri, logger.run_id) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert run_of(uri, logger.run_id).info.status == "FINISHED" and not (tmp_path / "spool").exists()


# ------------------------------------------------------------------ the packaged policy


def test_a_policy_packaged_while_the_store_is_away_is_sent_later_and_once(
    uri: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pmoe_lightning.tracking.logger._EXIT_PATIENCE_SECONDS", HANG_SECONDS)
    folder = tmp_path / "run"
    logger = MLflowLogger(tracking_uri=uri, spool=folder / "mlflow-spool", flush_seconds=1000.0)
    logger.start()
    assert logger.flush(HANG_SECONDS)
    away = store.rename(tmp_path / "elsewhere.db")
    logger.log_metrics({"eval/episode_return": 5.0}, step=1000)
    checkpoint = make_policy()[1]
    queue_policy_model(logger, checkpoint, folder / "best.model", register_as="runner")
    logger.finish("FINISHED")
    assert "1 points and 2 other entries are not there yet" in capfd.readouterr().err.splitlines()[-1]
    observation = np.zeros((1, 3), np.float32)
    expected = mlflow.pyfunc.load_model(str(folder / "best.model")).predict(observation)

    away.rename(store)
    moved = folder.rename(tmp_path / "moved")
    assert resend([str(moved)]) == 0
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    (model,) = client.search_logged_models([logger.experiment_id])
    assert (model.status, model.source_run_id) == ("READY", logger.run_id)
    assert {metric.key: metric.value for metric in model.metrics} == {"eval/episode_return": 5.0}
    np.testing.assert_array_equal(mlflow.pyfunc.load_model("models:/runner/1").predict(observation), expected)
    assert run_of(uri, logger.run_id).info.status == "FINISHED"

    # A run that is finished once more packages the same policy: it is the same model.
    again = MLflowLogger(tracking_uri=uri, run_id=logger.run_id, spool=moved / "mlflow-spool")
    queue_policy_model(again, checkpoint, moved / "best.model", register_as="runner")
    again.finish("FINISHED")
    assert [found.model_id for found in client.search_logged_models([logger.experiment_id])] == [model.model_id]
    assert [version.version for version in client.search_model_versions("name = 'runner'")] == [1]
    assert len(run_of(uri, logger.run_id).outputs.model_outputs) == 1
