"""The estimator laboratory: its exact gradient against another quadrature, and a small laboratory from start to end."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from mlflow.tracking import MlflowClient
from quadrature import Parameters, expectation_and_gradient

LAB = ROOT / "benchmarks" / "estimator_lab.py"


@pytest.fixture(scope="module")
def lab():
    spec = importlib.util.spec_from_file_location("estimator_lab", LAB)
    module = importlib.util.module_from_spec(spec)
    sys.modules["estimator_lab"] = module
    sys.path.insert(0, str(LAB.parent))  # as for a script
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(LAB.parent))
    del sys.modules["estimator_lab"]


@pytest.mark.parametrize("objective", ["quadratic", "sharp_bimodal", "many_modal"])
@pytest.mark.parametrize("action_dim", [1, 2])
def test_the_exact_gradient_agrees_with_another_quadrature(lab, objective, action_dim):
    cost, policy = lab.OBJECTIVES[objective], lab.random_policy(2, action_dim)
    exact = lab.exact_gradient(policy, cost).mean

    def function(u, log_prob):
        jacobian = torch.log1p(-u.tanh().square()).sum(-1)
        return cost(u.tanh()) + lab.ALPHA * (log_prob - jacobian)

    for state in (0, 5):
        mixture = Parameters(*(value[state] for value in (policy.log_weights, policy.loc, policy.scale)))
        if mixture.loc.abs().max() + 9 * mixture.scale.max() > 15:  # where 1 - tanh^2 has no digit left
            continue
        _, gradient = expectation_and_gradient(mixture, function, spacing=0.2)
        for mine, theirs in zip((exact[group][state] for group in lab.GROUPS), gradient, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_small_laboratory(run_module, tmp_path, store, clean_environ):
    """Real critics of a real run; every number of the CSV file is finite, and unbiased estimators show no bias."""
    words = ["algo=sac", "debug=default", "estimator=marginalized", "callbacks=minimal", "logger=none"]
    done = run_module("pmoe_lightning.train", *words, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, str(LAB), "--components", "4", "--action-dims", "1", "--results", "lab"]
    command += ["--checkpoint", "run/checkpoints/last.ckpt"]
    environ = clean_environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{store}"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "lab" / "estimator_lab.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["objective"] for row in rows} == {"time", "critic", "constant", "linear", "quadratic"} | {
        "smooth_bimodal",
        "sharp_bimodal",
        "many_modal",
    }
    for row in rows:
        if row["objective"] == "time":
            assert 0.3 < float(row["relative_time"]) < 30
        elif row["estimator"] in ("marginalized", "implicit", "half_reparameterized", "score_function"):
            # 4 standard errors of |m - exact|, whose square is a sum over at least eight parameters
            assert float(row["relative_bias"]) < 4 * float(row["standard_error"]) + 1e-3, row
    assert "| marginalized | 4 |" in done.stdout and "objective critic, K = 4, A = 1" in done.stdout
    figures = {path.name for path in (tmp_path / "lab").glob("*.png")}
    assert figures == {"bias.png", "critic.png", "noise_by_action_dim.png", "noise_by_components.png"}
    client = MlflowClient(f"sqlite:///{store}")
    (run,) = client.search_runs([client.get_experiment_by_name("estimator_lab").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["relative_time/pathwise"] == 1.0
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"estimator_lab", "figures"}
    again = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert "rows in" in done.stdout and "rows in" not in again.stdout  # finished cells are not measured twice
