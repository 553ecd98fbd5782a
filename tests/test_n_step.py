"""Transitions over n steps against a brute-force computation, across rollouts, ends, breakdowns and a restart."""

from __future__ import annotations

import pytest
import torch
from probe_envs import make_scripted_env
from tensordict import TensorDict
from test_data import make_policy, off_policy

from pmoe_lightning.data.n_step import NStepTransitions
from pmoe_lightning.data.off_policy import OffPolicyData
from pmoe_lightning.errors import ConfigurationError

GAMMA, COST_GAMMA, N, T = 0.9, 0.7, 3, 60
KEYS = ("observation", "action", "reward", "cost", "next_observation", "terminated", "truncated", "steps")


def episodes(seed: int = 0, *, breakdowns: bool = True) -> TensorDict:
    """Steps [N, T] of environments whose episodes end at random, in every way; observations count the steps."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(N, T, 1, generator=generator)
    terminated, truncated = chance < 0.1, (chance > 0.1) & (chance < 0.2)
    broken = (chance > 0.95) & breakdowns
    observation = torch.arange(N * T, dtype=torch.float32).view(N, T, 1)
    done = terminated | truncated | broken
    following = observation + 1
    following = torch.where(done, following + 0.5, following)
    after = {"observation": following, "terminated": terminated, "truncated": truncated, "done": done}
    after |= {name: torch.randn(N, T, 1, generator=generator) for name in ("reward", "cost")}
    root = {"observation": observation, "action": torch.randn(N, T, 2, generator=generator), "unusable": broken}
    return TensorDict({**root, "next": TensorDict(after, [N, T])}, [N, T])


def brute_force(steps: TensorDict, n: int, begins_anew: tuple[int, ...] = ()) -> dict[float, tuple]:
    """Every complete transition by its first observation; an environment was made anew before the steps named."""
    found = {}
    for env in steps.unbind(0):
        for start in range(T):
            rows: list[TensorDict] = []
            for t in range(start, T):
                step = env[t]
                if step["unusable"] or (t > start and t in begins_anew):
                    break
                rows.append(step)
                if step["next", "done"] or len(rows) == n:
                    break
            is_last = start + len(rows) == T and len(rows) < n and not (rows and rows[-1]["next", "done"])
            if not rows or is_last:
                continue
            after = rows[-1]["next"]
            reward, cost = (
                sum(g**k * row["next", name].item() for k, row in enumerate(rows))
                for name, g in (("reward", GAMMA), ("cost", COST_GAMMA))
            )
            found[rows[0]["observation"].item()] = (
                *(rows[0]["action"].tolist()),
                reward,
                cost,
                *(after[name].item() for name in ("observation", "terminated", "truncated")),
                len(rows),
            )
    return found


def as_rows(transitions: TensorDict) -> dict[float, tuple]:
    after = transitions["next"]
    columns = [transitions["action"], after["reward"], after["cost"], after["observation"], after["terminated"]]
    columns += [after["truncated"], transitions["steps_to_next_obs"]]
    table = torch.cat([column.double() for column in columns], 1)
    names = transitions["observation"].flatten().tolist()
    assert len(set(names)) == len(names), "each is given out once"
    return dict(zip(names, map(tuple, table.tolist()), strict=True))


def assert_equal(found: dict[float, tuple], expected: dict[float, tuple]) -> None:
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert found[name] == pytest.approx(tuple(map(float, row)), abs=1e-5), name


@pytest.mark.parametrize("length", [1, 2, 5, T])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_transitions_equal_a_brute_force_computation_across_rollouts(n, length):
    """And across a state dict between any two rollouts."""
    steps, given = episodes(), []
    transitions = NStepTransitions(n, GAMMA, COST_GAMMA)
    for start in range(0, T, length):
        given.append(transitions(steps[:, start : start + length].clone()))
        resumed = NStepTransitions(n, GAMMA, COST_GAMMA)
        resumed.load_state_dict(transitions.state_dict())
        transitions = resumed
    assert_equal(as_rows(torch.cat(given)), brute_force(steps, n))


def test_an_environment_that_was_made_anew_ends_what_was_waiting():
    steps = episodes(breakdowns=False)
    again = steps.clone()
    again["observation"][:, 30:] += 1000
    again["next", "observation"][:, 30:] += 1000
    transitions = NStepTransitions(4, GAMMA, COST_GAMMA)
    given = torch.cat([transitions(again[:, start : start + 10].clone()) for start in range(0, T, 10)])
    assert_equal(as_rows(given), brute_force(again, 4, begins_anew=(30,)))


def test_the_buffer_holds_them_and_minibatches_say_over_how_many_steps():
    data = off_policy(n_step=3, gamma=GAMMA, num_envs=2, init_random_frames=16)
    batches = list(data.train_dataloader())
    stored = data.buffer[: len(data.buffer)]
    assert set(stored["steps_to_next_obs"].flatten().tolist()) == {1, 2, 3}
    assert all(("steps_to_next_obs" in batch) and batch["next", "reward"].shape[-1] == 1 for batch in batches)
    ended = stored["next", "done"].flatten()
    assert (stored["steps_to_next_obs"].flatten()[~ended] == 3).all()


def test_they_go_on_exactly_after_a_restart():
    """Also where the first are still incomplete."""
    for stop in (8, 24):
        whole, first = (off_policy(n_step=5, gamma=GAMMA, frames_per_batch=4, init_random_frames=24) for _ in range(2))
        torch.manual_seed(1)
        for _ in range(10):
            whole.make_batch(whole.collect())
        torch.manual_seed(1)
        for _ in range(stop // 4):
            first.make_batch(first.collect())
        state = first.experience()
        second = off_policy(n_step=5, gamma=GAMMA, frames_per_batch=4, init_random_frames=24)
        second.load_state_dict(first.state_dict())
        second.load_experience(state)
        for _ in range(10 - stop // 4):
            second.make_batch(second.collect())
        for key, value in whole.buffer[: len(whole.buffer)].items(True, True):
            assert torch.equal(value, second.buffer[: len(second.buffer)].get(key)), key


def test_more_steps_than_are_taken_before_the_first_update_are_refused():
    with pytest.raises(ConfigurationError, match="data.n_step=9 needs as many steps .* and 8 are taken"):
        off_policy(n_step=9)
    data = OffPolicyData(
        make_scripted_env, make_policy(), total_frames=64, frames_per_epoch=64, num_envs=2, init_random_frames=16,
        batch_size=4, n_step=5,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="and 4 are taken"):
        data.check_processes(2)
