"""Output that cannot be written: pipes nobody reads, full disks, closed streams and terminals end nothing."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from mlflow import MlflowClient
from waiting import HANG_SECONDS, wait_until

from pmoe_lightning.tracking import MLflowLogger
from pmoe_lightning.tracking.database import make_database

#: Prints by every way there is, and then says in a file that it is not ended; Python's own exit code is 0.
PRINTS = """
import ctypes, logging, os, subprocess, sys, warnings
from pathlib import Path
from tqdm import tqdm
from pmoe_lightning.processes.output import outlive_output
from pmoe_lightning.processes.stopping import stop

outlive_output()
stop.listen()
Path("ready").touch()
if len(sys.argv) > 1:
    sys.stdin.readline()
logging.basicConfig(level=logging.INFO)
logging.getLogger("hydra").addHandler(logging.StreamHandler(sys.stdout))
for i in tqdm(range(2), mininterval=0):
    print("x" * 5000)
    print("a line", file=sys.stderr, flush=True)
    warnings.warn(f"of what happened {i}")
    logging.getLogger("hydra").warning("said")
    ctypes.CDLL(None).puts(b"from C")
    subprocess.run(["echo", "from a child"])
    sys.stdout.flush()
with open("opened", "w") as opened:  # takes the lowest free descriptor
    opened.write("kept")
    opened.flush()
    subprocess.run(["echo", "not into this file"])
Path("done").write_text(Path("opened").read_text())
print("unflushed", end="")
"""


@pytest.fixture
def environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    "shell",
    [
        '"$@" | true; exit ${PIPESTATUS[0]}',
        '"$@" 2>&1 | head -1 >/dev/null; exit ${PIPESTATUS[0]}',
        'PYTHONUNBUFFERED=1 "$@" 2>&1 | head -1 >/dev/null; exit ${PIPESTATUS[0]}',
        '"$@" >/dev/full 2>&1',
        '"$@" >&-',
        '"$@" 2>&-',
        '"$@" <&- >&- 2>&-',
        '"$@"',
    ],
)
def test_output_that_nobody_takes_changes_nothing(shell, environ, tmp_path):
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", PRINTS]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").read_text() == "kept"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if shell == '"$@"':
        assert done.stdout.count("x" * 5000) == 2 and "unflushed" in done.stdout
        assert done.stderr.count("a line\n") == 2 and "of what happened 1" in done.stderr


def test_a_terminal_that_is_gone_changes_nothing(environ, tmp_path):
    ours, terminal = pty.openpty()
    command = [sys.executable, "-c", PRINTS, "wait"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environ, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    wait_until((tmp_path / "ready").exists, process)
    os.close(ours)
    process.communicate(b"\n", timeout=HANG_SECONDS)
    assert process.returncode == 0 and (tmp_path / "done").read_text() == "kept"


def test_a_reader_that_has_stopped_reading_is_waited_for_until_a_signal_comes(environ, tmp_path):
    lines = PRINTS.replace("range(2)", "range(100)").replace('"x" * 5000', '"x" * 50000')
    command = [sys.executable, "-c", lines + "stop.raise_if_asked()"]
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as it:
        syscall = Path(f"/proc/{it.pid}/wchan")
        wait_until(lambda: (tmp_path / "ready").exists() and "poll" in syscall.read_text(), it)
        assert not (tmp_path / "done").exists()
        it.send_signal(signal.SIGTERM)
        assert it.wait(HANG_SECONDS) == 143 and (tmp_path / "done").exists()


@pytest.mark.parametrize(("shell", "code"), [('"$@" >/dev/full', 1), ('"$@" | true; exit ${PIPESTATUS[0]}', 0)])
def test_an_evaluation_whose_result_is_lost_says_so(shell, code, environ, tmp_path):
    """A full disk; not a reader that has had enough."""
    evaluate = [sys.executable, "-m", "pmoe_lightning.evaluate", f"checkpoint={ROOT}/tests/fixtures/sac-pendulum.ckpt"]
    command = ["bash", "-c", shell, "bash", *evaluate, "episodes=1", "+env.max_episode_steps=5"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    said = "error: the result could not be written to standard output: No space left on device"
    assert (said in done.stderr.splitlines()) == bool(code)


def test_what_is_sent_later_is_sent_whoever_reads_of_it(environ, tmp_path):
    """A run behind a store that is away, sent by a command whose output has no place."""
    database, run = tmp_path / "mlflow.db", tmp_path / "run" / "mlflow-spool"
    uri = f"sqlite:///{database}"
    make_database(uri)
    logger = MLflowLogger(tracking_uri=uri, spool=run, flush_seconds=1000.0)
    run_id = logger.start()
    away = database.rename(tmp_path / "away.db")
    logger.log_metrics({"train/alpha": 1.0}, step=3)
    logger.finish("FINISHED")
    assert list(run.glob("*.entry"))
    away.rename(database)
    command = ["bash", "-c", '"$@" >/dev/full 2>&1', "bash", sys.executable, "-m", "pmoe_lightning.tracking.resend"]
    done = subprocess.run([*command, str(tmp_path)], env=environ, timeout=HANG_SECONDS)
    assert done.returncode == 0 and not run.exists()
    found = MlflowClient(uri).get_run(run_id)
    assert found.info.status == "FINISHED" and found.data.metrics["train/alpha"] == 1.0
