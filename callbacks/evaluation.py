"""Evaluation of the deterministic policy in environments of its own."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from pmoe_lightning.checkpoints.policy import build_policy, candidate_rules, leaves_rule_open, policy_entry
from pmoe_lightning.envs import with_memory
from pmoe_lightning.evaluation.episodes import MAX_EPISODE_STEPS, EpisodeResults, EvaluationStopped, evaluate_policy
from pmoe_lightning.evaluation.rules import CHOICE_EPISODES, RuleChoice, choose_rule
from pmoe_lightning.limits import PositiveInt, Seed, checked
from pmoe_lightning.processes.stop_after_iteration import StopAfterIteration
from pmoe_lightning.tracking.references import load_policy

from .reporting import find_callback, log_metrics

if TYPE_CHECKING:
    from .contract import AbstractAlgorithm, Trainer

_log = logging.getLogger(__name__)
_MAX_ENVS = 16
_DRAWN_PART = 5  # of the judged episodes, in all evaluations but the last


class Evaluation(Callback):
    """Run whole episodes with the deterministic policy, and some with drawn actions, before training and after epochs.

    The policy is what ``load_policy`` would make of a checkpoint saved now, because that is what a user will act with.
    An algorithm without a ``policy_description`` is judged by its ``policy`` itself.

    Logs against environment frames: ``eval/episode_return`` (mean undiscounted return),
    ``eval/episode_return_low`` and ``eval/episode_return_high`` (its 95 % interval), ``eval/episode_length`` and
    ``train/time/evaluation_seconds``; ``eval/episode_return_sampled``, the mean return where the actions are drawn,
    which no deterministic rule distorts; ``eval/cut_short``, the number of judged episodes that did not end by
    themselves, where there are any; where the environment writes a cost, also ``eval/episode_cost`` (mean) and
    ``eval/violations`` (mean number of steps with a cost). ``ModelCheckpoint(monitor="eval/episode_return",
    mode="max")`` keeps the best policy; the evaluation before training is not offered to it.

    The drawn episodes have the seeds that follow those of the judged ones. At the last evaluation there are as many of
    them, at the others a fifth, so that they add a fifth to the time: ``ceil(episodes / 5)``.

    A mixture is judged, kept, filmed and packaged by the rule that earned most: before every evaluation ``mean``,
    ``max_weight`` and, where there are action values, ``best_value`` each act in the same four episodes, whose seeds
    follow those of the drawn ones, and the best of them is what the judged episodes are run with. The description of
    the policy names it from then on, and how it was chosen (``rule_chosen``), and ``eval/choice/...`` are the mean
    returns. That is eight or twelve episodes more in every evaluation, which of ten judged and two drawn ones about
    doubles. Nothing is chosen, and nothing more is run, with ``rule="trained"``, where the actor says another rule
    than its default ``best_value``, and where there is one rule.

    Training does not notice: the environments are separate, and the policy's mode and the global random states of
    Python, NumPy and torch are put back afterwards. Every evaluation starts from the same seed, so
    the policy alone decides the outcome. With several devices the first process evaluates and the others wait.

    A signal that stops the run also stops an evaluation, which then has no result. A run that goes on from that stop
    makes up for it.

    Args:
        make_env: called as ``make_env(num_envs=..., seed=...)`` at the first evaluation; for a policy with memory also
            with ``carry=...``.
        episodes: episodes of one evaluation.
        seed: seed of the evaluation environments; choose one that the training environments do not use.
        every_epochs: epochs between two evaluations. The last epoch is always evaluated.
        max_episode_steps: an episode that has not ended by then is cut short.
        rule: by which a mixture is judged: ``chosen``, see above, or ``trained``, the actor's own (``deterministic``).

    Attributes:
        choice: the rule that was chosen last, and how; None where none was.
        history: rows (env_frames, mean return, low, high), one per evaluation.
        returns: of every evaluation the returns of its judged episodes, by environment frames; their seeds follow
            ``seed``.
        made_up: the mean return of an evaluation that was made up for as this run went on.
    """

    @checked
    def __init__(
        self,
        make_env: Callable[..., EnvBase],
        *,
        episodes: PositiveInt = 10,
        seed: Seed = 1_000_000,
        every_epochs: PositiveInt = 1,
        max_episode_steps: PositiveInt = MAX_EPISODE_STEPS,
        rule: Literal["chosen", "trained"] = "chosen",
    ) -> None:
        self.make_env, self.episodes, self.seed, self.every_epochs = make_env, episodes, seed, every_epochs
        self.max_episode_steps, self.rule = max_episode_steps, rule
        self.choice: RuleChoice | None = None
        self._stopped_at: int | None = None  # the frames of an evaluation that is to be made up for
        self.history: list[list[float]] = []
        self.returns: dict[int, list[float]] = {}
        self.made_up: float | None = None
        self._envs: dict[int, EnvBase] = {}

    def on_train_start(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        frames = trainer.datamodule.env_frames
        if self.choice is not None and self.rule == "chosen":
            pl_module.follow_rule(self.choice.rule, self.choice.plain())
        if frames in (0, self._stopped_at):
            mean = self._evaluate(trainer, pl_module)
            self.made_up = mean if frames else None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        data = trainer.datamodule
        if (trainer.current_epoch + 1) % self.every_epochs == 0 or data.env_frames >= data.total_frames:
            mean = self._evaluate(trainer, pl_module)
            if mean is not None:
                pl_module.log("eval/episode_return", mean, logger=False, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: AbstractAlgorithm, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: AbstractAlgorithm, exception: BaseException) -> None:
        self._close()

    def state_dict(self) -> dict[str, Any]:
        choice = None if self.choice is None else self.choice.plain()
        history = torch.tensor(self.history, dtype=torch.float64)
        judged = {"history": history, "returns": dict(self.returns)}
        return {**judged, "stopped_at": self._stopped_at, "choice": choice}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"].tolist()
        self.returns = dict(state_dict.get("returns", {}))  # earlier checkpoints have none
        self._stopped_at = state_dict.get("stopped_at")
        choice = state_dict.get("choice")
        self.choice = None if choice is None else RuleChoice(**choice)

    def _evaluate(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> float | None:
        """The mean return; None if the evaluation was stopped."""
        mean = None
        if trainer.is_global_zero:
            mean = self._run_episodes(trainer, pl_module)
            self._stopped_at = trainer.datamodule.env_frames if mean is None else None
        # Every process needs the value: they decide together whether the checkpoint is the best.
        return trainer.strategy.broadcast(mean)

    def _run_episodes(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> float | None:
        start, data = time.monotonic(), trainer.datamodule
        is_last, part = data.env_frames >= data.total_frames, math.ceil(self.episodes / _DRAWN_PART)
        with isolate_rng():
            stop = find_callback(trainer, StopAfterIteration)
            try:
                choice, policy = self._choose(pl_module, stop)
                run = partial(self._run, policy, stop)
                result = run(self._env_of(pl_module, self.episodes), self.episodes, seed=self.seed)
                number = self.episodes if is_last else part
                drawn = run(self._env_of(pl_module, number), number, seed=self.seed + self.episodes, sample=True)
            except EvaluationStopped:  # in here, because an error would leave the random states as they are
                return None
        if choice is not None:
            self.choice = choice
            pl_module.follow_rule(choice.rule, choice.plain())
            _log.info("evaluation at %s frames acts by the rule %s", f"{data.env_frames:,}", choice)
        mean, (low, high) = float(result.mean), result.interval
        self.history.append([float(data.env_frames), mean, float(low), float(high)])
        self.returns[data.env_frames] = [float(value) for value in result.returns]
        metrics = {
            "eval/episode_return": mean,
            "eval/episode_return_low": float(low),
            "eval/episode_return_high": float(high),
            "eval/episode_return_sampled": float(drawn.mean),
            "eval/episode_length": sum(result.lengths) / len(result.lengths),
            "train/time/evaluation_seconds": time.monotonic() - start,
        }
        if choice is not None:
            metrics |= {f"eval/choice/{rule}": value for rule, value in choice.returns.items()}
        if result.cut_short:
            metrics["eval/cut_short"] = float(result.cut_short)
        if result.costs:
            metrics["eval/episode_cost"] = sum(result.costs) / len(result.costs)
            metrics["eval/violations"] = sum(result.violations) / len(result.violations)
        log_metrics(trainer, {name: value for name, value in metrics.items() if math.isfinite(value)}, data.env_frames)
        return mean

    def _run(
        self,
        policy: TensorDictModuleBase,
        stop: StopAfterIteration | None,
        env: EnvBase,
        episodes: int,
        *,
        seed: int,
        sample: bool = False,
    ) -> EpisodeResults:
        return evaluate_policy(
            policy,
            env,
            episodes=episodes,
            seed=seed,
            sample=sample,
            max_episode_steps=self.max_episode_steps,
            should_stop=lambda: stop is not None and stop.is_asked,
        )

    def _choose(
        self, pl_module: AbstractAlgorithm, stop: StopAfterIteration | None
    ) -> tuple[RuleChoice | None, TensorDictModuleBase]:
        """The policy to judge, and how its rule was chosen, where there is one to choose."""
        if self.rule == "trained" or not leaves_rule_open(pl_module.policy_description):
            return None, self.judged_policy(pl_module)
        entry = policy_entry({"policy": pl_module.policy_state()})
        made = partial(build_policy, entry, device=pl_module.device, parts=pl_module.parts)
        policies = {rule: made(rule=rule) for rule in candidate_rules(entry)}
        if len(policies) == 1:
            return None, self.judged_policy(pl_module)
        choice = choose_rule(
            policies,
            self._env_of(pl_module, CHOICE_EPISODES),
            seed=self.seed + 2 * self.episodes,  # the drawn episodes are as many as the judged ones, at the last
            max_episode_steps=self.max_episode_steps,
            should_stop=lambda: stop is not None and stop.is_asked,
        )
        return choice, policies[choice.rule]

    @staticmethod
    def judged_policy(pl_module: AbstractAlgorithm) -> TensorDictModuleBase:
        """What is evaluated: the policy of a checkpoint saved now."""
        if not pl_module.policy_description:
            return pl_module.policy
        return load_policy({"policy": pl_module.policy_state()}, device=pl_module.device, parts=pl_module.parts)

    def _env_of(self, pl_module: AbstractAlgorithm, episodes: int) -> EnvBase:
        """Environments for so many episodes, made at their first use: few have a small batch, for all of it steps."""
        num_envs = min(episodes, _MAX_ENVS)
        if num_envs not in self._envs:
            make_env = with_memory(self.make_env, pl_module.policy)
            self._envs[num_envs] = make_env(num_envs=num_envs, seed=self.seed)
        return self._envs[num_envs]

    def _close(self) -> None:
        while self._envs:
            self._envs.popitem()[1].close()
