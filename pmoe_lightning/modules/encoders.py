"""Encoders: from pixels to the vector that actor, critics and action transform take for the observation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float, UInt8
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from pmoe_lightning.limits import Limit, Width, checked

__all__ = ["PixelEncoder", "make_drq_encoder"]

_KERNEL = 3
Stride = Annotated[int, Limit(low=1, high=4)]


class PixelEncoder(TensorDictModuleBase):
    """``pixels`` uint8 [*B, C, H, W] -> ``observation`` float [*B, F], each in (-1, 1).

        pixels / 255 -> convolutions 3 x 3, each behind a ReLU -> linear [F] -> layer normalisation -> tanh

    As in SAC+AE (Yarats et al. 2021, arXiv 1910.01741) and DrQ (Kostrikov et al. 2021, arXiv 2004.13649), orthogonal
    weights and zero biases included.

    Args:
        shape: C, H and W of the pixels, all that are seen at once.
        channels: of the convolutions.
        strides: of the convolutions.
        features: F.

    Raises:
        ValueError: the pixels are fewer than the convolutions need, or not as many strides as channels.
    """

    in_keys = ["pixels"]
    out_keys = ["observation"]

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: Sequence[Width] = (32, 32, 32, 32),
        strides: Sequence[Stride] = (2, 1, 1, 1),
        features: Width = 50,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"pixels have a shape of three sides, [C, H, W], not {list(shape)}")
        if len(strides) != len(channels):
            raise ValueError(f"{len(channels)} channels and {len(strides)} strides are not of the same convolutions")
        self.shape, self.features = tuple(shape), features
        layers: list[nn.Module] = []
        wide, *sides = shape
        for out, stride in zip(channels, strides, strict=True):
            layers += [nn.Conv2d(wide, out, _KERNEL, stride), nn.ReLU()]
            wide, sides = out, [(side - _KERNEL) // stride + 1 for side in sides]
        if min(sides) < 1:
            raise ValueError(f"pixels of {shape[1]} x {shape[2]} are too few for {len(channels)} convolutions")
        self.convolutions = nn.Sequential(*layers)
        self.linear, self.norm = nn.Linear(wide * math.prod(sides), features), nn.LayerNorm(features)
        for layer in (*layers, self.linear):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1.0)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # both have one

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set("observation", self.encode(tensordict.get("pixels")))

    def encode(self, pixels: UInt8[Tensor, "*B C H W"]) -> Float[Tensor, "*B F"]:
        """The observation [*B, F] that pixels [*B, C, H, W] stand for."""
        rows = pixels.reshape(-1, *self.shape).to(self.linear.weight.dtype) / 255
        features = self.linear(self.convolutions(rows).flatten(1))
        return torch.tanh(self.norm(features)).reshape(*pixels.shape[:-3], self.features)


@checked
def make_drq_encoder(
    shape: Sequence[int],
    *,
    channels: Sequence[Width] = (32, 32, 32, 32),
    strides: Sequence[Stride] = (2, 1, 1, 1),
    features: Width = 50,
) -> PixelEncoder:
    """The encoder of DrQ, see ``PixelEncoder``, with its published sizes.

    Args:
        shape: of the pixels, [C, H, W].
        channels: of the convolutions, one after the other.
        strides: of the convolutions.
        features: numbers that the observation is made of.
    """
    return PixelEncoder(shape, channels=channels, strides=strides, features=features)
