"""Multi-layer perceptrons and their initialisation, shared by actors and critics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

Initialization = Literal["default", "orthogonal"]
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def make_mlp(
    in_features: int, hidden_sizes: Sequence[int], activation: str, initialization: Initialization
) -> nn.Sequential:
    """Linear layers of the given widths, each followed by the activation.

    Raises:
        ValueError: no hidden layer, a width below 1, an unknown activation or initialisation.
    """
    if not hidden_sizes or min(hidden_sizes) < 1:
        raise ValueError(f"hidden_sizes needs at least one width, all of them positive, not {list(hidden_sizes)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, not {activation!r}")
    layers: list[nn.Module] = []
    for out_features in hidden_sizes:
        layer = nn.Linear(in_features, out_features)
        initialize(layer, initialization, gain=math.sqrt(2))
        layers += [layer, ACTIVATIONS[activation]()]
        in_features = out_features
    return nn.Sequential(*layers)


def initialize(layer: nn.Linear, initialization: Initialization, gain: float) -> None:
    """``default`` leaves PyTorch's uniform fan-in weights; ``orthogonal`` scales by ``gain`` and zeroes the bias."""
    if initialization not in get_args(Initialization):
        raise ValueError(f"initialization must be one of {get_args(Initialization)}, not {initialization!r}")
    if initialization == "orthogonal":
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
