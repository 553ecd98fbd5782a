"""Policies with options: the choice of the option against the formula, what the actor writes, and its memory."""

from __future__ import annotations

import copy

import pytest
import torch
from policies import make_policy
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from pmoe_lightning.envs import carried_entries, make_env
from pmoe_lightning.errors import RunError
from pmoe_lightning.evaluation.episodes import evaluate_policy
from pmoe_lightning.modules.distributions import TanhGaussianMixture
from pmoe_lightning.modules.option_policies import OptionPolicies, make_option_actor
from pmoe_lightning.tracking.references import load_policy

OBSERVATION, A, K, B = 5, 2, 3, 12
LOW, HIGH = [-2.0, 0.5], [1.0, 2.0]
RANDOM, DETERMINISTIC, MODE = ExplorationType.RANDOM, ExplorationType.DETERMINISTIC, ExplorationType.MODE


def make(*, seed: int = 0, **arguments):
    """An actor whose heads are far from zero, so that options differ."""
    torch.manual_seed(seed)
    arguments = {"num_options": K, "hidden_sizes": (16,), "initialization": "default", **arguments}
    return make_option_actor(OBSERVATION, LOW, HIGH, **arguments)


def states(batch: int = B) -> TensorDict:
    """Random observations, with every o' in turn, and none at all."""
    observation = torch.randn(batch, OBSERVATION, generator=torch.Generator().manual_seed(2))
    previous = (torch.arange(batch) % (K + 1) - 1).unsqueeze(-1)
    return TensorDict(observation=observation, option_previous=previous, batch_size=batch)


def random_policies(batch: int = B) -> OptionPolicies:
    torch.manual_seed(1)
    mixture = TanhGaussianMixture(torch.randn(batch, K), torch.randn(batch, K, A), torch.rand(batch, K, A) + 0.1)
    return OptionPolicies(mixture, torch.randn(batch, K))


# --- pi_H -------------------------------------------------------------------------------------------------------------


def test_the_choice_of_the_option_is_that_of_the_formula():
    policies, previous = random_policies(), states()["option_previous"].squeeze(-1)
    found = policies.option_log_probs(previous).exp()
    master, beta = policies.mixture.weights, policies.termination_logits.sigmoid()
    for i, last in enumerate(previous.tolist()):
        for o in range(K):
            by_hand = master[i, o]
            if last >= 0:
                by_hand = (1 - beta[i, last]) * (o == last) + beta[i, last] * master[i, o]
            assert found[i, o].item() == pytest.approx(by_hand.item(), abs=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(B))
    assert set(previous.tolist()) == {-1, 0, 1, 2}


def test_a_certain_or_impossible_termination_has_finite_gradients():
    policies, previous = random_policies(2), torch.tensor([0, 1])
    logits = torch.tensor([[200.0, 0, 0], [0, -200.0, 0]], requires_grad=True)
    log_probs = OptionPolicies(policies.mixture, logits).option_log_probs(previous)
    torch.testing.assert_close(log_probs[0], policies.mixture.log_weights[0])
    torch.testing.assert_close(log_probs[1].exp(), torch.tensor([0.0, 1.0, 0.0]))
    (log_probs.exp() * log_probs).sum().backward()
    assert log_probs.isfinite().all() and logits.grad.isfinite().all()


# --- pi_L -------------------------------------------------------------------------------------------------------------


def test_an_option_scores_its_action_as_a_single_squashed_gaussian():
    policies, option = random_policies(), torch.arange(B) % K
    u = torch.randn(B, A)
    found, mixture = policies.action_log_prob(u, option), policies.mixture
    for i, o in enumerate(option.tolist()):
        alone = TanhGaussianMixture(torch.zeros(1), mixture.loc[i, o : o + 1], mixture.scale[i, o : o + 1])
        torch.testing.assert_close(found[i], alone.log_prob_unsquashed(u[i]) - alone.log_abs_det_jacobian(u[i]))


def test_the_entropy_of_an_action_is_that_of_its_samples():
    """Both are means over 20,000 draws of bounded spread; five standard errors fail once in a million runs."""
    policies = random_policies(1)
    mixture = policies.mixture
    many = OptionPolicies(
        TanhGaussianMixture(
            *(x.expand(20_000, *x.shape[1:]) for x in (mixture.log_weights, mixture.loc, mixture.scale))
        ),
        policies.termination_logits.expand(20_000, K),
    )
    option = torch.ones(20_000, dtype=torch.long)
    entropy = many.action_entropy(option)
    surprise = -many.action_log_prob(many.mixture.rsample_given(option), option)
    error = ((entropy.var() + surprise.var()) / 20_000).sqrt()
    assert abs(entropy.mean() - surprise.mean()) < 5 * error


# --- the actor --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_log_prob", [False, True])
def test_the_actor_writes_these_entries(return_log_prob):
    actor = make(return_log_prob=return_log_prob)
    data = actor(states())
    shapes = {"option": (B, 1), "action": (B, A)}
    if return_log_prob:
        shapes |= {"action_unsquashed": (B, A), "action_log_prob": (B,), "option_log_prob": (B,)}
    assert {key: value.shape for key, value in data.exclude(*actor.in_keys).items()} == shapes
    assert set(actor.out_keys) == set(shapes) and data["option"].dtype == torch.int64
    assert actor.in_keys == ["observation", "option_previous"]
    assert (data["action"] >= torch.tensor(LOW)).all() and (data["action"] <= torch.tensor(HIGH)).all()


@pytest.mark.parametrize("exploration", [RANDOM, DETERMINISTIC, MODE], ids=str)
def test_what_is_stored_belongs_to_the_action(exploration):
    actor = make(return_log_prob=True)
    with set_exploration_type(exploration):
        data = actor(states())
    policies, option, u = actor.get_dist(states()), data["option"].squeeze(-1), data["action_unsquashed"]
    torch.testing.assert_close(data["action"], policies.mixture.squash(u), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(data["action_log_prob"], policies.action_log_prob(u, option))
    log_probs = policies.option_log_probs(states()["option_previous"].squeeze(-1))
    torch.testing.assert_close(data["option_log_prob"], log_probs[torch.arange(B), option])


def test_without_exploration_it_takes_the_likeliest_option_and_its_mean():
    actor = make()
    with torch.no_grad():
        actor.network.termination.bias += torch.tensor([3.0, 0.0, -3.0])
    with set_exploration_type(DETERMINISTIC):
        data = actor(states())
    policies = actor.get_dist(states())
    best = policies.option_log_probs(states()["option_previous"].squeeze(-1)).argmax(-1)
    assert data["option"].squeeze(-1).equal(best) and best.unique().numel() > 1
    torch.testing.assert_close(data["action"], policies.mixture.component_modes[torch.arange(B), best])


def test_options_are_drawn_as_often_as_pi_h_says():
    """20,000 draws for one state with an option: a share has a standard error of at most 0.0036; 5 fail in 1e-6."""
    for rule, exploration in (("max_weight", RANDOM), ("sample_component", DETERMINISTIC)):
        actor = make(deterministic=rule)
        one = states()[2:3]
        data = one.expand(20_000).clone()
        with set_exploration_type(exploration):
            drawn = actor(data)["option"].squeeze(-1)
        share = torch.bincount(drawn, minlength=K) / len(drawn)
        expected = actor.get_dist(one).option_log_probs(one["option_previous"].squeeze(-1)).exp()[0]
        assert (share - expected).abs().max() < 5 * 0.0036
        assert data["action"].unique(dim=0).shape[0] == (20_000 if exploration is RANDOM else K)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_options": 1}, "num_options=1 must be a whole number >= 2"),
        ({"deterministic": "best"}, "deterministic='best' must be one of"),
        ({"scale": "none"}, "scale='none' must be one of"),
    ],
)
def test_impossible_actors_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_policy_says_what_must_be_carried():
    assert carried_entries(make_policy(actor="options")[0]) == ["option"]
    assert carried_entries(make_policy()[0]) == []


def test_a_loaded_policy_acts_as_the_saved_one():
    policy, checkpoint = make_policy(actor="options", num_options=K, return_log_prob=True)
    loaded = load_policy(copy.deepcopy(checkpoint))
    data = TensorDict(observation=torch.randn(B, 3) * 3, option_previous=states()["option_previous"], batch_size=B)
    with set_exploration_type(DETERMINISTIC):
        expected = policy(data.clone())
    found = loaded(data.clone())  # without a context it is deterministic
    for key in ("option", "action"):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
    with pytest.raises(RunError, match="use rule=max_weight"):
        load_policy(checkpoint, rule="best_value")
    with pytest.raises(RunError, match="deterministic='mean' must be one of max_weight, sample_component"):
        load_policy(checkpoint, rule="mean")


def test_evaluation_hands_the_option_on():
    """An option that never ends is chosen once an episode; without the memory it would be chosen at every step."""
    policy, _ = make_policy(actor="options", num_options=K, initialization="default")
    with torch.no_grad():
        policy[1].network.termination.weight.zero_()
        policy[1].network.termination.bias.fill_(-100.0)
    chosen = []
    policy.register_forward_hook(lambda module, inputs, out: chosen.append(out["option"][:2].flatten().tolist()))
    env = make_env("Pendulum-v1", num_envs=2, max_episode_steps=8, carry=["option"])
    sampled = [evaluate_policy(policy, env, episodes=2, seed=seed, sample=True) for seed in range(4)]
    assert len(chosen) == 4 * 8
    for episode in range(4):
        assert all(step == chosen[8 * episode] for step in chosen[8 * episode : 8 * episode + 8])
    assert len({tuple(step) for step in chosen}) > 1
    assert evaluate_policy(policy, env, episodes=2, seed=0, sample=True) == sampled[0]


def test_a_deterministic_evaluation_does_not_depend_on_the_number_of_environments():
    policy = load_policy(make_policy(actor="options", initialization="default")[1])
    envs = [make_env("Pendulum-v1", num_envs=n, max_episode_steps=20, carry=["option"]) for n in (1, 3)]
    assert len({evaluate_policy(policy, env, episodes=3, seed=3) for env in envs}) == 1
