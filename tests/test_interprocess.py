"""What the processes of a run share outside of its folder is gone when it ends, or after the next start."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmoe_lightning.processes.interprocess import _name, named_after

#: As a replay buffer and a process with workers do, which pass tensors on through a socket.
SHARES = """
import multiprocessing, sys
from multiprocessing import resource_sharer
from pmoe_lightning.processes.interprocess import named_after

with named_after(sys.argv[1]):
    values = [multiprocessing.get_context("spawn").Value("i") for _ in range(3)]
    resource_sharer.DupFd(0)
    print("made", flush=True)
    sys.stdin.read()
    del values
"""


def start(folder: Path, environ: dict[str, str], program: str = SHARES) -> subprocess.Popen:
    """A process in a group of its own, as soon as it shares something; it ends when its input does."""
    folder.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", program, str(folder)]
    process = subprocess.Popen(command, env=environ, start_new_session=True, **pipes)
    assert process.stdout.readline() == "made\n", process.stderr.read()
    return process


def shared_by(folder: Path, temporary: Path) -> tuple[int, int]:
    """The number of its semaphores and of its sockets."""
    semaphores, sockets = Path("/dev/shm").glob(f"sem.{_name(folder)}-*"), temporary.glob(f"{_name(folder)}-*/*")
    return len(list(semaphores)), len(list(sockets))


def left_by(folder: Path, temporary: Path) -> list[Path]:
    return [*Path("/dev/shm").glob(f"sem.{_name(folder)}-*"), *temporary.glob(f"{_name(folder)}-*")]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary folder with a path of a user's length, not of a test's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_the_next_start_removes_what_a_killed_group_has_left(temporary, tmp_path, clean_environ, monkeypatch):
    killed, running = tmp_path / "killed", tmp_path / "running"
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    processes = [start(folder, clean_environ | {"TMPDIR": str(temporary)}) for folder in (killed, running)]
    os.killpg(processes[0].pid, signal.SIGKILL)
    processes[0].communicate()
    assert shared_by(killed, temporary) == (3, 1), "it went by itself: nothing is proved"
    with named_after(killed):
        assert shared_by(killed, temporary) == (0, 0) and shared_by(running, temporary) == (3, 1)
    _, errors = processes[1].communicate()
    assert processes[1].returncode == 0, errors
    assert left_by(killed, temporary) == left_by(running, temporary) == []


def test_each_process_of_a_run_cleans_up_behind_its_own_predecessor(temporary, tmp_path, clean_environ, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    first = start(tmp_path / "run", clean_environ | {"TMPDIR": str(temporary)})
    monkeypatch.setenv("LOCAL_RANK", "1")
    with named_after(tmp_path / "run"):
        pass
    monkeypatch.delenv("LOCAL_RANK")
    assert shared_by(tmp_path / "run", temporary) == (3, 1)
    first.communicate()


def test_a_second_run_in_this_process_leaves_the_first_ones_to_their_objects(tmp_path, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with named_after(tmp_path):
        first = multiprocessing.get_context("spawn").Value("i")
    with named_after(tmp_path):
        second = multiprocessing.get_context("spawn").Value("i")
        assert len(left_by(tmp_path, tmp_path)) == 2
    del first, second
    gc.collect()
    assert left_by(tmp_path, tmp_path) == [] and unraisable == []


@pytest.mark.parametrize("length", [60, 100])
def test_sockets_lie_where_their_address_is_not_too_long(length, temporary, tmp_path, clean_environ):
    temporary, folder = temporary / ("x" * (length - len(str(temporary)) - 1)), tmp_path / "run"
    temporary.mkdir()
    process = start(folder, clean_environ | {"TMPDIR": str(temporary)})
    assert shared_by(folder, temporary if length == 60 else Path("/tmp")) == (3, 1)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert left_by(folder, Path("/tmp")) == left_by(folder, temporary) == []


def test_a_closed_terminal_leaves_their_keeper_to_the_run(tmp_path, clean_environ):
    """It ends when the run does, which answers the signal in its own time, and removes what the run has not."""
    program = "import signal; signal.signal(signal.SIGHUP, lambda *_: None)\n" + SHARES
    process = start(tmp_path / "run", clean_environ, program)
    os.killpg(process.pid, signal.SIGHUP)
    _, errors = process.communicate()
    assert process.returncode == 0 and errors == ""
