"""Does the tracking store answer? Asked once, before anything expensive starts."""

import sys
import threading
from urllib.parse import urlsplit

from pmoe_lightning.errors import RunError
from pmoe_lightning.tracking.address import store_line, without_secrets
from pmoe_lightning.tracking.database import check_database, make_database

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
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme in ("http", "https"):
        _check_http(uri)
    elif scheme == "sqlite":
        check_database(uri)
    elif _is_folder(uri):
        _check_folder(uri)
    elif scheme in ("postgresql", "mysql", "mssql"):
        _check_database(uri)


def prepare_store(uri: str) -> None:
    """Make a SQLite store that is not there yet, and refuse a folder, before MLflow's client touches either.

    Raises:
        RunError: it cannot be used.
    """
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme == "sqlite":
        make_database(uri)
    elif _is_folder(uri):
        _check_folder(uri)


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
            f"the MLflow server at {without_secrets(uri)} does not answer; start it or set MLFLOW_TRACKING_URI"
        ) from None
    if answer.status_code in (401, 403):
        raise RunError(
            f"the MLflow server at {without_secrets(uri)} refuses the credentials (HTTP {answer.status_code}); set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    # A missing Default experiment is a JSON answer with status 404; a page that is not JSON is another server.
    if answer.status_code >= 500 or "json" not in answer.headers.get("Content-Type", ""):
        raise RunError(
            f"{without_secrets(uri)} does not answer as an MLflow server (HTTP {answer.status_code}); check "
            "MLFLOW_TRACKING_URI"
        )


def _is_folder(uri: str) -> bool:
    from mlflow.utils.uri import is_local_uri

    return is_local_uri(uri)


def _check_folder(uri: str) -> None:
    from mlflow.environment_variables import MLFLOW_ALLOW_FILE_STORE

    if not MLFLOW_ALLOW_FILE_STORE.get():
        raise RunError(
            f"MLflow no longer writes runs into a folder ({uri}, which it takes by itself where ./mlruns holds old "
            "runs): set MLFLOW_TRACKING_URI=sqlite:///mlflow.db, or MLFLOW_ALLOW_FILE_STORE=true to go on with it"
        )


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
        reason = store_line(problem[0])
        raise RunError(f"the tracking database at {without_secrets(uri)} cannot be reached: {reason}")


if __name__ == "__main__":
    # `make train` asks before `mlflow run` opens the store, which of several first starts would destroy a new one.
    import mlflow

    try:
        check_server()
        prepare_store(mlflow.get_tracking_uri())
    except RunError as refusal:
        sys.exit(f"error: {refusal}")
