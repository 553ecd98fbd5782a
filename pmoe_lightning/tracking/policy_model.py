"""The trained policy as an MLflow model: observations in, actions out, without this package.

The policy as it is evaluated, its observation normaliser included, is traced by ``torch.export`` into one graph.
Loading it needs PyTorch and MLflow only, and executes no code from the file.
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
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
from pmoe_lightning.tracking.logger import MLflowLogger

_NOTE = """\
# A policy for {env}

It maps observations, float32 [N, {observations}], to actions, float32 [N, {actions}], in the units of the
environment. Observations are given as the environment returns them: the normalisation is inside.
{randomness}

    import mlflow, numpy as np
    policy = mlflow.pyfunc.load_model("{uri}")
    action = policy.predict(np.asarray(observation, dtype=np.float32)[None])[0]

The graph runs on the CPU. As a PyTorch module: mlflow.pytorch.load_model("{uri}", device="cpu").

{metadata}
"""


_DETERMINISTIC = "The same observation always gets the same action."
_DRAWS = """\
The policy is limited in its cost and chooses among candidates, most of which it draws: the same observation can get
another action next time. torch.manual_seed repeats them.
"""


class PolicyFunction(nn.Module):
    """A TensorDict policy as a plain function: ``observation [N, O] -> action [N, A]``."""

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Tensor) -> Tensor:
        tensordict = TensorDict({"observation": observation}, batch_size=[observation.shape[0]])
        return self.policy(tensordict)["action"]


class _CpuFlavor:
    """MLflow's PyTorch flavor, except that the model says it runs on the CPU.

    An exported graph cannot change its device, and MLflow would otherwise try the GPU of whoever loads it.
    """

    @staticmethod
    def save_model(pytorch_model: nn.Module, path: str, mlflow_model: Model, **arguments: Any) -> None:
        mlflow.pytorch.save_model(pytorch_model, path, mlflow_model=mlflow_model, **arguments)
        mlflow_model.flavors["python_function"]["config"] = {"device": "cpu"}
        mlflow_model.save(str(Path(path, "MLmodel")))


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

    Args:
        logger: names the run and its store.
        checkpoint: a checkpoint file, or a checkpoint already read.
        parts: see ``load_policy``.
        register_as: also make it the next version of this registered model.
        metadata: further facts, such as the algorithm; environment, K, frames and updates are always there.
        name: name of the model in the run.

    Returns:
        its URI, ``models:/m-...``, for ``mlflow.pyfunc.load_model``.

    Raises:
        RunError: the checkpoint cannot be read, the policy has a memory or cannot be exported for another reason, or
            the store does not take it.
    """
    where = "the checkpoint" if isinstance(checkpoint, Mapping) else f"checkpoint {checkpoint}"
    content = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    entry = policy_entry(content, where)
    rule = trained_rule(entry)
    fixed = "max_weight" if rule == "sample_component" else rule
    policy = build_policy(entry, rule=fixed, parts=parts, where=where)
    if memory := [key for key in policy.in_keys if key != "observation"]:
        raise RunError(f"{where}: the model maps observations alone, but the policy also reads {', '.join(memory)}")
    function = PolicyFunction(policy).eval().requires_grad_(False)
    facts = _facts(entry, policy) | dict(metadata or {})
    run_id = logger.run_id
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder, "HOW_TO_USE.md")
        try:
            # Model.log alone would put the model into whatever experiment is globally current.
            model_id = logger.experiment.create_logged_model(logger.experiment_id, name, run_id).model_id
            note.write_text(_note(facts, f"models:/{model_id}"))
            _log(function, facts, run_id=run_id, model_id=model_id, registered_model_name=register_as, note=note)
        except (MlflowException, OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(f"the policy model was not logged to {logger.tracking_uri}: {reason}") from error
    return f"models:/{model_id}"


def _log(function: nn.Module, facts: Mapping[str, Any], *, run_id: str, note: Path, **arguments: Any) -> None:
    observations, actions = facts["observation_dim"], facts["action_dim"]
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, observations))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, actions))]),
    )
    with warnings.catch_warnings(), torch.no_grad():
        # Tracing warns about TensorDict's internals; nothing that a user could act on.
        warnings.simplefilter("ignore")
        Model.log(
            None,
            _CpuFlavor,
            run_id=run_id,
            pytorch_model=function,
            serialization_format="pt2",
            signature=signature,
            # A batch of one would be traced as the constant 1.
            input_example=np.zeros((2, observations), np.float32),
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", f"numpy=={np.__version__}"],
            extra_files=[str(note)],
            metadata=dict(facts),
            **arguments,
        )


def _facts(entry: Mapping[str, Any], policy: nn.Module) -> dict[str, Any]:
    description = entry["description"]
    safe = description.get("safe")
    return {
        "env": description["env"]["id"],
        "observation_dim": description["observation_dim"],
        "action_dim": len(description["action_low"]),
        "actor": description["actor"],
        "num_components": next((m.num_components for m in policy.modules() if hasattr(m, "num_components")), None),
        "deterministic": safe is None or safe.get("num_candidates") == 1,
        "env_frames": entry.get("env_frames"),
        "updates": entry.get("updates"),
    }


def _note(facts: Mapping[str, Any], uri: str) -> str:
    return _NOTE.format(
        env=facts["env"],
        observations=facts["observation_dim"],
        actions=facts["action_dim"],
        uri=uri,
        randomness=_DETERMINISTIC if facts["deterministic"] else _DRAWS,
        metadata=json.dumps(dict(facts), indent=2, default=str),
    )
