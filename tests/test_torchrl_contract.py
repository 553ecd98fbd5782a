"""What TorchRL's own tests ask of loss modules and policies, asked of ours.

Keys and their renaming, dispatch, reductions, prioritised weights, functional parameters, copies, casts and compiling;
the subjects of ``test/objectives/test_sac.py`` and ``test_ppo.py`` of pytorch/rl. Which parameters a loss reaches is in
``test_losses.py``, what an actor writes under each exploration type in ``test_actors.py``.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from modes import in_every_mode
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.objectives import LossModule, SoftUpdate

from pmoe_lightning import (
    DACLoss,
    EvolveAction,
    Frequency,
    Marginalized,
    PMOEPPOLoss,
    PMOESACLoss,
    make_hamiltonian_transform,
    make_option_actor,
    make_option_value_network,
    make_pmoe_actor,
    make_qvalue_network,
    make_value_network,
)

OBSERVATION_DIM, A, B = 3, 2, 12
SIZES = (8, 8)
OBSERVATION, ACTION = "observation", "action"


def transform(**arguments):
    return make_hamiltonian_transform(OBSERVATION_DIM, A, num_leapfrog_steps=2, hidden_size=8, **arguments)


class ForeignCritic(nn.Module):
    """Any Q network that is not the package's own: its copies run side by side under ``torch.vmap``."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(OBSERVATION_DIM + A, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, observation, action):
        return self.layers(torch.cat([observation, action], -1))


def make_sac(
    observation=OBSERVATION, action=ACTION, *, foreign: bool = False, evolves: bool = False, estimator=None, **arguments
):
    keys = {"observation_key": observation, "action_key": action}
    actor = make_pmoe_actor(OBSERVATION_DIM, [-1.0] * A, [1.0] * A, num_components=3, hidden_sizes=SIZES, **keys)
    critics = [make_qvalue_network(OBSERVATION_DIM, A, hidden_sizes=SIZES, **keys) for _ in range(2)]
    if foreign:
        names = {"in_keys": [observation, action], "out_keys": ["state_action_value"]}
        critics = [TensorDictModule(ForeignCritic(), **names) for _ in range(2)]
    if evolves:
        arguments["action_transform"] = transform()
    loss = PMOESACLoss(actor, critics, estimator=estimator or Frequency(), **arguments)
    loss.make_value_estimator(gamma=0.9)
    SoftUpdate(loss, tau=0.005)  # TorchRL warns of target networks that nobody updates
    return loss


def make_ppo(observation=OBSERVATION, action=ACTION, *, routed: bool = True, **arguments):
    keys = {"observation_key": observation, "action_key": action}
    sizes = {"hidden_sizes": SIZES}
    actor = make_pmoe_actor(
        OBSERVATION_DIM, [-1.0] * A, [1.0] * A, num_components=3, return_log_prob=True, **sizes, **keys
    )
    value = make_value_network(OBSERVATION_DIM, **sizes, observation_key=observation)
    if routed:
        arguments |= {
            "qvalue_network": make_qvalue_network(OBSERVATION_DIM, A, **sizes, **keys),
            "routing": Frequency(),
        }
    loss = PMOEPPOLoss(actor, value, entropy_coeff=0.1, **arguments)
    loss.make_value_estimator(gamma=0.9, lmbda=0.95)
    return loss


def make_dac(observation=OBSERVATION):
    keys = {"hidden_sizes": SIZES, "observation_key": observation}
    actor = make_option_actor(OBSERVATION_DIM, [-1.0] * A, [1.0] * A, num_options=3, return_log_prob=True, **keys)
    return DACLoss(actor, make_option_value_network(OBSERVATION_DIM, 3, **keys), entropy_coeff=0.1)


LOSSES = {
    "sac": make_sac,
    "sac_marginalized": partial(make_sac, estimator=Marginalized()),
    "sac_hamiltonian": partial(make_sac, evolves=True),
    "sac_foreign": partial(make_sac, foreign=True, evolves=True),
    "ppo": partial(make_ppo, routed=False),
    "ppo_routed": make_ppo,
    "dac": make_dac,
}
EVERY = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
MIXTURES = pytest.mark.parametrize(
    "make", [make for name, make in LOSSES.items() if name != "dac"], ids=list(LOSSES)[:-1]
)


def seeded(make: Callable[..., LossModule], seed: int = 0, *arguments, **options) -> LossModule:
    torch.manual_seed(seed)
    return make(*arguments, **options)


def batch_for(loss: LossModule, *shape: int) -> TensorDict:
    """Everything the losses read, under the keys that the loss itself names."""
    shape = shape or (B,)
    generator = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(*shape, *size, generator=generator)

    observation = loss.actor_network.in_keys[0]
    data = TensorDict(
        {observation: normal(OBSERVATION_DIM), ("next", observation): normal(OBSERVATION_DIM)}, batch_size=shape
    )
    done = torch.rand(*shape, 1, generator=generator) < 0.3
    data.update({"next": {"reward": normal(1), "done": done, "terminated": done}})
    if isinstance(loss, DACLoss):
        data["option_previous"] = torch.randint(-1, 3, (*shape, 1), generator=generator)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(4)
        loss.actor_network(data)
    names = ["advantage", "advantage_high", "advantage_low", "value_target"]
    return data.update({name: normal(1) for name in names})


def outcome(loss: LossModule, data: TensorDict, seed: int = 7) -> TensorDict:
    torch.manual_seed(seed)
    return loss(data.copy()).detach()


def assert_same(first: TensorDict, second: TensorDict, **tolerance) -> None:
    torch.testing.assert_close(first.to_dict(), second.to_dict(), **(tolerance or {"rtol": 0, "atol": 0}))


# --- keys ------------------------------------------------------------------------------------------------------------


@EVERY
def test_in_keys_are_all_that_is_read_and_out_keys_all_that_is_promised(make):
    """As in TorchRL, PPO does not name the advantage: it takes one that is there, and computes one otherwise."""
    loss = seeded(make)
    data = batch_for(loss)
    if isinstance(loss, PMOEPPOLoss):
        data = data.exclude("advantage", "value_target")
    assert_same(outcome(loss, data.select(*loss.in_keys)), outcome(loss, data))
    assert set(loss.out_keys) <= set(loss(data).keys())


@EVERY
def test_a_loss_writes_nothing_into_the_minibatch_but_the_priority(make):
    """Neither parameters of the mixture nor advantages: the next to read it would take them for its own."""
    loss = seeded(make)
    data = batch_for(loss)
    if isinstance(loss, PMOEPPOLoss):
        data = data.exclude("advantage", "value_target")
    before = set(data.keys(True, True))
    loss(data)
    assert set(data.keys(True, True)) - before <= {"td_error"}


@EVERY
def test_a_loss_takes_tensors_by_name(make):
    """TorchRL's dispatch: entries as keywords, nested ones joined by underscores; the results in order of out_keys."""
    loss = seeded(make)
    data = batch_for(loss).select(*loss.in_keys)
    entries = {"_".join(key) if isinstance(key, tuple) else key: data[key] for key in loss.in_keys}
    torch.manual_seed(7)
    results = loss(**entries)
    expected = outcome(loss, data)
    for key, value in zip(loss.out_keys, results, strict=True):
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)


def test_what_a_critic_reads_is_read():
    critic = TensorDictModule(ForeignCritic(), in_keys=["goal", "action"], out_keys=["state_action_value"])
    loss = seeded(make_ppo, routed=False, qvalue_network=critic, routing=Frequency())
    assert "goal" in loss.in_keys
    loss(batch_for(loss).set("goal", torch.randn(B, OBSERVATION_DIM)))["loss_qvalue"].backward()


@EVERY
def test_selected_out_keys_are_all_that_comes_out(make):
    loss = seeded(make)
    data, wanted = batch_for(loss), loss.out_keys[:2]
    expected = outcome(loss, data)
    loss.select_out_keys(*wanted)
    assert loss.out_keys == wanted
    assert_same(outcome(loss, data), expected.select(*wanted))


NESTED = {"observation": ("agent", "state"), "action": ("agent", "control")}


@MIXTURES
def test_nested_keys_change_nothing(make):
    """Observation, action, reward and flags under other, nested names; what is stored beside the action follows it."""
    plain, nested = seeded(make), seeded(make, 0, *NESTED.values())
    expected = outcome(plain, batch_for(plain))
    data = batch_for(nested)
    outside = {"reward": ("agent", "reward"), "done": ("agent", "done"), "terminated": ("agent", "terminated")}
    for name, key in outside.items():
        data["next", *key] = data["next"].pop(name)
    nested.set_keys(**outside)
    if isinstance(nested, PMOEPPOLoss):
        assert {("agent", "control_unsquashed"), ("agent", "control_log_prob")} <= set(nested.in_keys)
        for name in ("advantage", "value_target"):
            data["estimates", name] = data.pop(name)
        nested.set_keys(advantage=("estimates", "advantage"), value_target=("estimates", "value_target"))
    assert_same(outcome(nested, data), expected)


@MIXTURES
def test_nested_keys_reach_the_value_estimator(make):
    """Without an advantage PPO computes it, and SAC always computes its target, from the renamed entries."""
    plain, nested = seeded(make), seeded(make)
    nested.set_keys(reward="gain", terminated="is_terminal", done="is_over")
    data = batch_for(plain).exclude("advantage", "value_target")
    renamed = data.clone()
    for old, new in {"reward": "gain", "terminated": "is_terminal", "done": "is_over"}.items():
        renamed["next", new] = renamed["next"].pop(old)
    assert_same(outcome(nested, renamed), outcome(plain, data))


@EVERY
def test_an_unknown_key_is_refused(make):
    with pytest.raises((ValueError, AttributeError), match="nonsense"):
        seeded(make).set_keys(nonsense="x")


def test_the_priority_goes_where_it_is_asked_for():
    loss = seeded(make_sac)
    data = batch_for(loss)
    loss.set_keys(priority=("sampling", "priority"))
    loss(data)
    assert data["sampling", "priority"].shape == (B,) and "td_error" not in data.keys()  # noqa: SIM118


# --- batches, reductions and weights ---------------------------------------------------------------------------------


@EVERY
def test_any_batch_shape(make):
    """[3, 4] transitions are 12 transitions: the same losses for the same random numbers."""
    loss = seeded(make)
    data = batch_for(loss, 3, 4)
    shaped, flat = outcome(loss, data), outcome(loss, data.reshape(-1))
    over_the_first_dimension = ("ESS", "explained_variance")  # in TorchRL's PPO
    shaped, flat = (out.exclude(*over_the_first_dimension) for out in (shaped, flat))
    assert_same(shaped, flat, rtol=1e-5, atol=1e-6)


@MIXTURES
def test_reductions(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # alpha and entropy are left out of what is not reduced
        each, mean, total = (seeded(make, reduction=reduction) for reduction in ("none", "mean", "sum"))
    data = batch_for(mean)
    per_state = outcome(each, data)
    for key in (key for key in mean.out_keys if key.startswith("loss_")):
        assert per_state[key].shape == (B,), key
        torch.testing.assert_close(outcome(mean, data)[key], per_state[key].mean(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outcome(total, data)[key], per_state[key].sum(), rtol=1e-5, atol=1e-5)


def test_what_is_not_reduced_can_carry_its_scalars():
    loss = seeded(make_sac, reduction="none", scalar_output_mode="non_tensor")
    out = loss(batch_for(loss))
    assert out["alpha"] == 1.0 and out["entropy"].ndim == 0
    assert out["loss_actor"].shape == (B,)


def test_weights_of_a_prioritised_buffer_weigh_every_loss():
    """sum_i w_i l_i / sum_i w_i, as in SACLoss."""
    each = seeded(make_sac, reduction="none", scalar_output_mode="exclude", use_prioritized_weights=False)
    weighted = seeded(make_sac, use_prioritized_weights=True)
    data = batch_for(weighted)
    weights = torch.rand(B, generator=torch.Generator().manual_seed(5))
    per_state, out = outcome(each, data), outcome(weighted, data.copy().set("priority_weight", weights))
    for key in ("loss_actor", "loss_qvalue", "loss_alpha", "loss_frequency"):
        expected = (weights * per_state[key]).sum() / weights.sum()
        torch.testing.assert_close(out[key], expected, rtol=1e-5, atol=1e-6)


@MIXTURES
def test_padded_steps_do_not_count(make):
    """("collector", "mask"), which TorchRL's slice sampler writes: the losses are those of the other steps."""
    loss = seeded(make)
    data = batch_for(loss)
    mask = torch.arange(B).view(B, 1) < 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        per_state = outcome(seeded(make, reduction="none"), data)
    out = outcome(loss, data.copy().set(("collector", "mask"), mask))
    for key in (key for key in loss.out_keys if key.startswith("loss_")):
        torch.testing.assert_close(out[key], per_state[key][:8].mean(), rtol=1e-5, atol=1e-6)


# --- parameters ------------------------------------------------------------------------------------------------------


def parameters_of(module: nn.Module) -> TensorDict:
    return TensorDict.from_module(module)


@EVERY
def test_functional_parameters(make):
    """The parameters of another loss, put in for one call, give the other's losses, and leave no trace."""
    loss, other = seeded(make), seeded(make, 1)
    data = batch_for(loss)
    own, expected = outcome(loss, data), outcome(other, data)
    with parameters_of(other).data.to_module(loss, preserve_module_state=False):
        assert_same(outcome(loss, data), expected)
    assert_same(outcome(loss, data), own)


@EVERY
def test_a_state_dict_carries_everything(make):
    loss, other = seeded(make), seeded(make, 1)
    with torch.no_grad():
        for value in loss.state_dict().values():
            value.mul_(1.1)  # targets and temperature, too, are no longer what they are at the start
    data = batch_for(loss)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(outcome(other, data), outcome(loss, data))


@EVERY
def test_a_copy_is_equal_and_its_own(make):
    """Also after a call, when TorchRL holds detached parameters in a cache."""
    loss = seeded(make)
    data = batch_for(loss)
    before = outcome(loss, data)
    twin = copy.deepcopy(loss)
    assert_same(outcome(twin, data), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert_same(outcome(loss, data), before)
    fresh = seeded(make, 1)
    fresh.load_state_dict(twin.state_dict())
    assert_same(outcome(twin, data), outcome(fresh, data))


@in_every_mode
@EVERY
def test_a_loss_in_every_mode(make, mode):
    """The critics that the actor sees are cast with the rest, after a first call too; compiled it is one graph."""
    loss = seeded(make)
    data = batch_for(loss)
    loss(data.copy())
    loss.to(mode.dtype)
    data = data.apply(lambda value: value.to(mode.dtype) if value.is_floating_point() else value)
    expected = outcome(loss, data)
    torch.manual_seed(7)
    out = mode.run(loss)(data.copy())
    assert_same(out.detach(), expected, rtol=1e-5, atol=1e-6)
    assert {out[key].dtype for key in loss.out_keys} == {mode.dtype}
    sum(out[key] for key in loss.out_keys if key.startswith("loss_")).backward()
    assert {parameter.grad.dtype for parameter in loss.parameters() if parameter.grad is not None} == {mode.dtype}
    assert {value.dtype for value in loss.state_dict().values()} == {mode.dtype}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sac_foreign"])
def test_pickled_losses_come_back(name):
    """TorchRL's own SACLoss does not: its ``vmap`` is a local function. Nor does ours with foreign critics."""
    loss = seeded(LOSSES[name])
    data = batch_for(loss)
    assert_same(outcome(pickle.loads(pickle.dumps(loss)), data), outcome(loss, data))


# --- policies --------------------------------------------------------------------------------------------------------


def make_policy(observation=OBSERVATION, action=ACTION):
    """An actor that also scores its actions, and the transform behind it, with the critics of a loss."""
    keys = {"observation_key": observation, "action_key": action}
    actor = make_pmoe_actor(OBSERVATION_DIM, [-1.0] * A, [1.0] * A, hidden_sizes=SIZES, return_log_prob=True, **keys)
    critics = [make_qvalue_network(OBSERVATION_DIM, A, hidden_sizes=SIZES, **keys) for _ in range(2)]
    return PMOESACLoss(actor, critics, action_transform=transform()).acting_policy(actor)


def states(key=OBSERVATION) -> TensorDict:
    return TensorDict({key: torch.randn(B, OBSERVATION_DIM, generator=torch.Generator().manual_seed(2))}, batch_size=B)


def acted(policy, data: TensorDict) -> TensorDict:
    torch.manual_seed(7)
    with torch.no_grad():
        return policy(data.copy())


def test_nested_keys_change_nothing_in_acting():
    observation, action = NESTED.values()
    plain, nested = acted(seeded(make_policy), states()), seeded(make_policy, 0, observation, action)
    assert {observation, action} <= {*nested.in_keys, *nested.out_keys}
    out = acted(nested, states(observation))["agent"]
    for suffix in ("", "_unsquashed", "_log_prob"):
        assert torch.equal(out[f"control{suffix}"], plain[f"action{suffix}"])


def test_a_policy_is_copied_pickled_saved_and_cast():
    policy = seeded(make_policy)
    expected = acted(policy, states())
    copies = [copy.deepcopy(policy), pickle.loads(pickle.dumps(policy)), seeded(make_policy, 1)]
    copies[-1].load_state_dict(policy.state_dict())
    for twin in copies:
        assert_same(acted(twin, states()), expected)
    exact = acted(policy.to(torch.float64), states().double())
    assert {value.dtype for value in exact.values()} == {torch.float64}


def test_a_policy_writes_what_is_selected():
    policy = seeded(make_policy)
    expected = acted(policy, states())["action"]
    out = acted(policy.select_out_keys("action"), states())
    assert set(out.keys()) == {"observation", "action"} and torch.equal(out["action"], expected)


def test_actions_evolve_under_vmap():
    """State by state as all together."""
    evolve = seeded(make_policy)[-1]
    assert isinstance(evolve, EvolveAction)
    generator = torch.Generator().manual_seed(5)
    observation, u, momentum = (torch.randn(B, size, generator=generator) for size in (OBSERVATION_DIM, A, A))

    def one(observation, u, momentum):
        return evolve.evolve(observation, u.tanh(), momentum, u, u.sum(-1), False)

    together = one(observation, u, momentum)
    for mapped, expected in zip(torch.vmap(one)(observation, u, momentum), together, strict=True):
        torch.testing.assert_close(mapped, expected)
