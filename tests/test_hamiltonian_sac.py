"""The Hamiltonian transform inside soft actor-critic: estimators, losses, acting, checkpoints, configuration."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from quadrature import (
    Parameters,
    assert_mean,
    bounds,
    expectation,
    expectation_and_gradient,
    parameters,
    repeat,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, TanhNormal

from pmoe_lightning.algorithms import make_sac
from pmoe_lightning.data.off_policy import OffPolicyData
from pmoe_lightning.envs import make_env
from pmoe_lightning.errors import RunError
from pmoe_lightning.estimators import (
    Frequency,
    GumbelSoftmax,
    HalfReparameterized,
    Implicit,
    Marginalized,
    ObjectiveValue,
    Pathwise,
    ScoreFunction,
)
from pmoe_lightning.hamiltonian import EvolveAction, HamiltonianTransform, Normalized, differentiable
from pmoe_lightning.hamiltonian import make_hamiltonian_transform as make_transform
from pmoe_lightning.losses import PMOESACLoss
from pmoe_lightning.modules.actors import make_gaussian_actor, make_pmoe_actor
from pmoe_lightning.modules.critics import make_qvalue_network
from pmoe_lightning.modules.distributions import TanhBounds, TanhGaussianMixture
from pmoe_lightning.tracking.references import load_policy

OBSERVATION_DIM, A, LOW, HIGH = 3, 1, [-2.0], [2.0]
SIZES = (32, 32)
UNBIASED = [Marginalized(), HalfReparameterized(num_samples=3), ScoreFunction(num_samples=3), Implicit()]
EVERY = [*UNBIASED, Frequency(), Frequency(backpropagate="all"), GumbelSoftmax()]
pendulum = partial(make_env, "Pendulum-v1")


def named(estimator) -> str:
    return type(estimator).__name__


def transform(force: str = "gated", **arguments) -> HamiltonianTransform:
    strength = {} if force == "raw" else {"magnitude": 1.0}
    return make_transform(OBSERVATION_DIM, A, force=force, **strength | arguments)


def sac(action_transform=None, estimator=None, num_components: int = 3, **arguments):
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=num_components, hidden_sizes=SIZES, **arguments)
    estimator = estimator or Marginalized()
    sizes = {"observation_dim": OBSERVATION_DIM, "action_dim": A, "hidden_sizes": SIZES}
    description = {
        "format": 1,
        "actor": "pmoe",
        "arguments": {"num_components": num_components, "hidden_sizes": list(SIZES), **arguments},
        "observation_dim": OBSERVATION_DIM,
        "action_low": LOW,
        "action_high": HIGH,
        "normalize_observation": False,
        "critic": {"hidden_sizes": list(SIZES), "activation": "relu"},
        "env": {"id": "Pendulum-v1", "kwargs": {}},
    }
    return make_sac(actor, estimator, action_transform=action_transform, policy_description=description, **sizes)


def transitions(batch: int = 32) -> TensorDict:
    flags = {key: torch.rand(batch, 1) < 0.1 for key in ("terminated", "done")}
    after = TensorDict({"observation": torch.randn(batch, 3), "reward": torch.randn(batch, 1), **flags}, [batch])
    return TensorDict({"observation": torch.randn(batch, 3), "action": torch.rand(batch, A), "next": after}, [batch])


def observations(batch: int = 8) -> TensorDict:
    return TensorDict({"observation": torch.randn(batch, OBSERVATION_DIM)}, [batch])


# -- estimators --------------------------------------------------------------------------------------------------------
ALPHA = 0.4
SLOPE = 1.5
MOMENTUM_NODES = torch.linspace(-6, 6, 61, dtype=torch.float64)


def linear_critic(action: Tensor) -> Tensor:
    """Q = slope a, for two critics: the gradient of the step size is exact for it."""
    return (SLOPE * action.sum(-1)).expand(2, *action.shape[:-1])


def evolved_cost(
    evolve: HamiltonianTransform, u: Tensor, log_prob: Tensor, momentum: Tensor, mixture, critic=linear_critic
) -> ObjectiveValue:
    """Soft actor-critic's cost of an evolved action: that of the draw, and the remainder."""
    evolution = evolve(
        u,
        log_prob.detach(),
        momentum,
        observation=momentum.new_zeros(*momentum.shape[:-1], OBSERVATION_DIM),
        qvalue=differentiable(critic),
        bounds=mixture,
        alpha=ALPHA,
    )
    after = evolution.log_prob - mixture.log_abs_det_jacobian(evolution.u)
    value = critic(mixture.squash(evolution.u))[0]
    drawn = ALPHA * (log_prob - mixture.log_abs_det_jacobian(u)) - critic(mixture.squash(u))[0]
    remainder = ALPHA * after - value - drawn.detach()
    return ObjectiveValue(drawn + remainder, after, value, remainder=remainder.detach())


@pytest.mark.parametrize("force", ["raw", "normalized"])
@pytest.mark.parametrize("estimator", UNBIASED, ids=named)
def test_unbiased_estimators_stay_unbiased(estimator, force):
    """Mixture parameters and step size alike, against a quadrature over action and momentum (A = 1).

    The momentum is drawn once per state and shared by all samples there; the failure rate is that of ``quadrature``.
    """
    torch.manual_seed(0)
    exact_mixture, (low, high) = parameters(2, 1), bounds(1)
    evolve = transform(force, step_size=0.4, temperature=1.5, learn_step_size=True).double()
    weights = (-0.5 * MOMENTUM_NODES.square()).softmax(0)

    def expected_cost(u: Tensor, log_prob: Tensor) -> Tensor:
        samples = u.expand(len(MOMENTUM_NODES), *u.shape)
        nodes = 1.5**0.5 * MOMENTUM_NODES.view(-1, 1, 1).expand_as(samples)
        cost = evolved_cost(evolve, samples, log_prob.expand(samples.shape[:-1]), nodes, mixture_at(exact_mixture)).cost
        return (weights.view(-1, 1) * cost).sum(0)

    def mixture_at(values: Parameters) -> TanhGaussianMixture:
        return TanhGaussianMixture(*values, low, high)

    value, gradient = expectation_and_gradient(exact_mixture, expected_cost)
    evolve.zero_grad()
    expectation(exact_mixture, expected_cost).backward()
    exact_step = evolve.step_size_logit.grad.clone()

    draws, step_gradients, costs = 40_000, [], []
    leaves = repeat(exact_mixture, draws)
    for part in range(40):
        chunk = slice(part * draws // 40, (part + 1) * draws // 40)
        mixture = mixture_at(Parameters(*(leaf[chunk] for leaf in leaves)))
        momentum = evolve.sample_momentum(mixture.loc[..., 0, :])
        surrogate = estimator(
            mixture, lambda u, log_prob, m=momentum, d=mixture: evolved_cost(evolve, u, log_prob, m, d)
        )
        evolve.zero_grad()
        surrogate.loss.sum().backward()
        step_gradients.append(evolve.step_size_logit.grad * 40 / draws)
        costs.append(surrogate.expected_cost.detach())
    assert_mean(torch.cat(costs), value, resolution=0.05)
    for leaf, exact in zip(leaves, gradient, strict=True):
        assert_mean(leaf.grad, exact, resolution=0.25)
    assert_mean(torch.stack(step_gradients), exact_step, resolution=0.1)
    assert exact_step.abs() > 0.1


@pytest.mark.parametrize("estimator", EVERY, ids=lambda e: f"{named(e)}-{getattr(e, 'backpropagate', '')}")
def test_every_estimator_trains_actor_and_transform(estimator):
    torch.manual_seed(0)
    algorithm = sac(transform("gated", learn_step_size=True, learn_magnitude=True), estimator)
    out = algorithm.loss(transitions())
    out["loss_actor"].backward()
    for name, parameter in algorithm.loss.action_transform.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(value.isfinite().all() for value in out.values())
    assert {"hamiltonian_qvalue_gain", "hamiltonian_acceptance", "hamiltonian_step_size"} <= set(out.keys())


@pytest.mark.parametrize("reduction", ["min", "mean"])
def test_the_actor_loss_is_that_of_the_evolved_action(reduction):
    """Cost, log-density and score by hand, and the dynamics' own values are those of the critics, draw for draw."""
    torch.manual_seed(0)
    algorithm = sac(transform("gated", step_size=0.3, critic_reduction=reduction), Frequency())
    loss, states = algorithm.loss, observations(16)
    distribution = algorithm.actor.get_dist(states.clone())
    unit = TanhBounds.normalized(distribution.loc)
    u = distribution.rsample_components()
    log_prob = distribution.log_prob_unsquashed(u)
    torch.manual_seed(1)
    found = loss.objective(states, distribution)(u, log_prob)
    torch.manual_seed(1)
    momentum = loss.action_transform.sample_momentum(distribution.loc[..., 0, :])
    evolution = loss.action_transform(u, log_prob, momentum, **loss.state_of(states, distribution))
    value, drawn = (loss.actor_value(states, unit.squash(at)) for at in (evolution.u, u))
    after, before = evolution.log_prob - unit.log_abs_det_jacobian(evolution.u), log_prob - unit.log_abs_det_jacobian(u)
    torch.testing.assert_close(found[:3], (after - value, after, value), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.remainder, (after - value - before + drawn).detach(), rtol=1e-4, atol=1e-5)
    slopes = [torch.autograd.grad(cost.sum(), u, retain_graph=True)[0] for cost in (found.cost, before - drawn)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


def test_frequency_evolves_every_draw_once():
    """The K trajectories that are ranked are those that are trained: K (L + 1) evaluations of the critics, no more."""
    torch.manual_seed(0)
    algorithm = sac(transform("normalized", step_size=0.3), Frequency())
    loss, states = algorithm.loss, observations(16)
    distribution = algorithm.actor.get_dist(states.clone())
    passes, action_value = [], loss.action_value(states)

    def watch(action):
        passes.append(action.shape)
        return action_value(action)

    loss.action_value = lambda _: watch
    loss.actor_value = None
    surrogate = loss.estimator(distribution, loss.objective(states, distribution))
    surrogate.loss.mean().backward()
    assert passes == [(distribution.num_components, 16, A)] * (loss.action_transform.num_leapfrog_steps + 1)


# -- the loss ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("force, estimator", [("raw", Pathwise()), ("gated", Frequency())], ids=["raw", "gated"])
def test_no_steps_are_no_transform_to_the_last_bit(force, estimator):
    """200 updates, losses, weights and what the random numbers were used for."""
    results = []
    for made in (None, transform(force, num_leapfrog_steps=0)):
        torch.manual_seed(0)
        algorithm = sac(made, estimator, num_components=1 if isinstance(estimator, Pathwise) else 3)
        optimizer = algorithm.configure_optimizers()
        for _ in range(200):
            out = algorithm.loss(transitions())
            optimizer.zero_grad()
            sum(value for name, value in out.items() if name.startswith("loss_")).backward()
            optimizer.step()
            algorithm.target_updater.step()
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            action = algorithm.policy(observations())["action"]
        weights = {k: v for k, v in algorithm.loss.state_dict().items() if "action_transform" not in k}
        results.append(weights | {"action": action, "random": torch.randn(3), "loss": out["loss_qvalue"]})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_each_use_of_the_evolved_action_is_switched_on_its_own():
    """Actor loss and critic target change where, and only where, ``used_in`` says so."""
    batch, found = transitions(), {}
    for used_in in (None, ["actor_loss"], ["critic_target"], ["acting"]):
        torch.manual_seed(0)
        made = used_in and HamiltonianTransform(Normalized(magnitude=3.0), step_size=0.3, used_in=used_in)
        algorithm = sac(made, Pathwise(), num_components=1)
        torch.manual_seed(1)
        target = algorithm.loss._compute_target_v2(batch)
        torch.manual_seed(2)
        actor_loss = algorithm.loss.actor_loss(batch)[0]
        torch.manual_seed(3)
        action = algorithm.policy(observations_at(batch))["action"]
        found[tuple(used_in or ())] = target.detach(), actor_loss.detach(), action.detach()
    plain = found.pop(())
    for (use,), values in found.items():
        changed = [not torch.equal(a, b) for a, b in zip(plain, values, strict=True)]
        assert changed == [use == name for name in ("critic_target", "actor_loss", "acting")], use


def observations_at(batch: TensorDict) -> TensorDict:
    return batch.select("observation")


def test_the_losses_still_reach_only_their_own_parameters():
    algorithm = sac(transform("gated", learn_step_size=True), Frequency())
    out = algorithm.loss(transitions())
    owners = {
        "loss_actor": {"actor_network_params", "action_transform"},
        "loss_qvalue": {"qvalue_network_params"},
        "loss_alpha": {"log_alpha"},
    }
    for name, expected in owners.items():
        algorithm.loss.zero_grad()
        out[name].backward(retain_graph=True)
        touched = {n.split(".")[0] for n, p in algorithm.loss.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched == expected, name


def test_the_critic_target_by_hand():
    """y of the evolved next action: live critics drive it, target critics judge it."""
    torch.manual_seed(0)
    algorithm = sac(transform("raw", step_size=0.2), Marginalized())
    loss, batch = algorithm.loss, transitions()
    loss.target_qvalue_network_params.data.apply_(lambda x: x.mul_(0.5))
    torch.manual_seed(1)
    target = loss._compute_target_v2(batch)
    torch.manual_seed(1)
    after = batch["next"]
    distribution = algorithm.actor.get_dist(after.clone())
    u = distribution.rsample_unsquashed()
    log_prob, momentum = distribution.log_prob_unsquashed(u), torch.randn_like(u)
    live = differentiable(lambda action: loss.qvalues(after, action, loss.qvalue_network_params))
    unit = TanhBounds.normalized(u)
    state = {"observation": after["observation"], "qvalue": live, "bounds": unit, "alpha": 1.0}
    evolution = loss.action_transform(u, log_prob, momentum, **state)
    log_prob = evolution.log_prob - unit.log_abs_det_jacobian(evolution.u)
    values = loss.qvalues(after, unit.squash(evolution.u), loss.target_qvalue_network_params).min(0).values
    expected = after["reward"] + 0.99 * (1 - after["terminated"].float()) * (values - log_prob).unsqueeze(-1)
    torch.testing.assert_close(target.unsqueeze(-1), expected.detach(), rtol=1e-4, atol=1e-4)


def test_any_critic_module_drives_the_transform():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_qvalue_network(OBSERVATION_DIM, A, hidden_sizes=SIZES).module

        def forward(self, observation, action):
            return self.inner(observation, action)

    actor = make_gaussian_actor(OBSERVATION_DIM, LOW, HIGH, hidden_sizes=SIZES)
    foreign = [
        TensorDictModule(Wrapped(), in_keys=["observation", "action"], out_keys=["state_action_value"])
        for _ in range(2)
    ]
    loss = PMOESACLoss(actor, foreign, estimator=Pathwise(), action_transform=transform(), target_entropy=-1.0)
    loss.make_value_estimator(gamma=0.99)
    loss(transitions())["loss_actor"].backward()
    with pytest.raises(ValueError, match="EvolveAction"):
        loss.acting_policy(actor)


# -- acting ------------------------------------------------------------------------------------------------------------
def fit(algorithm, total_frames: int):
    data = OffPolicyData(
        pendulum,
        algorithm.policy,
        total_frames=total_frames,
        frames_per_epoch=total_frames,
        frames_per_batch=8,
        init_random_frames=100,
        batch_size=64,
    )
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(algorithm, datamodule=data)
    return algorithm


@pytest.fixture(scope="module")
def trained():
    """SAC on Pendulum-v1 for 400 updates, gated and with everything learned."""
    torch.manual_seed(0)
    made = transform("gated", step_size=0.05, learn_step_size=True, learn_magnitude=True, magnitude=5.0)
    return fit(sac(made, Marginalized()), 500)


@pytest.mark.parametrize("force, step_size", [("raw", 0.02), ("normalized", 0.05), ("gated", 0.05)])
def test_evolved_actions_have_a_higher_value_on_a_trained_critic(trained, force, step_size):
    """Mean gain over 2,000 recent states, sampled momentum; five standard errors (failure rate 3e-7)."""
    torch.manual_seed(0)
    loss = trained.loss
    strength = {} if force == "raw" else {"magnitude": 5.0}
    evolve = transform(force, step_size=step_size, momentum_scale=0.3, **strength)
    observation = trained.last_observation[torch.randint(len(trained.last_observation), (8000,))]
    states = TensorDict({"observation": observation}, [8000])
    distribution = trained.actor.get_dist(states.clone())
    u = distribution.rsample_unsquashed().detach()
    unit = TanhBounds.normalized(u)
    evolution = evolve(
        u,
        torch.zeros(8000),
        evolve.sample_momentum(u),
        observation=observation,
        qvalue=loss.action_value(states),
        bounds=unit,
        alpha=loss._alpha,
    )
    gain = evolution.qvalue_gain
    before, after = (
        loss.qvalues(states, unit.squash(at), loss.qvalue_network_params).min(0).values for at in (u, evolution.u)
    )
    torch.testing.assert_close(gain, (after - before).detach(), rtol=1e-3, atol=1e-3)
    assert gain.mean() > 5 * gain.std() / 8000**0.5


def test_training_moves_what_is_learned_and_reports(trained):
    fresh = transform("gated", step_size=0.05, learn_step_size=True, learn_magnitude=True, magnitude=5.0)
    learned = trained.loss.action_transform
    assert learned.step_size.item() != fresh.step_size.item()
    assert learned.force.magnitude.item() != fresh.force.magnitude.item()
    (group, *_) = trained.optimizers().param_groups
    assert {id(p) for p in learned.parameters()} <= {id(p) for p in group["params"]}
    metrics = trained.drain_metrics()
    assert metrics["train/hamiltonian/nonfinite"] == 0 and 0 < metrics["train/hamiltonian/acceptance"] <= 1
    names = ("energy_error", "rejected", "qvalue_gain", "distance", "step_size")
    assert {f"train/hamiltonian/{name}" for name in names} <= metrics.keys()


def test_the_policy_acts_with_the_loss_own_weights(trained):
    """Not copies: a critic that changes changes the next action."""
    algorithm = copy.deepcopy(trained)
    states = observations(16)
    critics, policy = algorithm.loss.qvalue_network_params, algorithm.policy
    assert {p.data_ptr() for p in critics.parameters()} <= {p.data_ptr() for p in policy.parameters()}
    assert algorithm.loss.log_alpha.data_ptr() == policy[-1].log_alpha.data_ptr()
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        before = policy(states.clone())["action"]
        assert torch.equal(policy(states.clone())["action"], before)  # momentum zero: nothing is drawn
        critics.data.apply_(lambda x: x.mul_(-1.0))
        assert not torch.allclose(policy(states.clone())["action"], before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_acts_in_every_gradient_mode(trained, context):
    torch.manual_seed(0)
    observation = torch.randn(5, OBSERVATION_DIM)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        with torch.no_grad():
            expected = trained.policy(TensorDict({"observation": observation}, [5]))["action"]
        with context():
            action = trained.policy(TensorDict({"observation": observation.clone()}, [5]))["action"]
    torch.testing.assert_close(action.detach().clone(), expected)
    assert (action.abs() <= 2).all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_any_torchrl_actor_can_be_followed_by_it(context):
    """A plain TorchRL pipeline: TanhNormal, critics by automatic differentiation, action and bound written together."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(OBSERVATION_DIM, 2), nn.Unflatten(-1, (2, A)))

    class Parameters(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, observation):
            loc, raw = self.network(observation).unbind(-2)
            return loc, raw.exp()

    actor = ProbabilisticActor(
        TensorDictModule(Parameters(), in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -2.0, "high": 2.0},
        return_log_prob=True,
    )
    critic = make_qvalue_network(OBSERVATION_DIM, A, hidden_sizes=SIZES).module

    def qvalue(observation):
        return differentiable(lambda action: critic(observation, action).squeeze(-1).unsqueeze(0))

    made = HamiltonianTransform(Normalized(magnitude=5.0))
    policy = TensorDictSequential(
        actor, EvolveAction(made, qvalue, torch.tensor(-1.0), torch.tensor(LOW), torch.tensor(HIGH))
    )
    with context(), set_exploration_type(ExplorationType.RANDOM):
        torch.manual_seed(1)
        drawn = actor(observations(64))
        torch.manual_seed(1)
        out = policy(observations(64))
        assert out["action"].shape == (64, A) and (out["action"].abs() <= 2).all()
        assert (out["action"] - drawn["action"]).abs().mean() > 0.05
        assert out["action_log_prob"].shape == (64,) and not torch.equal(
            out["action_log_prob"], drawn["action_log_prob"]
        )


def test_the_log_density_an_actor_writes_becomes_the_bound():
    torch.manual_seed(0)
    algorithm = sac(transform("normalized", step_size=0.2), return_log_prob=True)
    states = observations(64)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        torch.manual_seed(1)
        drawn = algorithm.actor(states.clone())
        momentum = torch.randn_like(drawn["action"])
        torch.manual_seed(1)
        out = algorithm.policy(states.clone())
    mixture = algorithm.actor.get_dist(states.clone())
    u, log_prob = drawn["action_unsquashed"], drawn["action_log_prob"]
    evolution = algorithm.loss.action_transform(
        u,
        log_prob + mixture.log_abs_det_jacobian(u),
        momentum,
        observation=states["observation"],
        qvalue=algorithm.loss.action_value(states),
        bounds=TanhBounds.normalized(u),
        alpha=1.0,
    )
    expected = evolution.log_prob - mixture.log_abs_det_jacobian(evolution.u)
    torch.testing.assert_close(out["action_log_prob"], expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["action_unsquashed"], evolution.u.detach())
    torch.testing.assert_close(out["action"], mixture.squash(evolution.u).detach())


def test_metropolis_decides_when_sampling_only():
    """With a step that overshoots, some sampled proposals are refused; the deterministic action never is."""
    torch.manual_seed(0)
    algorithm = sac(transform("normalized", step_size=0.5, metropolis=True), return_log_prob=True)
    states = observations(256)
    with torch.no_grad():
        for kind, refuses in ((ExplorationType.RANDOM, True), (ExplorationType.DETERMINISTIC, False)):
            with set_exploration_type(kind):
                torch.manual_seed(1)
                drawn = algorithm.actor(states.clone())["action"]
                torch.manual_seed(1)
                stayed = (algorithm.policy(states.clone())["action"] == drawn).all(-1)
            assert stayed.any() == refuses and not stayed.all()


def test_collectors_hand_the_live_critics_to_their_workers():
    """A worker process acts with the critics it is sent: after a change it acts as the changed policy does."""
    torch.manual_seed(0)
    algorithm = sac(transform("normalized", step_size=0.3), Pathwise(), num_components=1)
    arguments = {"frames_per_batch": 20, "total_frames": -1, "exploration_type": ExplorationType.DETERMINISTIC}
    arguments["auto_register_policy_transforms"] = False
    make = partial(pendulum, num_envs=1, seed=0)
    collector = Collector([make], algorithm.policy, num_collectors=1, sync=True, cat_results="stack", **arguments)
    try:
        batches = iter(collector)
        for change in (1.0, -3.0):
            algorithm.loss.qvalue_network_params.data.apply_(lambda x, c=change: x.mul_(c))
            collector.update_policy_weights_()
            next(batches)
            data = next(batches).reshape(-1)
            with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
                expected = algorithm.policy(data.select("observation"))["action"]
            torch.testing.assert_close(data["action"], expected, rtol=1e-4, atol=1e-4)
    finally:
        collector.shutdown()


# -- checkpoints -------------------------------------------------------------------------------------------------------
def checkpoint_of(algorithm, **arguments) -> dict:
    named = {"force": "gated", "learn_step_size": True, "learn_magnitude": True, "used_in": ["acting", "actor_loss"]}
    entry = algorithm.policy_state()
    return {"policy": entry | {"description": entry["description"] | {"action_transform": named | arguments}}}


@pytest.mark.parametrize("rule", [None, "best_value"])
def test_a_loaded_policy_acts_with_its_transform(trained, rule):
    policy = load_policy(checkpoint_of(trained, step_size=0.05, magnitude=5.0), rule=rule)
    states = observations(32)
    evolve = trained.policy[-1]
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = trained.policy(states.clone())["action"]
        drawn = trained.actor(states.clone())["action"]
    with torch.no_grad():
        loaded = policy(states.clone())["action"]
    assert evolve.transform.num_leapfrog_steps == 3 and not torch.allclose(drawn, expected)
    if rule is None:
        torch.testing.assert_close(loaded, expected)
    else:
        assert loaded.isfinite().all() and not torch.allclose(loaded, expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"force": "os.system"}, "force=.* must be one of raw, normalized, gated"),
        ({"num_leapfrog_steps": 10**9}, "must be a whole number >= 0 and <= 1000"),
        ({"num_leapfrog_steps": 2.5}, "must be a whole number"),
        ({"step_size": "0.1"}, "must be a finite number > 0"),
        ({"step_size": True}, "must be a finite number > 0"),
        ({"used_in": [1, "acting"]}, "each element one of acting, actor_loss, critic_target"),
        ({"hidden_size": 10**9}, "must be a whole number >= 1 and <= 65536"),
        ({"hidden_size": 32}, "does not fit"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_description_that_cannot_be_built_is_refused(trained, arguments, message):
    with pytest.raises(RunError, match=message):
        load_policy(checkpoint_of(trained, **arguments))
