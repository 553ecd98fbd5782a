"""Action-value and value networks as TensorDict modules, and the forward pass of several critics at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tensordict import TensorDictBase, TensorDictParams
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.modules import ValueOperator

from pmoe_lightning.limits import checked
from pmoe_lightning.modules.borrowed import Borrowed
from pmoe_lightning.modules.networks import (
    Activation,
    HiddenSizes,
    Initialization,
    hidden_linear,
    hidden_product,
    initialize,
    make_mlp,
)

Norm = tuple[Float[Tensor, "Q H"], Float[Tensor, "Q H"]]
"""Gain and offset of a layer normalisation, critics along the first dimension."""
_LAYER_NORM_EPSILON = 1e-5


class QValueNetwork(nn.Module):
    """Q(s, a): an MLP of the concatenated observation [*B, O] and action [*B, A]; returns [*B, 1]."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_sizes: HiddenSizes = (256, 256),
        activation: Activation = "relu",
        initialization: Initialization = "default",
    ) -> None:
        super().__init__()
        self.layers = make_mlp(observation_dim + action_dim, hidden_sizes, activation, initialization)
        output = nn.Linear(hidden_sizes[-1], 1)
        initialize(output, initialization, gain=1.0)
        self.layers.append(output)

    @property
    def activation(self) -> nn.Module:
        """What stands between the layers."""
        return self.layers[1]

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.layers(torch.cat([observation, action], -1))

    def stacked_layers(self, parameters: TensorDictBase) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of all linear layers, first to last, from parameters by name."""
        linears = [str(i) for i, layer in enumerate(self.layers) if isinstance(layer, nn.Linear)]
        weights, biases = ([parameters["layers", i, kind] for i in linears] for kind in ("weight", "bias"))
        return weights, biases

    def layer_norms(self, parameters: TensorDictBase) -> list[Norm]:
        """Gain and offset of every layer normalisation before an activation; none here."""
        return []


class LayerNormNetwork(QValueNetwork):
    """A ``QValueNetwork`` with layer normalisation (Ba et al. 2016, arXiv 1607.06450) before every activation.

    The same for training and for every other use, row by row. Between its kinks Q is curved in the action, where that
    of a relu network is linear.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_sizes: HiddenSizes = (256, 256),
        activation: Activation = "relu",
        initialization: Initialization = "default",
    ) -> None:
        super().__init__(observation_dim, action_dim, hidden_sizes, activation, initialization)
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=_LAYER_NORM_EPSILON) for width in hidden_sizes])

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        x, *norms = torch.cat([observation, action], -1), *self.norms
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Linear) and norms:
                x = norms.pop(0)(x)
        return x

    def layer_norms(self, parameters: TensorDictBase) -> list[Norm]:
        norms = [parameters["norms", str(k)] for k in range(len(self.norms))]
        return [(norm["weight"], norm["bias"]) for norm in norms]


@checked
def make_qvalue_network(
    observation_dim: int,
    action_dim: int,
    *,
    hidden_sizes: HiddenSizes = (256, 256),
    activation: Activation = "relu",
    initialization: Initialization = "default",
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
) -> ValueOperator:
    """``observation, action -> state_action_value`` [*B, 1]. SAC takes a list of two of them.

    Args:
        observation_dim, action_dim: O and A.
        hidden_sizes: of the layers between.
        activation: behind each of them.
        initialization: of the weights.
        observation_key, action_key: the entries that are read.
    """
    network = QValueNetwork(observation_dim, action_dim, hidden_sizes, activation, initialization)
    return ValueOperator(network, in_keys=[observation_key, action_key], out_keys=["state_action_value"])


@checked
def make_layer_norm_network(
    observation_dim: int,
    action_dim: int,
    *,
    hidden_sizes: HiddenSizes = (256, 256),
    activation: Activation = "relu",
    initialization: Initialization = "default",
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
) -> ValueOperator:
    """``observation, action -> state_action_value`` [*B, 1] by a ``LayerNormNetwork``.

    Args:
        observation_dim, action_dim: O and A.
        hidden_sizes: see ``make_qvalue_network``.
        activation: see ``make_qvalue_network``.
        initialization: see ``make_qvalue_network``.
        observation_key, action_key: the entries that are read.
    """
    network = LayerNormNetwork(observation_dim, action_dim, hidden_sizes, activation, initialization)
    return ValueOperator(network, in_keys=[observation_key, action_key], out_keys=["state_action_value"])


def make_value_network(
    observation_dim: int,
    *,
    hidden_sizes: HiddenSizes = (64, 64),
    activation: Activation = "tanh",
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
    hidden_sizes: HiddenSizes = (64, 64),
    activation: Activation = "tanh",
    initialization: Initialization = "orthogonal",
    observation_key: NestedKey = "observation",
) -> ValueOperator:
    """``observation -> option_value`` [*B, K]: q(s, o) of every option o."""
    layers = _value_layers(observation_dim, num_options, hidden_sizes, activation, initialization)
    return ValueOperator(layers, in_keys=[observation_key], out_keys=["option_value"])


def _value_layers(
    observation_dim: int,
    num_values: int,
    hidden_sizes: HiddenSizes,
    activation: Activation,
    initialization: Initialization,
) -> nn.Sequential:
    layers = make_mlp(observation_dim, hidden_sizes, activation, initialization)
    output = nn.Linear(hidden_sizes[-1], num_values)
    initialize(output, initialization, gain=1.0)
    return layers.append(output)


Products = tuple[tuple[Float[Tensor, "N H"], ...], ...]
"""x W^T + b of the hidden layers of every critic, first to last; N rows, one for each action."""


class KnownProducts(NamedTuple):
    """What K samples of each state have computed in the hidden layers, for one of these samples.

    Ranking K actions takes K evaluations of the critics. That of the best is among them: only its derivative is new.

    Example:
        >>> qvalue, products = stacked_qvalue_and_products(*layers, relu, observation, actions)     # [Q, K, *B]
        >>> known = KnownProducts(products, qvalue.min(0).values.argmax(0))
        >>> qvalue = stacked_qvalue(*layers, relu, observation, of_best, known)                     # [Q, *B]
    """

    products: Products
    sample: Int[Tensor, "*B"]
    """Which of the K."""

    def at(self, critic: int, layer: int, x: Float[Tensor, "B H"], weight: Float[Tensor, "I H"]) -> Tensor:
        """What a critic's hidden layer makes of x, which is that of the sample; a derivative reaches x alone."""
        of_all = self.products[critic][layer].detach().unflatten(0, (-1, self.sample.numel()))
        return _KnownProduct.apply(x, weight, of_all.take_along_dim(self.sample.view(1, -1, 1), 0).squeeze(0))


def stacked_qvalue(
    weights: Sequence[Float[Tensor, "Q _ _"]],
    biases: Sequence[Float[Tensor, "Q _"]],
    activation: Callable[[Tensor], Tensor],
    observation: Float[Tensor, "*B O"],
    action: Float[Tensor, "*S A"],
    known: KnownProducts | None = None,
    norms: Sequence[Norm] = (),
) -> Float[Tensor, "Q *S"]:
    """Q_1..Q_n(s, a) of n critics of one shape, at actions [*S, *B, A] of the states [*B].

    The same numbers as ``torch.vmap`` over the critics at repeated states, but one critic after the other, because
    batched products are slower on a CPU and one critic's layers fit into its cache. The states' part of a first layer
    is computed once for all actions of a state; a last layer of one output is no matrix product at all.

    Args:
        weights, biases: of every linear layer of a ``QValueNetwork``, first to last, critics along the first dimension.
        activation: between layers.
        observation, action: the inputs; the sample dimensions of the actions come first.
        known: of the actions, which are one of the samples of before: no hidden product is computed anew.
        norms: of ``QValueNetwork.layer_norms``, where there are any.
    """
    return stacked_qvalue_and_products(weights, biases, activation, observation, action, known, norms)[0]


def stacked_qvalue_and_products(
    weights: Sequence[Float[Tensor, "Q _ _"]],
    biases: Sequence[Float[Tensor, "Q _"]],
    activation: Callable[[Tensor], Tensor],
    observation: Float[Tensor, "*B O"],
    action: Float[Tensor, "*S A"],
    known: KnownProducts | None = None,
    norms: Sequence[Norm] = (),
) -> tuple[Float[Tensor, "Q *S"], Products]:
    """``stacked_qvalue``, and what its hidden layers have computed."""
    # Matrices throughout: products of tensors with more dimensions would be batched.
    states, actions = (value.reshape(-1, value.shape[-1]) for value in (observation, action))
    values, products = [], []
    for critic in range(len(weights[0])):
        (first, bias), *hidden, (last, offset) = ((w[critic], b[critic]) for w, b in zip(weights, biases, strict=True))
        own = [(gain[critic], shift[critic]) for gain, shift in norms]

        def activate(x: Tensor, layer: int, own: Sequence[tuple[Tensor, Tensor]] = own) -> Tensor:
            return activation(F.layer_norm(x, x.shape[-1:], *own[layer], eps=_LAYER_NORM_EPSILON) if own else x)

        if len(states) == len(actions):
            h = activate(F.linear(torch.cat([states, actions], -1), first, bias), 0)
        else:
            of_state, of_action = first.split([states.shape[-1], actions.shape[-1]], -1)
            x = F.linear(actions, of_action).unflatten(0, (-1, len(states))) + F.linear(states, of_state, bias)
            h = activate(x, 0).flatten(0, 1)
        of_critic: list[Tensor] = []
        for k, (weight, bias) in enumerate(hidden):
            of_critic.append(hidden_linear(h, weight, bias) if known is None else known.at(critic, k, h, weight))
            h = activate(of_critic[-1], k + 1)
        values.append((h * last[0]).sum(-1) + offset[0])
        products.append(tuple(of_critic))
    return torch.stack(values).view(-1, *action.shape[:-1]), tuple(products)


class _KnownProduct(torch.autograd.Function):
    """x W^T + b, given that value: only its derivative by x is taken."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, product: Tensor) -> Tensor:
        return product.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return hidden_product(slope, weight), None, None


#: What an activation with output y makes of a slope; relu's is one pass over memory where a product with y > 0 is two.
BACKWARD: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
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
    weights, biases = network.stacked_layers(parameters)
    biases = [bias.unsqueeze(1) for bias in biases]
    norms = network.layer_norms(parameters)
    activation = network.activation
    back = BACKWARD[type(activation)]
    size, (n, width, _) = observation.shape[-1], weights[0].shape
    of_state, of_action = weights[0][..., :size].mT, weights[0][..., size:]
    from_state = (observation.reshape(1, -1, size) @ of_state + biases[0]).view(n, *observation.shape[:-1], width)

    def activate(x: Tensor, layer: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What follows a product [n, rows, H], and what that makes of a slope."""
        if not norms:
            y = activation(x)
            return y, lambda slope: back(slope, y)
        x, of_norm = _normalize_layer(x, *norms[layer])
        y = activation(x)
        return y, lambda slope: of_norm(back(slope, y))

    def evaluate(action: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        batch = action.shape[:-1]
        first = (action.reshape(1, -1, action.shape[-1]) @ of_action.mT).view(n, *batch, width)
        missing = first.ndim - from_state.ndim
        first = first + from_state.view(n, *[1] * missing, *from_state.shape[1:])
        h, backward = activate(first.view(n, -1, width), 0)
        backwards = [backward]
        for k, (weight, bias) in enumerate(zip(weights[1:-1], biases[1:-1], strict=True), 1):
            h, backward = activate(hidden_product(h, weight.mT) + bias, k)
            backwards.append(backward)
        values = torch.baddbmm(biases[-1], h, weights[-1].mT)

        def pullback(cotangent: Tensor) -> Tensor:
            slope = backwards[-1](cotangent.reshape(n, -1, 1) @ weights[-1])
            for weight, backward in zip(weights[-2:0:-1], backwards[-2::-1], strict=True):
                slope = backward(hidden_product(slope, weight))
            return (slope @ of_action).sum(0).view(action.shape)

        return values.view(n, *batch), pullback

    return evaluate


def _normalize_layer(
    x: Float[Tensor, "Q N H"], gain: Float[Tensor, "Q H"], offset: Float[Tensor, "Q H"]
) -> tuple[Float[Tensor, "Q N H"], Callable[[Tensor], Tensor]]:
    """Layer normalisation, and what it makes of a slope."""
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + _LAYER_NORM_EPSILON).rsqrt()
    unit, gain = centred * scale, gain.unsqueeze(1)

    def backward(slope: Tensor) -> Tensor:
        slope = slope * gain
        along = (slope * unit).mean(-1, keepdim=True)
        return scale * (slope - slope.mean(-1, keepdim=True) - unit * along)

    return unit * gain + offset.unsqueeze(1), backward


class QValueEnsemble(nn.Module):
    """Critics as a module of stacked parameters: an observation [*B, O] -> ``stacked_qvalue_at`` it.

    Holds the parameters it is given, not copies: those of ``SACLoss.qvalue_network_params`` stay the loss's own.
    """

    def __init__(self, network: QValueNetwork, parameters: TensorDictParams) -> None:
        super().__init__()
        self.parameters_by_name, self._architecture = parameters, Borrowed(network)

    def forward(self, observation: Tensor) -> Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]:
        return stacked_qvalue_at(self._architecture.module, self.parameters_by_name["module"], observation)
