"""A new SQLite store is made by one process, whole, while the others wait.

MLflow makes its tables in dozens of steps and without a lock: of several first starts at once all fail but one, and
what they leave can be opened by none.
"""

from __future__ import annotations

import glob
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from pmoe_lightning.errors import RunError, error_line
from pmoe_lightning.tracking.address import store_line

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

#: A database without its tables that nobody has touched for so long is not being made by somebody else.
_ABANDONED_SECONDS = 30.0
_PATIENCE_SECONDS = 5.0
#: What SQLite keeps beside a database while it writes, by the end of its name.
_COMPANIONS = ("-journal", "-wal", "-shm")
_ROWS_OF_A_NEW_STORE = ("alembic_version", "experiments", "workspaces")
_log = logging.getLogger(__name__)


def database_file(uri: str) -> Path | None:
    """The file of a SQLite URI in any of SQLAlchemy's forms; ``None`` where the database is in memory.

    Raises:
        RunError: it is no such URI.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
        (name,), _ = url.get_dialect()().create_connect_args(url)
    except (ArgumentError, ValueError) as error:
        raise RunError(
            f"{uri} is not a SQLite URI: write sqlite:///mlflow.db or sqlite:////folder/mlflow.db"
        ) from error
    if name.startswith("file:"):
        if "mode=memory" in name:
            return None
        name = unquote(urlsplit(name).path)
    return None if name in ("", ":memory:") else Path(name)


def absolute_uri(uri: str) -> str:
    """The URI, which names the same SQLite file in whatever folder it is read; any other as it is."""
    from sqlalchemy.engine import make_url

    if not uri.startswith("sqlite") or database_file(uri) is None or "file:" in uri:
        return uri
    url = make_url(uri)
    if url.database is None:
        return uri
    return url.set(database=str(Path(url.database).absolute())).render_as_string(hide_password=False)


def check_database(uri: str) -> None:
    """Return quietly when the file of this SQLite URI can be used, or made.

    Raises:
        RunError: it cannot, or there is none: each connection would have a database of its own, gone with the run.
    """
    database = database_file(uri)
    if database is None:
        raise RunError(f"the tracking database {uri} is in memory, and would keep nothing: write sqlite:///mlflow.db")
    if database.exists():
        try:
            with closing(sqlite3.connect(database, timeout=_PATIENCE_SECONDS)) as connection:
                connection.execute("pragma schema_version")
        except sqlite3.Error as error:
            raise RunError(
                f"the tracking database {database} cannot be used ({error_line(error)}); set MLFLOW_TRACKING_URI"
            ) from None
        writable = os.access(database, os.W_OK)
    else:
        folder = next(parent for parent in database.absolute().parents if parent.exists())
        writable = folder.is_dir() and os.access(folder, os.W_OK)
    if not writable:
        raise RunError(f"the tracking database {database} cannot be written; set MLFLOW_TRACKING_URI to another place")


def check_database_exists(uri: str) -> None:
    """Return quietly where this is no SQLite URI, or one whose file is there: a client would make an empty one.

    Raises:
        RunError: it is not there.
    """
    OpenDatabase(None, uri).reopen()


class OpenDatabase:
    """The file of a SQLite store that a client holds open; does nothing for any other store.

    SQLite goes on with a file that was moved, replaced or damaged, as long as a connection is open, and makes an empty
    one where it finds none.
    """

    def __init__(self, client: MlflowClient | None, uri: str) -> None:
        self._client = client
        self._file = database_file(uri) if uri.startswith("sqlite") else None

    def reopen(self) -> None:
        """Let what is asked next be answered by the file that lies there now.

        Raises:
            RunError: there is none.
        """
        if self._file is None:
            return
        if not self._file.exists() or not self._file.stat().st_size:
            raise RunError(f"the tracking database {self._file} is gone")
        if self._client is not None:
            self._client._tracking_client.store.engine.dispose()


def make_database(uri: str) -> None:
    """Make the SQLite store of this URI, unless it is there; another process that makes it is waited for.

    It is made beside its place and renamed, so that it is never there by halves, and what killed processes have left of
    it is removed. The half of one that another program has begun in its place gives way to a new one. One of an older
    MLflow is left to MLflow, which says how to bring it up to date.

    Raises:
        RunError: it cannot be made or used.
    """
    check_database(uri)
    database = database_file(uri)
    if database is None:
        return
    lock, is_current = database.with_name(f"{database.name}.lock"), _is_current(database)
    if is_current and not (lock.exists() or _leftovers(database)):
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with _alone(lock):
            for leftover in _leftovers(database):
                leftover.unlink(missing_ok=True)
            _wait_for_others(database)
            if _is_current(database):
                return
            if database.exists() and database.stat().st_size:
                if not _holds_nothing(database):
                    _open(database)
                    return
                _set_aside(database)
            _make(database)
    except OSError as error:
        if not is_current:
            raise RunError(f"the tracking database {database} cannot be made: {error.strerror or error}") from error


def _leftovers(database: Path) -> list[Path]:
    """What processes that were killed while they made the database have left; made and removed within the lock."""
    return list(database.parent.glob(f"{glob.escape(database.name)}.*.partial*"))


def _make(database: Path) -> None:
    partial = database.with_name(f"{database.name}.{os.getpid()}.partial")
    try:
        _open(partial)
        for kind in _COMPANIONS:  # SQLite would take one that another database has left here for its own
            database.with_name(database.name + kind).unlink(missing_ok=True)
        partial.replace(database)
    finally:
        for path in (partial, *(partial.with_name(partial.name + kind) for kind in _COMPANIONS)):
            path.unlink(missing_ok=True)


def _set_aside(database: Path) -> None:
    aside = database.with_name(f"{database.name}.interrupted")
    for kind in ("", *_COMPANIONS):
        path = database.with_name(database.name + kind)
        if path.exists():
            path.replace(aside.with_name(aside.name + kind))
    _log.warning("%s was the rest of an interrupted start; it is %s now", database, aside.name)


def _holds_nothing(database: Path) -> bool:
    """Whether nothing is in there but what MLflow puts into a new store."""
    try:
        with closing(sqlite3.connect(database, timeout=_PATIENCE_SECONDS)) as connection:
            tables = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
            rows = {name: connection.execute(f'select count(*) from "{name}"').fetchone()[0] for name in tables}
    except sqlite3.Error:
        return False
    return all(count <= (name in _ROWS_OF_A_NEW_STORE) for name, count in rows.items())


def _open(database: Path) -> None:
    """Let MLflow open the database, which makes the tables that it lacks."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    uri = make_url("sqlite://").set(database=str(database.absolute()))
    try:
        SqlAlchemyStore(str(uri), DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
    except (MlflowException, SQLAlchemyError) as error:
        raise RunError(
            f"the tracking database {database} cannot be brought up to date ({store_line(error)}): "
            "set MLFLOW_TRACKING_URI to another"
        ) from error


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold the lock file, which is removed at the end."""
    import fcntl  # not there on Windows

    while True:
        with open(lock, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_same(lock, file.fileno()):
                continue  # whoever held it has removed it, and a third process may hold the next one
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _wait_for_others(database: Path) -> None:
    # `mlflow run` and `mlflow ui` make a store in its place and know of no lock.
    said = False
    while not _is_current(database) and time.time() - _last_change(database) < _ABANDONED_SECONDS:
        if not said:
            _log.warning("waiting for another process that makes the tracking database %s", database)
        said = True
        time.sleep(0.1)


def _last_change(database: Path) -> float:
    journal = database.with_name(f"{database.name}-journal")
    changes = [0.0]
    for path in (database, journal):
        try:
            changes.append(path.stat().st_mtime)
        except FileNotFoundError:
            continue
    return max(changes)


def _is_current(database: Path) -> bool:
    """Whether MLflow's last migration and its first experiment, which it makes last of all, are there."""
    if not database.exists():
        return False
    address = f"{database.absolute().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=_PATIENCE_SECONDS)) as connection:
            version = connection.execute("select version_num from alembic_version, experiments").fetchone()
    except sqlite3.Error:
        return False
    return version is not None and version[0] == _newest_version()


def _newest_version() -> str | None:
    import mlflow.store
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(Path(mlflow.store.__file__).parent / "db_migrations")).get_current_head()
