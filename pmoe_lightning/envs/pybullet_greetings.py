"""What PyBullet prints from C when it is imported and at every connection, and nothing else, is left out."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

__all__ = ["import_quietly", "quiet_connection"]

_GREETING = re.compile(rb"(pybullet build time: .*|argv\[\d+\]=.*)\n")
_NAME = re.compile(r"bullet", re.IGNORECASE)


def import_quietly(id: str) -> None:
    """Import PyBullet for an environment whose id names it; where it is missing, who needs it will say so."""
    if "pybullet" in sys.modules or os.name != "posix" or not _NAME.search(id):
        return
    with _without_greetings(2):
        try:
            import_module("pybullet")
        except ImportError:
            return


def quiet_connection() -> Any:
    """A context in which an environment may connect: of what is printed there, all but the greetings comes after it."""
    return _without_greetings(1) if "pybullet" in sys.modules and os.name == "posix" else nullcontext()


@contextmanager
def _without_greetings(descriptor: int) -> Iterator[None]:
    """Standard output or standard error, with what Python and C still hold for it written first."""
    flush_c, kept = ctypes.CDLL(None).fflush, os.dup(descriptor)
    stream = sys.stdout if descriptor == 1 else sys.stderr
    with tempfile.TemporaryFile() as file:
        stream.flush(), flush_c(None)
        os.dup2(file.fileno(), descriptor)
        try:
            yield
        finally:
            stream.flush(), flush_c(None)
            os.dup2(kept, descriptor)
            os.close(kept)
            file.seek(0)
            if rest := _GREETING.sub(b"", file.read()):
                os.write(descriptor, rest)
