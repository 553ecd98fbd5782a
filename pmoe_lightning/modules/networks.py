"""Multi-layer perceptrons, their initialisation and the precision of their products, shared by actors and critics."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmoe_lightning.limits import Width, checked
from pmoe_lightning.modules import onednn

Activation = Literal["relu", "tanh"]
HiddenSizes = Sequence[Width]
Initialization = Literal["default", "orthogonal", "lecun_normal"]
MatmulPrecision = Literal["float32", "float32-onednn", "bf16-hidden", "tf32"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
_STD_OF_CUT_NORMAL = 0.87962566103423978  # of a standard normal number between -2 and 2
_of_hidden_products: MatmulPrecision = "float32"


@checked
def set_matmul_precision(precision: MatmulPrecision) -> None:
    """The precision of matrix products in this process, as ``torch.set_float32_matmul_precision`` is of the process.

    Args:
        precision: ``float32``; ``float32-onednn``: on a CPU the products between hidden layers, which are nearly all
            the work of a network, are taken by oneDNN: other last bits, on AMD's CPUs from Zen 5 on in half the time;
            ``bf16-hidden``: the same products take bfloat16 factors, everything else stays float32, the weights too;
            ``tf32``: every product on a GPU rounds its factors to 10 bits.

    Raises:
        ValueError: an unknown precision.
    """
    global _of_hidden_products
    _of_hidden_products = precision
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def matmul_precision() -> MatmulPrecision:
    """What :func:`set_matmul_precision` chose."""
    if _of_hidden_products in ("bf16-hidden", "float32-onednn"):
        return _of_hidden_products
    return "tf32" if torch.get_float32_matmul_precision() == "high" else "float32"


def over_float32(precision: MatmulPrecision, size: int = 256, pairs: int = 9) -> float:
    """How many times as long a hidden product takes in this precision as in float32, on one core of this CPU.

    Measured in some milliseconds: the median over pairs, of which one half follows the other at once, so that another
    process on the same core slows both or is an outlier. No flag of a CPU says it: AMX makes bfloat16 faster, on some
    CPUs so does AVX-512 alone, and elsewhere its rounding is emulated; which library is faster depends on both.
    """
    before, threads = matmul_precision(), torch.get_num_threads()
    x, ratios = torch.full((size, size), 0.5), []
    torch.set_num_threads(1)
    try:
        for _ in range(pairs + 1):
            moments = []
            for each in (precision, "float32"):
                set_matmul_precision(each)
                moments.append(time.perf_counter())
                hidden_product(x, x)
            moments.append(time.perf_counter())
            ratios.append((moments[1] - moments[0]) / (moments[2] - moments[1]))
    finally:
        set_matmul_precision(before)
        torch.set_num_threads(threads)
    return statistics.median(ratios[1:])  # in the first pair kernels are chosen and made


def hidden_product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` between two hidden layers, in the precision that ``set_matmul_precision`` chose."""
    if _of_hidden_products == "bf16-hidden":
        return (x.bfloat16() @ y.bfloat16()).float()
    return onednn.product(x, y) if _of_hidden_products == "float32-onednn" else x @ y


def hidden_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear`` between two hidden layers, in the same precision."""
    if _of_hidden_products in ("bf16-hidden", "float32-onednn"):
        return hidden_product(x, weight.T) + bias
    return F.linear(x, weight, bias)


class HiddenLinear(nn.Linear):
    """A layer between two hidden layers."""

    def forward(self, input: Tensor) -> Tensor:
        return hidden_linear(input, self.weight, self.bias)


@checked
def make_mlp(
    in_features: int, hidden_sizes: HiddenSizes, activation: Activation, initialization: Initialization
) -> nn.Sequential:
    """Linear layers of the given widths, each followed by the activation.

    Raises:
        ValueError: no hidden layer, a width below 1, an unknown activation or initialisation.
    """
    layers: list[nn.Module] = []
    for out_features in hidden_sizes:
        layer = (HiddenLinear if layers else nn.Linear)(in_features, out_features)
        initialize(layer, initialization, gain=math.sqrt(2))
        layers += [layer, ACTIVATIONS[activation]()]
        in_features = out_features
    return nn.Sequential(*layers)


@checked
def initialize(layer: nn.Linear, initialization: Initialization, gain: float) -> None:
    """``default`` leaves PyTorch's uniform fan-in weights; the others zero the bias.

    ``orthogonal`` scales by ``gain``. ``lecun_normal`` (LeCun et al. 1998) has the variance 1 / fan-in whatever the
    gain, cut off at two deviations.
    """
    if initialization == "orthogonal":
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    if initialization == "lecun_normal":
        std = layer.in_features**-0.5 / _STD_OF_CUT_NORMAL
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(layer.bias)
