"""Which version of a registered model has the alias ``best``."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from scipy import stats

from pmoe_lightning.evaluation.statistics import welch_interval
from pmoe_lightning.tracking.best_alias import move_best

HOPPER, WALKER = {"id": "Hopper-v5", "kwargs": {}}, {"id": "Walker2d-v5", "kwargs": {}}


@pytest.fixture
def client(store: Path) -> MlflowClient:
    client = MlflowClient(f"sqlite:///{store}")
    client.create_registered_model("runner")
    return client


def add(client: MlflowClient, returns: list[float] | None, environment: dict = HOPPER) -> ModelVersion:
    version = client.create_model_version("runner", "somewhere")
    move_best(client, version, told(returns, environment))
    return version


def told(returns: list[float] | None, environment: dict = HOPPER) -> dict[str, Any]:
    return {"returns": returns, "environment": environment}


def best(client: MlflowClient) -> str | None:
    found = client.get_registered_model("runner").aliases.get("best")
    return None if found is None else str(found)


def test_welchs_interval_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(3, 1, 7), rng.normal(1, 4, 12)
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    ours = welch_interval(*((float(x.mean()), float(x.std(ddof=1)), len(x)) for x in (a, b)))
    np.testing.assert_allclose(ours, (expected.low, expected.high))
    assert welch_interval((2.0, 0.0, 3), (1.0, 0.0, 3)) == (1.0, 1.0)
    assert all(map(math.isnan, welch_interval((2.0, 0.0, 1), (1.0, 1.0, 3))))


def test_it_moves_only_to_a_better_evaluation(client, caplog):
    caplog.set_level(logging.INFO)
    add(client, None)
    assert best(client) is None and not caplog.messages, "what was not evaluated is not the best"
    add(client, [10.0, 12.0, 14.0])
    assert best(client) == "2" and caplog.messages[-1] == "runner@best is version 2 now"
    add(client, [11.0, 13.0, 15.0])
    assert best(client) == "2" and "stays version 2: version 3 has +1.0 (95 % interval -" in caplog.messages[-1]
    add(client, [30.0, 32.0, 34.0])
    assert best(client) == "4" and caplog.messages[-1] == "runner@best is version 4 now, it was 2"
    add(client, [10.0, 10.0, 10.0])
    add(client, [99.0])
    assert best(client) == "4" and "version 6 has +67.0 (no interval, of one episode)" in caplog.messages[-1]
    add(client, [99.0, 98.0, 99.0], WALKER)
    assert best(client) == "4" and "another environment and not compared" in caplog.messages[-1]


def test_a_version_that_says_nothing_is_not_compared(client, caplog):
    version = client.create_model_version("runner", "somewhere")
    client.set_registered_model_alias("runner", "best", version.version)
    for text in (None, "", "[1]", '{"mean": "much"}', '{"mean": NaN, "deviation": 1, "episodes": 3}'):
        if text is not None:
            client.set_model_version_tag("runner", version.version, "pmoe_lightning.evaluation", text)
        add(client, [1.0, 1.0, 2.0])
        assert best(client) == str(version.version) and "says nothing of its evaluation" in caplog.messages[-1]


def test_a_delivery_that_is_repeated_changes_nothing(client):
    version = add(client, [1.0, 2.0, 3.0])
    add(client, [11.0, 12.0, 13.0])
    move_best(client, version, told([1.0, 2.0, 3.0]))
    assert best(client) == "2"


@pytest.mark.parametrize("order", [("good", "better"), ("better", "good")])
def test_of_two_runs_that_end_together_the_better_one_keeps_it(client, order, monkeypatch):
    """The first one is held up before it writes, until the other has done everything."""
    add(client, [1.0, 2.0, 3.0])
    returns = {"good": [11.0, 12.0, 13.0], "better": [21.0, 22.0, 23.0]}
    versions = {name: client.create_model_version("runner", "somewhere") for name in returns}
    first, second = order
    write = MlflowClient.set_registered_model_alias
    waiting = [True]

    def write_late(self: MlflowClient, *arguments: Any) -> None:
        if waiting and waiting.pop():
            move_best(client, versions[second], told(returns[second]))
        write(self, *arguments)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", write_late)
    move_best(client, versions[first], told(returns[first]))
    assert best(client) == str(versions["better"].version)
