r"""Velocity Verlet with any force, its energy, and what decides whether its end is kept. Pure functions of tensors.

Shape letters: S any leading dimensions, A action dimensions. Position u [*S, A], momentum rho [*S, A].

With log_target(u) the logarithm of the density that the dynamics are meant for and tau the scale of the momentum,

    energy H(u, rho) = -log_target(u) + |rho|^2 / (2 tau^2)

so that exp(-H) is the target times N(rho; 0, tau^2). A force that sees the position alone makes the map from start to
end preserve volume, and undoes it once the momentum is turned round, whether or not the force is the gradient of
anything: what Metropolis's rule and the change of variables need. A force that saw the momentum would not preserve
volume; one that saw the number of the step could not be undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

#: A trajectory whose energy changes by more than this many nats has left the region where its steps mean anything.
MAX_ENERGY_ERROR = 1000.0


def leapfrog(
    position: Float[Tensor, "*S A"],
    momentum: Float[Tensor, "*S A"],
    force: Callable[[Float[Tensor, "*S A"]], Float[Tensor, "*S A"]],
    step_size: float | Tensor,
    num_steps: int,
    *,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "*S A"], Float[Tensor, "*S A"]]:
    r"""``num_steps`` times kick, drift, kick; each force serves two steps, so it is evaluated num_steps + 1 times.

        rho <- rho + eps/2 f(u);    u <- u + eps rho;    rho <- rho + eps/2 f(u)

    The map (u, rho) -> (u_L, rho_L) has |det| = 1 for every force. Differentiable in the start, the step size, and
    whatever ``force`` leaves attached.

    Args:
        position, momentum: the start.
        force: f.
        step_size: eps, a number or a tensor that broadcasts to [*S, A].
        num_steps: L.
        temperature: T_0. Above 1, the momentum is meant to start T_0 times as hot and cools as it goes (Caterini et al.
            2018, arXiv 1805.11328): it is multiplied by sqrt(T_k / T_{k-1}) after step k, T_k = T_0 + (1 - T_0)
            (k/L)^2, and then log|det| = -(A/2) log T_0.

    Returns:
        position and momentum at the end.
    """
    kick = step_size / 2 * force(position)
    for step in range(1, num_steps + 1):
        momentum = momentum + kick
        position = position + step_size * momentum
        kick = step_size / 2 * force(position)
        momentum = momentum + kick
        if temperature != 1.0:
            momentum = momentum * _cooling(temperature, step, num_steps)
    return position, momentum


def _cooling(initial: float, step: int, num_steps: int) -> float:
    before, after = (initial + (1 - initial) * (k / num_steps) ** 2 for k in (step - 1, step))
    return math.sqrt(after / before)


def kinetic_energy(momentum: Float[Tensor, "*S A"], scale: float = 1.0) -> Float[Tensor, "*S"]:
    """|rho|^2 / (2 scale^2): -log N(rho; 0, scale^2) up to its constant."""
    return momentum.square().sum(-1) / (2 * scale**2)


def is_divergent(energy_error: Float[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Where the energy is not finite or has changed beyond ``MAX_ENERGY_ERROR``.

    The rule is the same for a trajectory and its reversal, so leaving divergent points where they are keeps the map
    from start to end a bijection that preserves volume, up to the sign of the momentum.
    """
    return ~(energy_error.abs() <= MAX_ENERGY_ERROR)


def metropolis_accepts(energy_error: Float[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """Accept with probability min(1, exp(-energy_error)), never where it is not a number (Metropolis et al. 1953).

    With fresh momenta before every trajectory, the target is then stationary, for every force and step size.
    """
    return torch.rand_like(energy_error).log() < -energy_error
