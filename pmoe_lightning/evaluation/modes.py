r"""How many of N equally good ways a policy keeps: measures of whole episodes that start alike and draw their actions.

Of E episodes n_i ended in mode i of N, and the rest in none. Throughout, p_i = n_i / E is the share of mode i and
S = sum_i p_i the success. With E = 400 the standard error of a share is at most 2.5 %.

Diversity within a step (the entropy of the weights, effective components) is not among them: a policy whose components
all differ can still send every episode to one goal.

The measures ``score`` and ``removal_success`` are those of DrAC (NeurIPS 2025, arXiv 2511.01374), whose estimate of the
second, from blocks of episodes, has a bias that the closed form here does not; ``price`` is this project's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

#: A mode counts as kept from this part of its fair share 1/N on: with four modes from 5 % of the episodes on.
KEPT_PART = 5
#: Attempts of a policy before it has failed, in ``removal_success`` and ``blocked_success``.
ATTEMPTS = 5


def kept(counts: Sequence[int], episodes: int) -> int:
    r"""Modes that a policy keeps: #{i: p_i >= 1 / (5 N)}.

    One lucky episode in hundreds does not count. A policy without any preference, p_i = 1/N, keeps all.

    Args:
        counts: n_i, [N].
        episodes: E.
    """
    _check(counts, episodes)
    return sum(KEPT_PART * len(counts) * count >= episodes for count in counts)


def success(counts: Sequence[int], episodes: int) -> float:
    r"""The share of episodes that end in any mode: S = sum_i p_i."""
    _check(counts, episodes)
    return sum(counts) / episodes


def score(counts: Sequence[int], episodes: int) -> float:
    r"""sum_i min(p_i, 1/N), from 0 to 1: success and balance in one number (``multi_goal_score`` of DrAC).

    It is 1 only where every mode is reached equally often and no episode fails; all episodes in one mode give 1/N.
    """
    _check(counts, episodes)
    return sum(min(count / episodes, 1 / len(counts)) for count in counts)


def balance(counts: Sequence[int]) -> float:
    r"""How evenly successful episodes are spread, whatever their number: -sum_i q_i ln q_i / ln N with q = p / S.

    From 0, one mode, to 1, all equally often (Pielou's evenness, 1966); NaN where no episode succeeded.
    """
    total = sum(counts)
    _check(counts, max(total, 1))
    if not total:
        return math.nan
    return sum(n / total * math.log(total / n) for n in counts if n) / math.log(len(counts))


def removal_success(
    counts: Sequence[int], episodes: int, *, removed: int | None = None, attempts: int = ATTEMPTS
) -> float:
    r"""The probability that one of m attempts succeeds after k modes, chosen at random, have been taken away.

        SR_m(k) = 1 - mean over all sets D of k modes of (1 - sum_{i not in D} p_i)^m

    An attempt at a mode that was taken away fails. The mean runs over all C(N, k) sets. (DrAC estimates it for
    k = N/2 from blocks of m episodes, crediting 1 to a block that reached R >= N - k modes and otherwise
    1 - C(N-R, k) / C(N, k), where 1 - C(N-R, N-k) / C(N, N-k) would be exact for it: 5/6, not 1, at N = 4, R = 2.)

    Args:
        counts: n_i, [N].
        episodes: E.
        removed: k; None is N/2, rounded down.
        attempts: m.
    """
    _check(counts, episodes)
    number = len(counts)
    removed = number // 2 if removed is None else removed
    left = [sum(those) / episodes for those in combinations(counts, number - removed)]
    return 1 - math.fsum((1 - share) ** attempts for share in left) / len(left)


def blocked_success(success: float, *, attempts: int = ATTEMPTS) -> float:
    r"""The probability that one of m attempts succeeds where passages are closed: SR_m = 1 - (1 - S_blocked)^m.

    Args:
        success: S_blocked, the share of episodes that reach any mode there.
        attempts: m.
    """
    return 1 - (1 - success) ** attempts


def price(drawn_returns: Sequence[float], ruled_returns: Sequence[float]) -> float:
    """What it costs to draw: mean return of drawn actions less that of the deterministic rule; below 0 draws cost.

    Noise alone reaches many modes, at a price.
    """
    return math.fsum(drawn_returns) / len(drawn_returns) - math.fsum(ruled_returns) / len(ruled_returns)


def gap(values: Sequence[float]) -> float:
    r"""Q(s_0, a) of the best way at the start less that of the worst: the critic's error where all ways are equal.

    Divided by the temperature alpha it is what decides whether modes are kept: a maximum-entropy policy prefers one
    way to another by exp(dQ / alpha) (Haarnoja et al. 2017, arXiv 1702.08165).

    Args:
        values: Q of the first action of every way, [W].
    """
    return max(values) - min(values)


def _check(counts: Sequence[int], episodes: int) -> None:
    if len(counts) < 2:
        raise ValueError(f"modes are counted from two on, not {len(counts)}")
    if min(counts) < 0 or not sum(counts) <= episodes or episodes < 1:
        raise ValueError(f"counts {list(counts)} are not those of {episodes} episodes")
