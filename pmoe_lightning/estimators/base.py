"""The contract of a gradient estimator.

    estimator(distribution, objective) -> Surrogate

``objective`` is what is minimised in expectation under the policy: J = E_{u ~ pi(.|s)}[cost(s, u, log pi(u|s))].
The gradient of ``Surrogate.loss`` with respect to the policy's parameters *is* the estimate of the gradient of J. An
estimator knows nothing of SAC, PPO, TensorDict or critics, so each one serves SAC's actor loss and PPO's entropy term
alike, with or without an action transform inside the objective.

Sample dimensions come first, as in ``torch.distributions``: u [*S, *B, A], densities [*S, *B].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from pmoe_lightning.distributions import TanhGaussianMixture

Scoring = Literal["component", "mixture"]


class Evaluation(NamedTuple):
    """What an objective says of unsquashed actions; every entry has the shape [*S, *B]."""

    cost: Float[Tensor, "*S"]
    """What is minimised."""
    log_prob: Float[Tensor, "*S"]
    """Log-density of the action that is finally taken (squashed, and transformed where a transform is used)."""
    score: Float[Tensor, "*S"]
    """Higher is better: min_i Q_i(s, a). Used only to rank components, never differentiated."""
    diagnostics: Mapping[str, Tensor] = {}
    """Detached quantities worth logging, any shape; an estimator hands them on."""
    choose: Callable[[Int[Tensor, "*B"]], Evaluation] | None = None
    """What ``of`` asks, where an objective knows a cheaper way than to differentiate all samples."""

    def of(self, sample: Int[Tensor, "*B"]) -> Evaluation:
        """What the objective says of one sample of each state, out of the K along the first dimension."""
        if self.choose is not None:
            return self.choose(sample)
        cost, log_prob, score = (take_sample(value, sample) for value in self[:3])
        return Evaluation(cost, log_prob, score)


def take_sample(values: Float[Tensor, "K *B *C"], sample: Int[Tensor, "*B"]) -> Float[Tensor, "*B *C"]:
    """The values of one sample of each state."""
    trailing = [1] * (values.ndim - 1 - sample.ndim)
    return values.take_along_dim(sample.view(1, *sample.shape, *trailing), 0).squeeze(0)


@runtime_checkable
class Objective(Protocol):
    """Maps unsquashed actions and their log-densities to costs; squashing is its first step.

    The cost is affine in the log-density, with a factor that does not depend on u: SAC's temperature, 1 for an entropy.
    An objective that has random numbers of its own (an action transform's momentum) draws them before it is asked, one
    set per state and never depending on u: all samples of a state share them, and asking again gives the same answer.
    """

    def __call__(self, u: Float[Tensor, "*S A"], log_prob: Float[Tensor, "*S"]) -> Evaluation: ...


class Surrogate(NamedTuple):
    """An estimate per state; every tensor has the shape [*B] unless said otherwise."""

    expected_cost: Float[Tensor, "*B"]
    """Differentiable; its value is the estimated cost."""
    log_prob: Float[Tensor, "*B"]
    """Detached estimate of E[log pi(a|s)], for the temperature."""
    auxiliary: Mapping[str, Tensor] = {}
    """Further differentiable losses of the estimator, by name."""
    diagnostics: Mapping[str, Tensor] = {}
    """Detached quantities worth logging, any shape."""

    @property
    def loss(self) -> Float[Tensor, "*B"]:
        """The surrogate whose gradient is the estimate."""
        return self.expected_cost + sum(self.auxiliary.values())


class AbstractEstimator(ABC):
    """Base of all gradient estimators."""

    log_prob: Scoring = "mixture"
    """Whose log-density scores a sampled action, here, in the critic target and in the temperature loss."""
    auxiliary_losses: ClassVar[tuple[str, ...]] = ()
    """Names that ``Surrogate.auxiliary`` holds."""
    annealed: ClassVar[tuple[str, ...]] = ()
    """Attributes, tensors, that ``anneal`` sets: what a compiled update reads anew each time."""

    @abstractmethod
    def __call__(self, distribution: TanhGaussianMixture, objective: Objective) -> Surrogate:
        """Estimate the gradient of the expected cost."""

    def anneal(self, progress: float) -> None:  # noqa: B027 (most estimators have nothing to anneal)
        """Set what changes in the course of training, from the share of it that is done, 0 to 1."""

    def check(self, num_components: int) -> None:  # noqa: B027 (most estimators serve any number)
        """Raise ValueError where the estimator cannot serve that many components."""
