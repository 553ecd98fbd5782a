"""Action-value and value networks as TensorDict modules, and the forward pass of several critics side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDictBase, TensorDictParams
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.modules import ValueOperator

from pmoe_lightning.networks import Initialization, hidden_linear, hidden_product, initialize, make_mlp


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
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
) -> ValueOperator:
    """``observation, action -> state_action_value`` [*B, 1]. SAC takes a list of two of them."""
    network = QValueNetwork(observation_dim, action_dim, hidden_sizes, activation, initialization)
    return ValueOperator(network, in_keys=[observation_key, action_key], out_keys=["state_action_value"])


def make_value_network(
    observation_dim: int,
    *,
    hidden_sizes: Sequence[int] = (64, 64),
    activation: str = "tanh",
    initialization: Initialization = "orthogonal",
    observation_key: NestedKey = "observation",
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
    observation_key: NestedKey = "observation",
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
    weights: Sequence[Float[Tensor, "Q _ _"]],
    biases: Sequence[Float[Tensor, "Q _"]],
    activation: Callable[[Tensor], Tensor],
    observation: Float[Tensor, "*B O"],
    action: Float[Tensor, "*S A"],
) -> Float[Tensor, "Q *S"]:
    """Q_1..Q_n(s, a) of n critics of one shape side by side, at actions [*S, *B, A] of the states [*B].

    The same numbers as ``torch.vmap`` over the critics at repeated states. The first layers are one wide product, whose
    state part is taken once for all actions of a state; hidden layers are a product each, because batched products are
    slower on a CPU; a last layer of one output is no matrix product at all.

    Args:
        weights, biases: of every linear layer of a ``QValueNetwork``, first to last, critics along the first dimension.
        activation: between layers.
        observation, action: the inputs; the sample dimensions of the actions come first.
    """
    width = weights[0].shape[1]
    first, bias = weights[0].flatten(0, 1), biases[0].flatten()
    # Matrices throughout: products of tensors with more dimensions would be batched.
    states, actions = (value.reshape(-1, value.shape[-1]) for value in (observation, action))
    if len(states) == len(actions):
        x = F.linear(torch.cat([states, actions], -1), first, bias)
    else:
        of_state, of_action = first.split([states.shape[-1], actions.shape[-1]], -1)
        x = F.linear(actions, of_action).unflatten(0, (-1, len(states))) + F.linear(states, of_state, bias)
    values = []
    for critic, h in enumerate(activation(x).view(len(actions), -1).split(width, -1)):
        for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
            h = activation(hidden_linear(h, weight[critic], bias[critic]))
        values.append((h * weights[-1][critic, 0]).sum(-1) + biases[-1][critic, 0])
    return torch.stack(values).view(-1, *action.shape[:-1])


def stacked_layers(network: QValueNetwork, parameters: TensorDictBase) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of all linear layers, first to last, from the parameters of a network by name."""
    linears = [str(i) for i, layer in enumerate(network.layers) if isinstance(layer, nn.Linear)]
    return tuple([parameters["layers", i, kind] for i in linears] for kind in ("weight", "bias"))


# What an activation with output y makes of a slope; relu's is one pass over memory where a product with y > 0 is two.
_BACKWARD: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.ReLU: lambda slope, y: torch.ops.aten.threshold_backward(slope, y, 0.0),
    nn.Tanh: lambda slope, y: slope * (1 - y.square()),
}


def stacked_qvalue_at(
    network: QValueNetwork, parameters: TensorDictBase, observation: Float[Tensor, "*B O"]
) -> Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]:
    r"""Q_1..Q_n(s, .) in given states, as functions of the action that come with their derivative.

    What the leapfrog of an action transform asks for several times per state: the states' part of the first layer is
    computed once, and the chain rule is written out, which takes about a third of the time of automatic differentiation
    and works where that does not (without gradients, in inference mode, in an exported graph).

    Args:
        network, parameters, observation: as for ``stacked_qvalue``.

    Returns:
        the map a [*S, *B, A] -> (Q_i [n, *S, *B], pullback), pullback(c [n, *S, *B]) = sum_i c_i dQ_i/da [*S, *B, A].
    """
    names = [str(i) for i, layer in enumerate(network.layers) if isinstance(layer, nn.Linear)]
    weights = [parameters["layers", name, "weight"] for name in names]
    biases = [parameters["layers", name, "bias"].unsqueeze(1) for name in names]
    activation = network.layers[1]
    back = _BACKWARD[type(activation)]
    size, (n, width, _) = observation.shape[-1], weights[0].shape
    of_state, of_action = weights[0][..., :size].mT, weights[0][..., size:]
    from_state = (observation.reshape(1, -1, size) @ of_state + biases[0]).view(n, *observation.shape[:-1], width)

    def evaluate(action: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        batch = action.shape[:-1]
        first = (action.reshape(1, -1, action.shape[-1]) @ of_action.mT).view(n, *batch, width)
        missing = first.ndim - from_state.ndim
        first = first + from_state.view(n, *[1] * missing, *from_state.shape[1:])
        hidden = [activation(first).view(n, -1, width)]
        for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
            hidden.append(activation(hidden_product(hidden[-1], weight.mT) + bias))
        values = torch.baddbmm(biases[-1], hidden[-1], weights[-1].mT)

        def pullback(cotangent: Tensor) -> Tensor:
            slope = back(cotangent.reshape(n, -1, 1) @ weights[-1], hidden[-1])
            for weight, y in zip(weights[-2:0:-1], hidden[-2::-1], strict=True):
                slope = back(hidden_product(slope, weight), y)
            return (slope @ of_action).sum(0).view(action.shape)

        return values.view(n, *batch), pullback

    return evaluate


class QValueEnsemble(nn.Module):
    """Critics as a module of stacked parameters: an observation [*B, O] -> ``stacked_qvalue_at`` it.

    Holds the parameters it is given, not copies: those of ``SACLoss.qvalue_network_params`` stay the loss's own.
    """

    def __init__(self, network: QValueNetwork, parameters: TensorDictParams) -> None:
        super().__init__()
        self.parameters_by_name = parameters
        # The architecture alone; as a submodule its own weights would be trained, moved and saved for nothing.
        self.__dict__["network"] = network

    def forward(self, observation: Tensor) -> Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]:
        return stacked_qvalue_at(self.network, self.parameters_by_name["module"], observation)
