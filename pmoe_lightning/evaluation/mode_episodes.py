"""Episodes from the start with drawn actions: which of the equally good ways a policy takes, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase

from pmoe_lightning.envs.modes import NamedModes, named_modes
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.evaluation import modes
from pmoe_lightning.evaluation.episodes import MAX_EPISODE_STEPS, EpisodeResults, acting, evaluate_policy
from pmoe_lightning.evaluation.mode_figures import drawn_ways
from pmoe_lightning.modules.acting import find_actor, plain_distribution_at, states_of_actor
from pmoe_lightning.modules.mixture import missing

EPISODES = 400  # the standard error of a share is then 2.5 % at most
_MAX_ENVS = 100


@dataclass(frozen=True)
class ModeReport:
    """What was measured of the modes of one policy.

    Attributes:
        episodes: E, the number of drawn episodes.
        counts: of them, those that ended in each mode, [N].
        measures: ``kept``, ``score``, ``success``, ``balance``, ``removal_success``, ``blocked_success``, ``price``,
            ``return_sampled``, ``alpha``, ``gap`` and ``gap_over_alpha``, as in ``evaluation.modes``; those that can be
            told here. The balance is nan where no episode succeeded.
        left_out: why the others cannot, by their names.
        warning: what makes the measures doubtful; empty where nothing does.
    """

    episodes: int
    counts: tuple[int, ...]
    measures: dict[str, float]
    left_out: dict[str, str]
    warning: str = ""


def measure_modes(
    policy: TensorDictModuleBase,
    make_env: Callable[..., EnvBase],
    *,
    episodes: int = EPISODES,
    seed: int = 0,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    critics: Sequence[TensorDictModuleBase] = (),
    alpha: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ModeReport | None:
    """Draw whole episodes from the start and count the modes in which they end; None where none are named.

    The price compares with one episode of the policy's deterministic rule in each of the environments, 100 at most.

    Args:
        policy: as in :func:`evaluate_policy`.
        make_env: called with ``num_envs`` and ``seed``, where the task has noise of the start with ``start_deviation``
            0 and, where it can be blocked, once more with ``blocked=True``: see ``envs.modes``.
        episodes: E, at least 1.
        seed: of the first episode.
        max_episode_steps: as in :func:`evaluate_policy`.
        critics: read what the actor reads and the action normalised to [-1, 1], write ``state_action_value``.
        alpha: the temperature of the policy.
        should_stop: as in :func:`evaluate_policy`.

    Raises:
        ConfigurationError: the environment cannot be made, or named a mode that it does not have.
        EvaluationStopped: ``should_stop`` said so.
    """
    named = modes_of(make_env)
    if named is None:
        return None
    arguments: dict[str, Any] = {"seed": seed, "max_episode_steps": max_episode_steps, "should_stop": should_stop}
    env = from_start(make_env, named, num_envs=min(episodes, _MAX_ENVS), seed=seed)
    try:
        drawn = evaluate_policy(policy, env, episodes=episodes, sample=True, **arguments)
        ruled = evaluate_policy(policy, env, episodes=env.batch_size[0], **arguments)
        env.set_seed(seed)
        starts, name, first_actions = env.reset(), env.name, _normalised_first_actions(env, named)
    finally:
        env.close()
    counts = _count(drawn, named, name)
    measures = {
        "kept": float(modes.kept(counts, episodes)),
        "score": modes.score(counts, episodes),
        "success": modes.success(counts, episodes),
        "balance": modes.balance(counts),
        "removal_success": modes.removal_success(counts, episodes),
        "price": modes.price(drawn.returns, ruled.returns),
        "return_sampled": drawn.mean,
    }
    left_out = {}
    if named.can_be_blocked:
        blocked = _blocked_episodes(policy, make_env, named, arguments | {"episodes": episodes})
        measures["blocked_success"] = modes.blocked_success(sum(m >= 0 for m in blocked.modes) / episodes)
    else:
        left_out["blocked_success"] = f"{name} has no argument blocked"
    if alpha is None:
        left_out["alpha"] = "the policy has no temperature"
    else:
        measures["alpha"] = alpha
    if first_actions is None:
        left_out["gap"] = f"{name} names no first actions of equally good ways"
    elif not critics:
        left_out["gap"] = "the policy has no critics of actions"
    else:
        measures["gap"] = modes.gap(_first_values(policy, critics, starts[:1], first_actions))
        measures |= {"gap_over_alpha": measures["gap"] / alpha} if alpha else {}
    same = (starts["observation"] == starts["observation"][:1]).all()
    warning = "" if same else f"the starts of {name} differ, and noise of the start alone reaches many modes"
    return ModeReport(episodes, counts, measures, left_out, warning)


def modes_of(make_env: Callable[..., EnvBase]) -> NamedModes | None:
    """What the environments made by ``make_env`` say of their modes; makes one to find out."""
    env = make_env(num_envs=1, seed=0)
    try:
        return named_modes(env)
    finally:
        env.close()


def from_start(make_env: Callable[..., EnvBase], named: NamedModes, **arguments: Any) -> EnvBase:
    """Environments without noise of the start."""
    return make_env(**arguments, **({"start_deviation": 0.0} if named.has_noisy_start else {}))


@torch.no_grad()
def drawn_paths(
    policy: TensorDictModuleBase, env: EnvBase, *, seed: int, max_steps: int = 1000
) -> tuple[list[np.ndarray], list[int]]:
    """Positions [T_i + 1, 2] along one drawn episode of every environment, and the mode in which each ended.

    Args:
        policy: as in :func:`evaluate_policy`.
        env: environments that name modes and a ``plane``: the first two entries of an observation are the position.
        seed: of the first environment.
        max_steps: where an episode is cut short.
    """
    env.set_seed(seed)
    root, number = env.reset(), env.batch_size[0]
    paths = [[position] for position in root["observation"][:, :2].numpy()]
    ended_in, running = [-1] * number, set(range(number))
    with acting(policy, seed, sample=True) as act:
        for _ in range(max_steps):
            step, root = env.step_and_maybe_reset(act(root))
            position, done = step["next", "observation"][:, :2].numpy(), step["next", "done"].flatten().tolist()
            for i in sorted(running):
                paths[i].append(position[i])
                if done[i]:
                    ended_in[i] = env.ended_in[i]
                    running.remove(i)
            if not running:
                break
    return [np.stack(path) for path in paths], ended_in


@torch.no_grad()
def first_action_density(
    policy: TensorDictModuleBase, start: TensorDictBase, resolution: int = 64
) -> np.ndarray | None:
    """pi(a|s_0) [G, G] at the centres of G x G equal cells of the action box; rows are action dimension 1.

    The density of the actor, before a transform evolves what is drawn from it. None where the policy has none, or the
    action not two dimensions.

    Args:
        policy: as in :func:`evaluate_policy`.
        start: the first root, [1].
        resolution: G.
    """
    if find_actor(policy) is None:
        return None
    mixture: Any = plain_distribution_at(policy, start)
    if missing(type(mixture), {"draws"}) or mixture.event_shape != (2,):
        return None
    low, high = (bound.expand(2) for bound in (mixture.low, mixture.high))
    centre = (torch.arange(resolution, dtype=low.dtype, device=low.device) + 0.5) / resolution
    x, y = (low[d] + (high[d] - low[d]) * centre for d in range(2))
    u = mixture.unsquash(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).unsqueeze(-2))
    return (mixture.log_prob_unsquashed(u) - mixture.log_abs_det_jacobian(u)).squeeze(-1).exp().numpy(force=True)


def draw_ways(
    policy: TensorDictModuleBase, make_env: Callable[..., EnvBase], *, seed: int = 0, paths: int = 40
) -> Figure | None:
    """The figure of drawn paths and of the first action for a task on a plane; None for any other.

    Args:
        policy: as in :func:`evaluate_policy`.
        make_env: as in :func:`measure_modes`; called with ``render_mode="rgb_array"``.
        seed: of the first path.
        paths: how many.
    """
    named = modes_of(make_env)
    if named is None or named.plane is None:
        return None
    env = from_start(make_env, named, num_envs=paths, seed=seed, render_mode="rgb_array")
    try:
        start = env.reset()[:1]
        picture, bounds = env.picture(), env.action_spec.space
        density = first_action_density(policy, start)
        drawn, ended_in = drawn_paths(policy, env, seed=seed)
        arguments = {"low": bounds.low[0].tolist(), "high": bounds.high[0].tolist(), "num_modes": named.number}
        arguments["title"] = f"Where drawn actions lead in {env.name}"
    finally:
        env.close()
    return drawn_ways(picture, named.plane, drawn, ended_in, density=density, **arguments)


def _count(drawn: EpisodeResults, named: NamedModes, name: str) -> tuple[int, ...]:
    for mode in drawn.modes:
        if not isinstance(mode, int | np.integer) or not -1 <= mode < named.number:
            raise ConfigurationError(
                f"environment {name!r} ended an episode with info['mode']={mode!r}: it must be an int from 0 to "
                f"num_modes - 1 = {named.number - 1}, or -1 for none"
            )
    return tuple(drawn.modes.count(mode) for mode in range(named.number))


def _blocked_episodes(
    policy: TensorDictModuleBase, make_env: Callable[..., EnvBase], named: NamedModes, arguments: dict[str, Any]
) -> EpisodeResults:
    num_envs = min(arguments["episodes"], _MAX_ENVS)
    env = from_start(make_env, named, num_envs=num_envs, seed=arguments["seed"], blocked=True)
    try:
        return evaluate_policy(policy, env, sample=True, **arguments)
    finally:
        env.close()


def _normalised_first_actions(env: EnvBase, named: NamedModes) -> Tensor | None:
    if named.first_actions is None:
        return None
    low, high = env.action_spec.space.low[0], env.action_spec.space.high[0]
    return 2 * (torch.as_tensor(named.first_actions) - low) / (high - low) - 1


@torch.no_grad()
def _first_values(
    policy: TensorDictModuleBase, critics: Sequence[TensorDictModuleBase], start: TensorDictBase, actions: Tensor
) -> list[float]:
    """min_i Q_i(s_0, a) of normalised actions [W, A] at the first root [1]."""
    parameter = next(policy.parameters(), torch.empty(0))
    state = states_of_actor(policy, start.select(*policy.in_keys, strict=False).to(parameter.device))
    ways = state.expand(len(actions)).clone().set("action", actions.to(parameter))
    values = torch.stack([critic(ways.copy())["state_action_value"].squeeze(-1) for critic in critics])
    return values.min(0).values.tolist()
