"""A process that has imported what a run imports, starts runs, and sees what becomes of them.

A run forked from it starts in a second and ends as Python ends; a fresh one starts as a user's does. The nursery adopts
what a killed run leaves behind, and all of its runs have a ``/dev/shm`` of their own, so that no process and no shared
memory of theirs goes unseen, and none of others is taken for theirs. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Where a forked run is, for the table of moments; the moments themselves are chosen by the clock alone.
PHASES = ("imports", "start", "store", "evaluation", "training", "save", "film", "packaging", "upload", "exit")
_ADOPT_ORPHANS, _NEW_MOUNTS, _NEW_USER, _PRIVATE = 36, 0x00020000, 0x10000000, (1 << 18) | (1 << 14)


class Nursery:
    """The client: ``start`` a run, ``end_of`` it, and what is ``alive`` or in ``shared_memory`` besides.

    Args:
        folder: for its log.
    """

    def __init__(self, folder: Path) -> None:
        path = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "torture")]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "SLURM_"))}
        environ |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        self._log = folder / "nursery.txt"
        with open(self._log, "ab") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            command = [sys.executable, str(Path(__file__).resolve())]
            self._process = subprocess.Popen(command, env=environ, cwd=folder, start_new_session=True, **pipes)
        self.shm_is_private = self._answer()["shm_is_private"]

    def start(self, words: list[str], folder: Path, log: Path, *, module: str, fresh: bool) -> int:
        """Run ``python -m module words`` in ``folder`` as the first process of a session; returns its process id."""
        request = {"words": words, "folder": str(folder), "log": str(log), "module": module, "fresh": fresh}
        return self._ask(start=request)["pid"]

    def end_of(self, pid: int) -> int:
        """The exit code of a run, which is waited for; negative is the signal that ended it."""
        return self._ask(end_of=pid)["code"]

    def alive(self) -> dict[int, str]:
        """Every living process below the nursery, and its command."""
        parents = {}
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                fields = Path(f"/proc/{int(entry)}/stat").read_text().rsplit(")", 1)[1].split()
                parents[int(entry)] = int(fields[1]) if fields[0] not in "ZX" else 0
        found: dict[int, str] = {}
        for pid in parents:
            above = parents[pid]
            while above and above != self._process.pid:
                above = parents.get(above, 0)
            if above:
                with contextlib.suppress(OSError):
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return found

    def shared_memory(self) -> list[str]:
        """What lies in the ``/dev/shm`` of its runs; nothing is known where they could not be given their own."""
        return sorted(os.listdir(f"/proc/{self._process.pid}/root/dev/shm")) if self.shm_is_private else []

    def clear_shared_memory(self) -> None:
        for name in self.shared_memory():
            with contextlib.suppress(OSError):
                Path(f"/proc/{self._process.pid}/root/dev/shm", name).unlink()

    def close(self) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.communicate()

    def _ask(self, **request: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        assert line, f"the nursery has ended: {self._log.read_text()[-2000:]}"
        return json.loads(line)


def read_phase(folder: Path) -> str:
    """Where the run forked last in ``folder`` is, or was when it was killed."""
    return PHASES[(folder / "phase").read_bytes()[0]]


# -- in the nursery's own process --------------------------------------------------------------------------------------
def main() -> None:
    """Answer requests until there are no more; in a forked child, be its run and return as ``__main__`` does."""
    # A shell starts what runs in its background with Ctrl-C ignored, and nohup with SIGHUP.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries say in here is no answer
    shm_is_private = _isolate()
    from forked import warm_up

    warm_up()
    _end_resource_tracker()
    gc.freeze()  # children need not look through what they share
    ends: dict[int, int] = {}
    print(json.dumps({"shm_is_private": shm_is_private}), file=answers)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "start" in request:
            start = _fresh if request["start"]["fresh"] else _forked
            pid = start(request["start"])
            if pid == 0:
                answers.close()
                return _run(request["start"])
            print(json.dumps({"pid": pid}), file=answers)
        else:
            while request["end_of"] not in ends:  # orphans that end meanwhile are waited for, as init would
                pid, status = os.wait()
                ends[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps({"code": ends.pop(request["end_of"])}), file=answers)
    return None


def _isolate() -> bool:
    """Adopt orphans, and mount a ``/dev/shm`` for this process and its children where that is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS):
        if libc.unshare(_NEW_USER | _NEW_MOUNTS):
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return libc.mount(b"none", b"/", None, _PRIVATE, None) == 0 and not libc.mount(
        b"shm", b"/dev/shm", b"tmpfs", 0, b""
    )


def _fresh(request: dict[str, Any]) -> int:
    environ = os.environ | {"TMPDIR": str(_temporary(request)), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", request["module"], *request["words"]]
    with open(request["log"], "ab") as log:
        process = subprocess.Popen(
            command,
            cwd=request["folder"],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    process.returncode = 0  # it is waited for by its id
    return process.pid


def _forked(request: dict[str, Any]) -> int:
    _temporary(request)
    Path(request["folder"], "phase").write_bytes(bytes([PHASES.index("start")]))
    return os.fork()


def _temporary(request: dict[str, Any]) -> Path:
    folder = Path(request["folder"], "tmp")
    folder.mkdir(exist_ok=True)
    return folder


def _run(request: dict[str, Any]) -> None:
    """In a forked child: what ``python -m module`` does, up to and including the end of Python."""
    import faulthandler

    from forked import train

    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    faulthandler.register(signal.SIGUSR2)  # where it hangs, if it does
    # By this name Hydra, Lightning and multiprocessing start further processes.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(request["module"])
    environ = {"TMPDIR": str(_temporary(request)), "PYTHONPATH": str(ROOT)}
    command = train(request["words"], Path(request["folder"]), environ=environ)
    if request["module"] == "pmoe_lightning.train":
        with _phases(Path(request["folder"], "phase")):
            command()
    else:
        _resend(request)


def _end_resource_tracker() -> None:
    """The one that warming up has started is no run's: each starts its own, in its own group."""
    tracker = resource_tracker._resource_tracker
    if tracker._fd is not None:
        os.close(tracker._fd)
        os.waitpid(tracker._pid, 0)
        tracker._fd = tracker._pid = None


def _resend(request: dict[str, Any]) -> None:
    from pmoe_lightning.tracking import resend

    os.chdir(request["folder"])
    sys.exit(resend.main(request["words"]))


@contextlib.contextmanager
def _phases(file: Path) -> Iterator[None]:
    """Note in the file, which survives a kill, in which part of the program this process is."""
    from pmoe_lightning import tracking
    from pmoe_lightning.callbacks import evaluation, final_policy
    from pmoe_lightning.checkpoints import io
    from pmoe_lightning.data.collection import CollectedData
    from pmoe_lightning.tracking import logger

    with open(file, "r+b") as opened:
        memory = mmap.mmap(opened.fileno(), 1)

    def marked(owner: Any, name: str, phase: str, lasting: bool = False) -> None:
        function, number = getattr(owner, name), PHASES.index(phase)

        def mark(*arguments: Any, **named: Any) -> Any:
            before, memory[0] = memory[0], number
            try:
                return function(*arguments, **named)
            finally:
                memory[0] = number if lasting else before

        setattr(owner, name, mark)

    marked(logger, "prepare_store", "store")
    marked(evaluation, "evaluate_policy", "evaluation")
    marked(CollectedData, "collect", "training", lasting=True)
    marked(io, "write_checkpoint", "save")
    marked(final_policy, "record_video", "film")
    marked(tracking, "queue_policy_model", "packaging")
    marked(logger.MLflowLogger, "finish", "upload")
    try:
        yield
    finally:
        memory[0] = PHASES.index("exit")


def wait_while(condition: Callable[[], object], seconds: float) -> bool:
    """Whether the condition ends within so many seconds; those of a pause of this process do not count."""
    waited, looked = 0.0, time.monotonic()
    while condition():
        if waited > seconds:
            return False
        time.sleep(0.005)
        now = time.monotonic()
        waited, looked = waited + min(now - looked, 1.0), now
    return True


if __name__ == "__main__":
    main()
