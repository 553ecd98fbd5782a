"""The actors wherever TorchRL takes a ProbabilisticActor."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from tensordict import TensorDict, from_module, from_modules
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    ActorCriticOperator,
    ActorCriticWrapper,
    ActorValueOperator,
    ProbabilisticActor,
    SafeSequential,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import ClipPPOLoss, SACLoss, SoftUpdate

from pmoe_lightning.envs import make_env
from pmoe_lightning.modules.actors import (
    BestValueActor,
    BlendedNetwork,
    make_additive_moe_actor,
    make_gaussian_actor,
    make_mcp_actor,
    make_pmoe_actor,
)
from pmoe_lightning.modules.critics import make_qvalue_network, make_value_network
from pmoe_lightning.modules.distributions import TanhGaussianMixture
from pmoe_lightning.modules.expert_blends import add_actions, multiply_densities
from pmoe_lightning.modules.option_policies import make_option_actor

OBSERVATION, A, B = 5, 2, 16
LOW, HIGH = [-2.0, 0.5], [1.0, 2.0]
SIZES = (16, 16)
RANDOM, DETERMINISTIC, MODE = ExplorationType.RANDOM, ExplorationType.DETERMINISTIC, ExplorationType.MODE
FACTORIES = (make_pmoe_actor, make_gaussian_actor, make_additive_moe_actor, make_mcp_actor)
MAKERS = [pytest.param(maker, id=maker.__name__.removeprefix("make_").removesuffix("_actor")) for maker in FACTORIES]


def make(maker=make_pmoe_actor, *, seed: int = 0, **arguments):
    torch.manual_seed(seed)
    return maker(OBSERVATION, LOW, HIGH, hidden_sizes=SIZES, **arguments)


def states(*batch: int, dtype: torch.dtype = torch.float32) -> TensorDict:
    observation = torch.randn(*batch, OBSERVATION, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return TensorDict(observation=observation, batch_size=batch)


def network_of(actor) -> nn.Module:
    """The network with the heads."""
    network = actor[0].module
    return network.experts if isinstance(network, BlendedNetwork) else network


# --- what an actor writes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (B,), (3, B)])
@pytest.mark.parametrize("return_log_prob", [False, True])
@pytest.mark.parametrize("maker", MAKERS)
def test_actor_writes_actions_and_nothing_else(maker, return_log_prob, batch):
    actor = make(maker, return_log_prob=return_log_prob)
    data = actor(states(*batch))
    shapes = {"action": (*batch, A)}
    if return_log_prob:
        shapes |= {"action_unsquashed": (*batch, A), "action_log_prob": batch}
    assert {key: value.shape for key, value in data.exclude("observation").items()} == shapes
    assert set(actor.out_keys) == set(shapes)
    assert actor.in_keys == ["observation"]
    assert actor.spec["action"].is_in(data["action"])
    distribution = actor.get_dist(states(*batch))
    assert isinstance(distribution, TanhGaussianMixture)
    assert distribution.loc.shape == (*batch, 4 if maker is make_pmoe_actor else 1, A)


@pytest.mark.parametrize("exploration", [RANDOM, DETERMINISTIC, MODE], ids=str)
@pytest.mark.parametrize("maker", MAKERS)
def test_action_unsquashed_and_log_prob_belong_to_the_action(maker, exploration):
    actor = make(maker, return_log_prob=True)
    with torch.no_grad():
        network_of(actor).loc.bias += 9.0  # so far out that the score through the action itself would be wrong
    with set_exploration_type(exploration):
        data = actor(states(B))
    distribution, u = actor.get_dist(states(B)), data["action_unsquashed"]
    torch.testing.assert_close(data["action"], distribution.squash(u), rtol=1e-6, atol=1e-6)
    exact = distribution.log_prob_unsquashed(u) - distribution.log_abs_det_jacobian(u)
    torch.testing.assert_close(data["action_log_prob"], exact)
    assert (distribution.log_prob(data["action"]) - exact).abs().max() > 1.0


def test_keys_are_those_of_a_probabilistic_actor():
    ours = make(return_log_prob=True)
    network = TensorDictModule(
        lambda x: (x[..., :A], x[..., :A].exp()), in_keys=["observation"], out_keys=["loc", "scale"]
    )
    theirs = ProbabilisticActor(
        network, in_keys=["loc", "scale"], spec=ours.spec["action"], distribution_class=TanhNormal, return_log_prob=True
    )
    assert ours.log_prob_keys == theirs.log_prob_keys == ["action_log_prob"]
    assert ours.dist_sample_keys == theirs.dist_sample_keys == ["action"]
    assert ours[-1].log_prob_key == theirs[-1].log_prob_key


@pytest.mark.parametrize("return_log_prob", [False, True])
@pytest.mark.parametrize("rule", ["max_weight", "sample_component"])
def test_exploration_types(rule, return_log_prob):
    actor = make(deterministic=rule, return_log_prob=return_log_prob)
    distribution = actor.get_dist(states(1000))
    heaviest = distribution.squash(distribution.loc[torch.arange(1000), distribution.weights.argmax(-1)])

    def act(exploration):
        with set_exploration_type(exploration):
            return actor(states(1000))["action"].detach()

    assert not torch.equal(act(RANDOM), act(RANDOM))
    assert not (act(RANDOM).unsqueeze(-2) == distribution.component_modes).all(-1).any()
    torch.testing.assert_close(act(MODE), heaviest)
    chosen = (act(DETERMINISTIC).unsqueeze(-2) - distribution.component_modes).abs().amax(-1).argmin(-1)
    torch.testing.assert_close(act(DETERMINISTIC) if rule == "max_weight" else heaviest, heaviest)
    if rule == "max_weight":
        assert torch.equal(chosen, distribution.weights.argmax(-1))
    else:  # weights near 1/4 each: every component is used
        assert set(chosen.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ExplorationType, ids=str)
@pytest.mark.parametrize("rule", ["max_weight", "sample_component"])
@pytest.mark.parametrize("maker", MAKERS)
def test_scoring_an_action_does_not_change_it(maker, rule, kind):
    """Under every exploration type the action with a log-probability is the one without, and is scored where it is."""
    arguments = {"deterministic": rule} if maker in (make_pmoe_actor, make_gaussian_actor) else {}
    results = []
    for return_log_prob in (False, True):
        actor = make(maker, return_log_prob=return_log_prob, **arguments)
        torch.manual_seed(1)
        with set_exploration_type(kind), torch.no_grad():
            results.append(actor(states(B)))
    plain, scored = results
    assert torch.equal(plain["action"], scored["action"])
    distribution = actor.get_dist(states(B))
    torch.testing.assert_close(scored["action"], distribution.squash(scored["action_unsquashed"]), rtol=0, atol=0)
    if kind in (ExplorationType.MEAN, ExplorationType.MEDIAN):
        expected = getattr(distribution, kind.name.lower())
        torch.testing.assert_close(scored["action"], expected)


def test_any_probabilistic_actor_can_act_by_mean_and_median():
    ours = make()
    theirs = ProbabilisticActor(
        ours[0],
        in_keys=["mixture_logits", "loc", "scale"],
        distribution_class=TanhGaussianMixture,
        distribution_kwargs={"low": torch.tensor(LOW), "high": torch.tensor(HIGH)},
        spec=ours.spec["action"],
    )
    for kind in (ExplorationType.MEAN, ExplorationType.MEDIAN, MODE, DETERMINISTIC):
        with set_exploration_type(kind):
            torch.testing.assert_close(theirs(states(B))["action"], ours(states(B))["action"])


# --- TorchRL's combined modules --------------------------------------------------------------------------------------


def make_common() -> TensorDictModule:
    return TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION), in_keys=["observation"], out_keys=["hidden"])


class HiddenValue(nn.Module):
    """Reads what it is given, whatever that is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(1)

    def forward(self, *inputs):
        return self.layer(torch.cat(inputs, -1))


def make_policies(return_log_prob: bool = False) -> dict:
    """Every policy of the package, by name, as makers that take the key of the observation."""

    def best_value(observation_key="observation"):
        keys = {"observation_key": observation_key}
        critics = [make_qvalue_network(OBSERVATION, A, hidden_sizes=SIZES, **keys) for _ in range(2)]
        return BestValueActor(make(**keys), critics)

    def options(observation_key="observation"):
        keys = {"observation_key": observation_key, "return_log_prob": return_log_prob}
        return make_option_actor(OBSERVATION, LOW, HIGH, hidden_sizes=SIZES, **keys)

    plain = {maker.__name__: partial(make, maker, return_log_prob=return_log_prob) for maker in FACTORIES}
    selected = lambda **keys: make(return_log_prob=True, **keys).select_out_keys("action")  # noqa: E731
    return plain | {"best_value": best_value, "options": options, "selected": selected}


COMBINED = {
    "SafeSequential": lambda make_policy: SafeSequential(
        make_policy(), ValueOperator(HiddenValue(), in_keys=["observation", "action"])
    ),
    "ActorCriticWrapper": lambda make_policy: ActorCriticWrapper(
        make_policy(), ValueOperator(HiddenValue(), in_keys=["observation"])
    ),
    "ActorValueOperator": lambda make_policy: ActorValueOperator(
        make_common(), make_policy(observation_key="hidden"), ValueOperator(HiddenValue(), in_keys=["hidden"])
    ),
    "ActorCriticOperator": lambda make_policy: ActorCriticOperator(
        make_common(), make_policy(observation_key="hidden"), ValueOperator(HiddenValue(), in_keys=["hidden", "action"])
    ),
}


@pytest.mark.parametrize("return_log_prob", [False, True])
@pytest.mark.parametrize("combination", COMBINED)
@pytest.mark.parametrize("name", make_policies())
def test_torchrls_combined_modules_take_every_policy(name, combination, return_log_prob):
    """What they promise is what they write, and no parameter of a distribution is part of it."""
    combined = COMBINED[combination](make_policies(return_log_prob)[name])
    data = states(B)
    if name == "options":
        data["option_previous"] = torch.zeros(B, 1, dtype=torch.long)
    written = {*combined(data.copy()).keys()} - {*data.keys()}
    assert written == {*combined.out_keys} == {*combined.spec.keys()}
    assert not written & {"mixture_logits", "loc", "scale"}
    if combination in ("ActorValueOperator", "ActorCriticOperator"):
        torch.manual_seed(1)
        whole = combined(data.copy())
        torch.manual_seed(1)
        assert torch.equal(combined.get_policy_operator()(data.copy())["action"], whole["action"])


@pytest.mark.parametrize("maker", MAKERS)
def test_the_policy_taken_out_of_a_combined_module_has_its_distribution(maker):
    """TorchRL makes it of the actor's layers, whose entries ``select_out_keys`` hides again."""
    combined = COMBINED["ActorValueOperator"](partial(make, maker))
    policy = combined.get_policy_operator()
    assert isinstance(policy.get_dist(states(B)), TanhGaussianMixture)
    assert {*policy.select_out_keys("action")(states(B)).keys()} == {"observation", "action"}


def test_rollouts_of_a_combined_module_hold_no_parameters():
    env = make_env("Pendulum-v1", num_envs=2, seed=0)
    low, high = env.action_spec.space.low[0], env.action_spec.space.high[0]
    actor = make_pmoe_actor(3, low, high, hidden_sizes=SIZES, return_log_prob=True)
    policy = ActorCriticWrapper(actor, ValueOperator(nn.Linear(3, 1), in_keys=["observation"]))
    rollout = env.rollout(3, policy)
    assert {"action", "action_unsquashed", "action_log_prob", "state_value"} <= {*rollout.keys()}
    assert not {"mixture_logits", "loc", "scale"} & {*rollout.keys()}
    env.close()


def test_the_spec_follows_what_is_selected():
    actor = make(return_log_prob=True)
    assert {*actor.spec.keys()} == {*actor.out_keys}
    assert {*actor.select_out_keys("action").spec.keys()} == {"action"}
    assert actor.spec["action"].is_in(actor(states(B))["action"])
    assert actor.to(torch.float64).spec["action"].dtype == torch.float64


@pytest.mark.parametrize("return_log_prob", [False, True])
def test_samples_are_pathwise(return_log_prob):
    actor = make(return_log_prob=return_log_prob)
    actor(states(B))["action"].sum().backward()
    assert network_of(actor).loc.weight.grad.any()


def test_observation_key():
    actor = make(observation_key="observation_normalized")
    assert actor.in_keys == ["observation_normalized"]
    assert "action" in actor(states(B).rename_key_("observation", "observation_normalized"))


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("router", "reaches"), [("detached", False), ("attached", True)])
def test_router_reaches_the_trunk_only_when_attached(router, reaches):
    actor = make(router=router)
    actor.get_dist(states(B)).weights.square().sum().backward()
    trunk = [
        parameter.grad is not None and bool(parameter.grad.any()) for parameter in network_of(actor).trunk.parameters()
    ]
    assert trunk == [reaches] * 4
    assert network_of(actor).router.weight.grad.any()


def test_both_routers_compute_the_same_weights():
    attached, detached = (make(router=router).get_dist(states(B)).weights for router in ("attached", "detached"))
    torch.testing.assert_close(attached, detached)


def test_weights_means_and_scales_depend_on_the_state():
    distribution = make().get_dist(states(B))
    for value in (distribution.weights, distribution.loc, distribution.scale):
        assert (value.std(0) > 1e-4).all()


def test_state_independent_scale():
    actor = make(scale="state_independent", num_components=3)
    scale = actor.get_dist(states(B)).scale
    assert scale.shape == (B, 3, A)
    torch.testing.assert_close(scale, torch.ones(B, 3, A))
    free = [parameter for parameter in network_of(actor).parameters() if parameter.shape == (3, A)]
    assert len(free) == 1
    with torch.no_grad():
        free[0][1, 0] = 0.5
    expected = torch.ones(3, A)
    expected[1, 0] = torch.tensor(0.5).exp()
    torch.testing.assert_close(actor.get_dist(states(B)).scale, expected.expand(B, 3, A))
    scale.sum().backward()
    assert free[0].grad.ne(0).all()


@pytest.mark.parametrize(("bias", "log_scale"), [(50.0, 2.0), (-50.0, -20.0), (0.0, None)])
def test_state_dependent_scale_is_clamped(bias, log_scale):
    actor = make()
    with torch.no_grad():
        network_of(actor).log_scale.bias += bias
    scale = actor.get_dist(states(B)).scale
    if log_scale is None:
        assert scale.std() > 0
    else:
        torch.testing.assert_close(scale, torch.full_like(scale, log_scale).exp())


@pytest.mark.parametrize("maker", MAKERS)
def test_orthogonal_initialisation(maker):
    network = network_of(make(maker, initialization="orthogonal"))
    trunk = [layer for layer in network.trunk if isinstance(layer, nn.Linear)]
    heads = [layer for layer in (network.loc, network.log_scale, network.router) if layer is not None]
    for layer, gain in [(layer, 2**0.5) for layer in trunk] + [(layer, 0.01) for layer in heads]:
        weight = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), rtol=1e-5, atol=1e-6)
        assert not layer.bias.any()


def test_default_initialisation_is_that_of_linear_layers():
    network = network_of(make())
    for layer in (module for module in network.modules() if isinstance(module, nn.Linear)):
        bound = layer.in_features**-0.5
        for values in (layer.weight, layer.bias):
            assert 0.5 * bound < values.abs().max() <= bound


def test_gaussian_actor_is_one_component_without_a_router():
    actor = make(make_gaussian_actor)
    assert actor.get_dist(states(B)).num_components == 1
    assert network_of(actor).router is None
    torch.manual_seed(0)
    peer = make_pmoe_actor(OBSERVATION, LOW, HIGH, num_components=1, hidden_sizes=SIZES)
    assert {k: v.shape for k, v in actor.state_dict().items()} == {k: v.shape for k, v in peer.state_dict().items()}


# --- experts merged into one Gaussian --------------------------------------------------------------------------------


def expert_parameters(K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits, loc = torch.randn(7, K, generator=generator).double(), torch.randn(7, K, A, generator=generator).double()
    return logits, loc, torch.rand(7, K, A, generator=generator).double() + 0.2


def test_added_actions_have_the_density_of_the_sum():
    """Against the moments of sums of draws: mean and variance within 4.9 standard errors (1e-6 per number)."""
    logits, loc, scale = expert_parameters(3)
    _, mean, deviation = add_actions(logits, loc, scale)
    torch.manual_seed(0)
    draws = (logits.softmax(-1).unsqueeze(-1) * (loc + scale * torch.randn(100_000, *loc.shape))).sum(-2)
    error = deviation.squeeze(-2) / 100_000**0.5
    assert ((draws.mean(0) - mean.squeeze(-2)).abs() < 4.9 * error).all()
    assert ((draws.var(0) / deviation.squeeze(-2).square() - 1).abs() < 4.9 * (2 / 100_000) ** 0.5).all()


def test_multiplied_densities_are_the_normalised_product():
    """log N(u; mu, sigma) minus the weighted sum of the experts' log-densities is the same for every u."""
    logits, loc, scale = expert_parameters(3)
    _, mean, deviation = multiply_densities(logits, loc, scale)
    u = torch.linspace(-3, 3, 41, dtype=torch.float64).view(-1, 1, 1, 1)
    experts = torch.distributions.Normal(loc, scale).log_prob(u)
    product = (logits.sigmoid().unsqueeze(-1) * experts).sum(-2)
    constant = torch.distributions.Normal(mean, deviation).log_prob(u).squeeze(-2) - product
    torch.testing.assert_close(constant, constant[:1].expand_as(constant))


@pytest.mark.parametrize("compose", [add_actions, multiply_densities])
def test_one_expert_alone_is_left_as_it_is(compose):
    """add: any weight is 1; multiply: a weight near 1 changes nothing."""
    _, loc, scale = expert_parameters(1)
    logits, mean, deviation = compose(torch.full((7, 1), 40.0, dtype=torch.float64), loc, scale)
    assert not logits.any()
    torch.testing.assert_close((mean, deviation), (loc, scale))


@pytest.mark.parametrize("maker", [make_additive_moe_actor, make_mcp_actor])
def test_every_expert_and_the_gate_learn_from_the_action(maker):
    actor = make(maker, num_experts=3)
    assert actor.get_dist(states(B)).num_components == 1
    actor(states(B))["action"].sum().backward()
    for name, parameter in actor.named_parameters():
        assert parameter.grad.ne(0).any(), name
    heads = network_of(actor)
    assert heads.router.weight.grad.ne(0).any(-1).all() and heads.loc.weight.grad.ne(0).any(-1).all()


# --- bounds and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
def test_bounds_come_from_the_action_spec(maker):
    spec = Bounded(torch.tensor([-0.4, 1.0, -3.0]), torch.tensor([0.4, 1.5, 7.0]), shape=(3,))
    torch.manual_seed(0)
    actor = maker(OBSERVATION, spec.space.low, spec.space.high, hidden_sizes=SIZES)
    with torch.no_grad():
        network_of(actor).log_scale.bias += 1.0  # wide enough to come near both bounds
    action = actor(states(5000))["action"].detach()
    assert spec.is_in(action)
    span = spec.space.high - spec.space.low
    assert (action.amin(0) < spec.space.low + 0.05 * span).all() and (
        action.amax(0) > spec.space.high - 0.05 * span
    ).all()
    assert actor.spec["action"] == spec


@pytest.mark.parametrize(
    ("low", "high", "arguments", "message"),
    [
        (LOW, HIGH, {"num_components": 0}, "num_components=0 must be a whole number >= 1"),
        (LOW, HIGH, {"router": "shared"}, "router='shared' must be one of detached, attached"),
        (LOW, HIGH, {"scale": "fixed"}, "scale='fixed' must be one of state_dependent"),
        (LOW, HIGH, {"initialization": "xavier"}, "initialization='xavier' must be one of"),
        (LOW, HIGH, {"activation": "gelu"}, "activation='gelu' must be one of relu, tanh"),
        (LOW, HIGH, {"hidden_sizes": ()}, r"hidden_sizes=\(\) must be a list"),
        (
            LOW,
            HIGH,
            {"deterministic": "best"},
            "deterministic='best' must be one of max_weight",
        ),
        ([0.0], [1.0, 1.0], {}, "action bounds must be finite vectors"),
        ([1.0, 0.0], [0.5, 1.0], {}, "action bounds .* low < high"),
        ([0.0, 0.0], [0.0, 1.0], {}, "action bounds .* low < high"),
        ([-float("inf")], [1.0], {}, "action bounds must be finite"),
        (-1.0, 1.0, {}, "action bounds must be finite vectors"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(monkeypatch, low, high, arguments, message):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # users run without the shape checks of the tests
    with pytest.raises(ValueError, match=message):
        make_pmoe_actor(OBSERVATION, low, high, **{"hidden_sizes": SIZES, **arguments})


# --- as a module -----------------------------------------------------------------------------------------------------


def same_actions(first, second, data: TensorDict) -> bool:
    actions = []
    for actor in (first, second):
        torch.manual_seed(0)
        actions.append(actor(data.clone())["action"])
    return torch.equal(*actions)


@pytest.mark.parametrize("maker", MAKERS)
def test_state_dict_round_trip(maker):
    actor = make(maker)
    other = maker(OBSERVATION, [-1.0, -1.0], [1.0, 1.0], hidden_sizes=SIZES)
    assert not same_actions(actor, other, states(B))
    other.load_state_dict(actor.state_dict())  # the bounds are buffers and come along
    assert same_actions(actor, other, states(B))


@pytest.mark.parametrize("return_log_prob", [False, True])
@pytest.mark.parametrize("maker", MAKERS)
def test_deepcopy(maker, return_log_prob):
    actor = make(maker, return_log_prob=return_log_prob)
    twin = copy.deepcopy(actor)
    assert same_actions(actor, twin, states(B))
    assert twin.out_keys == actor.out_keys
    with torch.no_grad():
        network_of(twin).loc.bias += 1.0
    assert not same_actions(actor, twin, states(B))


@pytest.mark.parametrize("maker", MAKERS)
def test_float64(maker):
    actor = make(maker, return_log_prob=True).to(torch.float64)
    data = actor(states(B, dtype=torch.float64))
    assert {value.dtype for value in data.values()} == {torch.float64}
    assert actor.get_dist(states(B, dtype=torch.float64)).low.dtype == torch.float64


@pytest.mark.parametrize("maker", MAKERS)
def test_functional_parameters(maker):
    """As SACLoss calls its actor: the parameters live outside and are put in for the call."""
    actor, other = make(maker, return_log_prob=True), make(maker, seed=1, return_log_prob=True)
    parameters = from_module(other).data
    with parameters.to_module(actor, preserve_module_state=False):
        torch.manual_seed(0)
        inside = actor(states(B))
        distribution = actor.get_dist(states(B))
    torch.manual_seed(0)
    expected = other(states(B))
    for key in ("action", "action_unsquashed", "action_log_prob"):
        torch.testing.assert_close(inside[key], expected[key], rtol=0, atol=0)
    torch.testing.assert_close(distribution.loc, other.get_dist(states(B)).loc, rtol=0, atol=0)
    assert same_actions(actor, make(maker), states(B))  # its own parameters are back


@pytest.mark.parametrize("maker", MAKERS)
def test_an_ensemble_runs_under_vmap(maker):
    actors = [make(maker, seed=seed, return_log_prob=True) for seed in range(3)]
    parameters = from_modules(*actors, as_module=False)

    def act(values, data):
        with values.to_module(actors[0]):
            return actors[0](data)

    with set_exploration_type(DETERMINISTIC):
        together = torch.vmap(act, (0, None))(parameters, states(B))
        alone = torch.stack([actor(states(B)) for actor in actors])
    for key in ("action", "action_unsquashed", "action_log_prob"):
        torch.testing.assert_close(together[key], alone[key])
    with set_exploration_type(RANDOM):
        drawn = torch.vmap(act, (0, None), randomness="different")(parameters, states(B))
    assert drawn["action"].shape == (3, B, A)


# --- in TorchRL's own losses -----------------------------------------------------------------------------------------


def transitions(actor) -> TensorDict:
    data = states(B)
    with torch.no_grad():
        actor(data)
    generator = torch.Generator().manual_seed(3)
    done = torch.rand(B, 1, generator=generator) < 0.2
    after = {
        "observation": torch.randn(B, OBSERVATION, generator=generator),
        "reward": torch.randn(B, 1, generator=generator),
    }
    data["next"] = TensorDict({**after, "done": done, "terminated": done}, batch_size=B)
    return data


def assert_every_parameter_learns(out: TensorDict, loss: nn.Module) -> None:
    total = sum(value for key, value in out.items() if key.startswith("loss_"))
    assert total.isfinite()
    total.backward()
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


ACTORS = [
    pytest.param(make_pmoe_actor, {}, id="pmoe"),
    pytest.param(make_pmoe_actor, {"router": "attached", "scale": "state_independent"}, id="pmoe_attached"),
    pytest.param(make_gaussian_actor, {}, id="gaussian"),
]


@pytest.mark.parametrize("return_log_prob", [False, True])
@pytest.mark.parametrize(("maker", "arguments"), ACTORS)
def test_actor_in_the_sac_loss_of_torchrl(maker, arguments, return_log_prob):
    actor = make(maker, return_log_prob=return_log_prob, **arguments)
    loss = SACLoss(
        actor, [make_qvalue_network(OBSERVATION, A, hidden_sizes=SIZES) for _ in range(2)], target_entropy="auto"
    )
    loss.make_value_estimator(gamma=0.9)
    SoftUpdate(loss, tau=0.005)
    assert_every_parameter_learns(loss(transitions(actor)), loss)
    assert loss.target_entropy == -A


@pytest.mark.parametrize(("maker", "arguments"), ACTORS)
def test_actor_in_the_ppo_loss_of_torchrl(maker, arguments):
    actor = make(maker, return_log_prob=True, **arguments)
    loss = ClipPPOLoss(
        actor, make_value_network(OBSERVATION, hidden_sizes=SIZES), entropy_coeff=0.01, normalize_advantage=True
    )
    data = transitions(actor)
    generator = torch.Generator().manual_seed(4)
    data["advantage"], data["value_target"] = torch.randn(2, B, 1, generator=generator)
    torch.manual_seed(5)
    out = loss(data)
    assert_every_parameter_learns(out, loss)
    assert out["kl_approx"].abs() < 1e-4
    torch.manual_seed(5)  # TorchRL takes the class's own entropy, not a Monte Carlo one
    torch.testing.assert_close(out["entropy"], actor.get_dist(data).entropy().mean())


def test_best_value_follows_the_component_that_the_critics_prefer():
    """The minimum over the critics decides: each critic alone would choose otherwise."""
    actor = make_pmoe_actor(2, [-1.0], [1.0], num_components=3, hidden_sizes=(8,))
    network = actor[0].module
    with torch.no_grad():
        network.loc.weight.zero_()
        network.loc.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
        network.router.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))  # the heaviest component is not the best one

    def critic(values):
        """Q as a function of the mode alone, given at the three modes."""

        def value(observation, action):
            k = (action.squeeze(-1).unsqueeze(-1) - torch.tensor([-1.0, 0.0, 1.0]).tanh()).abs().argmin(-1)
            return torch.tensor(values)[k].unsqueeze(-1)

        return TensorDictModule(value, in_keys=["observation", "action"], out_keys=["state_action_value"])

    policy = BestValueActor(actor, [critic([0.0, 1.0, 3.0]), critic([2.0, 1.0, 0.5])])
    out = policy(TensorDict(observation=torch.randn(4, 2), batch_size=4))
    assert set(out.keys()) == {"observation", "action"}
    torch.testing.assert_close(out["action"], torch.zeros(4, 1))  # minima are 0, 1 and 0.5
