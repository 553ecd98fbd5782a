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
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from pmoe_lightning.checkpoints.files import read_checkpoint
from pmoe_lightning.checkpoints.policy import build_policy, policy_entry, trained_rule
from pmoe_lightning.errors import RunError
from pmoe_lightning.tracking.address import first_line, without_secrets
from pmoe_lightning.tracking.logger import MLflowLogger
from pmoe_lightning.tracking.naming import NOTE

_RETURN = "eval/episode_return"

_NOTE = """\
# A policy for {env}

It maps observations, float32 [N, {observations}], to actions, float32 [N, {actions}], in the units of the
environment. Observations are given as the environment returns them: the normalisation is inside. One that holds NaN or
an infinity is an error.
{randomness}

    import mlflow, numpy as np
    policy = mlflow.pyfunc.load_model("{uri}")
    action = policy.predict(np.asarray(observation, dtype=np.float32)[None])[0]

{judged}

The graph runs on the CPU. As a PyTorch module: mlflow.pytorch.load_model("{uri}", device="cpu").

{metadata}
"""


_DETERMINISTIC = "The same observation always gets the same action."
_DRAWS = """\
The policy is limited in its cost and chooses among candidates, most of which it draws: the same observation can get
another action next time. torch.manual_seed repeats them.
"""


class PolicyFunction(nn.Module):
    """A TensorDict policy as a plain function: ``observation [N, O] -> action [N, A]``.

    The exported graph keeps its two questions: whoever serves it gets an error for an observation that is not finite,
    or so large that the action is not, in place of an action that is NaN.
    """

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Tensor) -> Tensor:
        _assert_finite(observation, "the observation holds NaN or an infinity")
        tensordict = TensorDict({"observation": observation}, batch_size=[observation.shape[0]])
        action = self.policy(tensordict)["action"]
        _assert_finite(action, "the observation is too large for the policy: its action is not finite")
        return action


def _assert_finite(values: Tensor, message: str) -> None:
    """Raise RuntimeError with the message; an operator, which ``torch.export`` keeps, and not a branch in Python."""
    torch._assert_async(values.isfinite().all(), message)


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
    where = "the checkpoint" if isinstance(checkpoint, Mapping) else f"checkpoint {checkpoint}"
    content = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    entry = policy_entry(content, where)
    rule = trained_rule(entry)
    # Drawn again for every action, a component is not a function of the observation.
    rule = "max_weight" if rule == "sample_component" else rule
    policy = build_policy(entry, rule=rule, parts=parts, where=where)
    if memory := [key for key in policy.in_keys if key != "observation"]:
        raise RunError(f"{where}: the model maps observations alone, but the policy also reads {', '.join(memory)}")
    function = PolicyFunction(policy).eval().requires_grad_(False)
    facts = _facts(entry, policy) | {"rule": rule} | dict(metadata or {})
    run_id, step = logger.run_id, int(facts["env_frames"] or 0)
    # MLflow gives a model the metrics that its run has at the model's step, when the model is logged.
    logger.flush()
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder, "HOW_TO_USE.md")
        try:
            client = logger.experiment
            judged = _judged(client, run_id, step)
            model_id = _create(client, logger.experiment_id, run_id, name, facts, judged)
            note.write_text(_note(facts, judged, f"models:/{model_id}"))
            version = _log(
                function,
                facts,
                run_id=run_id,
                step=step,
                model_id=model_id,
                registered_model_name=register_as,
                note=note,
            )
            if version is not None:
                client.update_model_version(register_as, version, _describe(facts, judged))
        except (MlflowException, OSError, RuntimeError) as error:
            where = without_secrets(logger.tracking_uri)
            raise RunError(f"the policy model was not logged to {where}: {first_line(error)}") from error
    return f"models:/{model_id}"


def _judged(client: MlflowClient, run_id: str, step: int) -> str:
    """How the run judged the policy at this step, in words; nothing where it did not."""
    run = client.get_run(run_id)
    values = {}
    for name in ("", "_low", "_high"):
        history = client.get_metric_history(run_id, _RETURN + name) if _RETURN + name in run.data.metrics else []
        values[name] = next((point.value for point in history if point.step == step), None)
    if values[""] is None:
        return ""
    interval = f" (95 % interval {values['_low']:.1f} to {values['_high']:.1f})" if None not in values.values() else ""
    return f"Its evaluation in run {run.info.run_name} had the mean return {values['']:.1f}{interval}."


def _create(
    client: MlflowClient, experiment_id: str, run_id: str, name: str, facts: Mapping[str, Any], judged: str
) -> str:
    """The entry of the model in the store, without its files: parameters of its run, facts, description."""
    parameters = client.get_run(run_id).data.params | {key: str(value) for key, value in facts.items()}
    tags = {NOTE: _describe(facts, judged)}
    # Model.log alone would put the model into whatever experiment is globally current.
    return client.create_logged_model(experiment_id, name, run_id, tags=tags, params=parameters).model_id


def _describe(facts: Mapping[str, Any], judged: str) -> str:
    trained = f"after {facts['env_frames']:,} environment frames" if facts["env_frames"] is not None else "as trained"
    return (
        f"Policy ({facts['actor']}) for {facts['env']} {trained}, acting by the rule {facts['rule']}. {judged}".strip()
    )


def _log(function: nn.Module, facts: Mapping[str, Any], *, note: Path, **arguments: Any) -> int | None:
    """Write the model's files; returns its version where it is registered."""
    observations, actions = facts["observation_dim"], facts["action_dim"]
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, observations))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, actions))]),
    )
    with warnings.catch_warnings(), torch.no_grad():
        # Tracing warns about TensorDict's internals; nothing that a user could act on.
        warnings.simplefilter("ignore")
        logged = Model.log(
            None,
            _CpuFlavor,
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
    return logged.registered_model_version


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


def _note(facts: Mapping[str, Any], judged: str, uri: str) -> str:
    return _NOTE.format(
        env=facts["env"],
        observations=facts["observation_dim"],
        actions=facts["action_dim"],
        uri=uri,
        judged=_describe(facts, judged),
        randomness=_DETERMINISTIC if facts["deterministic"] else _DRAWS,
        metadata=json.dumps(dict(facts), indent=2, default=str),
    )
