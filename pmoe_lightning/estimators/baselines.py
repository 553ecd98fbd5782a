"""Control variates for estimators that multiply a score with a cost."""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

Baseline = Literal["none", "mean", "leave_one_out"]


def check_baseline(estimator: str, baseline: str, num_samples: int) -> None:
    """Raise ValueError for an unknown baseline, or for too few draws to form it from."""
    if baseline not in get_args(Baseline):
        raise ValueError(f"estimator {estimator}: baseline must be one of {get_args(Baseline)}, not {baseline!r}")
    least = 1 if baseline == "none" else 2
    if num_samples < least:
        raise ValueError(
            f"estimator {estimator}: baseline={baseline} needs num_samples of at least {least}, not {num_samples}"
        )


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
