"""Measures of many ways: by hand, and against episodes that are really drawn."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded

from pmoe_lightning.envs import make_env
from pmoe_lightning.envs.multi_goal import GOALS, goals_reached
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.evaluation import modes
from pmoe_lightning.evaluation.episodes import evaluate_policy
from pmoe_lightning.evaluation.mode_episodes import draw_ways, drawn_paths, first_action_density, measure_modes
from pmoe_lightning.evaluation.mode_figures import modes_over_frames
from pmoe_lightning.modules.actors import MixtureActor, MixtureSampler


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


# --- episodes ---------------------------------------------------------------------------------------------------------

WEIGHTS = [0.5, 0.25, 0.2, 0.05]


class Scripted(torch.nn.Module):
    """A network that says what to do."""

    def __init__(self, num_components: int) -> None:
        super().__init__()
        self.num_components, self.unused = num_components, torch.nn.Parameter(torch.zeros(()))


class Chooses(Scripted):
    """Chooses a goal of MultiGoal at the origin, by the weights, and walks on along that axis."""

    def forward(self, observation):
        goals = torch.as_tensor(GOALS) / 5
        ahead = 100.0 * observation @ goals.T
        logits = torch.where(observation.norm(dim=-1, keepdim=True) < 0.5, torch.tensor(WEIGHTS).log(), ahead)
        loc = (1.5 * goals).expand(*observation.shape[:-1], 4, 2)
        return logits, loc, torch.full_like(loc, 0.05)


def chooser(rule: str = "max_weight") -> MixtureActor:
    network = TensorDictModule(Chooses(4), ["observation"], ["mixture_logits", "loc", "scale"])
    low, high = torch.full((2,), -1.0), torch.full((2,), 1.0)
    sampler = {"deterministic": rule, "return_log_prob": False, "action_key": "action", "spec": Bounded(low, high)}
    return MixtureActor(network, MixtureSampler(low, high, **sampler))


class Prefers(torch.nn.Module):
    """A critic to whom the first of two action dimensions is worth its number."""

    def __init__(self, worth: float) -> None:
        super().__init__()
        self.worth = worth

    def forward(self, tensordict):
        return tensordict.set("state_action_value", self.worth * tensordict["action"][..., :1])


def test_counts_are_those_of_the_policy_from_the_exact_start():
    make, critics = partial(make_env, "MultiGoal-v0"), [Prefers(3.0), Prefers(1.0)]
    report = measure_modes(chooser(), make, episodes=400, seed=3, critics=critics, alpha=0.5)
    # Four binomial counts; 4.5 standard errors each fail once in 40 000 runs.
    for count, weight in zip(report.counts, WEIGHTS, strict=True):
        assert abs(count - 400 * weight) < 4.5 * math.sqrt(400 * weight * (1 - weight))
    measures, counts = report.measures, report.counts
    assert measures["kept"] == modes.kept(counts, 400) and measures["success"] == 1.0
    assert measures["score"] == modes.score(counts, 400) and measures["balance"] == modes.balance(counts)
    # To the four sides min(3 a, a) is 1, -3, 0, 0.
    assert (measures["alpha"], measures["gap"], measures["gap_over_alpha"]) == (0.5, 4.0, 8.0)
    assert report.left_out == {"blocked_success": "MultiGoal-v0 has no argument blocked"} and not report.warning
    # The rule takes the heaviest goal, which is as near as the others: drawing costs no more than its own noise.
    assert -0.1 < measures["price"] < 0.1
    assert measure_modes(chooser(), make, episodes=400, seed=3).counts == counts
    assert measure_modes(chooser(), partial(make_env, "Pendulum-v1")) is None


def test_the_price_is_that_beside_the_rule():
    """The mean of four goals at the origin by weight goes slowly to the right, and is worth less than any draw."""
    make, policy = partial(make_env, "MultiGoal-v0"), chooser("mean")
    report = measure_modes(policy, make, episodes=20)
    rule = evaluate_policy(policy, make(num_envs=1, start_deviation=0.0), episodes=1, seed=0)
    assert report.measures["price"] == pytest.approx(report.measures["return_sampled"] - rule.mean)
    assert report.measures["price"] > 1


def test_blocked_passages_are_counted_in_the_blocked_world():
    class Northwards(Scripted):
        def forward(self, observation):
            x, y = observation[..., 0], observation[..., 1]
            west = (y > 0.6).to(x) * 4 - 2
            push = torch.stack([torch.where(x < -0.6, 0.0, -west), torch.where(x < -0.6, -4.0, 4.0)], -1)
            return x.new_zeros(*x.shape, 1), push.unsqueeze(-2), torch.full_like(push, 0.01).unsqueeze(-2)

    network = TensorDictModule(Northwards(1), ["observation"], ["mixture_logits", "loc", "scale"])
    policy = MixtureActor(network, chooser()[1])
    report = measure_modes(policy, partial(make_env, "TwoRoutes-v0", frame_skip=5), episodes=5)
    assert report.counts == (5, 0) and report.measures["blocked_success"] == 0.0
    assert report.left_out.keys() == {"alpha", "gap"}


def test_an_environment_that_starts_differently_or_names_no_mode_is_told():
    def make(mode, **arguments):
        env = make_env("MultiGoal-v0", **arguments)
        for each in env.envs:
            each.unwrapped.start_deviation = 0.1  # which its argument does not reach
            step = each.step
            each.step = lambda action, step=step: (*step(action)[:4], {"mode": mode})
        return env

    report = measure_modes(chooser(), partial(make, 0), episodes=4)
    assert report.counts == (4, 0, 0, 0)
    assert report.warning == "the starts of MultiGoal-v0 differ, and noise of the start alone reaches many modes"
    with pytest.raises(
        ConfigurationError, match=r"info\['mode'\]='left': it must be an int from 0 to num_modes - 1 = 3"
    ):
        measure_modes(chooser(), partial(make, "left"), episodes=2)


def test_the_paths_and_the_density_are_those_of_the_policy():
    env = make_env("MultiGoal-v0", num_envs=12, seed=0, start_deviation=0.0)
    paths, ended_in = drawn_paths(chooser(), env, seed=0)
    for path, mode in zip(paths, ended_in, strict=True):
        assert path[0].tolist() == [0.0, 0.0] and goals_reached(path[-1]) == mode
        assert (goals_reached(path[:-1]) == -1).all()
    density = first_action_density(chooser(), env.reset()[:1], resolution=400)
    cell = (2 / 400) ** 2
    x = np.broadcast_to((np.arange(400) + 0.5) / 200 - 1, (400, 400))
    for (a, b), weight in zip(GOALS / 5, WEIGHTS, strict=True):
        assert density[(a * x + b * x.T) > 0.7].sum() * cell == pytest.approx(weight, abs=0.02)


@pytest.mark.parametrize("id", ["MultiGoal-v0", "MultiGoalMaze-v0"])
def test_the_figure_counts_its_paths(id):
    class Still(Scripted):
        def forward(self, observation):
            loc = observation.new_zeros(*observation.shape[:-1], 1, 2)
            return loc[..., 0], loc, loc + 0.01

    network = TensorDictModule(Still(1), ["observation"], ["mixture_logits", "loc", "scale"])
    policy = chooser() if id == "MultiGoal-v0" else MixtureActor(network, chooser()[1])
    arguments = {} if id == "MultiGoal-v0" else {"frame_skip": 5}
    figure = draw_ways(policy, partial(make_env, id, **arguments), paths=8)
    density, paths = figure.axes
    assert len(paths.lines) == 8 and density.images and paths.images
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sum(int(text.split(": ")[1]) for text in said) == 8
    assert said[-1] == ("none: 8" if id == "MultiGoalMaze-v0" else said[3])
    assert draw_ways(policy, partial(make_env, "Pendulum-v1")) is None


def test_the_figure_of_a_run_shows_all_measures():
    values = {"kept": [0, 3], "score": [0.0, 0.7], "success": [0.0, 0.9], "balance": [math.nan, 0.9]}
    above, below = modes_over_frames([100, 200], values, num_modes=4).axes
    assert above.lines[0].get_ydata().tolist() == [0, 3] and above.get_ylim() == (0, 4)
    assert {line.get_label() for line in below.lines} == {"success", "score", "balance"}
