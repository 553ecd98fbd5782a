"""What a few values say about their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence


def student_t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean: mean -+ t_{n-1} s / sqrt(n), with the quantile of Student's t.

    Args:
        values: n independent values; below two there is no interval: (nan, nan).
        confidence: its coverage if the values are normal.
    """
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * deviation / math.sqrt(n)
    return mean - half, mean + half


def welch_interval(
    first: tuple[float, float, int], second: tuple[float, float, int], confidence: float = 0.95
) -> tuple[float, float]:
    """Confidence interval of the difference of two means, whose values may have other variances (Welch 1947).

    d -+ t_nu sqrt(v_1 + v_2),  d = mean_1 - mean_2,  v_i = s_i^2 / n_i,
    nu = (v_1 + v_2)^2 / (v_1^2 / (n_1 - 1) + v_2^2 / (n_2 - 1))

    Args:
        first, second: mean, standard deviation s and number n of independent values; below two of either there is no
            interval: (nan, nan).
        confidence: its coverage if the values are normal.
    """
    from scipy.special import stdtrit

    (mean_1, s_1, n_1), (mean_2, s_2, n_2) = first, second
    if min(n_1, n_2) < 2:
        return math.nan, math.nan
    v_1, v_2 = s_1**2 / n_1, s_2**2 / n_2
    half = 0.0
    if v_1 + v_2 > 0:
        freedom = (v_1 + v_2) ** 2 / (v_1**2 / (n_1 - 1) + v_2**2 / (n_2 - 1))
        half = float(stdtrit(freedom, (1 + confidence) / 2)) * math.sqrt(v_1 + v_2)
    return mean_1 - mean_2 - half, mean_1 - mean_2 + half
