"""From what a user types to a checkpoint or a policy: a path, an MLflow run or a registered model."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pmoe_lightning.checkpoints.blocks import named_blocks
from pmoe_lightning.checkpoints.files import previous_checkpoint, read_checkpoint, verify_checkpoint
from pmoe_lightning.checkpoints.loaded import LoadedPolicy
from pmoe_lightning.checkpoints.policy import build_policy, policy_entry
from pmoe_lightning.errors import RunError
from pmoe_lightning.tracking.address import store_line

_LAST = "checkpoints/last.ckpt"
_CHECKPOINTS = ("checkpoints/best.ckpt", _LAST)


def load_policy(
    checkpoint: str | Path | Mapping[str, Any],
    *,
    device: str | torch.device = "cpu",
    rule: str | None = None,
    parts: Mapping[str, Callable[..., Any]] | None = None,
) -> LoadedPolicy:
    """Rebuild the policy of a checkpoint: ``tensordict["observation"] [*B, O] -> tensordict["action"] [*B, A]``.

    On plain arrays it is ``policy.predict(observation) -> action``; ``policy.get_dist(tensordict)`` is its mixture.
    A policy with memory also reads what an environment made with ``carry`` hands on, see ``envs.with_memory``.
    The observation normaliser, if the policy was trained with one, is part of it. The policy is in evaluation mode and
    acts deterministically; ``torchrl.envs.set_exploration_type(ExplorationType.RANDOM)`` makes it sample, whatever the
    rule.

    Args:
        checkpoint: a file, an MLflow run id, ``models:/<name>@<alias>`` (see ``resolve_checkpoint``), or a checkpoint
            already read.
        device: where the policy is to act.
        rule: the deterministic rule, ``max_weight``, ``mean``, ``sample_component`` or ``best_value`` (the component
            that the checkpoint's own critics prefer); :func:`trained_rule` when ``None``.
        parts: the factories of parts that are not this package's, by group and option: ``{"actor/mine": make_mine}``
            for a policy trained with ``actor=mine``. A checkpoint only says their names.

    Raises:
        RunError: the checkpoint is missing, damaged, foreign, or describes a policy this version cannot build.

    Example:
        >>> policy = load_policy("checkpoints/best.ckpt")
        >>> action = policy(TensorDict(observation=torch.zeros(1, 17), batch_size=1))["action"]  # [1, 6]
        >>> action = policy.predict(np.zeros(17))  # [6]
    """
    where = "the checkpoint"
    if not isinstance(checkpoint, Mapping):
        where = f"checkpoint {checkpoint}"
        checkpoint = read_checkpoint(resolve_checkpoint(checkpoint))
    return build_policy(policy_entry(checkpoint, where), device=device, rule=rule, parts=parts, where=where)


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


def resolve_last_checkpoint(run_id: str) -> tuple[Path, str | None]:
    """The checkpoint from which an MLflow run can be resumed: in the run's own folder, else the one it has uploaded.

    Returns:
        a local path, and of a checkpoint that was uploaded the status of its run; a folder says that itself.

    Raises:
        RunError: there is none, or the tracking server cannot be used.
    """
    client, MlflowException = _client()
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise RunError(f"no MLflow run {run_id}: {store_line(error)}") from error
    local = Path(run.data.tags.get("output_dir", ""), _LAST)
    if "output_dir" in run.data.tags and (local.is_file() or previous_checkpoint(local).is_file()):
        return local, None
    path = _of_run(run_id, (_LAST,))
    verify_checkpoint(path)
    try:
        for block in named_blocks(path):
            artifact = f"{Path(_LAST).parent}/{block.parent.name}/{block.name}"
            block.parent.mkdir(exist_ok=True)
            # Where below the folder it comes to lie, the stores of MLflow do not agree.
            Path(client.download_artifacts(run_id, artifact, str(block.parent))).replace(block)
    except (MlflowException, OSError) as error:
        raise RunError(
            f"MLflow run {run_id} lacks a block of the replay buffer that its {_LAST} names: {store_line(error)}; "
            "begin a new run with its weights: init_from=<run id>"
        ) from error
    return path, run.info.status


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
        raise RunError(f"no checkpoint from MLflow run {run_id}: {store_line(error)}") from error


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
        raise RunError(f"{uri} is not in the model registry: {store_line(error)}") from error
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
