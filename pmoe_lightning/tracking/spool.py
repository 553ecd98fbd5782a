"""What is on its way to the tracking server, kept on disk until it has arrived.

One small file per entry, written before anything is sent and removed after. A process that is killed, or a server that
is away for longer than the run lasts, therefore loses nothing: :mod:`pmoe_lightning.tracking.resend` sends the rest.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmoe_lightning.tracking.address import without_secrets

_log = logging.getLogger(__name__)
_IDENTITY = "run.json"


@dataclass(frozen=True)
class Entry:
    """One thing to send.

    Attributes:
        kind: ``points``, ``upload`` or ``status``.
        values: what is needed to send it, as JSON can hold it.
        path: the file of the entry.
        content: the bytes of an upload, where the spool keeps them.
    """

    kind: str
    values: dict[str, Any]
    path: Path
    content: Path | None


class Spool:
    """A folder of entries, in the order in which they were put.

    Entries of an earlier process come first. After a fork, parent and child each see only what they put themselves.

    Args:
        folder: made when the first entry is put, removed by :meth:`close` when nothing is left.
        limit_bytes: points and uploads beyond this are dropped, with one warning.
    """

    def __init__(self, folder: str | Path, *, limit_bytes: int = 1 << 30) -> None:
        self.folder, self._limit = Path(folder), limit_bytes
        self._lock = threading.Lock()
        self._waiting = sorted(path.name for path in self.folder.glob("*.entry"))
        self._size = sum(path.stat().st_size for path in self.folder.glob("*") if path.is_file())
        self._next = 1 + max((int(name.split("-")[0]) for name in self._waiting), default=0)
        self._full = False
        self._note: str | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def identify(self, tracking_uri: str, run_id: str) -> None:
        """Say whose entries these are; it is written beside them, for a process that knows nothing but the folder.

        A password in the URI is left out.
        """
        self._note = json.dumps({"tracking_uri": without_secrets(tracking_uri), "run_id": run_id})

    def identity(self) -> tuple[str, str]:
        """The tracking URI and the run.

        Raises:
            OSError, ValueError, KeyError: there is no such note, or it is damaged.
        """
        note = json.loads((self.folder / _IDENTITY).read_text())
        return note["tracking_uri"], note["run_id"]

    def put(self, kind: str, values: dict[str, Any], content: bytes | None = None) -> None:
        """Add an entry; returns once it would survive the end of this process, or warns once if it cannot be kept."""
        text = json.dumps({"kind": kind, "values": values}).encode()
        size = len(text) + len(content or b"")
        with self._lock:
            if self._size + size > self._limit and kind != "status":
                self._warn_once(f"is full ({self._limit >> 20} MB)")
                return
            name = f"{self._next:09d}-{os.getpid()}.entry"
            try:
                self._write(name, text, content)
            except OSError as error:
                self._warn_once(f"cannot be written ({error.strerror or error})")
                return
            self._next, self._size = self._next + 1, self._size + size
            self._waiting.append(name)

    def _write(self, name: str, text: bytes, content: bytes | None) -> None:
        self._make_folder()
        if content is not None:
            (self.folder / name).with_suffix(".content").write_bytes(content)
        # Renamed when complete, so that a killed process leaves no half of an entry.
        partial = (self.folder / name).with_suffix(".partial")
        partial.write_bytes(text)
        partial.rename(self.folder / name)

    def entries(self) -> list[Entry]:
        """What is waiting, oldest first; an entry that cannot be read is set aside with a warning."""
        with self._lock:
            names = list(self._waiting)
        found = []
        for name in names:
            path = self.folder / name
            content = path.with_suffix(".content")
            try:
                entry = json.loads(path.read_text())
                found.append(Entry(entry["kind"], entry["values"], path, content if content.exists() else None))
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("cannot read %s, left out: %s", path, error)
                self._forget(name, 0)
        return found

    def remove(self, entries: list[Entry]) -> None:
        """Forget entries that have arrived, or never can."""
        for entry in entries:
            size = 0
            for path in (entry.content, entry.path):
                if path is not None and path.exists():
                    size += path.stat().st_size
                    path.unlink()
            self._forget(entry.path.name, size)

    def forget_all(self) -> None:
        """Leave every entry to the process that put it; for a child after a fork."""
        self._lock = threading.Lock()
        self._waiting = []

    def close(self) -> None:
        """Remove the folder if everything has arrived."""
        with self._lock:
            if not self._waiting and not list(self.folder.glob("*.entry")):
                shutil.rmtree(self.folder, ignore_errors=True)

    def _forget(self, name: str, size: int) -> None:
        with self._lock:
            self._waiting.remove(name)
            self._size -= size

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / _IDENTITY
        if self._note is not None and not note.exists():
            note.write_text(self._note)

    def _warn_once(self, problem: str) -> None:
        if not self._full:
            _log.warning("%s %s: what is logged now is lost", self.folder, problem)
        self._full = True
