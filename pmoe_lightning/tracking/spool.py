"""What is on its way to the tracking server, kept on disk until it has arrived.

One small file per entry, written before anything is sent and removed after. A process that is killed, or a server that
is away for longer than the run lasts, therefore loses nothing: :mod:`pmoe_lightning.tracking.resend` sends the rest.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from pmoe_lightning.errors import error_line
from pmoe_lightning.tracking.address import without_secrets

KINDS = ("points", "params", "tags", "upload", "model", "status")
#: The folder of what no store will take, inside that of the spool.
SET_ASIDE = "set-aside"
IDENTITY = "run.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One thing to send.

    Attributes:
        kind: one of :data:`KINDS`.
        values: what is needed to send it, as JSON can hold it.
        name: of its file in the spool.
        digest: SHA-256 of its content, where it has one; see :meth:`Spool.content`.
    """

    kind: str
    values: dict[str, Any]
    name: str
    digest: str | None = None


@dataclass(frozen=True)
class Identity:
    """Which run a spool belongs to.

    Attributes:
        tracking_uri: of the store, without a password.
        run_id: ``None`` while the run is being opened.
        start: a word of this start, which the run bears as the tag :data:`START_TAG`; it finds a run whose process
            died before it learnt the id.
        experiment_id: where to look for it.
    """

    tracking_uri: str
    run_id: str | None = None
    start: str | None = None
    experiment_id: str | None = None


START_TAG = "pmoe_lightning.start"


class Spool:
    """A folder of entries, in the order in which they were put, and of a note that says whose they are.

    Entries of an earlier process come first. After a fork, parent and child each see only what they put themselves.
    The note is there from :meth:`identify` to :meth:`close`: a note without a living process is that of a killed one.

    What cannot be written, because the disk is full, is kept in memory and written when there is room.

    Args:
        folder: made by the first note or entry, removed by :meth:`close` when nothing is left.
        limit_bytes: points and uploads beyond this are dropped, with one warning.
        memory_bytes: the same, for what cannot be written.

    Attributes:
        dropped: the number of entries that were lost to those limits.
        removed: the number of entries that were waiting and are not any more.
        uploading_bytes: the size of the file that is on its way at this moment.
    """

    def __init__(self, folder: str | Path, *, limit_bytes: int = 1 << 30, memory_bytes: int = 1 << 26) -> None:
        self.folder, self._limit, self._memory_limit = Path(folder), limit_bytes, memory_bytes
        self._lock = threading.Lock()
        self._waiting = sorted(path.name for path in self.folder.glob("*.entry"))
        self._in_memory: dict[str, tuple[bytes, bytes | None]] = {}
        self._size = sum(path.stat().st_size for path in self.folder.glob("*") if path.is_file())
        self._next = 1 + max((_number(name) for name in self._waiting), default=0)
        self._mark = uuid4().hex[:8]  # no other process names a file the same
        self._said: set[str] = set()
        self._identity: Identity | None = None
        self.dropped = self.removed = self.uploading_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def unwritten(self) -> int:
        """The number of waiting entries that are in memory alone."""
        return len(self._in_memory)

    # ------------------------------------------------------------------ whose they are

    def identify(
        self, tracking_uri: str, run_id: str | None, *, start: str | None = None, experiment_id: str | None = None
    ) -> None:
        """Say whose entries these are; it is written beside them, for a process that knows nothing but the folder."""
        self._identity = Identity(without_secrets(tracking_uri), run_id, start, experiment_id)
        try:
            self._write_note()
        except OSError as error:
            self._say_once(f"cannot be written ({error.strerror or error}): what is logged is kept in memory")

    def identity(self) -> Identity:
        """Whose entries these are; where the note is damaged, what a whole entry says of it.

        Raises:
            OSError, ValueError: there is no such note, or it is damaged and there is no whole entry.
        """
        if self._identity is None:
            try:
                self._identity = Identity(**_unsealed((self.folder / IDENTITY).read_bytes()))
            except (OSError, ValueError, TypeError) as error:
                self._identity = next(iter(self._identities_of_entries()), None)
                if self._identity is None:
                    raise ValueError(f"{self.folder / IDENTITY} cannot be read: {error_line(error)}") from error
                _log.warning(
                    "%s cannot be read, its entries say whose they are: %s", self.folder / IDENTITY, error_line(error)
                )
        return self._identity

    def _identities_of_entries(self) -> Sequence[Identity]:
        found = []
        for name in self._waiting:
            with suppress(OSError, ValueError, TypeError, KeyError):
                found.append(Identity(**_unsealed((self.folder / name).read_bytes())["run"]))
        return found

    # ------------------------------------------------------------------ entries

    def put(self, kind: str, values: Mapping[str, Any], content: bytes | None = None) -> None:
        """Add an entry; returns once it would survive the end of this process, or warns once if it would not."""
        text = self._text(kind, values, content)
        size = len(text) + len(content or b"")
        with self._lock:
            if self._size + size > self._limit and kind != "status":
                self._drop(f"is full ({self._limit >> 20} MB)")
                return
            name = self._name()
            self._in_memory[name] = text, content
            try:
                self._write_out()
            except OSError as error:
                problem = f"cannot be written ({error.strerror or error})"
                kept = sum(len(text) + len(content or b"") for text, content in self._in_memory.values())
                if kept > self._memory_limit and kind != "status":
                    del self._in_memory[name]
                    self._drop(problem)
                    return
                self._say_once(f"{problem}: what is logged is kept in memory")
            self._next, self._size = self._next + 1, self._size + size
            self._waiting.append(name)

    def entries(self) -> list[Entry]:
        """What is waiting, oldest first; a damaged entry, and one of another run, is set aside with a warning."""
        with self._lock:
            names = list(self._waiting)
        found = []
        for name in names:
            try:
                found.append(self._read(name))
            except FileNotFoundError:  # another process has sent it
                with self._lock:
                    self._forget(name)
            except OSError as error:  # it may be whole, and read next time
                self._say_once(f"cannot be read ({error.strerror or error})")
            except (ValueError, KeyError, TypeError) as error:
                self._put_away(name, f"is damaged ({error_line(error)})")
        return found

    def content(self, entry: Entry) -> bytes | None:
        """The bytes that were put with an entry.

        Raises:
            OSError, ValueError: they are gone, or not what was put.
        """
        _, content = self._in_memory.get(entry.name, (b"", None))
        if content is None and entry.digest is not None:
            content = self._content(entry.name).read_bytes()
            if sha256(content).hexdigest() != entry.digest:
                raise ValueError("its content is not what was written")
        return content

    def remove(self, entries: Sequence[Entry]) -> None:
        """Forget entries that have arrived."""
        with self._lock:
            for entry in entries:
                for path in (self.folder / entry.name, self._content(entry.name)):
                    with suppress(FileNotFoundError):
                        size = path.stat().st_size
                        path.unlink()
                        self._size -= size
                self._forget(entry.name)

    def set_aside(self, entry: Entry, problem: str) -> None:
        """Move an entry that no store will take out of the way, into the folder :data:`SET_ASIDE`, with a warning."""
        self._put_away(entry.name, problem)

    def put_aside(self, kind: str, values: Mapping[str, Any], problem: str) -> None:
        """Write what is part of an entry, and no store will take, where :meth:`set_aside` moves whole ones."""
        with self._lock:
            name, self._next = self._name(), self._next + 1
        try:
            (self.folder / SET_ASIDE).mkdir(exist_ok=True)
            self._write(f"{SET_ASIDE}/{name}", self._text(kind, values, None))
        except OSError as error:
            problem = f"{problem}; it cannot be kept ({error.strerror or error})"
        self._say_once(f"{SET_ASIDE}/{name}: {problem}")

    def aside(self) -> int:
        """The number of entries that were set aside."""
        return sum(1 for _ in (self.folder / SET_ASIDE).glob("*.entry"))

    def last_change(self) -> float:
        """When something was last written here, in seconds since 1970."""
        return max((path.stat().st_mtime for path in self.folder.glob("*")), default=time.time())

    def move(self, folder: Path) -> None:
        """Rename the folder, also for whoever is still sending from it.

        Raises:
            OSError: it cannot be renamed.
        """
        with self._lock:
            self.folder = self.folder.rename(folder)

    def forget_all(self) -> None:
        """Leave every entry to the process that put it; for a child after a fork."""
        self._lock, self._mark = threading.Lock(), uuid4().hex[:8]
        self._waiting, self._in_memory = [], {}

    def close(self) -> None:
        """Remove the folder, except for what was set aside, if everything has arrived."""
        with self._lock:
            if self._waiting or any(self.folder.glob("*.entry")):
                return
            for path in self.folder.glob("*"):
                if path.is_dir() and path.name != SET_ASIDE:
                    shutil.rmtree(path, ignore_errors=True)
                elif path.is_file() and path.name != IDENTITY:
                    path.unlink(missing_ok=True)
            (self.folder / IDENTITY).unlink(missing_ok=True)  # last: what is left without it nobody would look for
            with suppress(OSError):  # something is set aside
                self.folder.rmdir()

    # ------------------------------------------------------------------ files

    def _name(self) -> str:
        return f"{self._next:09d}-{self._mark}.entry"

    def _text(self, kind: str, values: Mapping[str, Any], content: bytes | None) -> bytes:
        digest = None if content is None else sha256(content).hexdigest()
        run = None if self._identity is None else asdict(self._identity)
        return _sealed({"kind": kind, "values": dict(values), "content": digest, "run": run})

    def _write_out(self) -> None:
        for name in list(self._in_memory):
            text, content = self._in_memory[name]
            if not (self.folder / IDENTITY).exists():
                self._write_note()
            if content is not None:
                self._content(name).write_bytes(content)
            self._write(name, text)
            del self._in_memory[name]

    def _write_note(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._identity is not None:
            self._write(IDENTITY, _sealed(asdict(self._identity)))

    def _write(self, name: str, text: bytes) -> None:
        # Renamed when complete, so that a killed process leaves no half of a file.
        partial = self.folder / f".{Path(name).name}.{self._mark}.partial"
        try:
            partial.write_bytes(text)
            partial.replace(self.folder / name)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _read(self, name: str) -> Entry:
        text, _ = self._in_memory.get(name) or ((self.folder / name).read_bytes(), None)
        values = _unsealed(text)
        of, here = values["run"], self._identity
        if of is not None and here is not None and of["run_id"] != here.run_id:
            raise ValueError(f"it is of run {of['run_id']}")
        if values["kind"] not in KINDS:
            raise ValueError(f"nobody knows {values['kind']!r}")
        return Entry(values["kind"], values["values"], name, values["content"])

    def _content(self, name: str) -> Path:
        return (self.folder / name).with_suffix(".content")

    def _put_away(self, name: str, problem: str) -> None:
        aside = self.folder / SET_ASIDE
        try:
            aside.mkdir(exist_ok=True)
            for path in (self._content(name), self.folder / name):
                with suppress(FileNotFoundError):
                    path.replace(aside / path.name)
        except OSError as error:  # it stays where it is, and is not read again by this process
            problem = f"{problem}; it cannot be moved ({error.strerror or error})"
        self._say_once(f"{SET_ASIDE}/{name}: {problem}")
        with self._lock:
            self._forget(name)

    def _forget(self, name: str) -> None:
        text, content = self._in_memory.pop(name, (b"", None))
        self._size -= len(text) + len(content or b"")
        if name in self._waiting:
            self._waiting.remove(name)
            self.removed += 1

    def _drop(self, problem: str) -> None:
        self.dropped += 1
        self._say_once(f"{problem}: what is logged now is lost")

    def _say_once(self, problem: str) -> None:
        if problem not in self._said:
            self._said.add(problem)
            _log.warning("%s %s", self.folder, problem)


def _number(name: str) -> int:
    number = name.split("-")[0]
    return int(number) if number.isdigit() else 0


def _sealed(values: Mapping[str, Any]) -> bytes:
    """As JSON, with the SHA-256 of the rest as ``digest``."""
    return json.dumps({"digest": _digest(values), **values}).encode()


def _unsealed(text: bytes) -> dict[str, Any]:
    """What :func:`_sealed` was given.

    Raises:
        ValueError: it was something else.
    """
    values = json.loads(text)
    if not isinstance(values, dict) or values.pop("digest", None) != _digest(values):
        raise ValueError("its digest does not match")
    return values


def _digest(values: Mapping[str, Any]) -> str:
    return sha256(json.dumps(values).encode()).hexdigest()
