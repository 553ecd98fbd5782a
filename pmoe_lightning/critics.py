"""Action-value and value networks as TensorDict modules, and the forward pass of several critics side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.modules import ValueOperator

from pmoe_lightning.networks import Initialization, hidden_linear, initialize, make_mlp


class QValueNetwork(nn.Module):
    """Q(s, a): an MLP of the concatenated observation [*B, O] and action [*B, A]; returns [*B, 1]."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_sizes: Sequence[int] = (256, 256),
        activation: str = "relu",
        initialization: Initialization = "default",
    ) -> None:
        super().__init__()
        self.layers = make_mlp(observation_dim + action_dim, hidden_sizes, activation, initialization)
        output = nn.Linear(hidden_sizes[-1], 1)
        initialize(output, initialization, gain=1.0)
        self.layers.append(output)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.layers(torch.cat([observation, action], -1))


def make_qvalue_network(
    observation_dim: int,
    action_dim: int,
    *,
    hidden_sizes: Sequence[int] = (256, 256),
    activation: str = "relu",
    initialization: Initialization = "default",
    observation_key: str = "observation",
) -> ValueOperator:
    """``observation, action -> state_action_value`` [*B, 1]. SAC takes a list of two of them."""
    network = QValueNetwork(observation_dim, action_dim, hidden_sizes, activation, initialization)
    return ValueOperator(network, in_keys=[observation_key, "action"])


def make_value_network(
    observation_dim: int,
    *,
    hidden_sizes: Sequence[int] = (64, 64),
    activation: str = "tanh",
    initialization: Initialization = "orthogonal",
    observation_key: str = "observation",
) -> ValueOperator:
    """``observation -> state_value`` [*B, 1]."""
    layers = _value_layers(observation_dim, 1, hidden_sizes, activation, initialization)
    return ValueOperator(layers, in_keys=[observation_key])


def make_option_value_network(
    observation_dim: int,
    num_options: int,
    *,
    hidden_sizes: Sequence[int] = (64, 64),
    activation: str = "tanh",
    initialization: Initialization = "orthogonal",
    observation_key: str = "observation",
) -> ValueOperator:
    """``observation -> option_value`` [*B, K]: q(s, o) of every option o."""
    layers = _value_layers(observation_dim, num_options, hidden_sizes, activation, initialization)
    return ValueOperator(layers, in_keys=[observation_key], out_keys=["option_value"])


def _value_layers(
    observation_dim: int,
    num_values: int,
    hidden_sizes: Sequence[int],
    activation: str,
    initialization: Initialization,
) -> nn.Sequential:
    layers = make_mlp(observation_dim, hidden_sizes, activation, initialization)
    output = nn.Linear(hidden_sizes[-1], num_values)
    initialize(output, initialization, gain=1.0)
    return layers.append(output)


def stacked_qvalue(
    network: QValueNetwork,
    parameters: TensorDictBase,
    observation: Float[Tensor, "*B O"],
    action: Float[Tensor, "*B A"],
) -> Float[Tensor, "Q *B"]:
    """Q_1..Q_n(s, a) of n critics whose parameters are stacked along the first dimension.

    The same numbers as ``torch.vmap`` over ``parameters.to_module(network)``, without its clones and layout changes,
    which cost about 2 ms of a 10 ms SAC update.

    Args:
        network: the architecture.
        parameters: its parameters by name, each with a leading dimension n (``SACLoss.qvalue_network_params``).
        observation, action: the inputs, with the same batch dimensions.
    """
    inputs = torch.cat([observation, action], -1)
    inputs = inputs.view(-1, inputs.shape[-1])
    values = []
    linears = [(str(i), layer) for i, layer in enumerate(network.layers) if isinstance(layer, nn.Linear)]
    activation = network.layers[1]
    weights = [parameters["layers", name, "weight"].unbind(0) for name, _ in linears]
    biases = [parameters["layers", name, "bias"].unbind(0) for name, _ in linears]
    for critic in range(len(weights[0])):
        x = inputs
        for depth in range(len(linears)):
            linear = hidden_linear if 0 < depth < len(linears) - 1 else F.linear
            x = linear(x, weights[depth][critic], biases[depth][critic])
            x = activation(x) if depth + 1 < len(linears) else x
        values.append(x)
    return torch.stack(values).view(-1, *action.shape[:-1])
