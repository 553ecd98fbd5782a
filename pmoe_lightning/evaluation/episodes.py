"""How good is a policy: whole episodes, from the reset of a stated seed to their end."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import ExplorationType, set_exploration_type

from pmoe_lightning.envs import AbstractEnvironment, carried_entries
from pmoe_lightning.envs.modes import named_modes
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.evaluation.statistics import student_t_interval

_log = logging.getLogger(__name__)
#: An episode that has not ended by itself after so many steps is ended here.
MAX_EPISODE_STEPS = 10_000
# Matrix products of different row counts round differently, and a chaotic simulator magnifies that: with a constant
# count an episode does not depend on how many others are run beside it.
_POLICY_ROWS = 16


@dataclass(frozen=True)
class EpisodeResults:
    """Undiscounted returns and lengths of whole episodes; episode i was seeded with ``seed + i``.

    ``costs`` are their undiscounted costs, and ``violations`` their numbers of steps with a cost; empty where the
    environment writes no cost. ``modes`` are the modes in which they ended, -1 for none; empty where the environment
    names no modes (``envs.modes``). ``cut_short`` counts the episodes that did not end by themselves: their returns and
    lengths are those of their first ``max_episode_steps``.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    costs: tuple[float, ...] = ()
    violations: tuple[int, ...] = ()
    cut_short: int = 0
    modes: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """Mean return."""
        return math.fsum(self.returns) / len(self.returns)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean return over episodes of this one policy (not over training seeds)."""
        return student_t_interval(self.returns)


class EvaluationStopped(Exception):
    """``should_stop`` ended an evaluation before it had a result."""


@torch.no_grad()
def evaluate_policy(
    policy: TensorDictModuleBase,
    env: AbstractEnvironment,
    *,
    episodes: int,
    seed: int,
    sample: bool = False,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    should_stop: Callable[[], bool] = lambda: False,
) -> EpisodeResults:
    """Run ``episodes`` whole episodes; episode i starts from a reset with seed ``seed + i``.

    The result of a deterministic policy does not depend on the number of environments in ``env`` (a policy that draws,
    by ``sample`` or by its own rule, repeats itself for the same ``seed`` and number of environments). Global random
    states and the policy's mode are as before afterwards. Environments are left in the middle of episodes: do not share
    ``env`` with training.

    Args:
        policy: reads ``observation`` [N, O], writes ``action`` [N, A]; acts on the device of its parameters. A policy
            with memory also reads what ``env`` carries, see ``envs.with_memory``.
        env: N environments; rounds of N episodes are run at once, and only the first episode after the reset counts.
        episodes: number of episodes, at least 1.
        seed: seed of episode 0.
        sample: draw from the policy, in place of its deterministic action.
        max_episode_steps: an episode that has not ended by then is cut short; the result counts it, a warning says so.
        should_stop: asked before every step.

    Raises:
        ConfigurationError: ``episodes`` or ``max_episode_steps`` is not positive.
        EvaluationStopped: ``should_stop`` said so.
    """
    for name, value in (("episodes", episodes), ("max_episode_steps", max_episode_steps)):
        if value < 1:
            raise ConfigurationError(f"{name} must be at least 1, not {value}")
    outcomes: list[tuple[float, ...]] = []
    modes: list[int] = []
    cut_short = 0
    with acting(policy, seed, sample) as act:
        for first in range(0, episodes, env.batch_size[0]):
            count = min(env.batch_size[0], episodes - first)
            finished, ended_in, unfinished = _run_round(act, env, count, seed + first, max_episode_steps, should_stop)
            outcomes += finished
            modes += ended_in
            cut_short += unfinished
    if cut_short:
        _log.warning(
            "%d of %d evaluation episodes did not end within %s steps and were cut short there (max_episode_steps)",
            *(cut_short, episodes, f"{max_episode_steps:,}"),
        )
    # Without a cost an outcome is (return, length).
    names = ("returns", "lengths", "costs", "violations")
    columns: dict[str, Any] = dict(zip(names, zip(*outcomes, strict=True), strict=False))
    return EpisodeResults(**columns, cut_short=cut_short, modes=tuple(modes))


@contextmanager
def acting(policy: TensorDictModuleBase, seed: int, sample: bool) -> Iterator[Any]:
    """A function that adds the policy's action [N, A] to a root [N], both on the CPU, and has no other side effect."""
    parameter = next(policy.parameters(), torch.empty(0))
    modes = [(module, module.training) for module in policy.modules()]
    written = ["action", *carried_entries(policy)]
    mode = ExplorationType.RANDOM if sample else ExplorationType.DETERMINISTIC

    def act(root: TensorDictBase) -> TensorDictBase:
        n = root.batch_size[0]
        rows = max(n, _POLICY_ROWS)
        read = root.select(*policy.in_keys, strict=False).items()
        inputs = {key: _padded(value, rows).to(parameter.device) for key, value in read}
        out = policy(TensorDict(inputs, batch_size=rows))
        for key in written:
            root.set(key, out.get(key)[:n].cpu())
        return root

    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), set_exploration_type(mode):
        torch.manual_seed(seed)
        try:
            policy.eval()
            yield act
        finally:
            for module, training in modes:
                module.training = training


def _padded(values: Tensor, rows: int) -> Tensor:
    padded = values.new_zeros(rows, *values.shape[1:])
    padded[: len(values)] = values
    return padded


def _run_round(
    act: Any, env: AbstractEnvironment, count: int, seed: int, max_steps: int, should_stop: Callable[[], bool]
) -> tuple[list[tuple[float, ...]], list[int], int]:
    """The first episodes of the first ``count`` environments, seeded with ``seed``, ``seed + 1``, ...

    Returns:
        of each the entries of ``EpisodeResults``, the mode in which it ended, and how many were cut short.
    """
    env.set_seed(seed)
    root = env.reset()
    outcomes: list[tuple[float, ...]] = [()] * count
    running, violations = set(range(count)), [0] * count
    modes = [] if named_modes(env) is None else [-1] * count
    for _ in range(max_steps):
        if should_stop():
            raise EvaluationStopped
        step, root = env.step_and_maybe_reset(act(root))
        following = step.get("next")
        done, cost = following.get("done").flatten().tolist(), following.get("cost", None)
        if cost is not None:
            violations = [n + (c > 0) for n, c in zip(violations, cost.flatten().tolist(), strict=False)]
        for i in running:
            outcomes[i] = following.get("episode_return")[i].item(), int(following.get("episode_length")[i])
            if cost is not None:
                outcomes[i] += following.get("episode_cost")[i].item(), violations[i]
        if modes:
            modes = [env.ended_in[i] if i in running and done[i] else mode for i, mode in enumerate(modes)]
        running = {i for i in running if not done[i]}
        if not running:
            break
    return outcomes, modes, len(running)


def episode_of(act: Any, env: AbstractEnvironment, seed: int) -> Iterator[tuple[TensorDictBase, float]]:
    """The roots of the episode of ``seed``, each with its action and the return up to it, while ``env`` is there.

    The last root is where the episode ended and has no action.
    """
    env.set_seed(seed)
    root, total = env.reset(), 0.0
    for _ in range(MAX_EPISODE_STEPS):
        yield act(root), total
        step = env.step(root)
        root, total = env.step_mdp(step).exclude("action"), step["next", "episode_return"].item()
        if step["next", "done"].any():
            break
    yield root, total


@torch.no_grad()
def follow_episode(policy: TensorDictModuleBase, env: AbstractEnvironment, *, seed: int) -> TensorDictBase:
    """The roots [T] of the episode of ``seed``, with the actions of the policy, as :func:`evaluate_policy` runs it.

    Args:
        policy: as in :func:`evaluate_policy`.
        env: one environment; it is left at the end of the episode.
        seed: of the episode.
    """
    with acting(policy, seed, sample=False) as act:
        *roots, _ = (root for root, _ in episode_of(act, env, seed))
    return torch.cat(roots)
