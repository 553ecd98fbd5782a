"""The contract of a mixture distribution: what one offers, and the members that each offer stands for.

Whoever works with a distribution says what it asks for, the distribution says what it offers, and ``missing`` and
``offers`` compare the two before anything is computed. Nobody looks for attributes.

Shape letters as in ``distributions``: B batch, S sample dimensions and batch, SB the same of an index, K, A.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, Self, TypeGuard, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Offer = Literal[
    "draws",
    "weights",
    "component_draws",
    "component_densities",
    "component_modes",
    "diagonal_scales",
    "parameters",
]


@runtime_checkable
class MixtureDistribution(Protocol):
    """A mixture of K components over unsquashed actions u, squashed into bounds, with the members of its ``offers``.

    Those in front of the first offer it always has: most come with ``torch.distributions.Distribution`` and
    ``distributions.TanhBounds`` as bases.
    """

    offers: ClassVar[frozenset[Offer]]
    low: Tensor
    """The lower bounds of the action, of the type and on the device of its draws; broadcasts to [A]."""
    high: Tensor

    @property
    def batch_shape(self) -> torch.Size: ...
    @property
    def event_shape(self) -> torch.Size: ...
    @property
    def num_components(self) -> int:
        """K."""

    def squash(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """The action a(u)."""

    def unsquash(self, action: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """The inverse of ``squash``."""

    def log_abs_det_jacobian(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """log |da/du|."""

    # --- draws -------------------------------------------------------------------------------------------------------

    def rsample_unsquashed(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "*S A"]:
        """u ~ pi; gradients reach the component that drew it, never the choice."""

    def log_prob_unsquashed(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """log pi(u|s)."""

    # --- weights -----------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> Float[Tensor, "*B K"]:
        """w, which sum to one."""

    log_weights: Float[Tensor, "*B K"]

    def sample_component(self, sample_shape: Sequence[int] = ()) -> Int[Tensor, "*SB"]:
        """k ~ w."""

    def take_component(self, values: Float[Tensor, "*B K A"], component: Int[Tensor, "*SB"]) -> Float[Tensor, "*SB A"]:
        """values[..., k, :] at the given k."""

    # --- component draws ---------------------------------------------------------------------------------------------

    def rsample_components(self) -> Float[Tensor, "K *B A"]:
        """One pathwise draw of every component: a stratified sample."""

    def rsample_given(self, component: Int[Tensor, "*SB"]) -> Float[Tensor, "*SB A"]:
        """A pathwise draw of the given components."""

    # --- component densities -----------------------------------------------------------------------------------------

    def component_log_prob_unsquashed(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S K"]:
        """log p_k(u) of every component."""

    def stratum_log_prob_unsquashed(self, u: Float[Tensor, "K *B A"]) -> Float[Tensor, "K *B"]:
        """log p_k(u_k) of a stratified sample."""

    def log_prob_given(self, u: Float[Tensor, "*SB A"], component: Int[Tensor, "*SB"]) -> Float[Tensor, "*SB"]:
        """log p_k(u) of the given components."""

    def component_posterior(self, value: Float[Tensor, "*S A"]) -> Float[Tensor, "*S K"]:
        """P(k | a, s) of an action."""

    # --- component modes ---------------------------------------------------------------------------------------------

    loc: Float[Tensor, "*B K A"]
    """The unsquashed mode of every component."""

    def mode_unsquashed(self) -> Float[Tensor, "*B A"]:
        """The u of the mode of the heaviest component."""

    def deterministic_unsquashed(self) -> Float[Tensor, "*B A"]:
        """The u of the deterministic rule."""

    @property
    def component_modes(self) -> Float[Tensor, "*B K A"]:
        """The squashed mode of every component."""

    # --- diagonal scales ---------------------------------------------------------------------------------------------

    scale: Float[Tensor, "*B K A"]
    """Standard deviations: p_k = N(loc_k, diag scale_k^2)."""

    # --- parameters --------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The tensors [*B, ...] that it is made of, by name; ``mixture_logits`` are the log-weights."""

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> Self:
        """The distribution with the same bounds and these parameters, whatever their batch."""


def missing(distribution: type[Any], asks: Collection[Offer]) -> list[Offer]:
    """What of this a class of distributions does not offer; one that says nothing, such as torch's, offers nothing."""
    return sorted(set(asks) - getattr(distribution, "offers", frozenset()))


def offers(distribution: object, asks: Collection[Offer]) -> TypeGuard[MixtureDistribution]:
    """Whether a distribution can be asked for all of this."""
    return not missing(type(distribution), asks)
