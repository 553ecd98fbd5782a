r"""What drives the dynamics: a force f(s, u, g) of the gradient g = grad_u log_target(s, u).

A force may use the state s, the position u and g, and nothing else: see ``leapfrog``. To add one, subclass
``AbstractForce`` and name it in ``transform.make_hamiltonian_transform``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pmoe_lightning.limits import Flag, Of, PositiveFloat, Width, checked


class AbstractForce(nn.Module, ABC):
    """Base of all forces.

    Attributes:
        step_size: of the leapfrog where none is chosen.
    """

    step_size = 0.1

    @abstractmethod
    def forward(
        self, observation: Float[Tensor, "*S O"], u: Float[Tensor, "*S A"], gradient: Float[Tensor, "*S A"]
    ) -> Float[Tensor, "*S A"]:
        """The force at the position u in the state."""


class Raw(AbstractForce):
    """f = g: Hamiltonian Monte Carlo (Duane et al. 1987). As strong as Q is steep and the temperature low."""

    step_size = 0.05

    def forward(
        self, observation: Float[Tensor, "*S O"], u: Float[Tensor, "*S A"], gradient: Float[Tensor, "*S A"]
    ) -> Float[Tensor, "*S A"]:
        return gradient


class Normalized(AbstractForce):
    """f = m g / sqrt(1 + |g|^2): the direction of the gradient with a magnitude m of its own.

    Where log_target is steep, by far more than a nat per unit of u, the force has the size m, whatever the scale of the
    rewards and the temperature, so a step size that suits one task suits another. Towards an optimum it fades: a force
    that kept its size would turn round there at once, where no gradient through it could be estimated.

    Args:
        magnitude: m, of the force.
        learn_magnitude: make it a parameter (its logarithm, so that it stays positive).
    """

    @checked
    def __init__(self, *, magnitude: PositiveFloat = 5.0, learn_magnitude: Flag = False) -> None:
        super().__init__()
        log_magnitude = torch.tensor(magnitude).log()
        if learn_magnitude:
            self.log_magnitude = nn.Parameter(log_magnitude)
        else:
            self.register_buffer("log_magnitude", log_magnitude)

    @property
    def magnitude(self) -> Tensor:
        """m."""
        return self.log_magnitude.exp()

    def forward(
        self, observation: Float[Tensor, "*S O"], u: Float[Tensor, "*S A"], gradient: Float[Tensor, "*S A"]
    ) -> Float[Tensor, "*S A"]:
        return self.magnitude * direction(gradient)


class Gated(Normalized):
    r"""A learned gate between the direction of the gradient and a learned direction.

        f = m (sigmoid(z) g' + (1 - sigmoid(z)) tanh(t)),    z, t = network(s, tanh(u), g'),    g' = g / sqrt(1 + |g|^2)

    Gate z and direction t have one entry per action dimension. The network starts with sigmoid(z) = 0.95 everywhere:
    near ``Normalized``. It is trained with the actor.

    Args:
        observation_dim, action_dim: O and A.
        hidden_size: width of the network's one hidden layer.
        **arguments: of ``Normalized``.
    """

    @checked
    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        hidden_size: Width = 64,
        **arguments: Annotated[Any, Of(Normalized)],
    ) -> None:
        super().__init__(**arguments)
        self.hidden = nn.Linear(observation_dim + 2 * action_dim, hidden_size)
        self.gate, self.direction = (nn.Linear(hidden_size, action_dim) for _ in range(2))
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, torch.tensor(0.95).logit().item())

    def forward(
        self, observation: Float[Tensor, "*S O"], u: Float[Tensor, "*S A"], gradient: Float[Tensor, "*S A"]
    ) -> Float[Tensor, "*S A"]:
        towards = direction(gradient)
        features = self.hidden(torch.cat([observation, u.tanh(), towards], -1)).relu()
        gate = self.gate(features).sigmoid()
        return self.magnitude * (gate * towards + (1 - gate) * self.direction(features).tanh())


def direction(gradient: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
    """g / sqrt(1 + |g|^2); scaled first, so that no gradient is too large for it."""
    scale = gradient.detach().abs().amax(-1, keepdim=True).clamp_min(1.0)
    scaled = gradient / scale
    return scaled / (scaled.square().sum(-1, keepdim=True) + scale**-2).sqrt()
