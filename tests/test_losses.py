"""The loss modules against TorchRL's own, against hand-computed values, and against what each loss may touch."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import PercentileValueNorm, ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss, LossModule, PPOLoss, SACLoss, SoftUpdate

from pmoe_lightning.estimators import (
    Frequency,
    GumbelSoftmax,
    HalfReparameterized,
    Marginalized,
    Pathwise,
    ScoreFunction,
    Surrogate,
)
from pmoe_lightning.estimators.base import AbstractEstimator, take_sample
from pmoe_lightning.losses import PMOEPPOLoss, PMOESACLoss
from pmoe_lightning.modules.actors import make_pmoe_actor
from pmoe_lightning.modules.critics import make_qvalue_network, make_value_network
from pmoe_lightning.modules.distributions import TanhBounds

OBSERVATION_DIM, A, B = 3, 2, 16
SIZES = (8, 8)
LOW, HIGH = [-1.0] * A, [1.0] * A


def transitions(batch: int = B, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    terminated = torch.rand(batch, 1, generator=generator) < 0.3
    truncated = torch.rand(batch, 1, generator=generator) < 0.3
    after = {"observation": normal(batch, OBSERVATION_DIM), "reward": normal(batch, 1), "terminated": terminated}
    after |= {"truncated": truncated, "done": terminated | truncated}
    root = {"observation": normal(batch, OBSERVATION_DIM), "action": normal(batch, A).tanh() * 0.9}
    return TensorDict({**root, "next": TensorDict(after, batch_size=[batch])}, batch_size=[batch])


def rollout(actor, batch: int = B) -> TensorDict:
    data = transitions(batch)
    with torch.no_grad():
        actor(data)
    generator = torch.Generator().manual_seed(1)
    data["advantage"] = torch.randn(batch, 1, generator=generator)
    data["value_target"] = torch.randn(batch, 1, generator=generator)
    return data


def tanh_normal_twin(actor) -> ProbabilisticActor:
    """TorchRL's own squashed Gaussian on the same network: the peer of a one-component actor."""
    network = actor[0].module

    class Parameters(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, observation):
            _, loc, scale = self.network(observation)
            return loc.squeeze(-2), scale.squeeze(-2)

    return ProbabilisticActor(
        TensorDictModule(Parameters(), in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        spec=actor[1].spec["action"],
        return_log_prob=actor[1].return_log_prob,
    )


def gradients(out: TensorDict, module: nn.Module) -> list[torch.Tensor]:
    module.zero_grad()
    sum(value for name, value in out.items() if name.startswith("loss_")).backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


def touched(module: nn.Module) -> set[str]:
    """Names of the parameters whose gradient is not zero."""
    return {name for name, value in module.named_parameters() if value.grad is not None and value.grad.any()}


def sac_loss(actor, critics, cls=PMOESACLoss, **arguments):
    loss = cls(actor, critics, target_entropy=-float(A), **arguments)
    loss.make_value_estimator(gamma=0.9)
    SoftUpdate(loss, tau=0.005)  # TorchRL warns of target networks that nobody updates
    return loss


def critics() -> list:
    return [make_qvalue_network(OBSERVATION_DIM, A, hidden_sizes=SIZES) for _ in range(2)]


@pytest.mark.parametrize("estimator", [Pathwise(), Marginalized(), Frequency()], ids=lambda e: type(e).__name__)
def test_sac_with_one_component_equals_torchrl(estimator):
    torch.manual_seed(0)
    actor, qvalues = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=1, hidden_sizes=SIZES), critics()
    peer = sac_loss(tanh_normal_twin(actor), qvalues, SACLoss, loss_function="l2")
    ours = sac_loss(actor, qvalues, estimator=estimator)
    ours.qvalue_network_params.data.copy_(peer.qvalue_network_params.data)
    for loss in (peer, ours):  # targets that differ from the critics
        loss.target_qvalue_network_params.data.copy_(loss.qvalue_network_params.data.apply(lambda x: x * 0.9))
    results = []
    for loss in (peer, ours):
        torch.manual_seed(1)
        out = loss(transitions())
        results.append((out, gradients(out, actor), gradients_of_critics(loss)))
    (theirs, actor_theirs, critic_theirs), (mine, actor_mine, critic_mine) = results
    for name in ("loss_actor", "loss_qvalue", "loss_alpha", "alpha"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine["regulated_entropy"], theirs["entropy"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actor_mine, actor_theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(critic_mine, critic_theirs, rtol=1e-6, atol=1e-6)


def one_component(**arguments):
    torch.manual_seed(0)
    return make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=1, hidden_sizes=SIZES, **arguments)


def assert_equal_outcomes(mine: LossModule, theirs: LossModule, data: TensorDict, *left_out: str) -> None:
    """The same entries and numbers, under the same random numbers."""
    outs = []
    for loss in (theirs, mine):
        torch.manual_seed(1)
        outs.append(loss(data.copy()).exclude(*left_out).to_dict())
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)


SAC_ARGUMENTS = [
    {"num_qvalue_nets": 2},
    {"loss_function": "smooth_l1"},
    {"loss_function": "l1"},
    {"alpha_init": 0.3},
    {"alpha_init": 0.3, "min_alpha": 0.5},
    {"alpha_init": 0.3, "max_alpha": 0.1},
    {"alpha_init": 0.3, "fixed_alpha": True},
    {"action_spec": Bounded(-1.0, 1.0, shape=(A,))},
    {"target_entropy": "auto"},
    {"delay_actor": True},
    {"delay_qvalue": False},
    {"delay_value": False},
    {"separate_losses": True},
    {"reduction": "sum"},
    {"reduction": "none", "scalar_output_mode": "exclude"},
    {"reduction": "none", "scalar_output_mode": "non_tensor"},
    {"skip_done_states": False},
    {"value_network": None},
    {"deactivate_vmap": True},
    {"use_prioritized_weights": True},
    {"use_prioritized_weights": False},
    {"gamma": None},
    {"priority_key": None},
]


@pytest.mark.parametrize("foreign", [False, True], ids=["own", "foreign"])
@pytest.mark.parametrize("arguments", SAC_ARGUMENTS, ids=str)
def test_every_argument_of_sac_acts_as_in_torchrl(arguments, foreign):
    """One component, with critics of the package and with others, which run under ``vmap``."""
    actor, qvalues = one_component(), foreign_critics() if foreign else critics()
    arguments = {"loss_function": "l2", "target_entropy": -float(A)} | arguments
    losses = []
    for cls, policy in ((SACLoss, tanh_normal_twin(actor)), (PMOESACLoss, actor)):
        losses.append(cls(policy, qvalues, **arguments))
        losses[-1].make_value_estimator(gamma=0.9)
        if arguments.get("delay_qvalue", True):
            SoftUpdate(losses[-1], tau=0.005)
    peer, ours = losses
    ours.qvalue_network_params.data.copy_(peer.qvalue_network_params.data)
    if arguments.get("delay_qvalue", True):
        for loss in losses:
            loss.target_qvalue_network_params.data.copy_(loss.qvalue_network_params.data.apply(lambda x: x * 0.9))
    weights = torch.rand(B, generator=torch.Generator().manual_seed(5))
    data = transitions().set("priority_weight", weights)
    assert_equal_outcomes(ours, peer, data, "entropy", "regulated_entropy")
    torch.manual_seed(1)
    theirs = peer(data.copy())
    torch.manual_seed(1)
    mine = ours(data.copy())
    if "entropy" in (scalars := theirs.to_dict()):  # TorchRL's name of the regulated one
        torch.testing.assert_close(mine.to_dict()["regulated_entropy"], scalars["entropy"], rtol=1e-5, atol=1e-5)
    assert {name for name, _ in inspect.signature(SACLoss.__init__).parameters.items()} - {"self"} == {
        "actor_network",
        "qvalue_network",
        *(name for row in SAC_ARGUMENTS for name in row),
    }


def foreign_critics() -> list:
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(OBSERVATION_DIM + A, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, observation, action):
            return self.layers(torch.cat([observation, action], -1))

    keys = {"in_keys": ["observation", "action"], "out_keys": ["state_action_value"]}
    return [TensorDictModule(Critic(), **keys) for _ in range(2)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"value_network": make_value_network(OBSERVATION_DIM)}, ValueError, "PMOESACLoss has no value_network"),
        ({"skip_done_states": True}, ValueError, "PMOESACLoss has no skip_done_states"),
        ({"gamma": 0.9}, TypeError, "gamma"),
        ({"priority_key": "x"}, RuntimeError, "priority_key"),
        ({"nonsense": 1}, TypeError, "nonsense"),
        ({"estimator": lambda distribution, objective: None}, TypeError, "estimator"),
    ],
    ids=["value_network", "skip_done_states", "gamma", "priority_key", "nonsense", "estimator"],
)
def test_arguments_that_sac_does_not_have_are_refused(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        PMOESACLoss(one_component(), critics(), **arguments)
    assert error is not ValueError or "\n" not in str(raised.value)


PPO_ARGUMENTS = [
    {"clip_epsilon": 0.05},
    {"clip_epsilon": (0.05, 0.1)},
    {"entropy_bonus": False},
    {"samples_mc_entropy": 1},
    {"entropy_coeff": 0.0},
    {"entropy_coeff": 0.3},
    {"log_explained_variance": False},
    {"critic_coeff": 0.3},
    {"critic_coeff": 0.0},
    {"critic_coeff": None},
    {"loss_critic_type": "smooth_l1"},
    {"loss_critic_type": "l1"},
    {"normalize_advantage": True},
    {"normalize_advantage": True, "normalize_advantage_exclude_dims": (1,)},
    {"advantage_norm": PercentileValueNorm()},
    {"separate_losses": True},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"clip_value": True},
    {"clip_value": 0.01},
    {"delay_actor": True},
    {"max_importance_ratio": 1.1},
    {"device": torch.device("cpu")},
    {"functional": True},
    {"functional": False},
    {"gamma": None},
    {"advantage_key": None},
    {"value_target_key": None},
    {"value_key": None},
]


@pytest.mark.parametrize("arguments", PPO_ARGUMENTS, ids=str)
def test_every_argument_of_ppo_acts_as_in_torchrl(arguments):
    """One component whose entropy TorchRL's loss draws as ours does, on actions another policy took."""
    data = rollout(one_component(return_log_prob=True)).set("state_value", torch.zeros(B, 1))
    actor, value = one_component(return_log_prob=True), make_value_network(OBSERVATION_DIM, hidden_sizes=SIZES)
    with torch.no_grad():
        network_loc(actor).bias += 0.3
    arguments = {"loss_critic_type": "l2"} | arguments
    ours, peer = (cls(actor, value, **arguments) for cls in (PMOEPPOLoss, ClipPPOLoss))
    if "delay_actor" in arguments:
        for loss in (ours, peer):
            network_of_target = loss.target_actor_network_params["module", "0"]  # the other module holds the bounds
            network_of_target.data.apply_(lambda x: x.mul_(0.9))
    assert_equal_outcomes(ours, peer, data)
    known = {*inspect.signature(ClipPPOLoss.__init__).parameters, *inspect.signature(PPOLoss.__init__).parameters}
    tested = {name for row in PPO_ARGUMENTS for name in row}
    assert known - {"self", "kwargs", "actor", "critic"} == tested | {"actor_network", "critic_network"}


def network_loc(actor) -> nn.Linear:
    return actor[0].module.loc


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"samples_mc_entropy": 4}, ValueError, "PMOEPPOLoss has no samples_mc_entropy"),
        ({"entropy_coeff": {"action_log_prob": 0.1}}, ValueError, "give a number, not a mapping"),
        ({"nonsense": 1}, TypeError, "nonsense"),
        ({"actor": None}, TypeError, "actor"),
        ({"entropy_coef": 0.1}, TypeError, "entropy_coef"),
        ({"gamma": 0.9}, TypeError, "gamma"),
        ({"value_key": "x"}, RuntimeError, "value"),
        ({"functional": False, "delay_actor": True}, ValueError, "functional=True"),
    ],
    ids=str,
)
def test_arguments_that_ppo_does_not_have_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        PMOEPPOLoss(one_component(), make_value_network(OBSERVATION_DIM), **arguments)


@pytest.mark.parametrize("functional", [True, False])
def test_a_routed_loss_may_own_its_networks(functional):
    """With ``functional=False`` the modules themselves get the gradients, those of the functional form."""
    torch.manual_seed(0)
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, hidden_sizes=SIZES, return_log_prob=True)
    value, qvalue = make_value_network(OBSERVATION_DIM, hidden_sizes=SIZES), critics()[0]
    data, found = rollout(actor), []
    for owns in (True, functional):
        loss = PMOEPPOLoss(actor, value, qvalue, routing=Frequency(), functional=owns)
        torch.manual_seed(1)
        out = loss(data)
        for network in (actor, value, qvalue):
            network.zero_grad()
        sum(out[name] for name in ("loss_objective", "loss_entropy", "loss_critic", "loss_qvalue")).backward()
        found.append([parameter.grad for network in (actor, value, qvalue) for parameter in network.parameters()])
    torch.testing.assert_close(*found)


def test_the_router_learns_from_the_current_policy_beside_a_delayed_one():
    torch.manual_seed(0)
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, hidden_sizes=SIZES, return_log_prob=True)
    value, qvalue = make_value_network(OBSERVATION_DIM, hidden_sizes=SIZES), critics()[0]
    loss = PMOEPPOLoss(actor, value, qvalue, routing=Frequency(), delay_actor=True)
    loss(rollout(actor))["loss_frequency"].backward()
    assert actor[0].module.router.weight.grad.any()


def test_a_call_that_fails_leaves_nothing_in_the_loss():
    """Neither the minibatch nor its distribution: a loss is copied, saved and sent to other processes as it is."""

    class Failing(Marginalized):
        def __call__(self, distribution, objective):
            raise ArithmeticError

    loss = PMOEPPOLoss(one_component(return_log_prob=True), make_value_network(OBSERVATION_DIM), estimator=Failing())
    data, before = rollout(loss.actor_network), set(vars(loss))
    with pytest.raises(ArithmeticError):
        loss(data)
    assert set(vars(loss)) == before


def gradients_of_critics(loss) -> list[torch.Tensor]:
    leaves = loss.qvalue_network_params.flatten_keys(".")
    return [leaves[name].grad.clone() for name in sorted(leaves.keys()) if leaves[name].grad is not None]


@pytest.mark.parametrize("entropy_coeff", [0.0, 0.05])
def test_ppo_with_one_component_equals_torchrl(entropy_coeff):
    torch.manual_seed(0)
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=1, hidden_sizes=SIZES, return_log_prob=True)
    value = make_value_network(OBSERVATION_DIM, hidden_sizes=SIZES)
    twin = tanh_normal_twin(actor)
    arguments = {"entropy_coeff": entropy_coeff, "normalize_advantage": True, "loss_critic_type": "l2"}
    peer, ours = ClipPPOLoss(twin, value, **arguments), PMOEPPOLoss(actor, value, **arguments)
    data = rollout(actor)
    data["action_log_prob"] += 0.3 * torch.randn(B)  # ratios on both sides of the clip
    results = []
    for loss in (peer, ours):
        torch.manual_seed(1)
        out = loss(data.clone())
        results.append((out, gradients(out, actor)))
    (theirs, actor_theirs), (mine, actor_mine) = results
    assert 0 < mine["clip_fraction"] < 1
    for name in theirs.keys():  # noqa: SIM118 (a TensorDict iterates over its rows)
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actor_mine, actor_theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", [Marginalized(), Frequency(), Frequency(backpropagate="all", log_prob="mixture")])
def test_each_sac_loss_reaches_only_its_own_parameters(estimator):
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=3, hidden_sizes=SIZES)
    loss = sac_loss(actor, critics(), estimator=estimator)
    owners = {
        "loss_actor": "actor_network_params",
        "loss_frequency": "actor_network_params",
        "loss_qvalue": "qvalue_network_params",
        "loss_alpha": "log_alpha",
    }
    out = loss(transitions())
    for name, value in out.items():
        if not name.startswith("loss_"):
            continue
        loss.zero_grad()
        value.backward(retain_graph=True)
        reached = {parameter.split(".")[0] for parameter in touched(loss)}
        assert reached == {owners[name]}, name


@pytest.mark.parametrize("foreign", [False, True], ids=["stacked", "vmap"])
def test_the_objective_tells_one_sample_as_if_it_were_asked_about_it_alone(foreign, monkeypatch):
    """Cost, log-density and the derivative of the action: that of the winner, which Frequency asks for."""
    torch.manual_seed(0)
    if foreign:
        monkeypatch.setattr(PMOESACLoss, "stacks_qvalues", False)
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=3, hidden_sizes=SIZES)
    loss, states = sac_loss(actor, critics(), estimator=Frequency()), transitions()
    distribution = actor.get_dist(states)
    objective = loss.objective(states, distribution)
    u = distribution.rsample_components().detach().requires_grad_()
    log_prob = distribution.stratum_log_prob_unsquashed(u).detach()
    evaluation = objective(u, log_prob)
    best = evaluation.score.argmax(0)
    alone = objective(take_sample(u, best), take_sample(log_prob, best))
    slopes = []
    for told in (evaluation.of(best), alone):
        torch.testing.assert_close(told.cost, take_sample(evaluation.cost, best))
        torch.testing.assert_close(told.log_prob, alone.log_prob)
        slopes.append(torch.autograd.grad(told.cost.sum(), u, retain_graph=True)[0])
    assert (slopes[0] != 0).any(-1).sum() == B
    torch.testing.assert_close(*slopes)


def test_the_frequency_loss_reaches_only_a_detached_router():
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=3, hidden_sizes=SIZES, router="detached")
    loss = sac_loss(actor, critics(), estimator=Frequency())
    loss(transitions())["loss_frequency"].backward()
    assert touched(actor) == {"module.0.module.router.weight", "module.0.module.router.bias"}


@pytest.mark.parametrize("scoring", ["mixture", "component"])
def test_critic_target_bootstraps_truncation_but_not_termination(scoring):
    """y = r + gamma (1 - terminated) [min Qbar(s', a') - alpha log pi(a'|s')], worked out by hand."""
    torch.manual_seed(0)
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=3, hidden_sizes=SIZES)
    loss = sac_loss(actor, critics(), estimator=Frequency(log_prob=scoring), alpha_init=0.7)
    data = transitions()
    after = data["next"]
    assert (after["truncated"] & ~after["terminated"]).any() and after["terminated"].any()

    torch.manual_seed(5)
    target = loss._compute_target_v2(data)
    torch.manual_seed(5)
    distribution = actor.get_dist(after)
    k = distribution.sample_component()
    rows = torch.arange(B)
    u = distribution.loc[rows, k] + distribution.scale[rows, k] * torch.randn(B, A)
    log_prob = distribution.log_prob_unsquashed(u)
    if scoring == "component":
        log_prob = distribution.component_log_prob_unsquashed(u)[rows, k]
    log_prob = log_prob - distribution.log_abs_det_jacobian(u)
    inputs = TensorDict(observation=after["observation"], action=distribution.squash(u), batch_size=B)
    values = torch.stack([network(inputs.clone())["state_action_value"].squeeze(-1) for network in plain_critics(loss)])
    soft_value = values.min(0).values - 0.7 * log_prob
    expected = after["reward"].squeeze(-1) + 0.9 * (~after["terminated"].squeeze(-1)) * soft_value
    torch.testing.assert_close(target, expected.detach(), rtol=1e-5, atol=1e-6)


def plain_critics(loss) -> list:
    """The stacked target critics as two ordinary modules."""
    plain = []
    for i in range(2):
        network = make_qvalue_network(OBSERVATION_DIM, A, hidden_sizes=SIZES)
        loss.target_qvalue_network_params[i].to_module(network, preserve_module_state=False)
        plain.append(network)
    return plain


def test_alpha_loss_is_the_hand_computed_one():
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=3, hidden_sizes=SIZES)
    loss = sac_loss(actor, critics(), alpha_init=0.5)
    out = loss(transitions())
    expected = -math.log(0.5) * (-out["regulated_entropy"].item() - A)
    assert out["loss_alpha"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "regulated"),
    [
        (Marginalized(), 0.0),
        (HalfReparameterized(), 0.0),
        (ScoreFunction(), 0.0),
        (GumbelSoftmax(), 0.0),
        (Frequency(), -math.log(4)),  # a component's own density is K times its share of the mixture's
        (Frequency(log_prob="mixture"), 0.0),  # with these critics, which hardly prefer any of the draws
        (GumbelSoftmax(straight_through=False), 9.8),  # between the components, where there is hardly any density
    ],
    ids=["marginalized", "half", "score", "gumbel", "frequency", "frequency-mixture", "gumbel-relaxed"],
)
def test_the_entropy_is_the_policys_whatever_the_estimator(estimator, regulated):
    """Four separated components of scale 0.3 in six dimensions; tolerance five standard errors, so 1 in 10^6 fails."""
    actor, states = separated_mixture()
    qvalues = [make_qvalue_network(OBSERVATION_DIM, 6, hidden_sizes=SIZES) for _ in range(2)]
    loss = PMOESACLoss(actor, qvalues, estimator=estimator, target_entropy=-6.0)
    loss.make_value_estimator(gamma=0.9)
    SoftUpdate(loss, tau=0.005)
    distribution = actor.get_dist(states)
    drawn = distribution.rsample_unsquashed((64,))
    log_prob = distribution.log_prob_unsquashed(drawn) - TanhBounds.normalized(drawn).log_abs_det_jacobian(drawn)
    truth, error = -log_prob.mean().item(), log_prob.std().item() / math.sqrt(len(states))
    out = loss(states)
    assert out["entropy"].item() == pytest.approx(truth, abs=5 * error)
    assert out["regulated_entropy"].item() - truth == pytest.approx(regulated, abs=10 * error)


def separated_mixture() -> tuple[Any, TensorDict]:
    torch.manual_seed(0)
    actor = make_pmoe_actor(OBSERVATION_DIM, [-1.0] * 6, [1.0] * 6, num_components=4, hidden_sizes=SIZES)
    network = actor[0].module
    with torch.no_grad():
        for head in (network.loc, network.log_scale, network.router):
            head.weight.zero_()
            head.bias.zero_()
        network.log_scale.bias.fill_(math.log(0.3))
        network.loc.bias.copy_(torch.randn(24).sign())
    batch = transitions(4096)
    batch["action"] = torch.zeros(4096, 6)
    return actor, batch


def test_sac_state_dict_round_trip_and_target_update():
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, hidden_sizes=SIZES)
    loss = sac_loss(actor, critics(), estimator=Frequency())
    updater = SoftUpdate(loss, tau=0.5)
    with torch.no_grad():
        loss.qvalue_network_params.data.apply_(lambda x: x.add_(1.0))
    before = loss.target_qvalue_network_params.data.clone()
    updater.step()
    expected = before.lerp(loss.qvalue_network_params.data, 0.5)
    torch.testing.assert_close(loss.target_qvalue_network_params.data.to_dict(), expected.to_dict())
    other = sac_loss(make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, hidden_sizes=SIZES), critics(), estimator=Frequency())
    other.load_state_dict(loss.state_dict())
    for mine, theirs in zip(other.state_dict().values(), loss.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_critics_keep_their_own_initial_weights():
    """TorchRL re-draws the weights of a single expanded critic; a list is stacked as it is."""
    first, second = critics()
    loss = sac_loss(make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, hidden_sizes=SIZES), [first, second])
    stacked = loss.qvalue_network_params["module", "layers", "0", "weight"]
    assert torch.equal(stacked[0], first.module.layers[0].weight)
    assert torch.equal(stacked[1], second.module.layers[0].weight)


def test_any_critic_module_is_accepted():
    """A critic that is not ours goes through TorchRL's vmap, with the same result as ours through the stacked pass."""
    torch.manual_seed(0)
    actor, ours = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, hidden_sizes=SIZES), critics()

    class Wrapped(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, observation, action):
            return self.network(observation, action)

    foreign = [
        TensorDictModule(Wrapped(q.module), in_keys=["observation", "action"], out_keys=["state_action_value"])
        for q in ours
    ]
    results = []
    for networks in (ours, foreign):
        torch.manual_seed(1)
        results.append(sac_loss(actor, networks, estimator=Marginalized())(transitions()))
    for name in ("loss_actor", "loss_qvalue", "loss_alpha"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)


def ppo_loss(actor, **arguments):
    qvalue = make_qvalue_network(OBSERVATION_DIM, A, hidden_sizes=SIZES)
    return PMOEPPOLoss(actor, make_value_network(OBSERVATION_DIM, hidden_sizes=SIZES), qvalue, **arguments)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_the_first_ppo_ratio_is_one_however_saturated_the_actions(spread):
    torch.manual_seed(0)
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=3, hidden_sizes=SIZES, return_log_prob=True)
    with torch.no_grad():
        actor[0].module.loc.bias.uniform_(-spread, spread)
    data = rollout(actor)
    assert spread == 1.0 or (data["action"].abs() == 1).any()
    out = ppo_loss(actor)(data)
    assert out["max_ratio"].item() == pytest.approx(1.0, abs=1e-4)
    assert out["kl_approx"].abs().item() < 1e-5


def test_ppo_scores_through_atanh_only_where_it_must():
    """Without ``action_unsquashed`` the loss falls back on the action: wrong by nats where tanh has saturated."""
    torch.manual_seed(0)
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=3, hidden_sizes=SIZES, return_log_prob=True)
    with torch.no_grad():
        actor[0].module.loc.bias.uniform_(-30, 30)
    data = rollout(actor)
    fallback = ppo_loss(actor)(data.exclude("action_unsquashed"))
    assert fallback["kl_approx"].abs().item() > 1.0


def test_each_ppo_loss_reaches_only_its_own_parameters():
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=3, hidden_sizes=SIZES, return_log_prob=True)
    loss = ppo_loss(actor, routing=Frequency(), entropy_coeff=0.1)
    owners = dict.fromkeys(("loss_objective", "loss_entropy", "loss_frequency"), "actor_network_params")
    owners |= {"loss_critic": "critic_network_params", "loss_qvalue": "qvalue_network_params"}
    out = loss(rollout(actor))
    assert {name for name, _ in out.items() if name.startswith("loss_")} == set(owners)
    for name, owner in owners.items():
        loss.zero_grad()
        out[name].backward(retain_graph=True)
        reached = {parameter.split(".")[0] for parameter in touched(loss)}
        assert reached == {owner}, name


def test_the_losses_that_are_named_are_those_that_come_out():
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=3, hidden_sizes=SIZES, return_log_prob=True)
    loss = ppo_loss(actor, routing=Frequency())
    assert set(loss.out_keys) <= set(loss(rollout(actor)).keys())
    sac = sac_loss(make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, hidden_sizes=SIZES), critics(), estimator=Frequency())
    assert set(sac.out_keys) <= set(sac(transitions()).keys())


def test_ppo_qvalue_loss_by_hand():
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=2, hidden_sizes=SIZES, return_log_prob=True)
    loss = ppo_loss(actor, routing=Frequency(), qvalue_coeff=0.5)
    data = rollout(actor)
    qvalue = loss.qvalue_network(data.select("observation", "action"))["state_action_value"]
    expected = 0.5 * (qvalue - data["value_target"]).square().mean()
    torch.testing.assert_close(loss(data)["loss_qvalue"], expected)


def test_routing_without_a_critic_to_rank_by_is_refused():
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, hidden_sizes=SIZES, return_log_prob=True)
    with pytest.raises(ValueError, match="qvalue_network"):
        PMOEPPOLoss(actor, make_value_network(OBSERVATION_DIM, hidden_sizes=SIZES), routing=Frequency())


def router_entropy_gradients(loss, data, draws: int) -> torch.Tensor:
    """Independent draws of d(loss_entropy)/d(router bias) [draws, K]."""
    bias = loss.actor_network_params["module", "0", "module", "router", "bias"]
    rows = []
    for _ in range(draws):
        loss.zero_grad()
        loss(data)["loss_entropy"].backward()
        rows.append(bias.grad.clone())
    return torch.stack(rows)


def test_ppo_entropy_bonus_has_the_router_gradient_that_torchrl_misses():
    """Against a 400-point quadrature in A = 1; bound: 5 standard errors per component (failure rate 6e-7 each)."""
    torch.manual_seed(0)
    actor = make_pmoe_actor(OBSERVATION_DIM, [-1.0], [1.0], num_components=2, hidden_sizes=SIZES, return_log_prob=True)
    network = actor[0].module
    with torch.no_grad():
        for head in (network.loc, network.router, network.log_scale):
            head.weight.zero_()
        network.loc.bias.copy_(torch.tensor([-1.0, 0.5]))
        network.log_scale.bias.copy_(torch.tensor([-1.0, 0.2]))
        network.router.bias.copy_(torch.tensor([0.8, 0.0]))
    data = TensorDict(observation=torch.zeros(64, OBSERVATION_DIM), batch_size=64)
    data["action"], data["advantage"] = torch.zeros(64, 1), torch.zeros(64, 1)
    data["value_target"], data["action_log_prob"] = torch.zeros(64, 1), torch.zeros(64)

    u = torch.linspace(-12, 12, 4001, dtype=torch.float64).unsqueeze(-1)
    logits = network.router.bias.detach().double().requires_grad_()
    loc, scale = network.loc.bias.detach().double(), network.log_scale.bias.detach().double().exp()
    component = -0.5 * ((u - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
    log_density = (torch.log_softmax(logits, -1) + component).logsumexp(-1)
    jacobian = 2 * (math.log(2) - u.squeeze(-1) - nn.functional.softplus(-2 * u.squeeze(-1)))
    entropy = -torch.trapezoid(log_density.exp() * (log_density - jacobian), u.squeeze(-1))
    exact = torch.autograd.grad(-entropy, logits)[0].float()

    value = make_value_network(OBSERVATION_DIM, hidden_sizes=SIZES)
    draws = router_entropy_gradients(PMOEPPOLoss(actor, value, entropy_coeff=1.0), data, 300)
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 5 * error).all()
    assert (exact.abs() > 20 * error).all()  # the bound separates the true gradient from zero

    monte_carlo = PMOEPPOLoss(actor, value, estimator=OneDraw(), entropy_coeff=1.0)
    flawed = router_entropy_gradients(monte_carlo, data, 300)
    assert (flawed.mean(0).abs() < 5 * flawed.std(0) / math.sqrt(len(flawed))).all()  # TorchRL's: zero on average


class OneDraw(AbstractEstimator):
    """The Monte Carlo entropy TorchRL falls back on: -log pi(u) at one pathwise draw from the mixture."""

    def __call__(self, distribution, objective):
        u = distribution.rsample_unsquashed()
        evaluation = objective(u, distribution.log_prob_unsquashed(u))
        return Surrogate(evaluation.cost, evaluation.log_prob.detach())
