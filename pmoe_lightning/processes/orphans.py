"""No process outlives the one that it works for, and whoever ends at once takes those with it that work for it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

#: The environment variable in which a training process tells those that it launches who it is.
LAUNCHER = "PMOE_LIGHTNING_LAUNCHER"
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 10.0


def end_with_launcher() -> None:
    """Where this is a training process that another one has launched, :func:`end_with` it, from the first line on."""
    if LAUNCHER in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        end_with(int(os.environ[LAUNCHER]), _PATIENCE_SECONDS)


def end_with(parent: int, patience: float = 0.0) -> None:
    """From now on a thread watches the process that has started this one, and ends this one when it is gone.

    Args:
        parent: its id, as told by itself: whoever asks the system may ask too late.
        patience: seconds in which this process may end by itself first.
    """
    threading.Thread(target=_end_with, args=(parent, patience), daemon=True, name="parent-watch").start()


def _end_with(parent: int, patience: float) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    time.sleep(patience)
    kill_descendants()
    os._exit(1)


def kill_descendants(keep: Collection[int] = ()) -> None:
    """Kill the processes that this one has started, and those that they have, at once.

    Python's keepers of shared memory are left alone: they end when nobody needs them any more, and remove it then. So
    are processes in a session of their own, which are meant to outlive this one.

    Args:
        keep: children of this process that stay, with theirs.
    """
    kill_families([pid for pid in children() if pid not in keep])


def kill_families(pids: Iterable[int]) -> None:
    """Kill these processes and those that they have started, with the exceptions of :func:`kill_descendants`."""
    started, family = _children_of_all(), list(pids)
    for pid in family:
        family += started[pid]
    for pid in family:
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == os.getsid(0) and b"resource_tracker" not in _command(pid):
                os.kill(pid, signal.SIGKILL)


def children() -> list[int]:
    """The processes that this one has started."""
    return _children_of_all()[os.getpid()]


def _children_of_all() -> dict[int, list[int]]:
    children = defaultdict(list)
    for pid, parent in _processes():
        children[parent].append(pid)
    return children


def _processes() -> list[tuple[int, int]]:
    """Id and parent of every process that can be seen."""
    if not Path("/proc/self/stat").exists():
        with suppress(OSError):
            listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
            return [(int(process), int(parent)) for process, parent in map(str.split, listed.splitlines())]
        return []
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has just ended
            # Its own name stands in parentheses and may hold anything.
            found.append((int(name), int(Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[1])))
    return found


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
