r"""CrossQ's critic: batch renormalisation in front of every linear layer, folded into that layer's weights.

A normalisation is an affine map x -> s x + t, per feature, with

    training:   s = gamma r / sigma_B,   t = beta + gamma d - s mu_B,        sigma_B = sqrt(var_B + eps)
                r = clip(sigma_B / sigma, 1/3, 3),   d = clip((mu_B - mu) / sigma, -5, 5),   held fixed
    frozen:     s = gamma / sigma,       t = beta - s mu,                    sigma = sqrt(var + eps)

where mu_B and var_B are of the batch, mu and var run along (Ioffe 2017, arXiv 1702.03275). Until the running statistics
have settled r = 1 and d = 0: plain batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167). The layer behind it
then is W' = W s, b' = b + W t. So nothing is ever normalised as a layer, which would read and write all rows several
times, and with running statistics the critic is a plain multi-layer perceptron: whatever takes the layers of a
``QValueNetwork`` takes these.

Source: Bhatt et al. (ICLR 2024), "CrossQ: Batch Normalization in Deep Reinforcement Learning for Greater Sample
Efficiency and Simplicity", arXiv 1902.05605, whose code has these constants.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.modules import ValueOperator

from pmoe_lightning.limits import Limit, NonNegativeInt, checked
from pmoe_lightning.modules.critics import BACKWARD, QValueNetwork
from pmoe_lightning.modules.networks import Activation, HiddenSizes, hidden_linear

Momentum = Annotated[float, Limit(low=0, high=1, high_included=False)]
EPSILON, MAX_SCALE, MAX_SHIFT = 1e-3, 3.0, 5.0
_STATISTICS = ("running_mean", "running_var")


class BatchRenormalization(nn.Module):
    """What one normalisation holds: gamma and beta, mu and var [H]."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))


class CrossQNetwork(QValueNetwork):
    """A ``QValueNetwork`` whose input and hidden layers are normalised; ``forward`` is the frozen form.

    Args:
        observation_dim, action_dim, hidden_sizes, activation: as for ``QValueNetwork``.
        momentum: what the running statistics keep of themselves at an update.
        warm_up: updates of plain batch normalisation, before r and d are used.

    Buffers: ``running_mean`` and ``running_var`` of every normalisation, ``num_updates`` [] (float, as the others, so
    that all of them are averaged over processes at once).
    """

    @checked
    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_sizes: HiddenSizes = (256, 256),
        activation: Activation = "relu",
        *,
        momentum: Momentum = 0.99,
        warm_up: NonNegativeInt = 100_000,
    ) -> None:
        super().__init__(observation_dim, action_dim, hidden_sizes, activation, "lecun_normal")
        self.momentum, self.warm_up = momentum, warm_up
        widths = [observation_dim + action_dim, *hidden_sizes]
        self.norms = nn.ModuleList([BatchRenormalization(width) for width in widths])
        self.register_buffer("num_updates", torch.zeros(()))

    @property
    def statistics(self) -> list[NestedKey]:
        """The names of what ``training_values`` returns anew."""
        norms = [("norms", str(k), name) for k in range(len(self.norms)) for name in _STATISTICS]
        return [*norms, "num_updates"]

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        linears = [(layer.weight, layer.bias) for layer in self.layers if isinstance(layer, nn.Linear)]
        norms = [norm for norm in self.norms if isinstance(norm, BatchRenormalization)]
        affines = [_running_affine(n.weight, n.bias, n.running_mean, n.running_var) for n in norms]
        first, *hidden, last = (fold(*linear, *affine) for linear, affine in zip(linears, affines, strict=True))
        x = self.activation(F.linear(torch.cat([observation, action], -1), *first))
        for layer in hidden:
            x = self.activation(hidden_linear(x, *layer))
        return F.linear(x, *last)

    def stacked_layers(self, parameters: TensorDictBase) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases with the running statistics folded in: the frozen critics as a plain network."""
        folded = []
        for k, linear in enumerate(zip(*super().stacked_layers(parameters), strict=True)):
            norm = parameters["norms", str(k)]
            affine = _running_affine(norm["weight"], norm["bias"], norm["running_mean"], norm["running_var"])
            folded.append(fold(*linear, *affine))
        weights, biases = zip(*folded, strict=True)
        return list(weights), list(biases)

    def training_values(
        self, parameters: TensorDictBase, observation: Float[Tensor, "N O"], action: Float[Tensor, "N A"]
    ) -> tuple[Float[Tensor, "Q N"], dict[NestedKey, Tensor]]:
        """Q_1..Q_n of a batch by the statistics of that batch, and what the running statistics become.

        Derivatives lead through the statistics of the batch, not through r and d. Nothing is changed: whoever takes the
        step takes over the new statistics with it. For CrossQ the batch is (s, a) and (s', a') together.

        Args:
            parameters: of n critics of this architecture, stacked.
        """
        weights, biases = super().stacked_layers(parameters)
        norms = [parameters["norms", str(k)] for k in range(len(self.norms))]
        warm = parameters["num_updates"] >= self.warm_up
        x = torch.cat([observation, action], -1)
        # Raw observations have means far beyond their deviations: in one pass, these would cancel.
        of_input = x.mean(0), x.var(0, unbiased=False)
        values, moments = [], []
        for critic in range(len(weights[0])):
            h, (mean, var), seen = x, of_input, []
            for k, norm in enumerate(norms):
                seen.append((mean, var))
                weight, bias, *running = (norm[name][critic] for name in _NORM)
                affine = _batch_affine(mean, var, weight, bias, (running[0], running[1]), warm[critic])
                weight, bias = fold(weights[k][critic], biases[k][critic], *affine)
                if k == len(norms) - 1:
                    values.append((h * weight[0]).sum(-1) + bias[0])
                    break
                product = (hidden_linear if k else F.linear)(h, weight, bias)
                h, mean, mean_square = _ActivationWithMoments.apply(product, self.activation)
                var = (mean_square - mean.square()).clamp_min(0.0)
            moments.append(seen)
        return torch.stack(values), self._statistics_after(parameters, moments)

    def _statistics_after(self, parameters: TensorDictBase, moments: list[list[tuple]]) -> dict[NestedKey, Tensor]:
        after: dict[NestedKey, Tensor] = {"num_updates": parameters["num_updates"].detach() + 1}
        for k, of_critics in enumerate(zip(*moments, strict=True)):
            for name, of_batch in zip(_STATISTICS, zip(*of_critics, strict=True), strict=True):
                key = ("norms", str(k), name)
                after[key] = parameters[key].detach().lerp(torch.stack(of_batch).detach(), 1 - self.momentum)
        return after


class _ActivationWithMoments(torch.autograd.Function):
    """y of an activation and, over the rows, the means of y and of y^2.

    With the slope back to x written out as one pass over y. Taken apart, as automatic differentiation takes it, each of
    the three is a pass of its own, and the sum of a product and a matrix copies the matrix.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, activation: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        y = activation(x)
        return y, y.mean(0), y.square().mean(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, nn.Module], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[0])
        ctx.back = BACKWARD[type(inputs[1])]

    @staticmethod
    def backward(ctx: Any, slope: Tensor, of_mean: Tensor, of_square: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        of_moments = (of_mean + 2 * of_square * y) / len(y)
        # Behind the activation: the sum of a product and a matrix would be one product onto a copy of the matrix.
        return ctx.back(slope, y) + ctx.back(of_moments, y), None


_NORM = ("weight", "bias", *_STATISTICS)


def fold(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The layer [*Q, H, I] that does to x what this one does to s x + t: W' = W s, b' = b + W t."""
    return weight * scale.unsqueeze(-2), bias + (weight * shift.unsqueeze(-2)).sum(-1)


def _running_affine(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight * (var + EPSILON).rsqrt()
    return scale, bias - mean * scale


def _batch_affine(
    mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor], warm: Tensor
) -> tuple[Tensor, Tensor]:
    """s and t of a batch; ``running``: mu and var; ``warm``: whether r and d are used."""
    deviation, running_deviation = (var + EPSILON).sqrt(), (running[1] + EPSILON).sqrt()
    r = (deviation.detach() / running_deviation).clamp(1 / MAX_SCALE, MAX_SCALE)
    d = ((mean.detach() - running[0]) / running_deviation).clamp(-MAX_SHIFT, MAX_SHIFT)
    scale = weight * torch.where(warm, r, 1.0) / deviation
    return scale, bias + weight * torch.where(warm, d, 0.0) - mean * scale


@checked
def make_crossq_network(
    observation_dim: int,
    action_dim: int,
    *,
    hidden_sizes: HiddenSizes = (256, 256),
    activation: Activation = "relu",
    momentum: Momentum = 0.99,
    warm_up: NonNegativeInt = 100_000,
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
) -> ValueOperator:
    """``observation, action -> state_action_value`` [*B, 1] by a ``CrossQNetwork``.

    Args:
        observation_dim, action_dim: O and A.
        hidden_sizes: of the layers between.
        activation: behind each of them.
        momentum: what the running statistics keep of themselves at an update.
        warm_up: updates of plain batch normalisation, before r and d are used.
        observation_key, action_key: the entries that are read.
    """
    network = CrossQNetwork(observation_dim, action_dim, hidden_sizes, activation, momentum=momentum, warm_up=warm_up)
    return ValueOperator(network, in_keys=[observation_key, action_key], out_keys=["state_action_value"])
