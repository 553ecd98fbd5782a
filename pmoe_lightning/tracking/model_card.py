"""The model card: what a packaged policy is, how well it did, what that does not say, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmoe_lightning.evaluation.statistics import student_t_interval

#: The card and the picture of the mixture, in the folder of the model.
CARD, PICTURE = "README.md", "mixture.png"

_CARD = """\
# A policy for {env}

{described}

It maps observations, float32 [N, {observations}], to actions, float32 [N, {actions}], in the units of the
environment. Observations are given as the environment returns them: the normalisation is inside. One that holds NaN or
an infinity is an error.
{randomness}

## How to load it

```python
import mlflow
import numpy as np

policy = mlflow.pyfunc.load_model("{uri}"){here}
observations = np.zeros((1, {observations}), dtype=np.float32)  # what the environment has returned, a row each
actions = policy.predict(observations)
```

The graph runs on the CPU and needs torch, numpy and MLflow only. As a PyTorch module:
`mlflow.pytorch.load_model("{uri}", device="cpu")`.

## What it is

| | |
|---|---|
{rows}
{picture}
## What it was not tested on

{limits}
"""

_DETERMINISTIC = "The same observation always gets the same action."
_DRAWS = """\
The policy is limited in its cost and chooses among candidates, most of which it draws: the same observation can get
another action next time. torch.manual_seed repeats them.
"""
_PICTURE = f"""
![What each component would do along an episode]({PICTURE})
"""


def describe(facts: Mapping[str, Any], judged: str = "") -> str:
    """What the policy is, in a sentence or two."""
    trained = f"after {facts['env_frames']:,} environment frames" if facts["env_frames"] is not None else "as trained"
    return (
        f"Policy ({facts['actor']}) for {facts['env']} {trained}, acting by the rule {facts['rule']}. {judged}".strip()
    )


def model_card(facts: Mapping[str, Any], uri: str, judged: str = "", training: Mapping[str, Any] | None = None) -> str:
    """The text of :data:`CARD`.

    Args:
        facts: of the policy, see ``policy_model``.
        uri: by which it is loaded; ``.`` for the folder that holds the card.
        judged: how its run judged it, in words, where only the store knows it.
        training: what the run says of itself, each where it is known: ``algorithm``, ``estimator``,
            ``action_transform``, ``seed``, ``begun``, ``returns`` and the seed of the first of these episodes,
            ``first_seed``, the number of ``evaluations`` of which this is the best, ``origin`` (of ``provenance``), and
            ``picture``, whether one lies beside the card.
    """
    told = training or {}
    rows = "\n".join(f"| {name} | {text} |" for name, text in _rows(facts, told).items() if text)
    return _CARD.format(
        env=facts["env"],
        described=describe(facts, judged),
        observations=facts["observation_dim"],
        actions=facts["action_dim"],
        randomness=_DETERMINISTIC if facts["deterministic"] else _DRAWS,
        uri=uri,
        here="  # in the folder of this file" if uri == "." else "",
        rows=rows,
        picture=_PICTURE if told.get("picture") else "",
        limits="\n".join(f"- {limit}" for limit in _limits(facts, told)),
    )


def _rows(facts: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, str]:
    mixture = facts["num_components"]
    frames, updates = facts["env_frames"], facts["updates"]
    counted = [f"{frames:,} environment frames" if frames is not None else ""]
    counted += [f"{updates:,} updates" if updates is not None else ""]
    counted += [f"seed {told['seed']}" if told.get("seed") is not None else ""]
    further = {"estimator", "action_transform", "begun"}.intersection(key for key, value in told.items() if value)
    return {
        "task": facts["env"],
        "algorithm": str(told.get("algorithm") or facts.get("algorithm") or ""),
        "actor": facts["actor"] + (f", {mixture} components" if mixture else ""),
        **{key.replace("_", " "): str(told[key]) for key in sorted(further)},
        "rule": facts["rule"],
        "training": ", ".join(filter(None, counted)),
        "return": _return(told),
        "software": _software(told.get("origin") or {}),
    }


def _return(told: Mapping[str, Any]) -> str:
    """The mean over the episodes, its interval and their seeds."""
    returns = told.get("returns") or []
    if not returns:
        return ""
    mean, (low, high) = sum(returns) / len(returns), student_t_interval(returns)
    interval = f", 95 % interval {low:.1f} to {high:.1f}" if len(returns) > 1 else ", without an interval"
    first = told["first_seed"]
    seeds = f"seeds {first} to {first + len(returns) - 1}" if len(returns) > 1 else f"seed {first}"
    return f"{mean:.1f}{interval}, of {len(returns)} episode{'s' * (len(returns) > 1)} ({seeds})"


def _software(origin: Mapping[str, Any]) -> str:
    known = origin.get("packages", {})
    names = ("pmoe_lightning", "torch", "torchrl", "mujoco", "gymnasium")
    parts = [f"{name} {known[name]}" for name in names if name in known]
    commit = origin.get("git_commit")
    parts += [f"commit {commit}{' with changes' * bool(origin.get('git_dirty'))}"] if commit else []
    return ", ".join(parts)


def _limits(facts: Mapping[str, Any], told: Mapping[str, Any]) -> list[str]:
    """What the numbers above do not say."""
    limits = [
        f"It was judged in {facts['env']} alone, as it was trained: not with other dynamics, other sensors, delays or "
        "noise, and on no machine.",
        "One training run made it. Its return says nothing of how well other seeds do.",
    ]
    if not told.get("returns"):
        limits.append("Its run has recorded no evaluation of it here.")
    elif told.get("evaluations", 1) > 1:
        limits.append(
            f"It is the best of {told['evaluations']} evaluations on the same seeds: on new ones expect less than the "
            "return above, and an interval that is honest from `pmoe-evaluate` with another `seed`."
        )
    if not facts["deterministic"]:
        limits.append("The limit on its cost held in training as far as its cost critics know; it is no guarantee.")
    return limits
