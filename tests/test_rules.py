"""The deterministic rule of a mixture: chosen on episodes other than those reported, and kept with the policy."""

from __future__ import annotations

import json

import pytest
import torch
from policies import make_policy, make_sac_policy
from test_callbacks import Recorder, StopAt, fit, make_run, pendulum, savers

from pmoe_lightning import load_policy
from pmoe_lightning.callbacks import Evaluation
from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.checkpoints.files import write_checkpoint
from pmoe_lightning.checkpoints.policy import build_policy, candidate_rules, policy_entry, trained_rule
from pmoe_lightning.errors import RunError
from pmoe_lightning.evaluate import main as evaluate
from pmoe_lightning.evaluation.episodes import EvaluationStopped, evaluate_policy
from pmoe_lightning.evaluation.rules import RuleChoice, choose_rule
from pmoe_lightning.tracking.policy_model import save_policy_model


def fit_chosen(folder, *others, ckpt_path=None, deterministic="best_value", **arguments):
    evaluation, logger = Evaluation(pendulum, episodes=2, seed=1000), Recorder()
    trainer, algorithm, data = make_run([evaluation, *savers(folder), *others], folder, logger=logger, **arguments)
    algorithm.policy_description["critic"] = {"hidden_sizes": [8], "activation": "relu"}
    algorithm.policy_description["arguments"]["deterministic"] = deterministic
    trainer.fit(algorithm, datamodule=data, ckpt_path=ckpt_path)
    return evaluation, logger, algorithm


def test_candidates_are_the_rules_that_draw_nothing():
    of_values = policy_entry(make_sac_policy()[1])
    assert candidate_rules(of_values) == ("mean", "max_weight", "best_value")
    of_draws = policy_entry(make_policy(deterministic="sample_component")[1])
    assert candidate_rules(of_draws) == ("mean", "max_weight")
    for actor, rule in {"gaussian": "max_weight", "mcp": "max_weight", "flow": "base_mode", "latent": "center"}.items():
        assert candidate_rules(policy_entry(make_policy(actor=actor)[1])) == (rule,)
    assert candidate_rules(policy_entry(make_policy(num_components=1)[1])) == ("max_weight",)


def test_the_rule_is_the_best_on_its_own_episodes():
    entry = policy_entry(make_policy(num_components=3)[1])
    policies = {rule: build_policy(entry, rule=rule) for rule in ("mean", "max_weight")}
    env = pendulum(num_envs=2)
    returns = {rule: evaluate_policy(each, env, episodes=4, seed=7).mean for rule, each in policies.items()}
    choice = choose_rule(policies, env, seed=7)
    assert choice.returns == returns and choice.rule == max(returns, key=lambda rule: returns[rule])
    assert RuleChoice(**json.loads(json.dumps(choice.plain()))) == choice
    assert str(choice).startswith(f"{choice.rule}, chosen on 4 other episodes from seed 7 (mean ")
    with pytest.raises(EvaluationStopped):
        choose_rule(policies, env, seed=7, should_stop=lambda: True)


def test_what_is_judged_and_kept_is_the_chosen_rule(tmp_path):
    evaluation, logger, _ = fit_chosen(tmp_path)
    last = read_checkpoint(tmp_path / "last.ckpt")["policy"]
    choice = RuleChoice(**last["description"]["rule_chosen"])
    assert choice == evaluation.choice and choice.seed == 1004 and choice.episodes == 4
    assert choice.rule == max(choice.returns, key=lambda rule: choice.returns[rule]) == trained_rule(last)
    judged = evaluate_policy(load_policy(tmp_path / "last.ckpt"), pendulum(num_envs=2), episodes=2, seed=1000)
    assert logger.values("eval/episode_return")[-1] == judged.mean
    for rule, mean in choice.returns.items():
        assert logger.steps(f"eval/choice/{rule}") == [0, 100, 200, 300]
        own = evaluate_policy(
            load_policy(tmp_path / "last.ckpt", rule=rule), pendulum(num_envs=4), episodes=4, seed=1004
        )
        assert logger.values(f"eval/choice/{rule}")[-1] == own.mean == mean
    assert len(logger.steps("eval/episode_return_sampled")) == 4


def test_the_choice_changes_nothing_of_training_and_goes_on_in_a_resumed_run(tmp_path):
    whole, _, expected = fit_chosen(tmp_path / "whole")
    _, plain, _ = fit([], tmp_path / "plain")
    with pytest.raises(ZeroDivisionError):
        fit_chosen(tmp_path / "cut", StopAt(180, ZeroDivisionError()))
    cut = read_checkpoint(tmp_path / "cut" / "last.ckpt")["policy"]["description"]
    assert cut["rule_chosen"]["rule"] == cut["arguments"]["deterministic"]  # that of the evaluation at 100 frames
    again, _, resumed = fit_chosen(tmp_path / "cut", ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert again.choice == whole.choice and again.history == whole.history
    assert resumed.policy_description == expected.policy_description
    for name, value in expected.loss.state_dict().items():
        assert torch.equal(value, resumed.loss.state_dict()[name])
        assert torch.equal(value, plain.loss.state_dict()[name])


@pytest.mark.parametrize("said", [{"num_components": 1}, {"deterministic": "mean"}], ids=str)
def test_nothing_is_chosen_for_one_component_or_against_a_rule_that_the_actor_says(tmp_path, said):
    evaluation, logger, _ = fit_chosen(tmp_path, **said)
    assert evaluation.choice is None and not logger.steps("eval/choice/mean")
    assert "rule_chosen" not in read_checkpoint(tmp_path / "last.ckpt")["policy"]["description"]


def test_the_command_chooses_on_other_episodes_and_says_so(tmp_path, capsys):
    _, checkpoint = make_sac_policy(env_id="TwoRoutes-v0")
    path = str(tmp_path / "p.ckpt")
    checkpoint["policy"]["description"]["env"] = {"id": "TwoRoutes-v0", "kwargs": {"frame_skip": 5}}
    write_checkpoint(checkpoint, tmp_path / "p.ckpt")
    assert evaluate([f"checkpoint={path}", "rule=chosen", "episodes=3", "seed=5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    chosen = RuleChoice(**told["rule_chosen"])
    assert (
        chosen.seed == 8 and set(chosen.returns) == {"mean", "max_weight", "best_value"} and told["rule"] == chosen.rule
    )
    assert evaluate([f"checkpoint={path}", "rule=chosen", "episodes=3"]) == 0
    assert f"rule {chosen.rule}, chosen on 4 other episodes from seed 3 (mean " in capsys.readouterr().out


def test_a_packaged_policy_has_the_rule_that_its_description_says(tmp_path):
    _, checkpoint = make_policy(num_components=3)
    chosen = {"rule": "mean", "returns": {"mean": 2.0, "max_weight": 1.0}, "episodes": 4, "seed": 9}
    description = checkpoint["policy"]["description"]
    description["arguments"]["deterministic"], description["rule_chosen"] = "mean", chosen
    assert save_policy_model(checkpoint, tmp_path / "model")["facts"]["rule"] == "mean"


@pytest.mark.parametrize(
    "chosen",
    [
        7,
        {},
        {"rule": 1, "returns": {}, "episodes": 4, "seed": 1},
        {"rule": "a", "returns": {"a": "b"}, "episodes": 4, "seed": 1},
    ],
)
def test_a_description_that_says_nonsense_of_its_choice_is_refused(chosen):
    _, checkpoint = make_policy()
    checkpoint["policy"]["description"]["rule_chosen"] = chosen
    with pytest.raises(RunError, match="rule_chosen"):
        policy_entry(checkpoint)
