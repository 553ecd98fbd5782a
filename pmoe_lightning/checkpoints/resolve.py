"""From what a user types to a checkpoint file: a path, an MLflow run or a registered model."""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pmoe_lightning.errors import RunError
from pmoe_lightning.tracking.address import first_line

_LAST = "checkpoints/last.ckpt"
_CHECKPOINTS = ("checkpoints/best.ckpt", _LAST)


def resolve_checkpoint(reference: str | Path) -> Path:
    """Find the checkpoint file that ``reference`` means.

    Args:
        reference: a path; an MLflow run id (32 hexadecimal digits), whose artifact ``checkpoints/best.ckpt`` is taken,
            else ``checkpoints/last.ckpt``; ``models:/<name>/<version>`` or ``models:/<name>@<alias>``, the checkpoint
            of the run that registered this version.

    Returns:
        a local path; a file downloaded from a server is removed when the process ends.

    Raises:
        RunError: nothing is found, or the tracking server cannot be used.
    """
    text = str(reference)
    if Path(reference).exists():
        return Path(reference)
    if re.fullmatch(r"[0-9a-f]{32}", text):
        return _of_run(text)
    if text.startswith("models:/"):
        return _of_run(_run_of_model(text))
    raise RunError(f"checkpoint {text} does not exist: give a file, an MLflow run id, or models:/<name>@<alias>")


def resolve_last_checkpoint(run_id: str) -> Path:
    """The checkpoint from which an MLflow run can be resumed: in the run's own folder, else the one it has uploaded.

    Raises:
        RunError: there is none, or the tracking server cannot be used.
    """
    client, MlflowException = _client()
    try:
        folder = client.get_run(run_id).data.tags.get("output_dir")
    except MlflowException as error:
        raise RunError(f"no MLflow run {run_id}: {first_line(error)}") from error
    local = Path(folder or "", _LAST)
    return local if folder and local.is_file() else _of_run(run_id, (_LAST,))


def _of_run(run_id: str, wanted: Sequence[str] = _CHECKPOINTS) -> Path:
    client, MlflowException = _client()
    try:
        present = {item.path for item in client.list_artifacts(run_id, "checkpoints")}
        artifact = next((path for path in wanted if path in present), None)
        if artifact is None:
            raise RunError(f"MLflow run {run_id} does not hold {' or '.join(wanted)}")
        folder = tempfile.mkdtemp(prefix="pmoe-checkpoint-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return Path(client.download_artifacts(run_id, artifact, folder))
    except (MlflowException, OSError) as error:
        raise RunError(f"no checkpoint from MLflow run {run_id}: {first_line(error)}") from error


def _run_of_model(uri: str) -> str:
    match = re.fullmatch(r"models:/(?P<name>[^/@]+)(/(?P<version>\d+)|@(?P<alias>[^/@]+))", uri)
    if match is None:
        raise RunError(f"{uri} is not a model reference: write models:/<name>/<version> or models:/<name>@<alias>")
    client, MlflowException = _client()
    try:
        if match["alias"]:
            version = client.get_model_version_by_alias(match["name"], match["alias"])
        else:
            version = client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        raise RunError(f"{uri} is not in the model registry: {first_line(error)}") from error
    if not version.run_id:
        raise RunError(f"{uri} was registered without a run, so it has no checkpoint; give the checkpoint itself")
    return version.run_id


def _client():
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.exceptions import MlflowException

    from pmoe_lightning.tracking.server import check_server

    check_server(mlflow.get_tracking_uri())
    return mlflow.MlflowClient(), MlflowException
