"""The contract of a gradient estimator.

    estimator(distribution, objective) -> Surrogate

``objective`` is what is minimised in expectation under the policy: J = E_{u ~ pi(.|s)}[cost(s, u, log pi(u|s))].
The gradient of ``Surrogate.loss`` with respect to the policy's parameters *is* the estimate of the gradient of J. An
estimator knows nothing of SAC, PPO, TensorDict or critics, so each one serves SAC's actor loss and PPO's entropy term
alike, with or without an action transform inside the objective.

What it needs to know of the distribution it says in ``asks``, in the words of ``modules.mixture``, and ``check_pair``
compares them with what the distribution offers, where a loss is made.

Not every cost can be differentiated by u: an action transform inside the objective would need the curvature of its
critics, of which automatic differentiation sees nothing where they are piecewise linear. Such an objective splits its
cost, f(u) = g(u) + r(u), into a part g that can and a remainder r of which only the value is known
(``ObjectiveValue.remainder``). With q the density that u was drawn from, given what was chosen before,

    grad E_q[f(u)] = E_q[grad g(u(eps))  +  r(u) grad log q(u)]        (u held fixed in the last term)

so an estimator that differentiates through a draw adds the score of that draw, times r (``ObjectiveValue.scored``). g
is a control variate: where r is small the score has little to multiply with, and where it is zero nothing is added.

Sample dimensions come first, as in ``torch.distributions``: u [*S, *B, A], densities [*S, *B].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from pmoe_lightning.modules.mixture import MixtureDistribution, Offer, missing

ScoringDensity = Literal["component", "mixture"]


class ObjectiveValue(NamedTuple):
    """What an objective says of unsquashed actions; every entry has the shape [*S, *B]."""

    cost: Float[Tensor, "*S"]
    """What is minimised. Its value is whole; its derivative by u may lack that of ``remainder``."""
    log_prob: Float[Tensor, "*S"]
    """Log-density of the action that is finally taken (squashed, and transformed where a transform is used)."""
    score: Float[Tensor, "*S"]
    """Higher is better: min_i Q_i(s, a). Used only to rank components, never differentiated."""
    diagnostics: Mapping[str, Tensor] = {}
    """Detached quantities worth logging, any shape; an estimator hands them on."""
    choose: Callable[[Int[Tensor, "*B"]], ObjectiveValue] | None = None
    """What ``of`` asks, where an objective knows a cheaper way than to differentiate all samples."""
    remainder: Float[Tensor, "*S"] | None = None
    """Detached: the part of the cost whose derivative by u the graph does not hold; None where it holds everything."""

    def scored(self, log_density: Callable[[], Float[Tensor, "*S"]]) -> ObjectiveValue:
        """The same values, with the derivative of the remainder in the graph of the cost as a score.

        Args:
            log_density: log q of the draws, held fixed; differentiable in the parameters of the policy.
        """
        if self.remainder is None:
            return self
        log_q = log_density()
        return self._replace(cost=self.cost + self.remainder * (log_q - log_q.detach()), remainder=None)

    def of(self, sample: Int[Tensor, "*B"]) -> ObjectiveValue:
        """What the objective says of one sample of each state, out of the K along the first dimension."""
        if self.choose is not None:
            return self.choose(sample)
        cost, log_prob, score = (take_sample(value, sample) for value in self[:3])
        remainder = None if self.remainder is None else take_sample(self.remainder, sample)
        return ObjectiveValue(cost, log_prob, score, remainder=remainder)


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

    def __call__(self, u: Float[Tensor, "*S A"], log_prob: Float[Tensor, "*S"]) -> ObjectiveValue: ...


class Surrogate(NamedTuple):
    """An estimate per state; every tensor has the shape [*B] unless said otherwise."""

    expected_cost: Float[Tensor, "*B"]
    """Differentiable; its value is the estimated cost."""
    log_prob: Float[Tensor, "*B"]
    """Detached; what the temperature holds at its target. An estimate of E[log pi(a|s)] where the estimator asks about
    plain draws of the mixture and scores them by it; of a draw that is selected or relaxed it is not."""
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

    asks: frozenset[Offer] = frozenset(get_args(Offer))
    """What a distribution must offer; one that does not say, asks for everything."""
    least_components: ClassVar[int] = 1
    """The smallest K it can serve."""
    most_components: ClassVar[int | None] = None
    """The largest; None where there is none."""
    log_prob: ScoringDensity = "mixture"
    """Whose log-density scores a sampled action, here, in the critic target and in the temperature loss."""
    auxiliary_losses: ClassVar[tuple[str, ...]] = ()
    """Names that ``Surrogate.auxiliary`` holds."""
    annealed: ClassVar[tuple[str, ...]] = ()
    """Attributes, tensors, that ``anneal`` sets: what a compiled update reads anew each time."""

    @abstractmethod
    def __call__(self, distribution: MixtureDistribution, objective: Objective) -> Surrogate:
        """Estimate the gradient of the expected cost."""

    def anneal(self, progress: float) -> None:  # noqa: B027 (most estimators have nothing to anneal)
        """Set what changes in the course of training, from the share of it that is done, 0 to 1."""


def check_pair(estimator: AbstractEstimator, distribution: type[Any], num_components: int | None = None) -> None:
    """Refuse an estimator that cannot serve the distributions of a class, with K components where that is known.

    Raises:
        ValueError: in one line, who asks for what of whom.
        TypeError: no estimator.
    """
    if not isinstance(estimator, AbstractEstimator):
        raise TypeError(f"{estimator!r} is no estimator: subclass AbstractEstimator and say what it asks for")
    name, of_whom = type(estimator).__name__, distribution.__name__
    lacking = missing(distribution, estimator.asks)
    if lacking:
        raise ValueError(f"estimator {name} asks for {', '.join(lacking)}, which {of_whom} does not offer")
    if num_components is None:
        return
    least, most = estimator.least_components, estimator.most_components
    if num_components < least:
        raise ValueError(f"estimator {name} asks for at least {least} components, {of_whom} has {num_components} here")
    if most is not None and num_components > most:
        raise ValueError(
            f"estimator {name} asks for at most {most} component{'s' * (most > 1)}, {of_whom} has {num_components} "
            "components here: use actor=gaussian, or another estimator such as marginalized"
        )
