"""Signals: the first is a note, looked at where a run may end, the second an end; in real processes, without a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from forked import LAST, SMALL, TINY
from mlflow import MlflowClient
from waiting import HANG_SECONDS, wait_until

from pmoe_lightning.processes.stopping import STOPS

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
HEAD = """
import ctypes, os, subprocess, sys, time
from pathlib import Path
from pmoe_lightning.processes.orphans import end_with
from pmoe_lightning.processes.stopping import Stopped, stop

def child():
    return subprocess.Popen(["sleep", "1000"]).pid

def ready(*words):
    print(*words, flush=True)

def wait_for(happened):
    while not happened():
        time.sleep(0.01)

stop.listen()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Runs lines of Python in a process of its own; returns when they have said that they are ready."""
    started = []

    def start(lines: str, *words: str) -> subprocess.Popen:
        command = [*words, sys.executable, "-c", HEAD + textwrap.dedent(lines)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)
        started.append(process)
        line = process.stdout.readline()
        assert line, process.stderr.read()
        process.said = line.split()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def is_gone(pid: int | str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def ends_with(process: subprocess.Popen, code: int) -> str:
    errors = process.communicate(timeout=HANG_SECONDS)[1]
    assert process.returncode == code, errors
    return errors


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_a_run_at_its_next_look_and_not_before(number, start):
    process = start("""
        done = []
        ready()
        try:
            wait_for(lambda: stop.is_asked)
            done.append("what was under way")
            stop.raise_if_asked()
            done.append("more")
        finally:
            ready(*done)
    """)
    process.send_signal(number)
    out, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 128 + number
    assert out == "what was under way\n" and errors.startswith("stopping")


def test_what_a_library_makes_of_the_exception_does_not_matter(start):
    """Swallowed by a callback of C, by a bare except, or exchanged for an error of its own."""
    for swallow in (
        "ctypes.CFUNCTYPE(None)(lambda: wait_for(lambda: False))()",
        "try: wait_for(lambda: False)\n            except BaseException: pass",
        "try: wait_for(lambda: False)\n            except BaseException: raise OSError('the store is broken')",
    ):
        process = start(f"""
        with stop.interruptible():
            ready()
            {swallow}
        ready("went on")
        """)
        process.send_signal(TERM)
        out, _ = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 143 and out == ""


def test_nothing_is_raised_where_it_would_end_as_a_note_on_stderr(start, tmp_path):
    """In a finalizer, or in what PyTorch calls from C: only when that is over."""
    process = start("""
        class Slow:
            def __del__(self):
                ready()
                wait_for(Path("look").exists)
        with stop.interruptible():
            Slow()
            time.sleep(1000)
    """)
    process.send_signal(TERM)
    wait_until(lambda: not pending(process.pid, TERM))
    (tmp_path / "look").touch()
    assert ends_with(process, 143) == "stopping\n"


def test_a_signal_that_comes_while_a_process_is_forked_waits_for_it(tmp_path):
    """What is called around a fork is called from C, too."""
    hook = "os.register_at_fork(before=lambda: os.kill(os.getpid(), 15))"
    program = HEAD.replace("stop.listen()", f"{hook}\nstop.listen()") + textwrap.dedent("""
        with stop.interruptible():
            if not os.fork():
                os._exit(0)
            time.sleep(1000)
    """)
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 143 and done.stderr == "stopping\n"


def test_what_must_not_be_broken_off_ends_with_the_process(start, tmp_path):
    process = start("""
        with stop.closing(lambda: Path("closed").touch()), stop.interruptible(), stop.unbreakable():
            try:
                ready(child())
                time.sleep(1000)
            finally:
                ready("broken off")
    """)
    process.send_signal(TERM)
    out, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 143 and out == "" and errors == "stopping\n"
    assert (tmp_path / "closed").exists()
    wait_until(lambda: is_gone(process.said[0]))


def test_code_that_never_comes_back_to_python_is_ended_and_what_is_open_closed(start, tmp_path):
    process = start("""
        mutex = ctypes.create_string_buffer(64)
        lock = ctypes.CDLL(None).pthread_mutex_lock
        lock(mutex)
        with stop.closing(lambda: Path("closed").touch()), stop.interruptible():
            try:
                ready(child())
                lock(mutex)
            except Stopped:
                lock(mutex)
    """)
    process.send_signal(INT)
    ends_with(process, 130)
    assert (tmp_path / "closed").exists()
    wait_until(lambda: is_gone(process.said[0]))


@pytest.mark.parametrize("numbers", [(INT, INT), (TERM, TERM), (TERM, INT), (HUP, INT), (INT, TERM, TERM)])
def test_a_second_signal_ends_the_process_and_its_children_at_once(numbers, start):
    """Also where the first has broken off nothing, as in a loop that never looks."""
    process = start("""
        ready(child())
        while True:
            time.sleep(1000)
    """)
    for number in numbers[:-1]:
        process.send_signal(number)
        wait_until(lambda number=number: not pending(process.pid, number))  # equal ones that wait are one
    process.send_signal(numbers[-1])
    ends_with(process, 128 + numbers[0])
    wait_until(lambda: is_gone(process.said[0]))


def pending(pid: int, number: int) -> bool:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    return bool((int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)) >> (number - 1) & 1)


@pytest.mark.parametrize("numbers", [(INT, TERM), (HUP, HUP, HUP), (TERM, HUP), (HUP, TERM)])
def test_one_stop_may_be_several_signals(numbers, start):
    """``mlflow run`` adds a SIGTERM to Ctrl-C; a terminal and a session are closed by more than one SIGHUP."""
    process = start("""
        ready()
        wait_for(lambda: Path("look").exists())
        stop.raise_if_asked()
    """)
    for number in numbers:
        process.send_signal(number)
        wait_until(lambda number=number: not pending(process.pid, number))
    assert process.poll() is None
    Path(f"/proc/{process.pid}/cwd/look").touch()
    assert ends_with(process, 128 + numbers[0]).count("stopping") == 1


def test_a_process_started_by_nohup_ignores_sighup(start):
    process = start("ready(); wait_for(lambda: Path('look').exists()); stop.raise_if_asked()", "nohup")
    process.send_signal(HUP)
    wait_until(lambda: not pending(process.pid, HUP))
    Path(f"/proc/{process.pid}/cwd/look").touch()
    ends_with(process, 0)


def test_what_an_interruptible_stretch_has_started_is_ended_with_it(start):
    process = start("""
        kept = child()
        try:
            with stop.interruptible(ends_children=True):
                ready(kept, subprocess.Popen(["sh", "-c", "sleep 1000 & wait"]).pid)
                time.sleep(1000)
        finally:
            ready()
            wait_for(lambda: False)
    """)
    kept, started = process.said
    sleeper = Path(f"/proc/{started}/task/{started}/children")
    wait_until(lambda: is_gone(started) or sleeper.read_text().split())
    (grandchild,) = sleeper.read_text().split()
    process.send_signal(TERM)
    assert process.stdout.readline() == "\n"
    wait_until(lambda: is_gone(started) and is_gone(grandchild))
    assert not is_gone(kept)
    os.kill(int(kept), signal.SIGKILL)


def test_a_forked_process_obeys_a_signal(start):
    process = start("""
        pid = os.fork()
        if not pid:
            ready(os.getpid())
            time.sleep(1000)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), stop.is_asked)
    """)
    os.kill(int(process.said[0]), TERM)
    out, _ = process.communicate(timeout=HANG_SECONDS)
    assert out.split() == ["-15", "False"]


def test_a_signal_to_a_process_that_is_just_being_forked_is_not_its_parents(tmp_path):
    """Ctrl-C goes to both: counted twice in the parent, it would be the second one, which ends it at once."""
    first = "os.register_at_fork(after_in_child=lambda: (os.kill(os.getpid(), 2), time.sleep(0.5)))"
    program = HEAD.replace("stop.listen()", f"{first}\nstop.listen()")  # the hook registered first runs first
    program += textwrap.dedent("""
        pid = os.fork()
        if not pid:
            os._exit(0)
        ended, asked = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), stop.is_asked
        time.sleep(0.5)  # for the thread
        print(ended, asked, stop.is_asked)
    """)
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stdout == "-2 False False\n" and "stopping" not in done.stderr, done.stderr


def test_a_process_does_not_outlive_its_parent(start):
    """Killed at any moment: also before the child could ask the system who its parent is."""
    child = HEAD + "end_with(int(sys.argv[1])); ready(os.getpid()); time.sleep(1000)"
    process = start(f"""
        subprocess.Popen([sys.executable, "-c", {child!r}, str(os.getpid())])
        time.sleep(1000)
    """)
    assert not is_gone(process.said[0])
    process.kill()
    wait_until(lambda: is_gone(process.said[0]))
    too_late = subprocess.run([sys.executable, "-c", child, str(process.pid)], cwd=ROOT, capture_output=True)
    assert too_late.returncode == 1


ENDLESS_COMPILER = """#!/bin/sh
case "$*" in *--version*|-v) exec g++ "$@";; esac
sleep 100000 &
echo $$ $! >> {folder}/compilers
wait
"""


@pytest.mark.parametrize("words", [[], pytest.param(["data.num_workers=2"], marks=pytest.mark.slow)])
def test_a_signal_breaks_off_a_cold_compile_wherever_it_runs(words, tmp_path, clean_environ):
    """The compiler never ends by itself: here, and in the workers, whom the training process waits for."""
    compiler = tmp_path / "g++"
    compiler.write_text(ENDLESS_COMPILER.format(folder=tmp_path))
    compiler.chmod(0o755)
    environ = clean_environ | {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = [*TINY["ppo"], *SMALL, *words, "env=Pendulum-v1", "compile=true", "callbacks=minimal", "hydra.run.dir=run"]
    environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "-m", "pmoe_lightning.train", *words]
    process = subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / "compilers").exists, process)
    process.send_signal(TERM)
    errors = ends_with(process, 143)
    assert errors.startswith("stopping\n") and "Traceback" not in errors
    pids = (tmp_path / "compilers").read_text().split()
    wait_until(lambda: all(map(is_gone, pids)))
    (run,) = MlflowClient(environ["MLFLOW_TRACKING_URI"]).search_runs(["1"])
    assert run.info.status == "KILLED"
    assert not (tmp_path / "run" / LAST).exists(), "saved in the middle of an iteration"
