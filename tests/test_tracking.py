"""Tracking: one run, the right status, no point lost, no waiting for the server, policies without this package."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.figure
import mlflow
import numpy as np
import pytest
import requests
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import SIGTERMException
from mlflow import MlflowClient
from policies import make_policy, make_sac_policy
from proxies import TROUBLES, Proxy
from tensordict import TensorDict
from waiting import HANG_SECONDS, RETRIES_SECONDS, wait_until

from pmoe_lightning.checkpoints.files import write_checkpoint
from pmoe_lightning.errors import RunError
from pmoe_lightning.evaluate import main as evaluate_main
from pmoe_lightning.modules.critics import make_qvalue_network
from pmoe_lightning.tracking import MLflowLogger, check_server, log_policy_model, provenance, run_status
from pmoe_lightning.tracking.address import store_line, without_secrets
from pmoe_lightning.tracking.database import absolute_uri, database_file, make_database
from pmoe_lightning.tracking.delivery import Delivery
from pmoe_lightning.tracking.naming import run_name, sweep_name
from pmoe_lightning.tracking.references import load_policy, resolve_checkpoint
from pmoe_lightning.tracking.resend import main as resend_main
from pmoe_lightning.tracking.spool import START_TAG, Spool
from pmoe_lightning.tracking.ui import page as ui_page
from pmoe_lightning.tracking.writer import BackgroundWriter


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite tracking store; making one takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with contextlib.chdir(folder):  # the default experiment keeps its artifacts below the folder of this moment
        MlflowClient(uri).create_experiment("pmoe_lightning", artifact_location=str(folder / "artifacts"))
    return uri


@pytest.fixture(autouse=True)
def clean_surroundings(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    mlflow.set_tracking_uri(store)


@pytest.fixture
def logger(store: str) -> Iterator[MLflowLogger]:
    logger = MLflowLogger(tracking_uri=store)
    yield logger
    logger.finish("FINISHED")


def history(logger: MLflowLogger, name: str) -> dict[int, float]:
    points = MlflowClient(logger.tracking_uri).get_metric_history(logger.run_id, name)
    return {point.step: point.value for point in points}


def run_of(logger: MLflowLogger) -> Any:
    return MlflowClient(logger.tracking_uri).get_run(logger.run_id)


def read_artifact(logger: MLflowLogger, path: str, tmp_path: Path) -> bytes:
    client = MlflowClient(logger.tracking_uri)
    return Path(client.download_artifacts(logger.run_id, path, str(tmp_path))).read_bytes()


# ------------------------------------------------------------------ the run


def test_no_run_before_the_first_use(store: str) -> None:
    client = MlflowClient(store)
    before = len(client.search_runs(["1"]))
    logger = MLflowLogger(tracking_uri=store)
    logger.finalize("success")
    logger.finish("FINISHED")
    assert len(client.search_runs(["1"])) == before
    logger.log_metrics({"a": 1.0}, step=0)
    assert len(client.search_runs(["1"])) == before + 1


def test_start_describes_the_origin(logger: MLflowLogger, tmp_path: Path) -> None:
    run_id = logger.start()
    assert logger.run_id == run_id
    assert logger.flush(HANG_SECONDS)
    run = run_of(logger)
    assert run.info.status == "RUNNING"
    assert run.data.tags["python"] == ".".join(map(str, sys.version_info[:3]))
    versions = json.loads(read_artifact(logger, "versions.json", tmp_path))
    assert versions["packages"]["torch"] == torch.__version__


def test_a_run_made_by_a_request_that_came_late_is_closed_at_the_end(logger: MLflowLogger) -> None:
    """A server without a processor may answer the first request for a run after the second, and with another run."""
    run_id = logger.start()
    client = MlflowClient(logger.tracking_uri)
    own, tag = run_of(logger).info, run_of(logger).data.tags[START_TAG]
    late = client.create_run(own.experiment_id, start_time=own.start_time - 1000, tags={START_TAG: tag})
    logger.finish("FINISHED")
    assert client.get_run(late.info.run_id).info.status == "KILLED"
    assert client.get_run(run_id).info.status == "FINISHED"


def test_the_run_of_mlflow_run_is_adopted(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = MlflowClient(store).create_run("0", tags={"mlflow.runName": "from the command"})
    MlflowClient(store).log_param(opened.info.run_id, "algo", "ppo")
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    logger = MLflowLogger("another_experiment", tracking_uri=store)
    assert logger.start() == opened.info.run_id
    logger.log_hyperparams({"algo": "ppo", "seed": 1})
    logger.finish("FINISHED")
    run = run_of(logger)
    assert run.data.params == {"algo": "ppo", "seed": "1"}
    assert "changed_params" not in run.data.tags
    assert (run.info.status, run.info.experiment_id) == ("FINISHED", "0")

    # A continued run is running again.
    again = MLflowLogger(tracking_uri=store, run_id=opened.info.run_id)
    again.start()
    assert run_of(again).info.status == "RUNNING"
    again.finish("FINISHED")


def test_a_sweep_job_is_a_child_of_the_adopted_run(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = MlflowClient(store).create_run("0")
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    logger = MLflowLogger(tracking_uri=store, nested=True)
    run_id = logger.start()
    logger.finish("FINISHED")
    assert run_id != opened.info.run_id
    run = run_of(logger)
    assert run.data.tags["mlflow.parentRunId"] == opened.info.run_id
    assert run.info.experiment_id == "0"


def test_a_run_that_cannot_be_opened_is_one_line(store: str) -> None:
    deleted = MlflowClient(store).create_run("0").info.run_id
    MlflowClient(store).delete_run(deleted)
    for run_id, message in ((deleted, "was deleted"), ("0" * 32, "not found")):
        with pytest.raises(RunError, match=message) as caught:
            MLflowLogger(tracking_uri=store, run_id=run_id).start()
        assert "\n" not in str(caught.value)


class Ending(BoringModel):
    """Logs a point per step and ends as told at the third."""

    def __init__(self, end: Callable[[], Any]) -> None:
        super().__init__()
        self.end = end

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trainer.logger.log_metrics({"step": float(batch_idx)}, step=100 * batch_idx)
        if batch_idx == 2:
            self.end()
        return super().training_step(batch, batch_idx)


def interrupt() -> None:
    raise KeyboardInterrupt


def fail() -> None:
    raise ArithmeticError("not finite")


@pytest.mark.parametrize(
    ("end", "raised", "status"),
    [
        (lambda: None, None, "FINISHED"),
        (fail, ArithmeticError, "FAILED"),
        (interrupt, SystemExit, "KILLED"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), SIGTERMException, "KILLED"),
    ],
)
@pytest.mark.parametrize("started", [True, False])
def test_every_ending_has_its_status_and_all_points(
    store: str, tmp_path: Path, end: Callable[[], Any], raised: type | None, status: str, started: bool
) -> None:
    logger = MLflowLogger(tracking_uri=store, flush_seconds=1000.0)
    if started:
        logger.start()
    trainer = Trainer(
        max_steps=4,
        logger=logger,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    with pytest.raises(raised) if raised else contextlib.nullcontext():
        trainer.fit(Ending(end))
    steps = range(4) if raised is None else range(3)
    assert history(logger, "step") == {100 * step: float(step) for step in steps}
    if started and raised is None:
        assert run_of(logger).info.status == "RUNNING", "whoever starts a run ends it"
        logger.finish("FINISHED")
    assert run_of(logger).info.status == status
    ended = run_of(logger).info.end_time
    logger.finish(status)
    assert run_of(logger).info.end_time == ended


def test_a_later_failure_replaces_the_success(logger: MLflowLogger) -> None:
    logger.start()
    logger.finish("FINISHED")
    logger.finish("FAILED")
    assert run_of(logger).info.status == "FAILED"


def test_status_of_an_error() -> None:
    assert run_status(None) == "FINISHED"
    assert run_status(ValueError()) == run_status(SystemExit(1)) == "FAILED"
    assert {run_status(e) for e in (KeyboardInterrupt(), SIGTERMException(), SystemExit(143), SystemExit(130))} == {
        "KILLED"
    }


# ------------------------------------------------------------------ metrics, parameters, artifacts


def test_all_points_arrive_whatever_their_number_and_kind(logger: MLflowLogger) -> None:
    for step in range(700):
        logger.log_metrics({"a": step, "b": torch.tensor(step / 2), "loss[x]": 1.0}, step=1000 * step)
    logger.log_metrics({"a": float("nan"), "b": float("inf")}, step=10**9)
    assert logger.flush(HANG_SECONDS)
    a, b = history(logger, "a"), history(logger, "b")
    assert len(a) == len(b) == 701
    assert all(a[1000 * step] == step and b[1000 * step] == step / 2 for step in range(700))
    assert np.isnan(a[10**9]) and b[10**9] > 1e300
    assert len(history(logger, "loss_x_")) == 700


def test_points_are_sent_without_being_asked_to(store: str) -> None:
    quick = MLflowLogger(tracking_uri=store, flush_seconds=0.2)
    quick.log_metrics({"a": 1.0}, step=1)
    full = MLflowLogger(tracking_uri=store, flush_seconds=1000.0)
    for step in range(120):
        full.log_metrics({"m": float(step)}, step=step)
    wait_until(lambda: history(quick, "a") and len(history(full, "m")) >= 100)
    assert history(quick, "a") == {1: 1.0}
    quick.finish("FINISHED")
    full.finish("FINISHED")


def test_parameters_are_flat_complete_and_never_changed(logger: MLflowLogger) -> None:
    many = {f"p{i}": i for i in range(250)}
    logger.log_hyperparams({"algo": {"gamma": 0.99, "sizes": [1, 2], "none": None}, "long": "x" * 9000, **many})
    logger.log_hyperparams({"algo": {"gamma": 0.5, "tau": 0.1}})
    assert logger.flush(HANG_SECONDS)
    run = run_of(logger)
    params = run.data.params
    assert params["algo.gamma"] == "0.99" and params["algo.tau"] == "0.1"
    assert params["algo.sizes"] == "[1, 2]" and params["algo.none"] == "None"
    assert all(params[name] == str(value) for name, value in many.items())
    assert len(params["long"]) == 6000 and params["long"].endswith("x... (cut, 9000 characters)")
    assert json.loads(run.data.tags["changed_params"]) == {"algo.gamma": ["0.99", "0.5"]}


def test_artifacts(logger: MLflowLogger, tmp_path: Path) -> None:
    (tmp_path / "best.ckpt").write_bytes(b"weights")
    figure = matplotlib.figure.Figure()
    figure.subplots().plot([1, 2])
    logger.log_text("a: 1\n", "config.yaml")
    logger.log_dict({"a": [1, None]}, "facts/facts.json")
    logger.log_artifact(tmp_path / "best.ckpt", "checkpoints")
    logger.log_figure("weights", figure, step=2048)
    logger.log_figure("curve", figure)
    assert logger.flush(HANG_SECONDS)
    assert read_artifact(logger, "config.yaml", tmp_path) == b"a: 1\n"
    assert json.loads(read_artifact(logger, "facts/facts.json", tmp_path)) == {"a": [1, None]}
    assert read_artifact(logger, "checkpoints/best.ckpt", tmp_path) == b"weights"
    for name in ("weights_000002048", "curve"):
        assert read_artifact(logger, f"figures/{name}.png", tmp_path).startswith(b"\x89PNG")


@pytest.mark.parametrize(("layout", "is_wider"), [(None, True), ("constrained", False)])
def test_a_figure_is_logged_whole(logger: MLflowLogger, tmp_path: Path, layout: str | None, is_wider: bool) -> None:
    """What lies beside the figure belongs to it, unless the figure arranges itself; 6.4 inches are 768 pixels."""
    figure = matplotlib.figure.Figure(layout=layout)
    figure.text(0.0, 0.5, "within")
    figure.text(1.2, 0.5, "beside")
    canvas, dpi, expected = figure.canvas, figure.dpi, BytesIO()
    logger.log_figure("text", figure)
    assert logger.flush(HANG_SECONDS)
    picture = read_artifact(logger, "figures/text.png", tmp_path)
    width = int.from_bytes(picture[16:20], "big")
    assert width > 768 if is_wider else width == 768
    assert (figure.canvas, figure.dpi) == (canvas, dpi), "the figure is no longer its owner's"
    figure.savefig(expected, format="png", dpi=120, bbox_inches="tight" if is_wider else None)
    assert picture == expected.getvalue()


def test_a_failed_upload_is_a_warning(logger: MLflowLogger, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger.log_artifact(tmp_path / "missing.ckpt")
    logger.log_metrics({"a": 1.0}, step=3)
    assert logger.flush(HANG_SECONDS)
    assert "set-aside" in caplog.text and "missing.ckpt is gone" in caplog.text
    assert history(logger, "a") == {3: 1.0}


# ------------------------------------------------------------------ a server that comes and goes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(store: str) -> Iterator[tuple[str, Callable[[int], None]]]:
    """The URI of an MLflow server, and a function that signals all of its processes."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(Path(store[10:]).parent / "artifacts")]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=environment
    )
    uri = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(RunError):
            check_server(uri)
            return True
        return False

    try:
        wait_until(answers, process)
        yield uri, lambda number: os.killpg(process.pid, number)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(HANG_SECONDS)


def test_a_server_that_goes_away_costs_neither_time_nor_points(
    server: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri, signal_server = server
    logger = MLflowLogger("over_http", tracking_uri=uri, flush_seconds=0.2)
    logger.start()
    logger.log_metrics({"a": 0.0, "bad": float("nan")}, step=0)
    assert logger.flush(HANG_SECONDS)

    signal_server(signal.SIGSTOP)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    asked_by: set[threading.Thread] = set()
    send = requests.Session.send

    def observed(*arguments: Any, **options: Any) -> requests.Response:
        asked_by.add(threading.current_thread())
        return send(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(requests.Session, "send", observed)
        for step in range(1, 50):
            logger.log_metrics({"a": float(step)}, step=step)
        wait_until(lambda: asked_by)
    assert threading.current_thread() not in asked_by, "training waited for the server"
    assert not logger.flush(5.0)
    monkeypatch.setattr("pmoe_lightning.tracking.logger._EXIT_PATIENCE_SECONDS", 1.0)
    logger.finish("FAILED")
    said = capsys.readouterr().err
    assert "49 points and 1 other entries are not there yet (the server does not answer)" in said
    assert "send them with: python -m pmoe_lightning.tracking.resend" in said.splitlines()[-1]

    # The server now also works off the requests that timed out: points sent twice must count once.
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    signal_server(signal.SIGCONT)
    logger.finish("FINISHED")
    assert logger.flush(HANG_SECONDS)
    points = MlflowClient(uri).get_metric_history(logger.run_id, "a")
    assert sorted((point.step, point.value) for point in points) == [(step, float(step)) for step in range(50)]
    assert np.isnan(history(logger, "bad")[0])
    assert run_of(logger).info.status == "FINISHED"
    assert json.loads(read_artifact(logger, "versions.json", tmp_path))["python"]


def test_what_another_than_mlflow_answers_costs_nothing(
    server: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with Proxy(int(server[0].rpartition(":")[2])) as proxy:
        logger = MLflowLogger("over_a_proxy", tracking_uri=proxy.uri, flush_seconds=1000.0, spool=tmp_path / "spool")
        logger.start()
        assert logger.flush(HANG_SECONDS)
        for step, trouble in enumerate(TROUBLES):
            proxy.trouble = trouble
            logger.log_metrics({"a": float(step)}, step=step)
            logger.log_text(trouble, f"{step}.txt")
            logger.set_tags({f"t{step}": trouble})
            logger.log_hyperparams({f"p{step}": trouble})
            caplog.clear()
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
            assert not logger.flush(HANG_SECONDS), f"{trouble}: taken for an answer of MLflow"
            monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
            proxy.trouble = None
            assert logger.flush(HANG_SECONDS), trouble
            assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"], caplog.text
        logger.finish("FINISHED")
        points = MlflowClient(proxy.uri).get_metric_history(logger.run_id, "a")
        run, files = run_of(logger), MlflowClient(proxy.uri).list_artifacts(logger.run_id)
    assert [point.step for point in points] == list(range(len(TROUBLES)))
    assert {f"{step}.txt" for step in range(len(TROUBLES))} <= {file.path for file in files}
    for step, trouble in enumerate(TROUBLES):
        assert run.data.tags[f"t{step}"] == run.data.params[f"p{step}"] == trouble
    assert run.info.status == "FINISHED" and not (tmp_path / "spool").exists()


def put_points(spool: Spool | BackgroundWriter, *values: float) -> None:
    for value in values:
        spool.put("points", {"points": [["a", value, 0, int(value)]]})


def waiting(spool: Spool) -> list[float]:
    return [entry.values["points"][0][1] for entry in spool.entries()]


def test_points_refused_for_good_do_not_block_the_others(
    logger: MLflowLogger, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    spool = Spool(tmp_path / "spool")
    put_points(spool, 1.0, 2.0)
    spool.put("points", {"points": [["not [a] name", 3.0, 0, 3]]})
    put_points(spool, 4.0)
    delivery = Delivery(logger.experiment, logger.tracking_uri, logger.run_id)
    assert delivery.deliver(spool) and not len(spool)
    assert history(logger, "a") == {1: 1.0, 2: 2.0, 4: 4.0}
    assert "refuses 'not [a] name'" in caplog.text and "set-aside" in caplog.text
    (aside,) = (tmp_path / "spool" / "set-aside").iterdir()
    assert json.loads(aside.read_text())["values"] == {"points": [["not [a] name", 3.0, 0, 3]]}


def test_flush_counts_a_batch_that_is_under_way(tmp_path: Path) -> None:
    arrived: list[float] = []
    under_way, go_on = threading.Event(), threading.Event()

    def deliver(spool: Spool) -> bool:
        entries = spool.entries()
        under_way.set()
        assert go_on.wait(HANG_SECONDS)
        arrived.extend(entry.values["points"][0][1] for entry in entries)
        spool.remove(entries)
        return True

    writer = BackgroundWriter(Spool(tmp_path / "spool"), deliver, period=0.01)
    put_points(writer, 1.0)
    assert under_way.wait(HANG_SECONDS)
    assert not writer.flush(0.05)
    put_points(writer, 2.0)
    go_on.set()
    assert writer.flush(HANG_SECONDS)
    assert arrived == [1.0, 2.0]
    assert writer.close(HANG_SECONDS)
    assert not (tmp_path / "spool").exists()


def test_a_forked_process_leaves_its_parents_entries_alone(tmp_path: Path) -> None:
    code = """
import os, sys
from pmoe_lightning.tracking.spool import Spool
from pmoe_lightning.tracking.delivery import Delivery
from pmoe_lightning.tracking.spool import Spool
from pmoe_lightning.tracking.writer import BackgroundWriter
parent = os.getpid()

def deliver(spool):
    entries = spool.entries()
    os.write(1, f"{os.getpid() == parent}{[entry.values['x'] for entry in entries]} ".encode())
    spool.remove(entries)
    return True

writer = BackgroundWriter(Spool(sys.argv[1]), deliver, period=1000.0)
writer.put("points", {"x": "before"})
child = os.fork()
writer.put("points", {"x": "after"})
if not child:
    writer.flush(1000)
    os._exit(0)
os.waitpid(child, 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "spool")], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    # The child sends only its own entry; the parent sends at its exit, without being asked to.
    assert done.stdout == "False['after'] True['before', 'after'] ", done.stderr


def test_a_spool_survives_the_process_and_stays_within_its_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path / "spool", limit_bytes=600)
    put_points(spool, 1.0, 2.0)
    put_points(spool, *[9.0] * 20)
    spool.put("status", {"status": "FINISHED", "ended": 0})
    assert caplog.text.count("is full") == 1
    (tmp_path / "spool" / "000000099-1.entry").write_text("{")
    again = Spool(tmp_path / "spool")
    kinds = [entry.kind for entry in again.entries()]
    assert kinds[:2] == ["points", "points"] and kinds[-1] == "status" and len(kinds) < 8
    assert "set-aside/000000099-1.entry: is damaged" in caplog.text
    put_points(again, 5.0)
    assert again.entries()[-1].values["points"][0][1] == 5.0


def test_what_a_full_disk_does_not_take_waits_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = Spool(tmp_path / "spool", memory_bytes=1000)
    spool.identify("sqlite:///mlflow.db", "0" * 32)
    put_points(spool, 1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        put_points(spool, 2.0, 3.0)
        assert waiting(spool) == [1.0, 2.0, 3.0] and spool.unwritten == 2
        spool.put("upload", {"name": "a.txt", "folder": None}, b"a" * 1000)
        assert (len(spool), spool.dropped) == (3, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert waiting(Spool(tmp_path / "spool")) == [1.0]
    put_points(spool, 4.0)
    assert waiting(Spool(tmp_path / "spool")) == waiting(spool) == [1.0, 2.0, 3.0, 4.0]
    assert spool.unwritten == 0
    assert caplog.text.count("cannot be written (File too large): what is logged is kept in memory") == 1
    assert caplog.text.count("cannot be written (File too large): what is logged now is lost") == 1


def test_an_upload_leaves_nothing_in_the_temporary_folder(
    logger: MLflowLogger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run must leave nothing that nobody will look for: what it copies lies in the spool."""
    run_id = logger.run_id
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    spool = Spool(tmp_path / "spool")
    spool.put("upload", {"name": "note.txt", "folder": None}, b"kept")
    assert Delivery(logger.experiment, logger.tracking_uri, run_id).deliver(spool) and not len(spool)
    monkeypatch.undo()
    assert read_artifact(logger, "note.txt", tmp_path) == b"kept"


def resend(*folders: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pmoe_lightning.tracking.resend", *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)


KILLED_RUN = """
import os, signal, sys
from pmoe_lightning.tracking import MLflowLogger
logger = MLflowLogger(tracking_uri=sys.argv[1], spool=sys.argv[2], flush_seconds=1000.0)
logger.start()
print(logger.run_id, flush=True)
for step in range(20):
    logger.log_metrics({"a": float(step)}, step=step)
logger.log_text("kept", "note.txt")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_continued_without_gap_or_overlap(store: str, tmp_path: Path) -> None:
    spool = tmp_path / "run" / "mlflow-spool"
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, store, spool], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    logger = MLflowLogger(tracking_uri=store, run_id=done.stdout.strip(), spool=spool)
    for step in range(15, 30):  # the last checkpoint was at step 15
        logger.log_metrics({"a": float(step), "b": 1.0}, step=step)
    logger.finish("FINISHED")
    points = MlflowClient(store).get_metric_history(logger.run_id, "a")
    assert [point.step for point in sorted(points, key=lambda point: point.step)] == list(range(30))
    assert history(logger, "b").keys() == set(range(15, 30))
    assert read_artifact(logger, "note.txt", tmp_path) == b"kept"
    assert run_of(logger).info.status == "FINISHED"
    assert not spool.exists()


def test_what_is_left_after_the_end_is_sent_by_a_command(store: str, tmp_path: Path) -> None:
    spool = tmp_path / "run" / "mlflow-spool"
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, store, spool], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    run_id = done.stdout.strip()
    assert not MlflowClient(store).get_metric_history(run_id, "a")
    sent = resend(tmp_path)
    assert sent.returncode == 0 and f"entries sent to run {run_id}" in sent.stdout, sent.stderr
    assert len(MlflowClient(store).get_metric_history(run_id, "a")) == 20
    again = resend(tmp_path)
    assert (again.returncode, again.stdout) == (0, "nothing is waiting to be sent\n")


def test_the_command_says_what_it_could_not_send(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.identify(f"http://127.0.0.1:{free_port()}", "0" * 32)
    put_points(spool, 1.0)
    done = resend(tmp_path)
    assert done.returncode == 1 and "does not answer" in done.stderr and done.stderr.count("\n") == 1
    assert waiting(Spool(tmp_path / "spool")) == [1.0]
    assert resend(tmp_path / "nowhere").returncode == 2


# ------------------------------------------------------------------ is the server there?


class NotMlflow(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html></html>")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotMlflow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def refusal(uri: str) -> str:
    start = time.monotonic()
    with pytest.raises(RunError) as caught:
        check_server(uri)
    assert time.monotonic() - start < RETRIES_SECONDS
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_store_that_works_is_accepted(store: str, tmp_path: Path) -> None:
    check_server(store)
    check_server(f"sqlite:///{tmp_path}/new/folder/mlflow.db")
    assert not (tmp_path / "new").exists()


def test_a_closed_port_is_refused_at_once() -> None:
    port = free_port()
    assert f"http://127.0.0.1:{port} does not answer" in refusal(f"http://127.0.0.1:{port}")


def test_a_silent_server_is_refused_within_ten_seconds() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        message = refusal(f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}")
    assert "does not answer" in message and "secret" not in message


def test_other_servers_are_told_apart(other_server: str) -> None:
    assert "refuses the credentials (HTTP 401)" in refusal(f"{other_server}/401")
    assert "not answer as an MLflow server (HTTP 200)" in refusal(f"{other_server}/200")
    assert "not answer as an MLflow server (HTTP 500)" in refusal(f"{other_server}/500")


def test_databases_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database " * 100)
    assert "file is not a database" in refusal(f"sqlite:///{tmp_path}/text.db")
    assert "cannot be written" in refusal(f"sqlite:///{tmp_path}/text.db/below/mlflow.db")
    assert "cannot be reached" in refusal(f"postgresql://user:secret@127.0.0.1:{free_port()}/mlflow")


FIRST_START = """
import sys
from pmoe_lightning.tracking import MLflowLogger
sys.stdin.readline()  # all at once
logger = MLflowLogger(tracking_uri=sys.argv[1])
logger.start()
logger.finish("FINISHED")
"""


def test_first_starts_at_once_share_a_new_database(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FIRST_START, "sqlite:///new/mlflow.db?timeout=30"]
    pipe = subprocess.PIPE
    starts = [subprocess.Popen(command, cwd=tmp_path, stdin=pipe, stderr=pipe, text=True) for _ in range(3)]
    for start in starts:
        start.stdin.write("\n")
        start.stdin.flush()
    errors = [start.communicate()[1] for start in starts]
    assert [start.returncode for start in starts] == [0, 0, 0], errors
    client = MlflowClient(f"sqlite:///{tmp_path}/new/mlflow.db")
    experiment = client.get_experiment_by_name("pmoe_lightning")
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FINISHED"] * 3
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mlflow.db"], "a lock or a half is left"


def test_the_database_of_every_form_of_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri, file in {
        "sqlite:///a.db": tmp_path / "a.db",
        "sqlite:///in/a.db?timeout=3": tmp_path / "in" / "a.db",
        "sqlite+pysqlite:////tmp/a.db": Path("/tmp/a.db"),
        "sqlite:///file:a.db?mode=rwc&uri=true": Path("a.db"),
        "sqlite://": None,
        "sqlite:///:memory:": None,
    }.items():
        assert database_file(uri) == file
    assert "not a SQLite URI" in refusal("sqlite:a.db")
    for uri in ("sqlite://", "sqlite:///:memory:", "sqlite:///file:a?mode=memory&uri=true"):
        assert "is in memory, and would keep nothing" in refusal(uri)
    for uri in ("sqlite://", "http://host", "sqlite:////a/b.db?timeout=3"):
        assert absolute_uri(uri) == uri
    assert absolute_uri("sqlite:///a.db?timeout=3") == f"sqlite:///{tmp_path}/a.db?timeout=3"


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a journal comes and goes
        return 0


@pytest.mark.parametrize("program", ["ours", "MLflow"])
@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_store_whose_making_was_killed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, share: float
) -> None:
    """Killed when its file has that share of its final size, which it reaches before its last migration."""
    monkeypatch.setattr("pmoe_lightning.tracking.database._ABANDONED_SECONDS", 0.0)
    database, size = tmp_path / "mlflow.db", 600_000
    make = {"ours": make_database, "MLflow": lambda uri: MlflowClient(uri).search_experiments()}[program]
    child = os.fork()
    if not child:
        make(f"sqlite:///{database}")
        signal.pause()  # where the kill comes late, on a busy machine
    wait_until(lambda: any(size_of(path) > share * size for path in tmp_path.glob("mlflow.db*")))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list(tmp_path.iterdir())
    logger = MLflowLogger(tracking_uri=f"sqlite:///{database}")
    logger.start()
    logger.finish("FINISHED")
    assert run_of(logger).info.status == "FINISHED"
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"mlflow.db", "mlflow.db.interrupted", "mlflow.db.interrupted-journal"}


def test_a_database_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("create table experiments (experiment_id integer)")
        connection.execute("create table notes (text)")
        connection.execute("insert into notes values ('of somebody')")
        connection.commit()
    os.utime(database, (0, 0))
    with pytest.raises(RunError, match="cannot be brought up to date .* set MLFLOW_TRACKING_URI to another") as caught:
        MLflowLogger(tracking_uri=f"sqlite:///{database}")
    assert "\n" not in str(caught.value)


def test_a_folder_is_one_line_or_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    for uri in (f"{tmp_path}/runs", f"file://{tmp_path}/runs"):
        assert "MLFLOW_TRACKING_URI=sqlite:///mlflow.db" in refusal(uri)
        with pytest.raises(RunError, match="MLFLOW_ALLOW_FILE_STORE=true"):
            MLflowLogger(tracking_uri=uri)
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(None)
    assert "where ./mlruns holds old runs" in refusal(mlflow.get_tracking_uri())

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLflowLogger(tracking_uri=f"file://{tmp_path}/runs")
    logger.start()
    logger.log_metrics({"a": 1.0}, step=3)
    logger.finish("FINISHED")
    assert history(logger, "a") == {3: 1.0}


# ------------------------------------------------------------------ what is not said

ADDRESSES = {
    "http://me:secret@host:5000": "http://***@host:5000",
    "https://secret@host/path": "https://***@host/path",
    "postgresql://me:s/e@cr?et@host/db": "postgresql://***@host/db",
    "postgresql+psycopg2://host/db?user=me&password=secret": "postgresql+psycopg2://host/db?***",
    "mssql+pyodbc:///?odbc_connect=PWD%3Dsecret": "mssql+pyodbc:///?***",
    "sqlite:////home/me:a@work/mlflow.db?timeout=3": "sqlite:////home/me:a@work/mlflow.db?timeout=3",
    "file:///home/me@work": "file:///home/me@work",
    "https://host:5000/a/page": "https://host:5000/a/page",
}


def test_what_the_client_says_of_a_server_is_one_short_line() -> None:
    for said, meant in {
        "API request to endpoint /api failed with error code 503 != 200. Response body: '<html>": "HTTP 503",
        "API request to http://a:b@host failed with exception Max retries": "the server does not answer",
        "API request to http://host failed with timeout exception": "the server does not answer",
        "413 Client Error: Too large for url: http://host": "HTTP 413",
        "(raised as a result of Query-invoked autoflush)\n(sqlite3.DatabaseError) malformed\n[SQL: ...]": (
            "(sqlite3.DatabaseError) malformed"
        ),
        "": "ValueError",
    }.items():
        assert store_line(ValueError(said)) == meant


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_said_without_its_secrets(address: str) -> None:
    said = ADDRESSES[address]
    assert without_secrets(address) == without_secrets(said) == said
    assert without_secrets(f"a {address} b") == f"a {said} b"


def test_a_password_is_nowhere_in_the_run_and_the_rest_is_still_sent(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = MLflowLogger(tracking_uri=store, tags={"from": "http://me:secret@host"})
    logger.set_tags({"overrides": "logger.tracking_uri=http://me:secret@host"})
    logger.log_hyperparams({"uri": "http://me:secret@host"})
    logger.log_text("tracking_uri: http://me:secret@host\n", "config.yaml")
    logger.finish("FINISHED")
    run = run_of(logger)
    assert "secret" not in str(run.to_dictionary())
    assert read_artifact(logger, "config.yaml", tmp_path) == b"tracking_uri: http://***@host\n"

    closed = f"http://me:secret@127.0.0.1:{free_port()}"
    spool = Spool(tmp_path / "spool")
    spool.identify(closed, "0" * 32)
    put_points(spool, 1.0)
    assert "secret" not in (tmp_path / "spool" / "run.json").read_text()
    assert resend_main([str(tmp_path)]) == 1
    assert "set MLFLOW_TRACKING_URI to http://***@127.0.0.1" in capsys.readouterr().err
    mlflow.set_tracking_uri(closed)
    assert resend_main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "does not answer" in error and "secret" not in error


# ------------------------------------------------------------------ names and descriptions

CHOSEN = {"algo": "sac", "env": "Hopper-v5", "actor": "pmoe", "estimator": "frequency"}
CHOSEN |= {"action_transform": "none", "safe": "none"}


def test_a_name_says_what_was_chosen() -> None:
    words = ["algo=sac", "env.id=Hopper-v5", "seed=3", "+algo.lr=0.001", "hydra.run.dir=a", "logger.flush_seconds=1"]
    assert run_name(CHOSEN, words, 3) == "sac Hopper-v5 pmoe frequency +algo.lr=0.001 seed=3"
    assert run_name(CHOSEN | {"safe": "velocity"}, [], 0) == "sac Hopper-v5 pmoe frequency velocity seed=0"
    assert sweep_name(["-m", "algo=sac", "seed=1,2"]) == "sweep algo=sac seed=1,2"
    long = [f"+tag={'x' * 9000}"]
    names = {run_name(CHOSEN, long, seed) for seed in range(5)}
    assert len(names) == 5 and max(map(len, names)) <= 200


def test_only_an_invented_name_is_replaced(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(store)
    for given, expected in ((None, "ours"), ("bold-crow-123x", "bold-crow-123x"), ("mine", "mine")):
        opened = client.create_run("1", run_name=given).info.run_id
        monkeypatch.setenv("MLFLOW_RUN_ID", opened)
        logger = MLflowLogger(tracking_uri=store, run_name="ours")
        logger.start("what it is")
        logger.finish("FINISHED")
        run = client.get_run(opened)
        assert (run.info.run_name, run.data.tags["mlflow.note.content"]) == (expected, "what it is")
    client.set_tag(opened, "mlflow.note.content", "edited")
    again = MLflowLogger(tracking_uri=store)
    again.start("what it is")
    again.finish("FINISHED")
    assert client.get_run(opened).data.tags["mlflow.note.content"] == "edited"


def test_the_experiment_is_described_and_default_is_warned_of(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = MlflowClient(store)
    logger = MLflowLogger("described", tracking_uri=store)
    logger.start()
    logger.finish("FINISHED")
    tags = client.get_experiment(logger.experiment_id).tags
    assert "environment" in tags["mlflow.note.content"]
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert "Default" not in caplog.text
    monkeypatch.setenv("MLFLOW_RUN_ID", client.create_run("0").info.run_id)
    adopted = MLflowLogger(tracking_uri=store)
    adopted.start()
    adopted.finish("FINISHED")
    assert caplog.text.count("--experiment-name pmoe_lightning") == 1


def test_the_page_is_that_of_training_runs(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "#/experiments/1/runs?workflowType=machine_learning"
    assert ui_page(["--port", "5001"]) == (f"http://127.0.0.1:5001/{page}", store)
    bundle = Path(mlflow.__file__).parent / "server" / "js" / "build" / "static" / "js"
    assert any('MACHINE_LEARNING="machine_learning"' in file.read_text() for file in bundle.glob("main.*.js"))


# ------------------------------------------------------------------ provenance


def test_provenance_of_a_checkout_and_of_none(tmp_path: Path) -> None:
    assert provenance(tmp_path)["git_commit"] is None and provenance(tmp_path)["git_dirty"] is None

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    (tmp_path / "untracked").write_text("results do not make a checkout dirty")
    origin = provenance(tmp_path)
    assert origin["git_commit"] == git("rev-parse", "HEAD") and origin["git_dirty"] is False
    (tmp_path / "a").write_text("2")
    assert provenance(tmp_path)["git_dirty"] is True
    assert json.loads(json.dumps(origin)) == origin
    assert origin["packages"]["mlflow"] == mlflow.__version__


# ------------------------------------------------------------------ policies in MLflow


@pytest.fixture(scope="module")
def trained(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[MLflowLogger, Path, str]:
    """A run with a best checkpoint, and its policy packaged and registered."""
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    _, checkpoint = make_policy("HalfCheetah-v5", deterministic="sample_component")
    checkpoint["policy"]["description"]["env"]["kwargs"] = {"max_episode_steps": 5}
    write_checkpoint(checkpoint, path)
    logger = MLflowLogger(tracking_uri=store)
    logger.start()
    logger.log_artifact(path, "checkpoints")
    logger.log_hyperparams({"seed": 7})
    for step, value in ((0, -5.0), (1000, 321.5), (2000, 300.0)):
        suffixes = {"": value, "_low": value - 1, "_high": value + 1}
        logger.log_metrics({f"eval/episode_return{suffix}": x for suffix, x in suffixes.items()}, step=step)
    uri = log_policy_model(logger, path, register_as="runner", metadata={"algorithm": "sac"})
    logger.finish("FINISHED")
    MlflowClient(store).set_registered_model_alias("runner", "champion", "1")
    return logger, path, uri


STRANGER = """
import sys
sys.modules |= dict.fromkeys(["pmoe_lightning", "torchrl", "tensordict", "lightning"])  # importing these now fails
import mlflow, numpy as np
uri, store, observations, actions = sys.argv[1:]
mlflow.set_tracking_uri(store)
policy = mlflow.pyfunc.load_model(uri)
observation = np.load(observations)
action = policy.predict(observation)
assert policy.predict(observation[:1]).shape == (1, 6)
np.save(actions, action)
try:
    policy.predict(observation[:, :3])
except mlflow.MlflowException:
    pass
else:
    raise SystemExit("the signature is not enforced")
"""


def test_a_stranger_uses_the_packaged_policy(trained: tuple, store: str, tmp_path: Path) -> None:
    _, path, uri = trained
    observation = torch.randn(7, 17) * 3
    np.save(tmp_path / "observation.npy", observation.numpy())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", STRANGER, "models:/runner@champion", store]
    command += [str(tmp_path / "observation.npy"), str(tmp_path / "action.npy")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    # Whatever rule it was trained with, the packaged policy is a function: the likeliest component's mean.
    policy = load_policy(path, rule="max_weight")
    expected = policy(TensorDict(observation=observation, batch_size=7))["action"].detach()
    np.testing.assert_allclose(np.load(tmp_path / "action.npy"), expected, atol=1e-5)


def test_the_packaged_policy_follows_the_best_value_where_training_did(logger: MLflowLogger) -> None:
    _, checkpoint = make_policy("Hopper-v5", num_components=8)
    description = checkpoint["policy"]["description"] | {"critic": {"hidden_sizes": [8], "activation": "relu"}}
    description["arguments"]["deterministic"] = "best_value"
    critics = [dict(make_qvalue_network(11, 3, hidden_sizes=(8,)).state_dict()) for _ in range(2)]
    checkpoint["policy"] |= {"description": description, "action_values": critics}
    logger.start()
    packaged = mlflow.pyfunc.load_model(log_policy_model(logger, checkpoint))
    observation = TensorDict(observation=torch.randn(50, 11), batch_size=50)
    best, likeliest = (
        load_policy(checkpoint, rule=rule)(observation.clone())["action"] for rule in (None, "max_weight")
    )
    action = packaged.predict(observation["observation"].numpy())
    np.testing.assert_allclose(action, best.detach(), atol=1e-5)
    assert (best - likeliest).abs().max() > 0.01
    for row in range(2):
        for number in (np.nan, np.inf, -np.inf):
            broken = observation["observation"][:2].numpy().copy()
            broken[row, 3] = number
            with pytest.raises(Exception, match="the observation holds NaN or an infinity"):
                packaged.predict(broken)


@pytest.mark.parametrize("critic", ["crossq", "layer_norm"])
def test_the_packaged_policy_asks_critics_of_their_own_kind(critic: str, logger: MLflowLogger) -> None:
    """With statistics and gains that training has moved, behind the statistics of observations."""
    algorithm, _ = make_sac_policy(critic=critic, normalize=True)
    torch.manual_seed(2)
    for name, value in algorithm.state_dict().items():
        if "norms" in name:
            value.uniform_(0.5, 2.0) if "weight" in name or "var" in name else value.normal_()
    algorithm.policy[0].update(torch.randn(100, 11) * 3 + 1)
    checkpoint = {"policy": algorithm.policy_state()}
    logger.start()
    packaged = mlflow.pyfunc.load_model(log_policy_model(logger, checkpoint))
    observation = TensorDict(observation=torch.randn(50, 11) * 3, batch_size=50)
    best, likeliest = (
        load_policy(checkpoint, rule=rule)(observation.clone())["action"] for rule in (None, "max_weight")
    )
    found = packaged.predict(observation["observation"].numpy())
    np.testing.assert_allclose(found, best.detach(), atol=1e-5)
    assert (best - likeliest).abs().max() > 0.01


def test_a_served_graph_answers_what_is_not_finite_with_an_error(logger: MLflowLogger) -> None:
    """Also the graph itself, which other programs serve."""
    logger.start()
    uri = log_policy_model(logger, make_policy(normalize=False)[1])
    served = mlflow.pytorch.load_model(uri, device="cpu")
    packaged = mlflow.pyfunc.load_model(uri)
    huge = np.array([[3e38, -3e38, 3e38]], np.float32)
    assert np.isfinite(served(torch.zeros(4, 3)).numpy(force=True)).all()
    for number in (np.nan, np.inf, -np.inf):
        broken = np.array([[0.0, number, 0.0]], np.float32)
        with pytest.raises(RuntimeError, match="the observation holds NaN or an infinity"):
            served(torch.as_tensor(broken))
        with pytest.raises(Exception, match="the observation holds NaN or an infinity"):
            packaged.predict(broken)
    try:
        assert np.isfinite(packaged.predict(huge)).all()
    except RuntimeError as error:
        assert "too large for the policy" in str(error)


def test_the_packaged_policy_says_what_it_is(trained: tuple, tmp_path: Path) -> None:
    logger, _, uri = trained
    model = mlflow.models.get_model_info(uri)
    assert model.run_id == logger.run_id
    assert model.metadata == {
        "env": "HalfCheetah-v5",
        "observation_dim": 17,
        "action_dim": 6,
        "actor": "pmoe",
        "num_components": 4,
        "deterministic": True,
        "rule": "max_weight",
        "env_frames": 1000,
        "updates": 10,
        "algorithm": "sac",
    }
    assert model.flavors["python_function"]["config"] == {"device": "cpu"}
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path)))
    requirements = (folder / "requirements.txt").read_text().split()
    assert sorted(line.split("==")[0] for line in requirements) == ["mlflow", "numpy", "torch"]
    note = next(folder.rglob("README.md")).read_text()
    assert uri in note and "float32 [N, 17]" in note and "always gets the same action" in note
    logged = MlflowClient(logger.tracking_uri).get_logged_model(uri.removeprefix("models:/"))
    assert (logged.name, logged.source_run_id, logged.experiment_id) == ("policy", logger.run_id, logger.experiment_id)


def test_the_packaged_policy_has_the_metrics_of_its_checkpoint(trained: tuple, store: str) -> None:
    logger, _, uri = trained
    client = MlflowClient(store)
    model = client.get_logged_model(uri.removeprefix("models:/"))
    assert {metric.key: (metric.value, metric.step) for metric in model.metrics} == {
        "eval/episode_return": (321.5, 1000),
        "eval/episode_return_low": (320.5, 1000),
        "eval/episode_return_high": (322.5, 1000),
    }
    assert client.get_run(logger.run_id).outputs.model_outputs[0].step == 1000
    assert history(logger, "eval/episode_return") == {0: -5.0, 1000: 321.5, 2000: 300.0}
    (found,) = client.search_logged_models([logger.experiment_id], "metrics.`eval/episode_return` > 321")
    assert found.model_id == model.model_id
    assert model.params.items() >= {"seed": "7", "env_frames": "1000", "rule": "max_weight", "algorithm": "sac"}.items()
    description = model.tags["mlflow.note.content"]
    for said in ("HalfCheetah-v5", "1,000 environment frames", "rule max_weight", "321.5", "320.5 to 322.5"):
        assert said in description
    assert client.get_model_version("runner", "1").description == description


def test_references_to_the_store_are_resolved(trained: tuple, store: str, tmp_path: Path) -> None:
    logger, path, _ = trained
    for reference in (logger.run_id, "models:/runner/1", "models:/runner@champion"):
        assert resolve_checkpoint(reference).read_bytes() == path.read_bytes()
    last = MLflowLogger(tracking_uri=store)
    (tmp_path / "last.ckpt").write_bytes(b"last")
    last.log_artifact(tmp_path / "last.ckpt", "checkpoints")
    last.finish("FINISHED")
    assert resolve_checkpoint(last.run_id).read_bytes() == b"last"


def test_references_that_lead_nowhere_are_one_line(trained: tuple, logger: MLflowLogger) -> None:
    for reference, message in (
        ("0" * 32, "not found"),
        (logger.run_id, "does not hold checkpoints/best.ckpt or checkpoints/last.ckpt"),
        ("models:/runner/2", "not in the model registry"),
        ("models:/runner@nobody", "not in the model registry"),
        ("models:/nobody/1", "not in the model registry"),
    ):
        with pytest.raises(RunError, match=message) as caught:
            resolve_checkpoint(reference)
        assert "\n" not in str(caught.value)


def test_evaluate_by_run_id_adds_to_the_run_of_mlflow_run(
    trained: tuple, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_id = MlflowClient(store).create_run("1").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    assert evaluate_main(["--checkpoint", trained[0].run_id, "--episodes", "2", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["lengths"] == [5, 5]
    metrics = MlflowClient(store).get_run(run_id).data.metrics
    low, high = result["interval"]
    assert metrics == {
        "eval/episode_return": result["mean"],
        "eval/episode_return_low": low,
        "eval/episode_return_high": high,
    }
    logged = MlflowClient(store).download_artifacts(run_id, "evaluation.json", str(tmp_path))
    assert json.loads(Path(logged).read_text()) == result


def test_evaluate_says_that_the_server_is_down(capfd: pytest.CaptureFixture[str]) -> None:
    mlflow.set_tracking_uri(f"http://127.0.0.1:{free_port()}")
    start = time.monotonic()
    assert evaluate_main(["checkpoint=" + "0" * 32]) == 1
    assert time.monotonic() - start < RETRIES_SECONDS
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "does not answer" in error


def test_a_policy_that_is_not_one_is_not_packaged(logger: MLflowLogger) -> None:
    with pytest.raises(RunError, match="'policy' is missing"):
        log_policy_model(logger, {"state_dict": {}})
