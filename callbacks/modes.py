"""How many of the equally good ways the policy keeps, at equal distances over a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torchrl.envs import EnvBase

from pmoe_lightning.checkpoints.policy import build_critics, policy_entry
from pmoe_lightning.envs import with_memory
from pmoe_lightning.envs.modes import NamedModes
from pmoe_lightning.evaluation.episodes import MAX_EPISODE_STEPS, EvaluationStopped
from pmoe_lightning.evaluation.mode_episodes import EPISODES, ModeReport, draw_ways, measure_modes, modes_of
from pmoe_lightning.evaluation.mode_figures import modes_over_frames
from pmoe_lightning.limits import PositiveInt, Seed, checked
from pmoe_lightning.processes.stop_after_iteration import StopAfterIteration

from .evaluation import Evaluation
from .interval import FrameInterval
from .reporting import find_callback, log_figure, log_metrics, warn_on_failure

if TYPE_CHECKING:
    from .contract import AbstractAlgorithm, Trainer

_log = logging.getLogger(__name__)
_DRAWN = ("kept", "score", "success", "balance")


class ModeMeasures(Callback):
    """Log ``eval/modes/...`` for an environment that names its modes (``envs.modes``); any other is left alone.

    The measures are those of ``evaluation.modes``, of whole episodes from the start whose actions are drawn:
    ``kept``, ``score``, ``success``, ``balance``, ``removal_success``, ``blocked_success``, ``price``,
    ``return_sampled``, ``alpha``, ``gap`` and ``gap_over_alpha``; what of these cannot be told is left out, which one
    line of the log says. Figures, at the end: ``modes_over_frames``, and ``drawn_ways`` for a task on a plane.

    Training does not notice, as in :class:`Evaluation`. A measurement that a stop breaks off is made after the first
    iteration of the run that goes on.

    Args:
        make_env: as in :class:`Evaluation`; see also ``evaluation.mode_episodes.measure_modes``.
        points: measurements in the run, at equal distances; the last one is at its end.
        episodes: of one measurement.
        seed: of its first episode.
        max_episode_steps: an episode that has not ended by then is cut short.

    Attributes:
        history: rows (env_frames, kept, score, success, balance), one per measurement.
    """

    @checked
    def __init__(
        self,
        make_env: Callable[..., EnvBase],
        *,
        points: PositiveInt = 10,
        episodes: PositiveInt = EPISODES,
        seed: Seed = 2_000_000,
        max_episode_steps: PositiveInt = MAX_EPISODE_STEPS,
    ) -> None:
        self.make_env, self.points, self.episodes, self.seed = make_env, points, episodes, seed
        self.max_episode_steps = max_episode_steps
        self.history: list[list[float]] = []
        self._interval = FrameInterval(1)
        self._named: NamedModes | None = None
        self._has_told = False

    def on_train_start(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        data = trainer.datamodule
        self._interval.every_frames = max(1, math.ceil(data.total_frames / self.points))
        self._interval.start(data.env_frames)
        if trainer.is_global_zero:
            with isolate_rng(), warn_on_failure("the modes are not measured"):
                self._named = modes_of(with_memory(self.make_env, pl_module.policy))

    def on_train_batch_end(self, trainer: Trainer, pl_module: AbstractAlgorithm, *_: Any) -> None:
        if self._interval.is_due(trainer.datamodule.env_frames):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        if self._interval.has_rest(trainer.datamodule.env_frames):
            self._measure(trainer, pl_module)
        self._draw(trainer)
        if self._named is not None and self._named.plane is not None:
            with isolate_rng(), warn_on_failure("the drawn ways were not logged"):
                policy = Evaluation.judged_policy(pl_module)
                draw = partial(draw_ways, policy, with_memory(self.make_env, policy), seed=self.seed)
                log_figure(trainer, "drawn_ways", draw)

    def on_exception(self, trainer: Trainer, pl_module: AbstractAlgorithm, exception: BaseException) -> None:
        with warn_on_failure("the modes over the run were not drawn"):
            self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"history": torch.tensor(self.history, dtype=torch.float64), "frames": self._interval.frames}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self._interval.frames = state_dict["history"].tolist(), state_dict["frames"]

    def _measure(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        last, frames = self._interval.frames, trainer.datamodule.env_frames
        self._interval.mark(frames)
        if self._named is None:
            return
        stop = find_callback(trainer, StopAfterIteration)
        # In this order: after an error isolate_rng would leave the random states as they are.
        with isolate_rng(), warn_on_failure("the modes were not measured"):
            try:
                report = self._report(pl_module, lambda: stop is not None and stop.is_asked)
            except EvaluationStopped:
                self._interval.frames = last
                return
            if report is None:
                return
            measures = report.measures
            finite = {f"eval/modes/{name}": value for name, value in measures.items() if math.isfinite(value)}
            log_metrics(trainer, finite, frames)
            self.history.append([float(frames), *(measures.get(name, math.nan) for name in _DRAWN)])
            self._tell(report)

    def _report(self, pl_module: AbstractAlgorithm, should_stop: Callable[[], bool]) -> ModeReport | None:
        critics = []
        if pl_module.policy_description and pl_module.action_values():
            entry = policy_entry({"policy": pl_module.policy_state()})
            critics = [critic.to(pl_module.device) for critic in build_critics(entry, pl_module.parts)]
        return measure_modes(
            Evaluation.judged_policy(pl_module),
            with_memory(self.make_env, pl_module.policy),
            episodes=self.episodes,
            seed=self.seed,
            max_episode_steps=self.max_episode_steps,
            critics=critics,
            alpha=pl_module.alpha,
            should_stop=should_stop,
        )

    def _tell(self, report: ModeReport) -> None:
        """What is left out and what is doubtful: once, a line each."""
        if not self._has_told:
            for name, reason in report.left_out.items():
                _log.info("modes are measured without %s: %s", name, reason)
            if report.warning:
                _log.warning("the measures of modes are doubtful: %s", report.warning)
        self._has_told = True

    def _draw(self, trainer: Trainer) -> None:
        if self._named is not None and self.history:
            frames, *columns = zip(*self.history, strict=True)
            measures = dict(zip(_DRAWN, columns, strict=True))
            draw = partial(modes_over_frames, frames, measures, num_modes=self._named.number)
            log_figure(trainer, "modes_over_frames", draw)
