"""A run's folder has one writer, its lock dies with it, and what the dead leave is told from what the living write."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from waiting import HANG_SECONDS, wait_until

from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.processes import run_folder
from pmoe_lightning.processes.partial_files import partial_file, remove_leftovers, this_host
from pmoe_lightning.tracking.resend import main as resend

HOLD = "from pmoe_lightning.processes import run_folder; run_folder.hold({folder!r}); "


@pytest.fixture(autouse=True)
def nothing_stays_held() -> Iterator[None]:
    yield
    run_folder.release_all()


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts Python with these lines, which read what to wait for, and ends it afterwards."""
    started = []

    def start(code: str, **environ: str) -> subprocess.Popen:
        command = [sys.executable, "-c", code]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | environ, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_one_process_holds_a_folder_until_it_ends_however_it_does(start, tmp_path):
    first = start(HOLD.format(folder=str(tmp_path)) + "print('held', flush=True); input()")
    assert first.stdout.readline() == "held\n"
    who = f"process {first.pid} on {this_host()}"
    assert run_folder.is_held(tmp_path) and run_folder.holder(tmp_path) == who
    with pytest.raises(ConfigurationError, match=f"{tmp_path} is in use by {who}"):
        run_folder.hold(tmp_path)
    first.kill()
    first.wait()
    assert not run_folder.is_held(tmp_path)
    run_folder.hold(tmp_path)
    run_folder.hold(tmp_path)  # it is ours
    assert not run_folder.is_held(tmp_path), "not by another process"
    second = start(HOLD.format(folder=str(tmp_path)))
    assert f"in use by process {os.getpid()} on" in second.communicate(timeout=HANG_SECONDS)[1]
    run_folder.release(tmp_path)
    assert start(HOLD.format(folder=str(tmp_path))).wait(HANG_SECONDS) == 0


@pytest.mark.parametrize("former", ["killed", "goes on"])
def test_the_name_of_the_holder_before_is_not_taken_for_that_of_the_present_one(former, start, tmp_path):
    """In the instant between getting the lock and saying so."""
    lock = tmp_path / run_folder.LOCK
    if former == "killed":
        dead = start(HOLD.format(folder=str(tmp_path)) + "print('held', flush=True); input()")
        assert dead.stdout.readline() == "held\n"
        dead.kill()
        dead.wait()
        assert json.loads(lock.read_text())["pid"] == dead.pid
    else:
        run_folder.hold(tmp_path)
        run_folder.release(tmp_path)
    code = f"import fcntl; file = open({str(lock)!r}, 'r+'); fcntl.flock(file, fcntl.LOCK_EX); print('got', flush=True)"
    silent = start(f"{code}; input()")
    assert silent.stdout.readline() == "got\n"
    assert run_folder.holder(tmp_path) == "another process"
    lock.write_text("")
    assert run_folder.holder(tmp_path) == "another process"


@pytest.mark.parametrize("number", [2, 3, 5])
def test_of_several_starts_at_once_one_holds_the_folder(number, start, tmp_path):
    code = "input(); " + HOLD.format(folder=str(tmp_path / "run")) + "print('held', flush=True); input()"
    started = [start(code) for _ in range(number)]
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    wait_until(lambda: sum(process.poll() is not None for process in started) == number - 1)
    (first,) = [process for process in started if process.poll() is None]
    assert first.stdout.readline() == "held\n"
    for process in started:
        if process is not first:
            assert f"in use by process {first.pid} on" in process.communicate()[1]


def test_children_do_not_keep_the_folder_of_a_dead_parent(start, tmp_path):
    """Neither forked nor executed ones."""
    children = "import os, subprocess, time; sleeper = subprocess.Popen(['sleep', '1000']); child = os.fork()\n"
    children += "if not child:\n    print(sleeper.pid, os.getpid(), flush=True)\n    time.sleep(1000)\ninput()"
    parent = start(HOLD.format(folder=str(tmp_path)) + children)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert run_folder.is_held(tmp_path)
    parent.kill()
    parent.wait()
    assert not run_folder.is_held(tmp_path)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)  # they are alive


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_only_the_first_process_of_a_run_takes_the_lock(name, start, tmp_path, monkeypatch):
    run_folder.hold(tmp_path)
    assert start(HOLD.format(folder=str(tmp_path)), **{name: "1"}).wait(HANG_SECONDS) == 0
    assert start(HOLD.format(folder=str(tmp_path)), **{name: "0"}).wait(HANG_SECONDS) == 1


def without_locks(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


UNLOCKED = "import errno, fcntl, os\n"
UNLOCKED += "def without(*_): raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))\nfcntl.flock = without\n"


def test_where_there_are_no_locks_a_file_stands_for_one_and_a_line_says_so(start, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    code = UNLOCKED + HOLD.format(folder=str(tmp_path)) + "print('held', flush=True); input()"
    first = start(code)
    assert first.stdout.readline() == "held\n"
    claim = tmp_path / run_folder.CLAIM
    assert run_folder.holder(tmp_path) == f"process {first.pid} on {this_host()}"
    with pytest.raises(ConfigurationError, match=f"in use by process {first.pid} on .* remove {claim}"):
        run_folder.hold(tmp_path)
    assert "without locks (No locks available): the file .run.claim" in caplog.text
    first.kill()
    first.wait()
    assert claim.exists() and not run_folder.is_held(tmp_path)
    run_folder.hold(tmp_path)
    assert json.loads(claim.read_text())["pid"] == os.getpid()
    run_folder.release(tmp_path)
    assert not claim.exists()
    claim.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "1"}))
    with pytest.raises(ConfigurationError, match="in use by process 1 on elsewhere"):
        run_folder.hold(tmp_path)
    # In a container the number of the process before is often that of the next one.
    claim.write_text(json.dumps({"pid": os.getpid(), "host": this_host(), "started": "1"}))
    run_folder.hold(tmp_path)


@pytest.mark.parametrize("number", [2, 5])
def test_without_locks_too_one_of_several_starts_holds_the_folder(number, start, tmp_path):
    """Though a dead process has left its claim, which all of them find."""
    dead = start("pass")
    dead.wait()
    (tmp_path / run_folder.CLAIM).write_text(json.dumps({"pid": dead.pid, "host": this_host(), "started": "1"}))
    code = UNLOCKED + "input(); " + HOLD.format(folder=str(tmp_path)) + "print('held', flush=True); input()"
    started = [start(code) for _ in range(number)]
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    wait_until(lambda: sum(process.poll() is not None for process in started) == number - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [run_folder.CLAIM, run_folder.LOCK]


def test_what_a_run_that_runs_has_not_sent_yet_is_left_to_it(start, tmp_path, capfd):
    folder = tmp_path / "run"
    first = start(HOLD.format(folder=str(folder)) + "print('held', flush=True); input()")
    assert first.stdout.readline() == "held\n"
    (folder / "mlflow-spool").mkdir()
    (folder / "mlflow-spool" / "run.json").write_text("not even readable")
    assert resend([str(tmp_path)]) == 0
    assert f"left to process {first.pid} on" in capfd.readouterr().out
    first.kill()
    first.wait()
    assert resend([str(tmp_path)]) == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/run cannot be written"):
        run_folder.hold(tmp_path / "file" / "run")


def test_a_record_is_read_as_it_was_written_or_not_at_all(tmp_path, caplog):
    assert run_folder.read_record(tmp_path) == {}
    run_folder.write_record(tmp_path, "FINISHED", env_frames=3)
    path = tmp_path / run_folder.RECORD
    content = path.read_bytes()
    assert run_folder.read_record(tmp_path) == {"status": "FINISHED", "env_frames": 3}
    for position in range(len(content) - 1):  # the last character is the end of the line
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        caplog.clear()
        assert run_folder.read_record(tmp_path) == {"status": "UNKNOWN"} and "is damaged" in caplog.text
        path.write_bytes(content[:position])
        assert run_folder.read_record(tmp_path) == {"status": "UNKNOWN"}
    assert os.listdir(tmp_path) == [run_folder.RECORD]


def test_what_the_dead_have_left_is_removed_and_what_the_living_write_is_not(start, tmp_path):
    path = tmp_path / "last.ckpt"
    code = "from pmoe_lightning.processes.partial_files import partial_file; "
    code += f"path = partial_file({str(path)!r}); path.write_text('half'); print(path, flush=True); input()"
    living, dead = start(code), start(code)
    names = [Path(process.stdout.readline().strip()) for process in (living, dead)]
    dead.kill()
    dead.wait()
    before = tmp_path / ".last.ckpt.partial"  # of earlier versions
    elsewhere = tmp_path / ".last.ckpt.elsewhere.1.partial"
    for leftover in (before, elsewhere, partial_file(path)):
        leftover.write_text("half")
    path.write_text("whole")
    assert names[0].exists() and names[1].exists()
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {path, names[0]}
