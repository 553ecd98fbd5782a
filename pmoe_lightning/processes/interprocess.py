"""What the processes of a run share outside of its folder: semaphores and sockets, named after the folder.

Every TorchRL replay buffer holds semaphores, and worker processes pass tensors on by sockets in a temporary folder.
Python names both at random. It leaves the semaphores to a process of its own, the resource tracker, and the folder to
whoever has made it: a kill takes those along, and what they would have removed stays for ever. By its name the next
start in the run's folder finds it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_sharer, resource_tracker
from pathlib import Path

from pmoe_lightning.processes.stopping import stop

_SHARED_MEMORY = Path("/dev/shm")  # where Linux lists semaphores; other systems list them nowhere
_SYSTEMS = Path("/tmp")
#: The address of a socket in the file system may have 107 bytes, of which the name that Python gives it takes 18.
_LONGEST_FOLDER = 107 - 18
#: Of runs that have ended in this process, whose objects may live on: each removes its own with itself.
_outlived: set[Path] = set()


@contextmanager
def named_after(folder: str | Path) -> Iterator[None]:
    """What this process and its workers share in this context belongs to the run in the folder.

    Before, what a killed process of the same run has left is removed; the caller holds the folder. Each training
    process of a machine cleans up behind its own predecessor.
    """
    name = _name(folder)
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # workers get a copy
    before = {key: config.get(key) for key in ("semprefix", "tempdir")}
    _remove(name)
    sockets = _make_folder(name)
    config |= {"semprefix": f"/{name}", "tempdir": sockets}
    _start_tracker()
    try:
        with stop.closing(lambda: _remove(name, is_mine=True)):
            yield
    finally:
        resource_sharer.stop(timeout=1.0)  # else it would go on at an address that is gone
        config |= before
        _outlived.update(_semaphores(name))
        shutil.rmtree(sockets, ignore_errors=True)


def _name(folder: str | Path) -> str:
    """Of the folder itself, not its path, which another container may have for another; short, as macOS wants it."""
    place, rank = Path(folder).stat(), os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return f"pmoe-{hashlib.sha256(f'{place.st_dev} {place.st_ino} {rank}'.encode()).hexdigest()[:8]}"


def _semaphores(name: str) -> set[Path]:
    return set(_SHARED_MEMORY.glob(f"sem.{name}-*"))


def _remove(name: str, *, is_mine: bool = False) -> None:
    for semaphore in _semaphores(name) - (set() if is_mine else _outlived):
        semaphore.unlink(missing_ok=True)
        if is_mine:  # else the tracker would miss it, at length
            resource_tracker.unregister(semaphore.name.replace("sem.", "/", 1), "semaphore")
    for place in (Path(tempfile.gettempdir()), _SYSTEMS):
        for sockets in place.glob(f"{name}-*"):
            shutil.rmtree(sockets, ignore_errors=True)


def _make_folder(name: str) -> str:
    """In the temporary folder; where its path is so long that no socket can lie in it, in the system's own."""
    is_long = len(os.fsencode(tempfile.gettempdir())) + len(f"/{name}-12345678") > _LONGEST_FOLDER
    return tempfile.mkdtemp(prefix=f"{name}-", dir=_SYSTEMS if is_long and _SYSTEMS.is_dir() else None)


def _start_tracker() -> None:
    """It ignores Ctrl-C and SIGTERM by itself; a terminal that is closed must not end it before the run either."""
    if not hasattr(signal, "pthread_sigmask"):
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
