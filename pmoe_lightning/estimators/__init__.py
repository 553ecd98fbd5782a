"""Gradient estimators for mixture policies: one per file, one contract (``base``).

    from pmoe_lightning.estimators import Marginalized
    surrogate = Marginalized()(distribution, objective)
    surrogate.loss.mean().backward()

| name | bias | critic evaluations |
|---|---|---|
| ``frequency`` (PMOE) | biased | K |
| ``marginalized`` | none | K |
| ``half_reparameterized`` | none | N |
| ``score_function`` | none | N |
| ``implicit`` | none | 1 |
| ``gumbel_softmax`` | biased | 1 |
| ``pathwise`` | none, K = 1 only | 1 |
"""

from pmoe_lightning.estimators.base import AbstractEstimator, Objective, ObjectiveValue, Surrogate, check_pair
from pmoe_lightning.estimators.frequency import Frequency
from pmoe_lightning.estimators.gumbel_softmax import GumbelSoftmax
from pmoe_lightning.estimators.half_reparameterized import HalfReparameterized
from pmoe_lightning.estimators.implicit import Implicit
from pmoe_lightning.estimators.marginalized import Marginalized
from pmoe_lightning.estimators.pathwise import Pathwise
from pmoe_lightning.estimators.score_function import ScoreFunction

#: What ``ObjectiveValue`` was called before.
Evaluation = ObjectiveValue

__all__ = [
    "ESTIMATORS",
    "AbstractEstimator",
    "ObjectiveValue",
    "Frequency",
    "GumbelSoftmax",
    "HalfReparameterized",
    "Implicit",
    "Marginalized",
    "Objective",
    "Pathwise",
    "ScoreFunction",
    "Surrogate",
    "check_pair",
]

#: Each by its name, which is that of its file and of ``estimator=<name>``.
ESTIMATORS: dict[str, type[AbstractEstimator]] = {
    found.__module__.rpartition(".")[2]: found
    for found in tuple(globals().values())
    if isinstance(found, type) and issubclass(found, AbstractEstimator) and found is not AbstractEstimator
}
