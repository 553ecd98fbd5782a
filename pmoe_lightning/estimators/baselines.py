"""Control variates for estimators that multiply a score with a cost."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

Baseline = Literal["none", "mean", "leave_one_out"]


def check_baseline(estimator: object, baseline: Baseline, num_samples: int) -> None:
    """Raise ValueError for too few draws to form the baseline from."""
    if baseline != "none" and num_samples < 2:
        name = type(estimator).__name__
        raise ValueError(f"{name}: baseline={baseline} needs num_samples of at least 2, not {num_samples}")


def subtract_baseline(cost: Float[Tensor, "N *B"], baseline: Baseline) -> Float[Tensor, "N *B"]:
    r"""c_i - b_i for N independent draws, detached.

        none:           b_i = 0
        mean:           b_i = (1/N) sum_j c_j
        leave_one_out:  b_i = (1/(N-1)) sum_{j != i} c_j

    b_i may depend on every draw but the i-th without bias, since E[grad log pi] = 0. ``mean`` includes the i-th, which
    shrinks the score's gradient by exactly (N-1)/N; ``leave_one_out`` is unbiased (Kool et al. 2019, "Buy 4 REINFORCE
    samples, get a baseline for free!").
    """
    cost = cost.detach()
    if baseline == "none":
        return cost
    centred = cost - cost.mean(0)
    return centred if baseline == "mean" else centred * (len(cost) / (len(cost) - 1))
