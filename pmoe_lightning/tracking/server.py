"""Does the tracking store answer? Asked once, before anything expensive starts."""

import os
import sqlite3
import threading
from pathlib import Path
from urllib.parse import urlsplit

from pmoe_lightning.errors import RunError

_PATIENCE_SECONDS = 5.0


def check_server(uri: str | None = None) -> None:
    """Return quietly when the tracking store at ``uri`` can be used; otherwise say why, within ten seconds.

    MLflow's own client retries a dead server for minutes, and a dead database for longer, before it reports anything.

    Args:
        uri: an MLflow tracking URI (``http(s)://``, ``sqlite:///``, another database, a folder); the current one when
            ``None``.

    Raises:
        RunError: when the server does not answer, refuses the credentials or fails, or the database cannot be opened.
    """
    if uri is None:
        import mlflow

        uri = mlflow.get_tracking_uri()
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        _check_http(uri)
    elif scheme == "sqlite":
        _check_sqlite(uri)
    elif scheme.split("+")[0] in ("postgresql", "mysql", "mssql"):
        _check_database(uri)


def _check_http(uri: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking._tracking_service.utils import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default",
            "GET",
            max_retries=0,
            timeout=_PATIENCE_SECONDS,
            raise_on_status=False,
        )
    except MlflowException:
        raise RunError(
            f"the MLflow server at {_without_password(uri)} does not answer; start it or set MLFLOW_TRACKING_URI"
        ) from None
    if answer.status_code in (401, 403):
        raise RunError(
            f"the MLflow server at {_without_password(uri)} refuses the credentials (HTTP {answer.status_code}); set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    # A missing Default experiment is a JSON answer with status 404; a page that is not JSON is another server.
    if answer.status_code >= 500 or "json" not in answer.headers.get("Content-Type", ""):
        raise RunError(
            f"{_without_password(uri)} does not answer as an MLflow server (HTTP {answer.status_code}); check "
            "MLFLOW_TRACKING_URI"
        )


def _check_sqlite(uri: str) -> None:
    path = uri.split("?")[0].removeprefix("sqlite://").removeprefix("/")
    if path in ("", ":memory:"):
        return
    database = Path(path)
    if database.exists():
        try:
            with sqlite3.connect(database, timeout=_PATIENCE_SECONDS) as connection:
                connection.execute("pragma schema_version")
        except sqlite3.Error as error:
            raise RunError(
                f"the tracking database {database} cannot be used ({error}); set MLFLOW_TRACKING_URI"
            ) from None
        writable = os.access(database, os.W_OK)
    else:
        folder = next(parent for parent in database.absolute().parents if parent.exists())
        writable = folder.is_dir() and os.access(folder, os.W_OK)
    if not writable:
        raise RunError(f"the tracking database {database} cannot be written; set MLFLOW_TRACKING_URI to another place")


def _check_database(uri: str) -> None:
    problem: list[Exception] = [TimeoutError(f"no answer within {2 * _PATIENCE_SECONDS:.0f} s")]

    def connect() -> None:
        import sqlalchemy

        try:
            sqlalchemy.create_engine(uri).connect().close()
            problem.clear()
        except Exception as error:
            problem[:] = [error]

    # A driver's own connection timeout can be minutes: the thread is left behind when its time is up.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(2 * _PATIENCE_SECONDS - 1)
    if problem:
        reason = str(problem[0]).splitlines()[0]
        raise RunError(f"the tracking database at {_without_password(uri)} cannot be reached: {reason}")


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return uri if "@" not in parts.netloc else uri.replace(parts.netloc, parts.netloc.rsplit("@", 1)[1])
