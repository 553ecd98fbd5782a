"""The programs of ``examples/`` do, shortened, what they say."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from conftest import ROOT
from mlflow.tracking import MlflowClient
from policies import make_policy
from tensordict import TensorDict

from pmoe_lightning import Marginalized, load_policy, make_pmoe_actor, make_qvalue_network
from pmoe_lightning.checkpoints import write_checkpoint

EXAMPLES = ROOT / "examples"


@pytest.fixture
def run_example(monkeypatch, tmp_path, capsys):
    """``run_example("torchrl_sac.py", "--frames", 400)`` in an empty folder: its names, and what it printed."""

    def run(name: str, *words: object) -> tuple[dict, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return names, capsys.readouterr().out

    return run


def steps_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {int(state["step"]) for state in optimizer.state.values()}


def test_every_example_is_tested():
    text = Path(__file__).read_text()
    assert [path.stem for path in EXAMPLES.glob("*.py") if path.stem not in text] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sac_in_torchrl(run_example):
    """Pendulum's episodes have 200 steps: two end in 400 frames, of which the last 50 are learned from."""
    names, printed = run_example("torchrl_sac.py", "--frames", 400, "--warmup", 400, "--episodes", 1)
    assert re.findall(r"(\d+) frames, return -\d+", printed) == ["200", "400"]
    assert re.search(r"deterministic policy: return -\d+", printed)
    assert steps_of(names["optimizer"]) == {50}
    assert names["transform"].force.hidden.weight.grad.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ppo_in_torchrl(run_example):
    names, printed = run_example("torchrl_ppo.py", "--frames", 2_048)
    (episodes,) = re.findall(r"2048 frames, (\d+) episodes, return [\d.]+", printed)
    assert int(episodes) > 8  # a pole falls soon
    assert steps_of(names["optimizer"]) == {80}  # ten epochs of eight minibatches


def test_an_estimator_of_ones_own(run_example):
    names, printed = run_example("own_estimator.py")
    assert printed.startswith("estimated cost ") and "router.weight" in printed and "nan" not in printed
    # With nothing left out it is the exact sum: the gradients of the estimator that the package has for that.
    actor = make_pmoe_actor(3, [-1.0], [1.0], num_components=4, hidden_sizes=(8,))
    critics = [make_qvalue_network(3, 1, hidden_sizes=(8,)) for _ in range(2)]
    states, gradients = TensorDict(observation=torch.randn(5, 3), batch_size=5), []
    for estimator in (Marginalized(), names["HeaviestComponents"](num_kept=4)):
        loss = names["PMOESACLoss"](actor, critics, estimator=estimator)
        torch.manual_seed(0)
        actor.zero_grad()
        loss.estimate(states).loss.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in actor.parameters()])
    torch.testing.assert_close(*gradients)


def test_the_train_command_finds_an_estimator_and_an_environment_of_ones_own(run_module, tmp_path):
    words = ["env=own_environment:Fork-v0", "+env.obstacle=0.5", "estimator=heaviest", "estimator.num_kept=3"]
    words += ["--config-dir", str(EXAMPLES / "conf"), "algo=sac", "debug=default", "callbacks=minimal", "logger=none"]
    words += ["total_frames=256", "data.init_random_frames=128", "hydra.run.dir=run", "compile=false"]
    done = run_module("pmoe_lightning.train", *words, PYTHONPATH=f"{ROOT}:{EXAMPLES}")
    assert done.returncode == 0, done.stderr
    policy = load_policy(tmp_path / "run" / "checkpoints" / "last.ckpt")
    action = policy(TensorDict(observation=torch.zeros(1, 2), batch_size=1))["action"]
    assert action.shape == (1, 2) and action.abs().max() <= 1


@pytest.fixture
def champion(tmp_path: Path, store: Path) -> str:
    """A policy and its critics behind an alias of a registry."""
    policy, checkpoint = make_policy(normalize=False)
    critics = [make_qvalue_network(3, 1, hidden_sizes=(16, 16)) for _ in range(2)]
    entry = checkpoint["policy"]
    entry["action_values"] = [dict(critic.state_dict()) for critic in critics]
    entry["description"] |= {"critic": {"hidden_sizes": [16, 16], "activation": "relu"}, "action_transform": None}
    write_checkpoint(checkpoint, tmp_path / "best.ckpt")
    mlflow.set_tracking_uri(f"sqlite:///{store}")
    client = MlflowClient()
    experiment = client.create_experiment("swing", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment)
    client.log_artifact(run.info.run_id, str(tmp_path / "best.ckpt"), "checkpoints")
    client.create_registered_model("swing")
    client.create_model_version("swing", run.info.artifact_uri, run.info.run_id)
    client.set_registered_model_alias("swing", "champion", "1")
    return "models:/swing@champion"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_registered_policy_is_trained_further(run_example, champion, tmp_path):
    names, printed = run_example("finetune_from_registry.py", champion, "--frames", 128)
    assert re.search(r"return -\d.* before, -\d.* after 128 frames; saved as finetuned.ckpt", printed)
    assert steps_of(names["optimizer"]) == {128}
    registered, finetuned = load_policy(champion), load_policy(tmp_path / "finetuned.ckpt")
    states = TensorDict(observation=torch.randn(5, 3), batch_size=5)
    distance = (registered(states.copy())["action"] - finetuned(states.copy())["action"]).abs().max()
    assert 0 < distance < 0.5  # trained on, not begun anew
    assert torch.equal(names["actor"](states.copy())["action"], finetuned(states.copy())["action"])


@pytest.mark.slow
def test_a_search_with_optuna(tmp_path, store, clean_environ):
    words = ["--trials", "2", "debug=default", "callbacks=[minimal,evaluation]", "callbacks.evaluation.episodes=1"]
    command = [sys.executable, str(EXAMPLES / "sweep_optuna.py"), *words, "total_frames=256"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{store}")
    runs = client.search_runs([client.get_experiment_by_name("optuna").experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    trials = [run for run in runs if run is not parent]
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in trials)
    best = max(trials, key=lambda run: run.data.metrics["eval/episode_return"])
    assert parent.data.metrics["best_return"] == best.data.metrics["eval/episode_return"]
    assert parent.data.params["algo.lr"] == best.data.params["algo.lr"]
    assert f"return {parent.data.metrics['best_return']:.1f}" in done.stdout
