"""The amortised actor and the flow: what they draw, what stands for their density or is it, and who trains them."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs import ExplorationType, set_exploration_type

from pmoe_lightning import estimators
from pmoe_lightning.algorithms import make_ppo, make_sac
from pmoe_lightning.checkpoints.policy import build_policy, policy_entry
from pmoe_lightning.configuration import compose_jobs, validate
from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.estimators import AbstractEstimator, Marginalized, Pathwise, ScoreFunction
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.losses import PMOEPPOLoss
from pmoe_lightning.modules.actors import BoundModule, MixtureActor
from pmoe_lightning.modules.critics import make_value_network
from pmoe_lightning.modules.distributions import TanhBounds
from pmoe_lightning.modules.flow import make_flow_actor, spline_parameters
from pmoe_lightning.modules.latent import LatentActions, make_latent_actor
from pmoe_lightning.modules.mixture import missing
from pmoe_lightning.modules.networks import make_mlp

STATE, A, B = 3, 2, 5
LOW, HIGH = [-2.0, 0.5], [1.0, 2.0]
SIZES = (16, 16)
DIMS = {"observation_dim": STATE, "action_dim": A}
MAKERS = {"latent": make_latent_actor, "flow": make_flow_actor}


def make(name: str, seed: int = 0, **arguments) -> MixtureActor:
    torch.manual_seed(seed)
    return MAKERS[name](STATE, LOW, HIGH, hidden_sizes=SIZES, **arguments)


def states(*batch: int) -> TensorDict:
    observation = torch.randn(*batch, STATE, generator=torch.Generator().manual_seed(2))
    return TensorDict(observation=observation, batch_size=batch)


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (B,), (3, B)])
@pytest.mark.parametrize("name", MAKERS)
def test_it_acts_within_its_bounds_by_draws_of_their_own(name, batch):
    actor = make(name)
    with set_exploration_type(ExplorationType.RANDOM):
        first, second = (actor(states(*batch))["action"] for _ in range(2))
    assert first.shape == (*batch, A) and (first != second).all()
    assert actor.spec["action"].is_in(first) and set(actor.out_keys) == {"action"}
    assert actor.get_dist(states(*batch)).rsample_unsquashed((7,)).shape == (7, *batch, A)


@pytest.mark.parametrize("name", MAKERS)
def test_its_one_rule_draws_nothing_and_it_knows_no_mode(name):
    actor, before = make(name), torch.get_rng_state()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        first, second = (actor(states(B))["action"] for _ in range(2))
    assert torch.equal(first, second) and len(first.unique(dim=0)) == B
    assert torch.equal(torch.get_rng_state(), before)
    with set_exploration_type(ExplorationType.MODE), pytest.raises(NotImplementedError, match="DETERMINISTIC"):
        actor(states(B))


@pytest.mark.parametrize(("name", "own"), [("latent", "center"), ("flow", "base_mode")])
def test_a_checkpoint_acts_by_its_one_rule_alone(name, own):
    actor = make(name)
    description = {"format": 1, "actor": name, "arguments": {"hidden_sizes": list(SIZES)}, "observation_dim": STATE}
    description |= {"action_low": LOW, "action_high": HIGH, "normalize_observation": False}
    description |= {"env": {"id": "Any-v0", "kwargs": {}}}
    entry = policy_entry({"policy": {"description": description, "state_dict": dict(actor.state_dict())}})
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        torch.testing.assert_close(build_policy(entry)(states(B))["action"], actor(states(B))["action"])
    for rule in ("mean", "max_weight", "best_value", "sample_component"):
        with pytest.raises(RunError, match=f"actor {name} has one rule, {own}, and cannot act by rule={rule}"):
            build_policy(entry, rule=rule)
    description["arguments"] |= {"hidden_sizes": [65_536, 30_000]}
    with pytest.raises(RunError, match="the network would have more than"):
        policy_entry({"policy": {"description": description, "state_dict": {}}})


def test_a_flow_whose_splines_alone_would_exhaust_the_memory_is_not_made():
    description = {"format": 1, "actor": "flow", "arguments": {"hidden_sizes": [30_000]}, "observation_dim": STATE}
    description |= {"action_low": LOW, "action_high": HIGH, "normalize_observation": False}
    description |= {"env": {"id": "Any-v0", "kwargs": {}}}
    with pytest.raises(RunError, match="the network would have more than"):
        policy_entry({"policy": {"description": description, "state_dict": {}}})


def reward(observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Zero where the action, normalised, is the first of the state."""
    normalised = TanhBounds(torch.tensor(LOW), torch.tensor(HIGH)).normalize(action)
    return -(normalised - observation[..., :1]).square().sum(-1, keepdim=True)


def one_step_tasks(number: int) -> TensorDict:
    """Minibatches [number, 64] of episodes of one step."""
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    observation, action = torch.rand(number, 64, STATE) * 2 - 1, low + torch.rand(number, 64, A) * (high - low)
    over = torch.ones(number, 64, 1, dtype=torch.bool)
    outcome = {"observation": observation, "reward": reward(observation, action), "done": over, "terminated": over}
    entries = {"observation": observation, "action": action, "next": TensorDict(outcome, batch_size=(number, 64))}
    return TensorDict(entries, batch_size=(number, 64))


TRAINED = [("latent", Pathwise), ("flow", Pathwise)]
TRAINED += [pytest.param("flow", other, marks=pytest.mark.slow) for other in (Marginalized, ScoreFunction)]


@pytest.mark.parametrize(("name", "estimator"), TRAINED)
def test_sac_trains_it(name, estimator):
    actor = make(name)
    algorithm = make_sac(actor, estimator(), **DIMS, lr=5e-3, alpha_init=0.05, hidden_sizes=(32, 32))
    optimizer, here = algorithm.configure_optimizers(), states(2000).apply(lambda x: x.clamp(-1, 1))

    def drawn() -> float:
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            return float(reward(here["observation"], actor(here.copy())["action"]).mean())

    before = drawn()
    for minibatch in one_step_tasks(60):
        out = algorithm.loss(minibatch)
        optimizer.zero_grad()
        sum(value for key, value in out.items() if key.startswith("loss_")).backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in algorithm.loss.actor_network_params.parameters())
    assert drawn() - before > 0.3


# --- the amortised actor ---------------------------------------------------------------------------------------------


def test_a_latent_action_is_what_one_network_makes_of_state_and_noise():
    actor = make("latent", latent_dim=4)
    torch.manual_seed(0)
    network = make_mlp(STATE + 4, SIZES, "relu", "default")
    distribution, z = actor.get_dist(states(B)), torch.rand(B, 4)
    joint = network(torch.cat([states(B)["observation"], z], -1))
    last = distribution.head.module.rest[-1]
    torch.testing.assert_close(distribution.head(distribution.features, z), last(joint))
    centre = network(torch.cat([states(B)["observation"], torch.full((B, 4), 0.5)], -1))
    torch.testing.assert_close(distribution.deterministic_unsquashed(), last(centre))


class Uniform(nn.Module):
    """u whose action is uniform in [-1, 1]."""

    action_dim = latent_dim = 1
    num_pairs = 8

    def forward(self, features: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (2 * z - 1).atanh()


def test_the_diversity_is_the_mean_logarithm_of_the_distance_of_two_actions():
    """E[log |x - y|] of two uniform numbers in [-1, 1] is log 2 - 3/2, whatever the units of the action."""
    torch.manual_seed(0)
    distribution = LatentActions(
        torch.zeros(20_000, 1), torch.tensor([-3.0]), torch.tensor([7.0]), head=BoundModule(Uniform())
    )
    found = distribution.diversity()
    assert found.shape == (20_000,)
    # Four standard errors: fails for a right program in one of about 16,000 seeds.
    assert abs(found.mean() - (math.log(2) - 1.5)) < 4 * found.std() / len(found) ** 0.5


def test_what_stands_for_its_density_is_minus_the_diversity_of_the_normalised_action():
    distribution = make("latent").get_dist(states(B))
    u = distribution.rsample_unsquashed((3,))
    torch.manual_seed(1)
    diversity = distribution.diversity()
    torch.manual_seed(1)
    stands = distribution.log_prob_unsquashed(u) - TanhBounds.normalized(u).log_abs_det_jacobian(u)
    torch.testing.assert_close(stands, -diversity.expand(3, B), rtol=1e-5, atol=1e-5)
    assert missing(LatentActions, {"draws"}) == ["draws"] and not missing(LatentActions, {"diversity"})


def test_the_diversity_takes_the_place_of_the_entropy_in_every_loss_of_sac():
    algorithm = make_sac(make("latent"), Pathwise(), **DIMS, alpha_init=0.7, gamma=0.9, hidden_sizes=(8,))
    loss, (minibatch,) = algorithm.loss, one_step_tasks(1)
    minibatch["next", "terminated"].zero_()
    torch.manual_seed(3)
    out = loss(minibatch)
    torch.manual_seed(3)
    with torch.no_grad():  # in the order of the loss: the target's draw, then the actor's
        following, acting = loss._distribution(minibatch["next"]), loss._distribution(minibatch)
        then, of_target = following.rsample_unsquashed(), following.diversity()
        first, of_actor = acting.rsample_unsquashed(), acting.diversity()
        values = loss.qvalues(minibatch, first.tanh(), loss.qvalue_network_params).min(0).values
        after = loss.qvalues(minibatch["next"], then.tanh(), loss.target_qvalue_network_params).min(0).values
        target = minibatch["next", "reward"].squeeze(-1) + 0.9 * (after + 0.7 * of_target)
        action = loss.normalize_action(minibatch["action"])
        here = loss.qvalues(minibatch, action, loss.qvalue_network_params)
    torch.testing.assert_close(out["loss_actor"], (-values - 0.7 * of_actor).mean())
    torch.testing.assert_close(out["loss_qvalue"], (here - target).square().sum(0).mean())
    aim = math.log(0.5 * math.sqrt(A))
    torch.testing.assert_close(out["loss_alpha"], loss.log_alpha * (of_actor - aim).mean())
    torch.testing.assert_close(out["regulated_entropy"], of_actor.mean())


@pytest.mark.parametrize("name", sorted(estimators.__all__))
def test_only_pathwise_serves_a_policy_without_a_density(name):
    estimator = getattr(estimators, name)
    if not (isinstance(estimator, type) and issubclass(estimator, AbstractEstimator)):
        return
    if estimator in (AbstractEstimator, Pathwise):
        assert "diversity" in estimator.asks
        return
    with pytest.raises(ValueError, match=f"estimator {name} asks for .*draws.*, which LatentActions does not offer"):
        make_sac(make("latent"), estimator(), **DIMS)


def test_who_needs_the_density_refuses_the_latent_actor_in_one_line():
    actor, value = make("latent"), make_value_network(STATE)
    with pytest.raises(ValueError, match="the probability ratio of PPO asks for draws, which LatentActions does not"):
        PMOEPPOLoss(actor, value, estimator=Pathwise())
    with pytest.raises(ValueError, match="an action transform asks for draws, which LatentActions does not"):
        make_sac(actor, Pathwise(), **DIMS, action_transform=make_hamiltonian_transform(STATE, A))
    with pytest.raises(ValueError, match="no log-probability"):
        make("latent", return_log_prob=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algo=ppo", "actor=latent"], "actor=latent has no density, which the probability ratio of ppo needs"),
        (["algo=dac", "actor=latent"], "algo=dac learns options"),
        (
            ["algo=sac", "actor=latent", "estimator=marginalized"],
            "which estimator=marginalized needs: use estimator=pa",
        ),
        (
            ["algo=sac", "actor=latent", "estimator=pathwise", "action_transform=hamiltonian_raw"],
            "actor=latent has no density, which the score of evolved actions needs",
        ),
    ],
)
def test_a_configuration_that_needs_its_density_is_refused(words, said):
    (cfg,) = compose_jobs(words)
    with pytest.raises(ConfigurationError, match=said):
        validate(cfg)


# --- the flow --------------------------------------------------------------------------------------------------------


def stretched(action_dim: int, **arguments) -> MixtureActor:
    """A flow with random weights so large that its density is far from the base's."""
    torch.manual_seed(0)
    actor = make_flow_actor(STATE, [-2.0] * action_dim, [3.0] * action_dim, hidden_sizes=(16,), **arguments).double()
    for parameter in actor.parameters():
        parameter.data.mul_(2)
    return actor


@pytest.mark.parametrize("action_dim", [1, 2])
def test_the_density_integrates_to_one(action_dim):
    distribution = stretched(action_dim).get_dist(states(1).double())
    axis = torch.linspace(-6, 6, 4001 if action_dim == 1 else 161, dtype=torch.double)
    grid = torch.stack(torch.meshgrid(*[axis] * action_dim, indexing="ij"), -1).flatten(0, -2).unsqueeze(1)
    with torch.no_grad():
        density = distribution.log_prob_unsquashed(grid).exp()
    assert ((density.sum(0) * (axis[1] - axis[0]) ** action_dim - 1).abs() < 1e-2).all()
    assert (density.amax(0) > 1.2 * (2 * math.pi) ** (-action_dim / 2)).any()  # and is not that of the base


def test_draws_have_the_density():
    """Kolmogorov's bound at 1.95 / sqrt(n): fails for a right program in one of a thousand seeds."""
    distribution, number = stretched(1).get_dist(states(1).double()), 4000
    axis = torch.linspace(-8, 8, 20_001, dtype=torch.double)
    with torch.no_grad():
        cdf = distribution.log_prob_unsquashed(axis.view(-1, 1, 1)).exp().flatten().cumsum(0) * (axis[1] - axis[0])
        drawn = distribution.rsample_unsquashed((number,)).flatten().sort().values
    expected = cdf[torch.searchsorted(axis, drawn).clamp(max=20_000)]
    assert (expected - torch.arange(1, number + 1) / number).abs().max() < 1.95 / number**0.5


def test_the_rule_is_the_image_of_the_bases_mode():
    distribution = make("flow").get_dist(states(B))
    image, _ = distribution.head(distribution.features, distribution.deterministic_unsquashed(), False)
    torch.testing.assert_close(image, torch.zeros(B, A), rtol=0, atol=1e-4)


def test_a_flow_is_a_mixture_of_one():
    distribution = make("flow").get_dist(states(B))
    torch.manual_seed(1)
    pathwise = distribution.rsample_unsquashed()
    torch.manual_seed(1)
    strata = distribution.rsample_components()
    torch.testing.assert_close(strata, pathwise.unsqueeze(0))
    component = distribution.sample_component((7,))
    assert component.shape == (7, B) and distribution.rsample_given(component).shape == (7, B, A)
    assert distribution.take_component(pathwise.unsqueeze(-2), component).shape == (7, B, A)
    assert torch.equal(distribution.weights, distribution.log_weights.exp())
    density = distribution.log_prob_unsquashed(pathwise)
    assert torch.equal(distribution.component_log_prob_unsquashed(pathwise), density.unsqueeze(-1))
    assert torch.equal(distribution.log_prob_given(pathwise, component[0]), density)
    assert torch.equal(distribution.stratum_log_prob_unsquashed(strata), density.unsqueeze(0))
    assert (distribution.component_posterior(distribution.squash(pathwise)) == 1).all()


@pytest.mark.parametrize("estimator", [Pathwise, Marginalized, ScoreFunction])
def test_the_first_ratio_of_ppo_is_one_and_its_losses_reach_the_flow(estimator):
    actor = make("flow", return_log_prob=True)
    algorithm = make_ppo(actor, estimator(), **DIMS, entropy_coeff=0.1)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        batch = actor(states(64))
    batch.update({"advantage": torch.randn(64, 1), "value_target": torch.randn(64, 1)})
    out = algorithm.loss(batch)
    assert out["kl_approx"].abs() < 1e-6 and out["clip_fraction"] == 0
    (out["loss_objective"] + out["loss_entropy"]).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in algorithm.loss.actor_network_params.parameters())


def test_saturated_and_far_actions_have_finite_densities_and_gradients():
    distribution = make("flow").get_dist(states(B))
    u = torch.tensor([-30.0, -5.0, 0.0, 5.0, 30.0]).view(-1, 1, 1).expand(-1, B, A).clone().requires_grad_()
    log_prob = distribution.log_prob_unsquashed(u) - distribution.log_abs_det_jacobian(u)
    (slope,) = torch.autograd.grad(log_prob.sum(), u)
    assert log_prob.isfinite().all() and slope.isfinite().all()


def test_the_number_of_weights_is_the_one_that_a_checkpoint_is_refused_by():
    splines = make("flow", num_transforms=3)[-1].head.splines
    weights = sum(parameter.numel() for name, parameter in splines.named_parameters() if name.endswith("weight"))
    assert weights == spline_parameters(A, SIZES[-1], 3)


def test_without_zuko_a_flow_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(RunError, match=r'^actor=flow needs zuko: pip install "pmoe-lightning\[flow\]"$'):
        make("flow")
    (cfg,) = compose_jobs(["algo=sac", "actor=flow", "estimator=pathwise"])
    with pytest.raises(ConfigurationError, match="actor=flow needs zuko"):
        validate(cfg)
