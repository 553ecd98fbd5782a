"""What several test files share."""

from __future__ import annotations

import ast
import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import shapes
from waiting import HANG_SECONDS

from pmoe_lightning.processes.stopping import STOPS, stop

ROOT = Path(__file__).resolve().parents[1]
# MLflow's servers would each start eight processes for jobs that nothing here asks for.
os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a suite under nohup tests what a terminal's end does, too


shapes.enforce()
#: Files of real processes: few tests and minutes each. Begun first, so that no core is left with them at the end.
LONGEST = ("test_devices", "test_train", "test_resume", "test_tracking", "test_processes", "test_workers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def no_tracking_store_left() -> Iterator[None]:
    """The tracking store that a test opened is not the next test's: MLflow keeps it for the whole process."""
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)


@pytest.fixture(scope="session")
def clean_environ() -> dict[str, str]:
    """Environment variables for a command: the checkout importable, no MLflow setting of the caller's."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run_module(tmp_path: Path, clean_environ: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """``run_module("pmoe_lightning.train", "algo=sac")`` in an empty folder, as a user would."""

    def run(module: str, *words: str, **environ: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", module, *words]
        return subprocess.run(
            command, cwd=tmp_path, env=clean_environ | environ, capture_output=True, text=True, timeout=HANG_SECONDS
        )

    return run


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; creating one takes seconds."""
    import mlflow.tracking

    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.tracking.MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> Path:
    """The database that a command run in ``tmp_path`` uses."""
    return Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))


def syntax_tree(path: Path) -> ast.Module:
    """The file, parsed: while Python 3.11 makes the tree, no finalizer may parse as well, or it loses count."""
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


@contextmanager
def restored_signals() -> Iterator[None]:
    """The train command answers signals to the end of its process: behind this they are the caller's again."""
    handlers = {number: signal.getsignal(number) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        stop.asked = 0


@pytest.fixture(autouse=True)
def signals_of_the_tests() -> Iterator[None]:
    """Whatever commands a test runs in this process, the next one begins with no handler and no note of theirs."""
    with restored_signals():
        yield


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The train command inside this process, because starting Python costs more than these runs: what it printed."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def train(*words: str, code: int = 0) -> str:
        from pmoe_lightning.train import main

        monkeypatch.setattr(sys, "argv", ["train", *words])
        left = 0
        logging.root.handlers.clear()  # as in a new process: those of a run before write to a stream that is closed
        try:
            main()
        except SystemExit as ending:
            left = ending.code or 0
        printed = "".join(capfd.readouterr())
        assert left == code, printed
        return printed

    return train
