"""Which deterministic rule a mixture acts by: the one that earned most on episodes other than those reported.

No rule is best everywhere: where components surround one way their mean is, where they are several ways it lies between
them. The returns of the rules are compared on a few episodes; the choice is reported, and judged on others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tensordict.nn import TensorDictModuleBase

from pmoe_lightning.envs import AbstractEnvironment
from pmoe_lightning.evaluation.episodes import MAX_EPISODE_STEPS, evaluate_policy

#: Of each candidate. The choice errs by their noise, which the reported episodes do not share.
CHOICE_EPISODES = 4


@dataclass(frozen=True)
class RuleChoice:
    """The rule that was chosen, and how.

    Attributes:
        rule: the one with the highest mean return; of equal ones the first.
        returns: the mean return of every candidate, by its name.
        episodes: of each candidate.
        seed: of their first episode.
    """

    rule: str
    returns: dict[str, float]
    episodes: int
    seed: int

    def __str__(self) -> str:
        returns = ", ".join(f"{rule} {mean:.1f}" for rule, mean in self.returns.items())
        return f"{self.rule}, chosen on {self.episodes} other episodes from seed {self.seed} ({returns})"

    def plain(self) -> dict[str, Any]:
        """Plain values, from which ``RuleChoice(**values)`` makes it again."""
        return asdict(self)


def choose_rule(
    policies: Mapping[str, TensorDictModuleBase],
    env: AbstractEnvironment,
    *,
    seed: int,
    episodes: int = CHOICE_EPISODES,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    should_stop: Callable[[], bool] = lambda: False,
) -> RuleChoice:
    """Run every candidate on the same episodes.

    Args:
        policies: one for each rule; those that come first win where they tie.
        env, episodes, seed, max_episode_steps, should_stop: as in :func:`evaluate_policy`, which costs
            ``len(policies) * episodes`` episodes here.

    Raises:
        EvaluationStopped: ``should_stop`` said so.
    """
    limits: dict[str, Any] = {"max_episode_steps": max_episode_steps, "should_stop": should_stop}
    results = {
        rule: evaluate_policy(each, env, episodes=episodes, seed=seed, **limits) for rule, each in policies.items()
    }
    returns = {rule: result.mean for rule, result in results.items()}
    # One whose returns are not numbers is never the best of those that are.
    best = max(returns, key=lambda rule: (returns[rule] == returns[rule], returns[rule]))
    return RuleChoice(best, returns, episodes, seed)
