"""A run's folder has one writer, and says how its run ended.

The writer holds a lock (``flock``), which the system releases when the process ends, however it does. Only the process
that leads a run takes it: neither the other training processes nor workers. Reading a folder needs no lock.

Light to import: whoever must refuse a command asks here first.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.processes.partial_files import is_alive, partial_file, this_host

LOCK = ".run.lock"
RECORD = ".run.json"
#: For filesystems without locks: a file that is there as long as its process holds the folder.
CLAIM = ".run.claim"
#: What a run or a sweep leaves in its folder besides.
_TRACES = ("mlflow-spool", "multirun.yaml", "checkpoints/last.ckpt", "checkpoints/last.previous.ckpt")
#: For a process that is just ending, or asking who holds the folder.
_PATIENCE_SECONDS = 1.0
_SETTLING_SECONDS = 0.2
_log = logging.getLogger(__name__)
_held: dict[Path, int] = {}  # the descriptor of the lock by folder


def hold(folder: str | Path) -> None:
    """Make this process the one writer to the folder, which is made if it is not there, until :func:`release`.

    Nothing more happens where it is that already. The other training processes of a run take no lock: the first one
    holds the folder for them.

    Raises:
        ConfigurationError: another process holds it; says which.
        RunError: the folder cannot be written.
    """
    folder = Path(folder).resolve()
    if folder in _held or not is_first_process():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # closed when a child executes
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}") from error
    try:
        _lock(descriptor, folder)
        with suppress(OSError):  # a full disk: the lock is held all the same
            _write(descriptor, _who_i_am())
    except BaseException:
        os.close(descriptor)
        raise
    _held[folder] = descriptor


def release(folder: str | Path) -> None:
    """Let others write to the folder, where this process holds it."""
    folder = Path(folder).resolve()
    if folder in _held:
        if _read(folder / CLAIM) == _who_i_am():
            (folder / CLAIM).unlink(missing_ok=True)
        with suppress(OSError):  # this process may go on: whoever holds the folder next is not to be taken for it
            os.ftruncate(_held[folder], 0)
        os.close(_held.pop(folder))


def release_all() -> None:
    """:func:`release` for every folder that this process holds."""
    for folder in list(_held):
        release(folder)


def is_held(folder: str | Path) -> bool:
    """Whether another process writes to this folder."""
    return holder(folder) is not None


def holder(folder: str | Path) -> str | None:
    """The other process that writes to this folder, as ``process 4711 on node3``; None where there is none."""
    folder = Path(folder).resolve()
    if folder in _held:
        return None
    if _is_there(folder / CLAIM):
        return _describe(_read(folder / CLAIM))
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return None  # nobody has ever held it
    try:
        free = _try_lock(descriptor, shared=True)
    except OSError:
        free = True  # a filesystem without locks, and no claim
    finally:
        os.close(descriptor)
    return None if free else _describe_owner(folder)


def refuse_held(folder: str | Path) -> None:
    """Raise where :func:`hold` would, without waiting and without a trace.

    Raises:
        ConfigurationError: another process writes to this folder; says which.
    """
    if is_first_process() and (who := holder(folder)):
        raise ConfigurationError(f"{folder} is in use by {who}: wait for its end, or stop it")


def has_begun(folder: str | Path) -> bool:
    """Whether this is the folder of a run, as Hydra and :func:`write_record` mark it."""
    return Path(folder, ".hydra").is_dir() or Path(folder, RECORD).exists()


def holds_run(folder: str | Path) -> bool:
    """Whether anything of a run or a sweep is in this folder."""
    return has_begun(folder) or any(Path(folder, trace).exists() for trace in _TRACES)


def is_first_process() -> bool:
    """Whether this process leads its run, by what launchers tell the training processes that they start."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


# ---------------------------------------------------------------------------------------------------- how a run ended


def write_record(folder: str | Path, status: str, **facts: Any) -> None:
    """Say that the run in this folder is ``RUNNING``, or how it ended; a kill leaves the record before or this one.

    Raises:
        RunError: it cannot be written.
    """
    path = Path(folder, RECORD)
    record = {"status": status, **facts}
    partial = partial_file(path)
    try:
        partial.write_text(json.dumps(record | {"sha256": _digest(record)}) + "\n")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def read_record(folder: str | Path) -> dict[str, Any]:
    """What :func:`write_record` wrote last; empty where there is none, or, with a warning, where it is damaged."""
    path = Path(folder, RECORD)
    if not path.exists():
        return {}
    record = _read(path)
    if record.pop("sha256", None) != _digest(record):
        _log.warning("%s, which says how the run ended, is damaged: the run counts as one that was broken off", path)
        return {"status": "UNKNOWN"}
    return record


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- the lock


def _lock(descriptor: int, folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"{folder} is in use by {_describe_owner(folder)}: wait for its end, or stop it"
                )
            time.sleep(0.05)
    except OSError as error:
        _log.warning(
            "%s lies on a filesystem without locks (%s): the file %s, with host and process, keeps others out instead",
            *(folder, error.strerror or error, CLAIM),
        )
        _claim(folder)


def _try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Whether the lock is got, at once.

    Raises:
        OSError: this filesystem, or this system, has none.
    """
    try:
        import fcntl
    except ImportError:
        raise OSError("this system has no flock") from None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _claim(folder: Path) -> None:
    """Make the file that stands for the lock; that of a process which has ended gives way."""
    path, mine = folder / CLAIM, _who_i_am()
    if path.exists():
        found = _read(path)
        if _is_there(path):
            raise _claimed(folder, found)
        # Of several that find it, one moves it away; what another has made meanwhile is put back.
        dead = partial_file(path)
        try:
            os.rename(path, dead)
        except FileNotFoundError:
            raise _claimed(folder, _read(path)) from None
        if _read(dead) != found:
            os.rename(dead, path)
            raise _claimed(folder, _read(path))
        dead.unlink()
    try:
        with open(path, "x") as file:
            file.write(json.dumps(mine))
    except FileExistsError:
        raise _claimed(folder, _read(path)) from None
    time.sleep(_SETTLING_SECONDS)
    if _read(path) != mine:
        raise _claimed(folder, _read(path))


def _claimed(folder: Path, claim: dict[str, Any]) -> ConfigurationError:
    return ConfigurationError(
        f"{folder} is in use by {_describe(claim)}: wait for its end, or remove {folder / CLAIM} if it has ended"
    )


def _who_i_am() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": this_host(), "started": _start_time(os.getpid())}


def _is_there(path: Path) -> bool:
    """Whether the process of a claim runs, as far as anybody here can know: on another machine it counts as running."""
    try:
        size, age = path.stat().st_size, time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    claim = _read(path)
    if not size:  # just being written, or its writer was killed
        return age < _PATIENCE_SECONDS
    if not isinstance(claim.get("pid"), int) or claim.get("host") != this_host():
        return True
    mine = claim["pid"] == os.getpid()  # and yet not held: of a process before, which had the same number
    return not mine and _runs(claim)


def _describe_owner(folder: Path) -> str:
    """Who has the lock: it says so just after it has got it, over the name of the one before."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not _runs(who := _read(folder / LOCK)):
        if time.monotonic() > deadline:
            return "another process"
        time.sleep(0.02)
    return _describe(who)


def _runs(who: dict[str, Any]) -> bool:
    """Whether this names a process that runs, as far as anybody here can know."""
    if not isinstance(who.get("pid"), int) or who.get("host") != this_host():
        return "host" in who
    return is_alive(who["pid"]) and _start_time(who["pid"]) == who.get("started")


def _start_time(pid: int) -> str | None:
    """What tells a process from a later one of the same number, where the system says it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None


def _describe(who: dict[str, Any]) -> str:
    return f"process {who['pid']} on {who['host']}" if who.keys() >= {"pid", "host"} else "another process"


def _write(descriptor: int, who: dict[str, Any]) -> None:
    content = json.dumps(who).encode()
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _leave_to_parent() -> None:
    """A forked child must not keep the folder of its parent, which may die before it."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


atexit.register(release_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
