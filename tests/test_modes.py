"""Measures of many ways: by hand, and against episodes that are really drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pmoe_lightning.evaluation import modes


def test_measures_by_hand():
    counts = [200, 100, 5, 0]  # of 400 episodes, 95 of which fail
    assert modes.kept(counts, 400) == 2 and modes.kept([20, 19, 0, 361], 400) == 2  # from 1 / (5 N) = 5 % on
    assert modes.success(counts, 400) == pytest.approx(305 / 400)
    assert modes.score(counts, 400) == pytest.approx(0.25 + 0.25 + 5 / 400)
    q = np.array([200, 100, 5]) / 305
    assert modes.balance(counts) == pytest.approx(-(q * np.log(q)).sum() / math.log(4))
    assert modes.blocked_success(0.5, attempts=3) == pytest.approx(7 / 8)
    assert modes.price([1.0, 3.0], [4.0]) == -2.0 and modes.gap([1.0, 4.0, 2.0]) == 3.0


def test_the_extremes():
    even, one = [100] * 4, [400, 0, 0, 0]
    assert modes.kept(even, 400) == 4 and modes.score(even, 400) == modes.balance(even) == 1.0
    assert modes.kept(one, 400) == 1 and modes.score(one, 400) == 0.25 and modes.balance(one) == 0.0
    assert modes.removal_success(one, 400) == 0.5  # whether the one mode is among those removed
    assert modes.removal_success(even, 400) == pytest.approx(1 - 0.5**5)
    assert math.isnan(modes.balance([0, 0])) and modes.removal_success([0, 0], 10) == 0.0
    with pytest.raises(ValueError, match="from two on"):
        modes.kept([3], 3)
    with pytest.raises(ValueError, match=r"\[3, 3\] are not those of 5 episodes"):
        modes.score([3, 3], 5)


def test_removal_in_closed_form_is_that_of_drawn_attempts():
    """20 000 times k modes are removed at random and m episodes drawn: 4.5 standard errors fail once in 150 000."""
    counts, episodes, removed, attempts = [50, 20, 10, 0, 5, 3], 100, 2, 3
    rng, number = np.random.default_rng(0), len(counts)
    shares = np.array([*counts, episodes - sum(counts)]) / episodes
    drawn = rng.choice(number + 1, size=(20_000, attempts), p=shares)
    gone = rng.permuted(np.tile(np.arange(number), (len(drawn), 1)), axis=1)[:, :removed]
    is_gone = (drawn[:, :, None] == gone[:, None, :]).any(-1) | (drawn == number)
    estimate = 1 - is_gone.all(1).mean()
    exact = modes.removal_success(counts, episodes, removed=removed, attempts=attempts)
    assert abs(estimate - exact) < 4.5 * math.sqrt(exact * (1 - exact) / len(drawn))
