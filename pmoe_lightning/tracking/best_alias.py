"""The alias ``best`` of a registered model: on the version that was evaluated best, beyond the chance of its episodes.

Every version says in a tag how it was evaluated. The alias moves to a new one where the 95 % interval of the difference
of their mean returns (Welch) lies above zero, and only between evaluations in the same environment.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient

from pmoe_lightning.evaluation.statistics import welch_interval

ALIAS = "best"
_EVALUATION = "pmoe_lightning.evaluation"
_DISPLACED = "pmoe_lightning.displaced"
_log = logging.getLogger(__name__)


def move_best(client: MlflowClient, version: ModelVersion, training: Mapping[str, Any] | None) -> None:
    """Give the alias to a version that was just registered, if it is better; a line says what was done.

    Nothing is said of a version without an evaluation. Two runs that end together can both find the same version
    worse than theirs, and a store cannot compare and write at once. So each first says which version it displaces,
    and behind its move looks who else has displaced that one: the highest mean return of them keeps the alias,
    whoever looks last.

    Args:
        client: of the registry.
        version: the new one.
        training: what its run says of it: ``returns``, ``environment``, see ``model_card``.

    Raises:
        MlflowException: the store does not answer; to be called again.
    """
    name, number = version.name, str(version.version)
    if not (training and training.get("returns")):
        return
    evaluation = {"environment": training.get("environment"), "returns": training["returns"]}
    client.set_model_version_tag(name, number, _EVALUATION, _summary(evaluation))
    holder = _holder(client, name)
    if holder == number:
        return
    if holder is not None and not _is_better(client, name, number, holder):
        return
    client.set_model_version_tag(name, number, _DISPLACED, holder or "none")
    client.set_registered_model_alias(name, ALIAS, number)
    winner = max(_rivals(client, name, holder or "none"), default=(0.0, number))[1]
    if winner != number:
        client.set_registered_model_alias(name, ALIAS, winner)
        _log.warning("%s@%s is version %s, which another run has registered meanwhile", name, ALIAS, winner)
    else:
        _log.info("%s@%s is version %s now%s", name, ALIAS, number, f", it was {holder}" if holder else "")


def _is_better(client: MlflowClient, name: str, number: str, holder: str) -> bool:
    new, old = (_evaluation(client.get_model_version(name, which)) for which in (number, holder))
    kept = f"{name}@{ALIAS} stays version {holder}"
    if new is None or old is None:
        _log.warning("%s: it says nothing of its evaluation, so version %s was not compared", kept, number)
        return False
    if new["environment"] != old["environment"]:
        _log.warning("%s: version %s was evaluated in another environment and not compared", kept, number)
        return False
    first, second = ((side["mean"], side["deviation"], side["episodes"]) for side in (new, old))
    low, high = welch_interval(first, second)
    if low > 0:
        return True
    interval = "no interval, of one episode" if math.isnan(low) else f"95 % interval {low:.1f} to {high:.1f}"
    _log.info("%s: version %s has %+.1f (%s)", kept, number, new["mean"] - old["mean"], interval)
    return False


def _holder(client: MlflowClient, name: str) -> str | None:
    found = client.get_registered_model(name).aliases.get(ALIAS)
    return None if found is None else str(found)


def _rivals(client: MlflowClient, name: str, displaced: str) -> list[tuple[float, str]]:
    """Mean return and number of every version that has taken the alias from the same one."""
    versions = client.search_model_versions(f"name = '{name}'")
    taken = [version for version in versions if version.tags.get(_DISPLACED) == displaced]
    return [(told["mean"], str(version.version)) for version in taken if (told := _evaluation(version)) is not None]


def _summary(evaluation: Mapping[str, Any]) -> str:
    """What Welch's interval needs, however many the episodes: a tag is short."""
    returns = evaluation["returns"]
    mean = math.fsum(returns) / len(returns)
    variance = math.fsum((value - mean) ** 2 for value in returns) / max(1, len(returns) - 1)
    told = {"environment": evaluation["environment"], "episodes": len(returns)}
    return json.dumps(told | {"mean": mean, "deviation": math.sqrt(variance)}, sort_keys=True)


def _evaluation(version: ModelVersion) -> dict[str, Any] | None:
    """What the tag of a version says; None where somebody has made it something else."""
    try:
        told = json.loads(version.tags.get(_EVALUATION, ""))
        numbers = [float(told[key]) for key in ("mean", "deviation", "episodes")]
    except (ValueError, TypeError, KeyError):
        return None
    return told | {"environment": told.get("environment")} if all(map(math.isfinite, numbers)) else None
