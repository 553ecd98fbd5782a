"""Action-value and value networks, and the stacked forward pass against TorchRL's vmap."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict, from_modules
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pmoe_lightning.modules import critics
from pmoe_lightning.modules.critics import QValueNetwork, make_qvalue_network, make_value_network

OBSERVATION, A, K, B = 5, 2, 3, 7


def stack(num_critics: int, **arguments) -> tuple[QValueNetwork, TensorDict]:
    """An architecture and the parameters of ``num_critics`` instances, stacked as ``SACLoss`` holds them."""
    torch.manual_seed(0)
    networks = [QValueNetwork(OBSERVATION, A, **arguments).double() for _ in range(num_critics)]
    return networks[0], from_modules(*networks, as_module=True)


def stacked(network, parameters, observation, action, *known):
    layers = network.stacked_layers(parameters)
    return critics.stacked_qvalue(*layers, network.layers[1], observation, action, *known)


def through_vmap(network, parameters, observation, action):
    def one(values, observation, action):
        with values.to_module(network):
            return network(observation, action).squeeze(-1)

    return torch.vmap(one, (0, None, None))(parameters, observation, action)


@pytest.mark.parametrize("num_critics", [1, 2, 3])
@pytest.mark.parametrize("batch", [(), (B,), (K, B), (K, 2, B)], ids=str)
def test_stacked_pass_equals_vmap(num_critics, batch):
    """Values, and gradients of parameters and inputs; the states are repeated over the sample dimensions in front."""
    network, parameters = stack(num_critics, hidden_sizes=(8, 6))
    results = []
    for compute in (stacked, through_vmap):
        torch.manual_seed(1)
        observation = torch.randn(*batch[-1:], OBSERVATION, dtype=torch.float64, requires_grad=True)
        action = torch.randn(*batch, A, dtype=torch.float64, requires_grad=True)
        values = compute(network, parameters, observation.expand(*batch, OBSERVATION), action)
        assert values.shape == (num_critics, *batch)
        weights = torch.randn(values.shape, dtype=torch.float64)
        leaves = [*parameters.parameters(), observation, action]
        results.append([values, *torch.autograd.grad((weights * values).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


def test_one_of_the_samples_is_evaluated_again_without_a_hidden_product():
    """Value and derivative are those of its own evaluation; the forward pass takes the first layers' products alone."""
    network, parameters = stack(2, hidden_sizes=(8, 6, 4))
    observation = torch.randn(B, OBSERVATION, dtype=torch.float64)
    actions = torch.randn(K, B, A, dtype=torch.float64)
    sample = torch.arange(B) % K
    action = actions[sample, torch.arange(B)].requires_grad_()
    layers = network.stacked_layers(parameters)
    _, products = critics.stacked_qvalue_and_products(*layers, network.layers[1], observation, actions)
    known = critics.KnownProducts(products, sample)
    with FlopCounterMode(display=False) as counter:
        value = stacked(network, parameters, observation, action, known)
    assert counter.get_total_flops() == 2 * 2 * B * (OBSERVATION + A) * 8
    expected = stacked(network, parameters, observation, action)
    torch.testing.assert_close(value, expected)
    weights = torch.randn_like(value)
    slopes = [torch.autograd.grad((weights * values).sum(), action)[0] for values in (value, expected)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("samples", [(K,), (K, 2), (1,)], ids=str)
def test_sampled_actions_share_the_state(samples):
    """Values and gradients are those of states that are repeated for every sample."""
    network, parameters = stack(2, hidden_sizes=(8, 6))
    observation = torch.randn(B, OBSERVATION, dtype=torch.float64, requires_grad=True)
    action = torch.randn(*samples, B, A, dtype=torch.float64, requires_grad=True)
    results = []
    for states in (observation, observation.expand(*samples, B, OBSERVATION)):
        values = stacked(network, parameters, states, action)
        assert values.shape == (2, *samples, B)
        leaves = [*parameters.parameters(), observation, action]
        results.append([values, *torch.autograd.grad((values**2).sum(), leaves)])
    for shared, repeated in zip(*results, strict=True):
        torch.testing.assert_close(shared, repeated, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    "arguments", [{"activation": "tanh"}, {"hidden_sizes": (4,)}, {"hidden_sizes": (4, 4, 4)}], ids=str
)
def test_stacked_pass_follows_the_architecture(arguments):
    network, parameters = stack(2, **arguments)
    observation, action = torch.randn(B, OBSERVATION).double(), torch.randn(B, A).double()
    values = stacked(network, parameters, observation, action)
    torch.testing.assert_close(values, through_vmap(network, parameters, observation, action))


def test_stacked_critics_are_independent():
    network, parameters = stack(2, hidden_sizes=(8,))
    observation, action = torch.randn(B, OBSERVATION).double(), torch.randn(B, A).double()
    stacked(network, parameters, observation, action)[1].sum().backward()
    for parameter in parameters.parameters():
        assert not parameter.grad[0].any() and parameter.grad[1].any()


@pytest.mark.parametrize("batch", [(), (B,), (2, B)])
def test_networks_write_one_value_per_state(batch):
    data = TensorDict(observation=torch.randn(*batch, OBSERVATION), action=torch.randn(*batch, A), batch_size=batch)
    qvalue, value = (
        make_qvalue_network(OBSERVATION, A, hidden_sizes=(8, 8)),
        make_value_network(OBSERVATION, hidden_sizes=(8, 8)),
    )
    assert qvalue(data.clone())["state_action_value"].shape == (*batch, 1)
    assert value(data.clone())["state_value"].shape == (*batch, 1)
    assert (qvalue.in_keys, value.in_keys) == (["observation", "action"], ["observation"])


def test_the_value_depends_on_every_input():
    observation, action = torch.randn(B, OBSERVATION, requires_grad=True), torch.randn(B, A, requires_grad=True)
    make_qvalue_network(OBSERVATION, A).module(observation, action).sum().backward()
    assert observation.grad.ne(0).any(0).all() and action.grad.ne(0).any(0).all()


def test_observation_key_is_read():
    data = TensorDict(pixels=torch.randn(B, OBSERVATION), action=torch.randn(B, A), batch_size=B)
    assert "state_action_value" in make_qvalue_network(OBSERVATION, A, observation_key="pixels")(data.clone())
    assert "state_value" in make_value_network(OBSERVATION, observation_key="pixels")(data.clone())


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def test_initialisation():
    *hidden, output = linear_layers(
        make_value_network(OBSERVATION, hidden_sizes=(16, 16))
    )  # orthogonal unless told otherwise
    for layer, gain in [(layer, 2.0) for layer in hidden] + [(output, 1.0)]:
        gram = (
            layer.weight @ layer.weight.T if layer.out_features <= layer.in_features else layer.weight.T @ layer.weight
        )
        torch.testing.assert_close(gram, gain * torch.eye(len(gram)), rtol=1e-5, atol=1e-5)
        assert not layer.bias.any()
    assert all(layer.bias.any() for layer in linear_layers(make_qvalue_network(OBSERVATION, A)))


def test_deepcopy_and_state_dict_round_trip():
    network = make_qvalue_network(OBSERVATION, A, hidden_sizes=(8,))
    other = make_qvalue_network(OBSERVATION, A, hidden_sizes=(8,))
    data = TensorDict(observation=torch.randn(B, OBSERVATION), action=torch.randn(B, A), batch_size=B)
    expected = network(data.clone())["state_action_value"]
    assert not torch.equal(other(data.clone())["state_action_value"], expected)
    other.load_state_dict(network.state_dict())
    for twin in (other, copy.deepcopy(network)):
        torch.testing.assert_close(twin(data.clone())["state_action_value"], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_sizes": ()}, r"hidden_sizes=\(\) must be a list"),
        ({"hidden_sizes": (8, 0)}, r"hidden_sizes=\(8, 0\) must be a list, each element a whole number >= 1"),
        ({"activation": "gelu"}, "activation='gelu' must be one of relu, tanh"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make", [lambda **kw: make_qvalue_network(OBSERVATION, A, **kw), lambda **kw: make_value_network(OBSERVATION, **kw)]
)
def test_unknown_switches_are_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_unknown_initialisation_is_refused(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # users run without the shape checks of the tests
    with pytest.raises(ValueError, match="initialization='xavier' must be one of"):
        make_qvalue_network(OBSERVATION, A, initialization="xavier")
