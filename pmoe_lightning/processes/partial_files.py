"""Files on their way to their place: named after the process that writes them, so that those of the dead are known.

``last.ckpt`` is written as ``.last.ckpt.<host>.<pid>.partial`` beside its place and renamed when it is whole.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
from pathlib import Path

_NAME = re.compile(r"\..+\.(?P<host>[^.]+)\.(?P<pid>\d+)\.partial")
_log = logging.getLogger(__name__)


def this_host() -> str:
    """The name of this machine, without its domain."""
    return socket.gethostname().split(".")[0] or "localhost"


def partial_file(path: str | Path) -> Path:
    """Where this process, and no other, writes what is to become ``path``."""
    path = Path(path)
    return path.with_name(f".{path.name}.{this_host()}.{os.getpid()}.partial")


def sync_folder(folder: Path) -> None:
    """Write to the disk which files are there, so that one just renamed keeps its name when the power goes."""
    if os.name == "nt":  # Windows cannot open a folder; its rename is journalled.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine; one that nobody has waited for has ended."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (ProcessLookupError, OverflowError):
        return False
    except (OSError, IndexError):  # not ours to ask, and so there; or a system that does not say
        return True


def remove_leftovers(folder: str | Path) -> None:
    """Remove the partial files and folders whose writers are dead; what a living process of this machine writes stays.

    For whoever holds the folder: a writer on another machine, which nobody here can ask, has then ended.
    """
    for partial in Path(folder).glob(".*.partial"):
        name = _NAME.fullmatch(partial.name)
        # One of this very number is of a process before, which had the same.
        if name is None or name["host"] != this_host() or not is_alive(pid := int(name["pid"])) or pid == os.getpid():
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
            _log.warning("removed %s, which a killed run had not finished writing", partial)
