"""Float32 products of matrices by oneDNN, which on some CPUs takes half the time of the library behind ``x @ y``.

On an x86 CPU that library is MKL, which on AMD's leaves the wide half of every vector register unused. That costs half
of the time where the CPU multiplies a whole register at once (Zen 5), and nothing where it takes two halves in turn
(Zen 4). PyTorch has oneDNN too, but asks it for layers with fixed weights alone. The operator here asks it for any
product, and is one of PyTorch's own to automatic differentiation, ``vmap``, fake tensors and the compiler.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

#: Multiplications of a product below which asking costs more than is won: a product of 64 x 256 x 256.
SMALLEST = 2**22


def is_available() -> bool:
    """Whether this build of PyTorch has oneDNN for this CPU."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y``, of x [*N, I] and y [I, H], or of x [*B, N, I] and y [*B, I, H], by oneDNN where that is worth it.

    It is worth it for float32 on a CPU and from 2^22 multiplications on. An exported graph gets ``x @ y``, because it
    is for every machine and every number of rows.
    """
    if torch.compiler.is_exporting() or x.device.type != "cpu" or not x.dtype == y.dtype == torch.float32:
        return x @ y
    rows = x.numel() // x.shape[-1] if y.ndim == 2 else x.shape[-2]
    if rows * y.shape[-2] * y.shape[-1] < SMALLEST or not is_available():
        return x @ y
    if y.ndim > 2:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        pairs = zip(*(z.expand(*batch, *z.shape[-2:]).reshape(-1, *z.shape[-2:]) for z in (x, y)), strict=True)
        return torch.stack([torch.ops.pmoe_lightning.product(*pair) for pair in pairs]).unflatten(0, batch)
    return torch.ops.pmoe_lightning.product(x.reshape(-1, x.shape[-1]), y).view(*x.shape[:-1], y.shape[-1])


_library = torch.library.Library("pmoe_lightning", "DEF")
_library.define("product(Tensor x, Tensor y) -> Tensor", tags=[torch.Tag.needs_exact_strides])


def _by_onednn(x: Tensor, y: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, y.mT, None, "none", [], "")


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, y = ctx.saved_tensors
    needs_x, needs_y = ctx.needs_input_grad
    multiply = torch.ops.pmoe_lightning.product
    return multiply(slope, y.mT) if needs_x else None, multiply(x.mT, slope) if needs_y else None


def _over_batch(info: Any, dims: tuple[int | None, int | None], x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    x, y = (z if dim is None else z.movedim(dim, 0) for z, dim in zip((x, y), dims, strict=True))
    return x @ y, 0


_library.impl("product", _by_onednn, "CPU")
_NAME = "pmoe_lightning::product"
torch.library.register_fake(_NAME, lambda x, y: x.new_empty(x.shape[0], y.shape[1]), lib=_library)
torch.library.register_autograd(_NAME, _backward, setup_context=_save, lib=_library)
torch.library.register_vmap(_NAME, _over_batch, lib=_library)


@cache
def teach_compiler() -> None:
    """Have compiled programs call PyTorch's kernel. The operator above is Python, which they would wait for."""
    from torch._inductor import ir, lowering, mkldnn_ir

    def lower(x: Any, y: Any) -> Any:
        product = mkldnn_ir.LinearUnary.create(x, lowering.permute(y, [1, 0]), None, "none", [], "")
        return ir.TensorBox.create(product)

    lowering.register_lowering(torch.ops.pmoe_lightning.product.default, type_promotion_kind=None)(lower)
