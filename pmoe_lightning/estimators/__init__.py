"""Gradient estimators for mixture policies: one per file, one contract (``base``).

    from pmoe_lightning.estimators import Marginalized
    surrogate = Marginalized()(distribution, objective)
    surrogate.loss.mean().backward()

| name | bias | critic evaluations |
|---|---|---|
| ``frequency`` (PMOE) | biased | K |
| ``marginalized`` | none | K |
| ``pathwise`` | none, K = 1 only | 1 |
"""

from pmoe_lightning.estimators.base import AbstractEstimator, Evaluation, Objective, Surrogate
from pmoe_lightning.estimators.frequency import Frequency
from pmoe_lightning.estimators.marginalized import Marginalized
from pmoe_lightning.estimators.pathwise import Pathwise

__all__ = ["AbstractEstimator", "Evaluation", "Frequency", "Marginalized", "Objective", "Pathwise", "Surrogate"]
