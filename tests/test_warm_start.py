"""A run that begins with the weights of another one: what it takes, what it refuses, and that it goes on as any run."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from test_resume import CROSSQ, LAST, PPO, QUIET, SAC, SAFE, differing, state_of

from pmoe_lightning import load_policy
from pmoe_lightning.algorithms.base import AbstractAlgorithm
from pmoe_lightning.checkpoints import read_checkpoint, write_checkpoint

PENDULUM = [*SAC, *QUIET, "env=Pendulum-v1", "data.utd_ratio=0.1"]
ROLLOUTS = [*PPO, *QUIET, "env=Pendulum-v1"]


@pytest.fixture
def beginning(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The weights, and the actions by rule for ``OBSERVATIONS``, that the next run begins with."""
    begun: dict[str, Any] = {}
    on_fit_start = AbstractAlgorithm.on_fit_start

    def remember(self: AbstractAlgorithm) -> None:
        begun.update({name: value.clone() for name, value in self.state_dict().items()})
        begun["entry"] = {"policy": deepcopy(self.policy_state())}
        on_fit_start(self)

    monkeypatch.setattr(AbstractAlgorithm, "on_fit_start", remember)
    return begun


def actions(checkpoint: Any, size: int) -> np.ndarray:
    observations = np.random.default_rng(0).normal(size=(5, size))
    torch.manual_seed(0)  # a safe policy draws its candidates
    return load_policy(checkpoint).predict(observations)


@pytest.mark.parametrize(
    ("words", "size", "taken"),
    [
        (PENDULUM, 3, "actor, log_alpha, qvalue;"),
        ([*ROLLOUTS, "estimator=frequency"], 3, "actor, critic, qvalue, observation_normalizer, reward_scaler;"),
        pytest.param(
            [*ROLLOUTS, "algo=dac"],
            None,  # it acts by more than an observation
            "actor, critic, observation_normalizer, reward_scaler;",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [*SAC, *QUIET, *SAFE, *CROSSQ, "env=Hopper-v5", "action_transform=hamiltonian_gated"],
            11,
            "actor, log_alpha, multiplier, qvalue, action_transform, cost, observation_normalizer;",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sac", "ppo", "dac", "safe"],
)
def test_a_run_begins_with_every_part_that_both_have(words, size, taken, train, beginning, tmp_path):
    train(*words, "total_frames=256", "hydra.run.dir=first")
    first = read_checkpoint(tmp_path / "first" / LAST)
    said = train(*words, "total_frames=320", "seed=1", "init_from=first", "hydra.run.dir=second")
    env = first["policy"]["description"]["env"]["id"]
    assert f"init_from  first, {env} after 256 frames: took {taken} anew optimizer, experience\n" in said
    assert differing({name: beginning[name] for name in first["state_dict"]}, first["state_dict"]) == []
    assert size is None or np.array_equal(actions(beginning["entry"], size), actions(first, size))
    second = read_checkpoint(tmp_path / "second" / LAST)
    assert second["policy"]["env_frames"] == 320, "the counters began anew"
    assert differing(second["state_dict"], first["state_dict"]), "it went on learning"


def test_the_first_actions_are_drawn_from_the_other_runs_policy(train, tmp_path, monkeypatch):
    train(*ROLLOUTS, "total_frames=256", "hydra.run.dir=first")
    rollouts: list[TensorDict] = []
    step = AbstractAlgorithm.on_train_batch_start

    def remember(self: AbstractAlgorithm, batch: TensorDict, index: int) -> None:
        rollouts.append(batch.clone())
        step(self, batch, index)

    monkeypatch.setattr(AbstractAlgorithm, "on_train_batch_start", remember)
    train(*ROLLOUTS, "total_frames=64", "init_from=first", "hydra.run.dir=second")
    policy, rollout = load_policy(tmp_path / "first" / LAST), rollouts[0]
    density = policy.get_dist(rollout.select("observation")).log_prob(rollout["action"])
    torch.testing.assert_close(density, rollout["action_log_prob"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [pytest.param("resume=second", marks=pytest.mark.slow), "resume=auto"])
def test_a_resumed_run_does_not_begin_again(how, train, tmp_path):
    train(*PENDULUM, "total_frames=128", "hydra.run.dir=first")
    begins = [*PENDULUM, "init_from=first"]
    folder = "outputs/sac-Pendulum-v1/second" if how == "resume=auto" else "second"
    train(*begins, "total_frames=320", "hydra.run.dir=whole")
    train(*begins, "total_frames=192", f"hydra.run.dir={folder}")
    Path(tmp_path, "first").rename(tmp_path / "elsewhere")
    said = train(*(begins if how == "resume=auto" else PENDULUM), "total_frames=320", how)
    assert "init_from  first, Pendulum-v1 after 128 frames: took actor" in said
    assert "init_from=" not in said.split("resume     ")[1]
    assert differing(state_of(tmp_path / "whole"), state_of(tmp_path / folder)) == []


@pytest.mark.slow
def test_resume_auto_goes_on_only_with_a_run_that_began_alike(train, tmp_path):
    train(*PENDULUM, "total_frames=128", "hydra.run.dir=outputs/first")
    said = train(*PENDULUM, "total_frames=192", "init_from=outputs/first", "resume=auto", "hydra.run.dir=second")
    assert "starting a new one" in said and "took actor, log_alpha, qvalue" in said


def test_parts_that_differ_begin_anew_with_the_reason(train, tmp_path):
    train(*ROLLOUTS, "total_frames=256", "hydra.run.dir=ppo")
    of_actor = ["actor.hidden_sizes=[16]", "actor.activation=tanh", "actor.scale=state_independent"]
    train(*ROLLOUTS, *of_actor, "data.normalize_observation=false", "total_frames=256", "hydra.run.dir=plain")
    said = train(*PENDULUM, *of_actor, "total_frames=128", "init_from=plain")
    assert "took actor; anew optimizer, experience, log_alpha (not in the checkpoint), qvalue (" in said
    said = train(*ROLLOUTS, "data.normalize_reward=false", "total_frames=128", "init_from=ppo")
    assert (
        "took actor, observation_normalizer; anew optimizer, experience, critic (of rewards scaled otherwise)" in said
    )
    entry = {"policy": read_checkpoint(tmp_path / "ppo" / LAST)["policy"]}
    write_checkpoint(entry, tmp_path / "policy.ckpt")
    said = train(*ROLLOUTS, "total_frames=128", "init_from=policy.ckpt")
    assert "took actor, observation_normalizer; anew optimizer, experience, critic (not in the checkpoint)" in said


REFUSED: list[tuple[list[str], int, str]] = [
    (["env=Hopper-v5"], 2, "with 3 numbers in its observations; those of env=Hopper-v5 have 11"),
    (["actor.num_components=2"], 2, "num_components=4, not 2: set actor.num_components=4"),
    (["actor.hidden_sizes=[8]"], 2, "hidden_sizes=[16], not [8]: set actor.hidden_sizes=[16]"),
    (["actor=gaussian"], 2, "holds actor=pmoe, not actor=gaussian: use that one"),
    (["data.normalize_observation=true"], 2, "of plain observations: set data.normalize_observation=false"),
    (["init_from=nothing.ckpt"], 1, "checkpoint nothing.ckpt does not exist"),
    (["init_from=models:/nothing"], 1, "models:/nothing is not a model reference"),
    (["init_from=first/config.txt"], 1, "config.txt"),
    (["init_from=nan.ckpt"], 2, "the actor does not fit: module.0.module.loc.weight is not finite"),
    (["resume=first"], 2, "init_from=first begins a run and resume=first goes on with one"),
]


def test_what_does_not_fit_is_refused_in_one_line(train, tmp_path):
    train(*PENDULUM, "total_frames=128", "hydra.run.dir=first")
    Path("first/config.txt").write_text("no checkpoint")
    spoilt = read_checkpoint(tmp_path / "first" / LAST)
    spoilt["state_dict"]["actor.module.0.module.loc.weight"].fill_(torch.nan)
    write_checkpoint(spoilt, tmp_path / "nan.ckpt")
    for i, (words, code, line) in enumerate(REFUSED):
        said = train(*PENDULUM, "total_frames=192", "init_from=first", f"hydra.run.dir=refused{i}", *words, code=code)
        assert line in said and "Traceback" not in said
        assert not list(Path(f"refused{i}").rglob("*.ckpt"))


@pytest.mark.slow
def test_it_works_over_processes_with_workers_and_in_a_sweep(train, run_module, tmp_path):
    train(*PENDULUM, "total_frames=128", "hydra.run.dir=first")
    words = [*PENDULUM, "total_frames=320", "init_from=first"]
    done = run_module("pmoe_lightning.train", *words, "trainer.devices=2", "data.num_workers=1", "hydra.run.dir=two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("took actor, log_alpha, qvalue") == 2  # as it begins, and as it ends
    assert read_checkpoint(tmp_path / "two" / LAST)["run"]["init_from"]["taken"] == ["actor", "log_alpha", "qvalue"]
    words[-1] = f"init_from={tmp_path / 'first'}"
    done = run_module("pmoe_lightning.train", "-m", *[w for w in words if w != "logger=none"], "seed=1,2")
    assert done.returncode == 0 and done.stdout.count("took actor, log_alpha, qvalue") == 4, done.stdout + done.stderr
