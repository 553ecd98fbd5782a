"""From the folder of a packaged policy to a model in MLflow: as often as it is tried, one model and one version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient

from pmoe_lightning.errors import RunError
from pmoe_lightning.tracking.best_alias import move_best
from pmoe_lightning.tracking.model_card import CARD, describe, model_card
from pmoe_lightning.tracking.naming import NOTE, short_enough

_DIGEST_TAG = "pmoe_lightning.policy_digest"
_VERSIONS_TAG = "mlflow.modelVersions"
_RETURN = "eval/episode_return"


def upload_model(
    client: MlflowClient,
    tracking_uri: str,
    run: Run,
    folder: Path,
    *,
    name: str,
    facts: Mapping[str, Any],
    digest: str,
    register_as: str | None,
    training: Mapping[str, Any] | None = None,
) -> str:
    """Make the folder a model of the run, with the metrics that the run has at the model's step; returns its id.

    A model of the same name and policy that the run has already is completed, not made again.

    Args:
        digest: of the policy; see :func:`~pmoe_lightning.tracking.policy_model.save_policy_model`.
        register_as: also make it the next version of this registered model.
        training: of the card, see :func:`~pmoe_lightning.tracking.model_card.model_card`.

    Raises:
        MlflowException, OSError, RunError: the store does not take it, or does not have what it has said yes to.
    """
    step = int(facts["env_frames"] or 0)
    judged = _judged(client, run, step)
    model = _known(client, run, folder) or _find(client, run, name, digest)
    model = model or _create(client, run, name, digest, facts, judged)
    card = model_card(facts, f"models:/{model.model_id}", judged, training)
    if model.status != LoggedModelStatus.READY:
        _write_identity(folder, model, run, card)
        client.set_logged_model_tags(model.model_id, {NOTE: short_enough(card)})
        _relate(client, run, model.model_id, step)
        _upload(model, tracking_uri, folder)
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        found = _known(client, run, folder)
        if found is None or found.status != LoggedModelStatus.READY:
            raise RunError(f"the store has said yes to model {model.model_id} but does not have it")
    if register_as is not None:
        version = _register(client, model.model_id, register_as, short_enough(card))
        move_best(client, version, training)
    return model.model_id


def _judged(client: MlflowClient, run: Run, step: int) -> str:
    """How the run judged the policy at this step, in words; nothing where it did not."""
    values = {}
    for name in ("", "_low", "_high"):
        known = _RETURN + name in run.data.metrics
        history = client.get_metric_history(run.info.run_id, _RETURN + name) if known else []
        values[name] = next((point.value for point in history if point.step == step), None)
    if values[""] is None:
        return ""
    interval = f" (95 % interval {values['_low']:.1f} to {values['_high']:.1f})" if None not in values.values() else ""
    return f"Its evaluation in run {run.info.run_name} had the mean return {values['']:.1f}{interval}."


def _known(client: MlflowClient, run: Run, folder: Path) -> LoggedModel | None:
    """The model that the folder has been sent to before; None where there is none, or it was deleted."""
    packaged = Model.load(str(folder))
    if packaged.model_id is None or packaged.run_id != run.info.run_id:
        return None
    try:
        model = client.get_logged_model(packaged.model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    if model.model_id != packaged.model_id:
        raise RunError("the store says nothing of its model")
    return model


def _find(client: MlflowClient, run: Run, name: str, digest: str) -> LoggedModel | None:
    condition = f"source_run_id = '{run.info.run_id}' AND name = '{name}'"
    found = client.search_logged_models([run.info.experiment_id], condition)
    return next((model for model in found if model.tags.get(_DIGEST_TAG) == digest), None)


def _create(
    client: MlflowClient, run: Run, name: str, digest: str, facts: Mapping[str, Any], judged: str
) -> LoggedModel:
    """The entry of the model in the store, without its files: parameters of its run, facts, description."""
    parameters = run.data.params | {key: str(value) for key, value in facts.items()}
    tags = {NOTE: describe(facts, judged), _DIGEST_TAG: digest}
    made = client.create_logged_model(run.info.experiment_id, name, run.info.run_id, tags=tags, params=parameters)
    if not made.model_id or made.source_run_id != run.info.run_id:
        raise RunError(f"the store says nothing of its model {name}")
    return made


def _relate(client: MlflowClient, run: Run, model_id: str, step: int) -> None:
    """Make it an output of the run, with the metrics of its step."""
    outputs = run.outputs.model_outputs if run.outputs is not None else []
    if model_id not in [output.model_id for output in outputs]:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, step=step)])
    metrics = [
        Metric(point.key, point.value, point.timestamp, point.step, model_id=model_id, run_id=run.info.run_id)
        for metric in run.data.to_proto().metrics
        if metric.step >= step
        for point in client.get_metric_history(run.info.run_id, metric.key)
        if point.step == step and point.model_id is None
    ]
    if metrics:
        client.log_batch(run.info.run_id, metrics=metrics)


def _write_identity(folder: Path, model: LoggedModel, run: Run, card: str) -> None:
    packaged = Model.load(str(folder))
    packaged.model_id = packaged.model_uuid = model.model_id
    packaged.run_id, packaged.artifact_path = run.info.run_id, model.artifact_location
    packaged.save(str(folder / "MLmodel"))
    (folder / CARD).write_text(card)


def _upload(model: LoggedModel, tracking_uri: str, folder: Path) -> None:
    place = get_artifact_repository(model.artifact_location, tracking_uri=tracking_uri)
    place.log_artifacts(str(folder))
    for below in {path.parent for path in folder.rglob("*") if path.is_file()}:
        relative = None if below == folder else below.relative_to(folder).as_posix()
        sizes = {Path(found.path).name: found.file_size for found in place.list_artifacts(relative)}
        for path in (path for path in below.iterdir() if path.is_file()):
            if sizes.get(path.name, -1) not in (None, path.stat().st_size):
                raise RunError(f"the store has said yes to {path.name} of the model but does not have it")


def _register(client: MlflowClient, model_id: str, name: str, description: str) -> ModelVersion:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise
    source = f"models:/{model_id}"
    versions = client.search_model_versions(f"name = '{name}'")
    version = next((found for found in versions if found.source == source or found.model_id == model_id), None)
    if version is None:
        version = client.create_model_version(name, source, model_id=model_id)
        known = [{"name": version.name, "version": version.version}]
        client.set_logged_model_tags(model_id, {_VERSIONS_TAG: json.dumps(known)})
    return client.update_model_version(name, version.version, description)
