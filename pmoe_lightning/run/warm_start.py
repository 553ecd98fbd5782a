"""``init_from=...``: a new run that begins with the weights of another one.

The actor is what is asked for: where it does not fit, the run is refused. Critics, temperature, multiplier, action
transform and statistics of normalisation come along where both have the same; the optimizer, the experience and the
counters begin anew. :func:`warm_start` says of every part which it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pmoe_lightning.algorithms.base import AbstractAlgorithm
from pmoe_lightning.checkpoints.files import read_checkpoint
from pmoe_lightning.checkpoints.policy import build_policy, policy_entry
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.tracking.references import resolve_checkpoint

#: Arguments of an actor that change neither its weights nor what they mean.
_OF_ACTING = ("deterministic", "initialization", "observation_key", "return_log_prob")
_ACTOR_IN_LOSS = "actor_network_params"  # the same tensors as the actor's
_NORMALIZER = "policy.module.0."  # it is always the first of a policy


@cache
def find(reference: str) -> Path:
    """The checkpoint that ``init_from`` means, of a run's folder the best; looked for once: a sweep has one beginning.

    Raises:
        RunError: there is none, or the tracking server cannot be used.
    """
    folder = Path(reference, "checkpoints")
    kept = [path for path in (folder / "best.ckpt", folder / "last.ckpt") if path.is_file()]
    return kept[0] if kept else resolve_checkpoint(reference)


def warm_start(reference: str, algorithm: AbstractAlgorithm, reward_scaler: nn.Module | None) -> dict[str, Any]:
    """Put the weights of another run into an algorithm that has not begun.

    Args:
        reference: a checkpoint, a run's folder, an MLflow run id or ``models:/<name>@<alias>``.
        algorithm: made for this run; it is changed in place.
        reward_scaler: that of this run's data, changed in place; None where rewards are not scaled.

    Returns:
        plain values for the checkpoint: ``reference``, ``env`` and ``env_frames`` of the other run, the parts
        ``taken`` and, with the reason, those that begin ``anew``.

    Raises:
        ConfigurationError: the actor does not fit.
        RunError: the checkpoint is missing, damaged or none of a policy.
    """
    where = f"init_from={reference}"
    checkpoint = read_checkpoint(find(reference))
    entry = policy_entry(checkpoint, where)
    there, here = entry["description"], algorithm.policy_description
    _refuse_other_actor(there, here, where)
    weights = _weights(checkpoint, entry, algorithm.parts, where)
    scaler = _scaler(checkpoint)
    unfit = _why_critics_do_not_fit(checkpoint, here, (scaler is None) == (reward_scaler is None))
    taken: dict[str, Tensor] = {}
    record: dict[str, Any] = {"reference": reference, "env": there["env"]["id"], "env_frames": entry.get("env_frames")}
    record |= {"taken": [], "anew": {"optimizer": "", "experience": ""}}
    for part, own in _parts(algorithm).items():
        reason = _difference(weights, own)
        if not reason and part != "actor" and any("_network_params." in name for name in own):
            reason = unfit
        if not reason:
            taken |= {name: weights[name] for name in own}
            record["taken"].append(part)
        elif part == "actor":
            raise ConfigurationError(f"{where}: the actor does not fit: {reason}")
        else:
            record["anew"][part] = reason
    algorithm.load_state_dict(taken, strict=False)
    if reward_scaler is not None:
        own = {name: value for name, value in reward_scaler.state_dict().items() if name != "discounted_return"}
        found = scaler or {}
        if reason := _difference(found, own):
            record["anew"]["reward_scaler"] = reason
        else:
            reward_scaler.load_state_dict({name: found[name] for name in own}, strict=False)
            record["taken"].append("reward_scaler")
    return record


def describe(record: Mapping[str, Any]) -> str:
    """What a run began with, in a line."""
    frames = "" if record["env_frames"] is None else f" after {record['env_frames']:,} frames"
    anew = [f"{part} ({reason})" if reason else part for part, reason in record["anew"].items()]
    began = f"{record['reference']}, {record['env']}{frames}"
    return f"{began}: took {', '.join(record['taken'])}; anew {', '.join(anew)}"


def _refuse_other_actor(there: Mapping[str, Any], here: Mapping[str, Any], where: str) -> None:
    """Raise where the actor is another function of its weights, or of other sizes."""
    if there["actor"] != here["actor"]:
        raise ConfigurationError(f"{where} holds actor={there['actor']}, not actor={here['actor']}: use that one")
    for what, a, b in (
        ("observations", there["observation_dim"], here["observation_dim"]),
        ("actions", len(there["action_low"]), len(here["action_low"])),
    ):
        if a != b:
            raise ConfigurationError(
                f"{where} is a policy for {there['env']['id']}, with {a} numbers in its {what}; those of "
                f"env={here['env']['id']} have {b}: it needs an environment of the same sizes"
            )
    for key, a in there["arguments"].items():
        b = here["arguments"].get(key, a)
        if key not in _OF_ACTING and _plain(a) != _plain(b):
            same = f"actor.{key}={_plain(a)}".replace(" ", "")
            raise ConfigurationError(f"{where} holds an actor with {key}={_plain(a)}, not {_plain(b)}: set {same}")
    if there["normalize_observation"] != here["normalize_observation"]:
        does = "normalised" if there["normalize_observation"] else "plain"
        raise ConfigurationError(
            f"{where} holds an actor of {does} observations: "
            f"set data.normalize_observation={str(there['normalize_observation']).lower()}"
        )


def _weights(
    checkpoint: Mapping[str, Any], entry: Mapping[str, Any], parts: Mapping[str, Callable[..., Any]], where: str
) -> Mapping[str, Any]:
    """The weights by the names that an algorithm has for them; of a file with a policy alone, those of its actor."""
    state_dict = checkpoint.get("state_dict")
    if isinstance(state_dict, Mapping):
        return state_dict
    actor = build_policy(entry, rule="max_weight", parts=parts, where=where).actor.state_dict()
    weights = {f"actor.{name}": value for name, value in actor.items()}
    return weights | {f"policy.{name}": value for name, value in entry["state_dict"].items()}


def _parts(algorithm: AbstractAlgorithm) -> dict[str, dict[str, Tensor]]:
    """What can be taken, by the names of the loss module's parts: what it trains, and targets with what they follow.

    Numbers of the configuration, which loss modules keep as buffers beside them, stay those of this run.
    """
    trained = {name.split(".")[0] for name, _ in algorithm.loss.named_parameters()}
    parts: dict[str, dict[str, Tensor]] = {"actor": {}}
    for name, value in algorithm.state_dict().items():
        owner, _, inner = name.partition(".")
        part = inner.split(".")[0].removeprefix("target_")
        if owner == "actor":
            parts["actor"][name] = value
        elif owner == "loss" and part in trained and part != _ACTOR_IN_LOSS:
            parts.setdefault(part.removesuffix("_network_params"), {})[name] = value
        elif name.startswith(_NORMALIZER) and algorithm.policy_description["normalize_observation"]:
            parts.setdefault("observation_normalizer", {})[name] = value
    # The bounds of the actions are those of this run's environment; weights are of normalised actions.
    parts["actor"] = {name: value for name, value in parts["actor"].items() if not name.endswith((".low", ".high"))}
    return parts


def _difference(weights: Mapping[str, Any], own: Mapping[str, Tensor]) -> str:
    """Why the part cannot be taken, in words; empty where it can."""
    if not any(name in weights for name in own):
        return "not in the checkpoint"
    for name, value in own.items():
        short, found = name.split(".", 1)[-1], weights.get(name)
        if not isinstance(found, Tensor):
            return f"no {short} in the checkpoint"
        if found.shape != value.shape:
            return f"{short} {list(found.shape)} there, {list(value.shape)} here"
        if not torch.isfinite(found).all():
            return f"{short} is not finite"
    return ""


def _why_critics_do_not_fit(checkpoint: Mapping[str, Any], here: Mapping[str, Any], same_rewards: bool) -> str:
    there = checkpoint["policy"]["description"]
    if there.get("critic", {}) != _plain(here.get("critic", {})):
        return "the critic is described otherwise"
    bounds = {abs(bound) for key in ("action_low", "action_high") for bound in there[key]}
    if there.get("action_units") != "normalized" and bounds != {1}:
        return "of actions in units of the environment"
    return "" if same_rewards else "of rewards scaled otherwise"


def _scaler(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    data = checkpoint.get("OnPolicyData")
    return data.get("reward_scaler") if isinstance(data, Mapping) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
