"""The trained policy as an MLflow model: observations in, actions out, without this package.

The policy as it is evaluated, its observation normaliser included, is traced by ``torch.export`` into one graph.
Loading it needs PyTorch and MLflow only, and executes no code from the file.
"""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from pmoe_lightning.checkpoints.files import read_checkpoint
from pmoe_lightning.checkpoints.policy import build_policy, policy_entry, trained_rule
from pmoe_lightning.errors import RunError
from pmoe_lightning.processes.partial_files import partial_file
from pmoe_lightning.tracking.address import store_line, without_secrets
from pmoe_lightning.tracking.logger import MLflowLogger
from pmoe_lightning.tracking.model_card import CARD, PICTURE, model_card
from pmoe_lightning.tracking.model_upload import upload_model


class PolicyFunction(nn.Module):
    """A TensorDict policy as a plain function: ``observation [N, O] -> action [N, A]``, or from pixels [N, C, H, W].

    The exported graph keeps its two questions: whoever serves it gets an error for an observation that is not finite,
    or so large that the action is not, in place of an action that is NaN.
    """

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Tensor) -> Tensor:
        _assert_finite(observation, "the observation holds NaN or an infinity")
        tensordict = TensorDict({self.policy.in_keys[0]: observation}, batch_size=[observation.shape[0]])
        action = self.policy(tensordict)["action"]
        _assert_finite(action, "the observation is too large for the policy: its action is not finite")
        return action


def _assert_finite(values: Tensor, message: str) -> None:
    """Raise RuntimeError with the message; an operator, which ``torch.export`` keeps, and not a branch in Python."""
    torch._assert_async(values.isfinite().all(), message)


def log_policy_model(
    logger: MLflowLogger,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    parts: Mapping[str, Callable[..., Any]] | None = None,
    register_as: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    name: str = "policy",
) -> str:
    """Package the policy of a checkpoint, as it is evaluated, and log it with the logger's run. Takes a few seconds.

    The model has the checkpoint's environment frames as its step, with the metrics that the run has there, its run's
    parameters and the facts below, and a description.

    Args:
        logger: names the run and its store.
        checkpoint: a checkpoint file, or a checkpoint already read.
        parts: see ``load_policy``.
        register_as: also make it the next version of this registered model.
        metadata: further facts, such as the algorithm; environment, K, frames, updates and the rule
            by which it acts are always there.
        name: name of the model in the run.

    Returns:
        its URI, ``models:/m-...``, for ``mlflow.pyfunc.load_model``.

    Raises:
        RunError: the checkpoint cannot be read, the policy has a memory or cannot be exported for another reason, or
            the store does not take it.
    """
    run_id = logger.run_id
    # MLflow gives a model the metrics that its run has at the model's step, when the model is logged.
    logger.flush()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        model = save_policy_model(checkpoint, folder, parts=parts, metadata=metadata)
        try:
            run = logger.experiment.get_run(run_id)
            model_id = upload_model(
                logger.experiment, logger.tracking_uri, run, folder, name=name, register_as=register_as, **model
            )
        except (MlflowException, OSError, RunError) as error:
            where = without_secrets(logger.tracking_uri)
            raise RunError(f"the policy model was not logged to {where}: {store_line(error)}") from error
    return f"models:/{model_id}"


def queue_policy_model(
    logger: MLflowLogger,
    checkpoint: str | Path | Mapping[str, Any],
    folder: str | Path,
    *,
    parts: Mapping[str, Callable[..., Any]] | None = None,
    register_as: str | None = None,
    training: Mapping[str, Any] | None = None,
    picture: bytes | None = None,
    name: str = "policy",
) -> None:
    """Package the policy of a checkpoint into a folder, and have it logged as soon as the store takes it.

    It stays there, for ``mlflow.pyfunc.load_model(folder)``. Arguments are those of :func:`log_policy_model` and of
    :func:`save_policy_model`.

    Raises:
        RunError: the checkpoint cannot be read, or the policy has a memory or cannot be exported for another reason.
    """
    model = save_policy_model(checkpoint, folder, parts=parts, training=training, picture=picture)
    logger.log_model(folder, {"name": name, "register_as": register_as, **model})


def save_policy_model(
    checkpoint: str | Path | Mapping[str, Any],
    folder: str | Path,
    *,
    parts: Mapping[str, Callable[..., Any]] | None = None,
    metadata: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    picture: bytes | None = None,
) -> dict[str, Any]:
    """Package the policy of a checkpoint, as it is evaluated, as an MLflow model in ``folder``, which is replaced.

    Args:
        checkpoint, parts, metadata: as those of :func:`log_policy_model`.
        training: what the run says of itself, for :func:`~pmoe_lightning.tracking.model_card.model_card`.
        picture: of its mixture, a PNG for the card.

    Returns:
        ``facts`` of the policy, the ``digest`` of its weights and ``training``, as :func:`upload_model` takes them.

    Raises:
        RunError: the checkpoint cannot be read, or the policy has a memory or cannot be exported for another reason.
    """
    where = "the checkpoint" if isinstance(checkpoint, Mapping) else f"checkpoint {checkpoint}"
    content = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    entry = policy_entry(content, where)
    rule = trained_rule(entry)
    # Drawn again for every action, a component is not a function of the observation.
    rule = "max_weight" if rule == "sample_component" else rule
    policy = build_policy(entry, rule=rule, parts=parts, where=where)
    if memory := [key for key in policy.in_keys if key not in ("observation", "pixels")]:
        raise RunError(f"{where}: the model maps observations alone, but the policy also reads {', '.join(memory)}")
    training = dict(training or {}) | {"picture": picture is not None}
    function = PolicyFunction(policy).eval().requires_grad_(False)
    facts = _facts(entry, policy) | {"rule": rule} | dict(metadata or {})
    folder = Path(folder).absolute()
    partial = partial_file(folder)
    try:
        _save(function, facts, partial, model_card(facts, ".", training=training), picture)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (MlflowException, OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"the policy of {where} cannot be packaged: {store_line(error)}") from error
    return {"facts": facts, "digest": _digest(function, facts), "training": training}


def _save(function: nn.Module, facts: Mapping[str, Any], folder: Path, card: str, picture: bytes | None) -> None:
    seen, actions = facts.get("pixels"), facts["action_dim"]
    kind = np.dtype(np.float32 if seen is None else np.uint8)
    single = [facts["observation_dim"]] if seen is None else seen
    signature = ModelSignature(
        inputs=Schema([TensorSpec(kind, (-1, *single))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, actions))]),
    )
    with warnings.catch_warnings(), torch.no_grad():
        # Tracing warns about TensorDict's internals; nothing that a user could act on.
        warnings.simplefilter("ignore")
        model = Model(metadata=dict(facts))
        mlflow.pytorch.save_model(
            function,
            str(folder),
            mlflow_model=model,
            serialization_format="pt2",
            signature=signature,
            # A batch of one would be traced as the constant 1.
            input_example=np.zeros((2, *single), kind),
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", f"numpy=={np.__version__}"],
        )
        # An exported graph cannot change its device, and MLflow would otherwise try the GPU of whoever loads it.
        model.flavors["python_function"]["config"] = {"device": "cpu"}
        model.save(str(folder / "MLmodel"))
    (folder / CARD).write_text(card)
    if picture is not None:
        (folder / PICTURE).write_bytes(picture)


def _digest(function: nn.Module, facts: Mapping[str, Any]) -> str:
    """Of everything by which the policy acts."""
    digest = sha256(json.dumps(dict(facts), sort_keys=True, default=str).encode())
    for name, tensor in sorted(function.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _facts(entry: Mapping[str, Any], policy: nn.Module) -> dict[str, Any]:
    description = entry["description"]
    safe, encoder = description.get("safe"), description.get("encoder")
    pixels = {} if encoder is None else {"pixels": encoder["shape"]}
    return {
        **pixels,
        "env": description["env"]["id"],
        "observation_dim": description["observation_dim"],
        "action_dim": len(description["action_low"]),
        "actor": description["actor"],
        "num_components": next((m.num_components for m in policy.modules() if hasattr(m, "num_components")), None),
        "deterministic": safe is None or safe.get("num_candidates") == 1,
        "env_frames": entry.get("env_frames"),
        "updates": entry.get("updates"),
    }
