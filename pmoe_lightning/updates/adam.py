"""Adam as a function of tensors, so that it can be part of a compiled update, on the state of ``torch.optim.Adam``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Moments(NamedTuple):
    """What Adam remembers of n parameters: the tensors of the optimizer's own state, not copies."""

    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    step: list[Tensor]


def moments(optimizer: torch.optim.Adam, parameters: Sequence[Tensor]) -> Moments:
    """The optimizer's state of these parameters, made as its ``step`` would make it where there is none yet."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return Moments(*([optimizer.state[parameter][name] for parameter in parameters] for name in Moments._fields))


def step_factors(group: dict[str, Any], step: Tensor, num_steps: int) -> Float[Tensor, "num_steps 2"]:
    r"""For each of the coming steps of an optimizer's group, the two numbers that depend on its index t.

        lr / (1 - beta1^t)    and    1 / sqrt(1 - beta2^t),    t = step + 1, step + 2, ...

    Inside the update they would be taken anew for every element of every parameter; on the host they would wait for the
    device.
    """
    beta1, beta2 = group["betas"]
    # In double precision, because 1 - beta2^t cancels in the first steps.
    t = step.double() + torch.arange(1, num_steps + 1, device=step.device)
    return torch.stack([group["lr"] / (1 - beta1**t), (1 - beta2**t).rsqrt()], -1).to(group["params"][0].dtype)


def adam_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Moments,
    factors: Float[Tensor, "2"],
    finite: Bool[Tensor, ""],
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    r"""One step of Adam (Kingma and Ba 2015, arXiv 1412.6980) in place, as ``torch.optim.Adam`` takes it.

        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
        p <- p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        parameters, gradients: n tensors each.
        moments: of the parameters.
        factors: of this step, from ``step_factors``.
        finite: where this is false nothing changes, as with ``found_inf`` of a fused ``torch.optim.Adam``.
        betas, eps: of the optimizer.
    """
    step_size, scale = factors.unbind()
    taken = finite.to(step_size.dtype)
    for parameter, gradient, mean, square, step in zip(parameters, gradients, *moments, strict=True):
        gradient = torch.where(finite, gradient, 0.0)
        mean.lerp_(gradient, (1 - betas[0]) * taken)
        square.lerp_(gradient.square(), (1 - betas[1]) * taken)
        parameter.sub_(taken * step_size * mean / (square.sqrt() * scale + eps))
        step.add_(taken)
