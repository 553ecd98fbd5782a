"""The programs of ``examples/`` do, shortened, what they say."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch
from conftest import ROOT
from mlflow.tracking import MlflowClient
from policies import make_policy, make_sac_policy
from tensordict import TensorDict
from waiting import HANG_SECONDS

from pmoe_lightning import Marginalized, load_policy, make_pmoe_actor, make_qvalue_network
from pmoe_lightning.checkpoints import read_checkpoint, write_checkpoint
from pmoe_lightning.checkpoints.policy import candidate_rules
from pmoe_lightning.evaluate import Request
from pmoe_lightning.evaluate import evaluate as run_episodes
from pmoe_lightning.evaluate import main as evaluate
from pmoe_lightning.export import main as export
from pmoe_lightning.exporting import policy_file

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


LOOP = """
import runpy, sys
sys.modules |= dict.fromkeys(["pmoe_lightning", "torch", "tensordict", "torchrl"])  # importing these now fails
names = runpy.run_path(sys.argv.pop(1), run_name="__main__")
loaded = {name for name, module in sys.modules.items() if module is not None}
assert not {"pmoe_lightning", "torch", "tensordict", "torchrl"} & {name.split(".")[0] for name in loaded}
print(names["returns"])
"""


def returns_alone(loop: str, folder: Path, episodes: int) -> np.ndarray:
    """Of the loop with policy.onnx of a folder, in a process that has neither torch nor this package."""
    command = [sys.executable, "-c", LOOP, str(EXAMPLES / loop), "policy.onnx", "--episodes", str(episodes)]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def test_the_onnxruntime_loop_returns_what_evaluate_does(tmp_path):
    """The same seeds begin the same episodes."""
    checkpoint, content = tmp_path / "policy.ckpt", make_policy("Pendulum-v1")[1]
    # As the train command writes it; whoever makes the environment elsewhere knows nothing of it.
    content["policy"]["description"]["env"]["kwargs"] = {"velocity_limit": None}
    write_checkpoint(content, checkpoint)
    with shapes.unchecked():
        assert export([f"checkpoint={checkpoint}", f"output={tmp_path}/policy.onnx", "rule=max_weight"]) == 0
    returns = returns_alone("onnxruntime_loop.py", tmp_path, 20)
    judged = run_episodes(Request(str(checkpoint), episodes=20, rule="max_weight")).result
    assert abs(returns.mean() - judged.mean) < 2 * np.std(judged.returns, ddof=1) / 20**0.5
    # A last bit of an action can become another swing; most episodes are the same to the second decimal.
    assert np.median(np.abs(returns - np.array(judged.returns))) < 0.01


def test_the_pixel_loop_sees_what_evaluate_shows(tmp_path, monkeypatch):
    """To the byte: the returns are the same. A task of dm_control is seen in ``benchmarks/exported.py``."""
    monkeypatch.setattr(policy_file, "OBSERVATIONS", 250)
    seen = {"size": 32, "grey": True, "stack": 2, "look": "fast"}
    checkpoint = tmp_path / "policy.ckpt"
    write_checkpoint(make_sac_policy("gaussian", env_id="InvertedPendulum-v5", pixels=seen)[1], checkpoint)
    with shapes.unchecked():
        assert export([f"checkpoint={checkpoint}", f"output={tmp_path}/policy.onnx"]) == 0
    judged = run_episodes(Request(str(checkpoint), episodes=3)).result
    np.testing.assert_allclose(returns_alone("onnxruntime_pixels.py", tmp_path, 3), judged.returns)


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_algorithm_of_ones_own_goes_through_every_command(tmp_path, monkeypatch, capsys):
    """own_algorithm.py, with all default callbacks: what looks at a mixture leaves itself out; a resume is bitwise."""
    from pmoe_lightning.train import main

    own = ["--config-dir", str(EXAMPLES / "conf")]
    words = [*own, "algo=td3", "env=Pendulum-v1", "algo.hidden_sizes=[16]", "actor.hidden_sizes=[16]", "logger=none"]
    words += ["data.init_random_frames=32", "data.batch_size=16", "data.frames_per_epoch=48", "data.frames_per_batch=1"]
    words += ["callbacks.evaluation.episodes=1", "callbacks.final_policy.video=false", "+env.max_episode_steps=30"]
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    for ends in (["total_frames=79", "run1"], ["total_frames=45", "run2"], ["total_frames=79", "run2", "resume=run2"]):
        monkeypatch.setattr(sys, "argv", ["train", *words, ends[0], f"hydra.run.dir={ends[1]}", *ends[2:]])
        main()
    assert "was not" not in capsys.readouterr().err
    whole, resumed = (read_checkpoint(f"run{n}/checkpoints/last.ckpt") for n in (1, 2))
    assert whole["updates"] == resumed["updates"] == 47
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert evaluate([*own, "checkpoint=run1/checkpoints/last.ckpt", "episodes=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lengths"] == [30]


SMALL = ["algo.hidden_sizes=[16]", "compile=false", "env=Hopper-v5", "+env.max_episode_steps=50", "data.num_envs=2"]
SAC = ["algo=sac", "total_frames=192", "data.init_random_frames=64", "data.batch_size=16", "data.utd_ratio=0.2"]
PPO = ["algo=ppo", "total_frames=128", "data.frames_per_batch=64", "algo.num_epochs=2", "algo.minibatch_size=32"]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """The train command in this process: ``train("algo=sac", ...)``."""
    from pmoe_lightning.train import main

    def train(*words: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train", *SMALL, *words, "hydra.run.dir=run"])
        main()

    return train


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("words", [SAC, PPO], ids=["sac", "ppo"])
def test_a_policy_that_the_train_command_has_registered_is_trained_further(
    words, train, run_example, store, tmp_path, monkeypatch, capsys
):
    """With what the commands do unless told otherwise: a mixture judged by the chosen rule, PPO normalised."""
    uri = f"sqlite:///{store}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    chosen = ["callbacks=[minimal,evaluation,checkpoint_best,final_policy]", "callbacks.evaluation.episodes=1"]
    train(*words, *chosen, "callbacks.final_policy.register_as=hopper", "callbacks.final_policy.video=false")
    MlflowClient(uri).set_registered_model_alias("hopper", "champion", "1")
    names, printed = run_example("finetune_from_registry.py", "models:/hopper@champion", "--frames", 128)
    assert re.search(r"return \d.* before, \d.* after 128 frames; saved as finetuned.ckpt", printed)
    registered, finetuned = load_policy("models:/hopper@champion"), load_policy(tmp_path / "finetuned.ckpt")
    states = TensorDict(observation=torch.randn(5, 11), batch_size=5)
    modes = [policy.get_dist(states).component_modes for policy in (registered, finetuned)]
    assert 0 < (modes[0] - modes[1]).abs().max() < 0.5  # trained on, not begun anew
    capsys.readouterr()
    assert evaluate(["checkpoint=finetuned.ckpt", "episodes=1", "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    entry = read_checkpoint(tmp_path / "finetuned.ckpt")["policy"]
    assert judged["rule"] == entry["description"]["rule_chosen"]["rule"] and judged["rule"] in candidate_rules(entry)


VARIANTS = [[*algo, f"actor={actor}"] for algo in (SAC, PPO) for actor in ("gaussian", "additive_moe", "mcp")]
VARIANTS += [[*SAC, f"action_transform=hamiltonian_{force}"] for force in ("raw", "normalized", "gated")]
VARIANTS += [[*SAC, "action_transform=hamiltonian_gated", "action_transform.used_in=[actor_loss]"]]
VARIANTS += [[*SAC, "safe=velocity", f"action_transform={transform}"] for transform in ("none", "hamiltonian_gated")]
VARIANTS += [
    [*algo, f"actor.deterministic={rule}"] for algo in (SAC, PPO) for rule in ("max_weight", "sample_component")
]
VARIANTS += [[*SAC, f"estimator={name}"] for name in ("frequency", "gumbel_softmax", "implicit", "score_function")]
VARIANTS += [[*PPO, "estimator=marginalized"], [*PPO, "estimator=score_function"], [*PPO, "estimator=frequency"]]
VARIANTS += [[*PPO, "data.normalize_observation=false"], [*PPO, "data.normalize_reward=false"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("words", VARIANTS, ids=lambda words: "-".join([words[0], *words[5:]]))
def test_every_kind_of_policy_is_trained_further(words, train, run_example, tmp_path):
    train(*words, "callbacks=minimal", "logger=none")
    _, printed = run_example("finetune_from_registry.py", "run/checkpoints/last.ckpt", "--frames", 128)
    assert "after 128 frames; saved as finetuned.ckpt" in printed
    before, after = (load_policy(tmp_path / path) for path in ("run/checkpoints/last.ckpt", "finetuned.ckpt"))
    states = TensorDict(observation=torch.randn(5, 11), batch_size=5)
    distance = (before.get_dist(states).component_modes - after.get_dist(states).component_modes).abs().max()
    assert 0 < distance < 0.5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_policy_with_options_is_not_trained_further_in_one_line(run_example, tmp_path):
    _, checkpoint = make_policy(actor="options")
    write_checkpoint(checkpoint, tmp_path / "o.ckpt")
    with pytest.raises(SystemExit, match="o.ckpt acts through options, which need DACLoss"):
        run_example("finetune_from_registry.py", "o.ckpt")


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
