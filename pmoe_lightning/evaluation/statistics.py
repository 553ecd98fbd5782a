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
