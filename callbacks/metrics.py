"""Metrics of the training itself, logged every so many environment frames."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from pmoe_lightning.limits import PositiveInt, checked

from .interval import FrameInterval
from .reporting import log_metrics, warn_on_failure

if TYPE_CHECKING:
    from .contract import AbstractAlgorithm, Trainer


class MetricsLogger(Callback):
    """Log what training has produced since the last time: losses, returns of finished episodes, speed.

    ============================================== ============================================================
    ``train/loss_*``, ``train/alpha``, ...         means over the updates of the interval, from the algorithm
    ``train/episode_return``                       mean undiscounted return of the episodes that finished in it
    ``train/episode_length``                       mean length of those episodes, in environment steps
    ``train/episode_cost``                         mean cost of those episodes, where the environment writes a cost
    ``train/violations``                           steps with a cost, total since the start of training
    ``train/updates``, ``train/episodes``          totals since the start of training
    ``train/time/frames_per_second``               frames of the interval over wall-clock time, evaluation included
    ``train/time/updates_per_second``              the same for updates
    ============================================== ============================================================

    Everything is logged against environment frames, after the batch that reaches a multiple of the interval and at the
    end. Any other batch costs one comparison. Reading the metrics waits for the device, so the interval should not be
    much shorter than a second of training. A run that is stopped from outside leaves its unfinished interval to the
    checkpoint, so that the resumed run logs what the uninterrupted one would have. One that fails logs it, unless the
    iteration under way would have completed it.

    Args:
        every_frames: environment frames between two reports.

    Attributes:
        latest: the last value of everything logged.
        episodes: rows (env_frames, mean return, number of episodes), one per interval with finished episodes.
    """

    @checked
    def __init__(self, every_frames: PositiveInt = 1000) -> None:
        self._interval = FrameInterval(every_frames)
        self.latest: dict[str, float] = {}
        self.episodes: list[list[float]] = []
        self._updates = 0
        self._time = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        self._mark(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: AbstractAlgorithm, *_: Any) -> None:
        if self._interval.is_due(trainer.datamodule.env_frames):
            self._report(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        self._report(trainer)

    def on_exception(self, trainer: Trainer, pl_module: AbstractAlgorithm, exception: BaseException) -> None:
        has_failed = isinstance(exception, Exception)  # not after Ctrl-C, nor a signal
        if has_failed and not self._interval.is_left_to_resumed_run(trainer.datamodule, exception):
            with warn_on_failure("the last training metrics were not logged"):
                self._report(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"episodes": torch.tensor(self.episodes, dtype=torch.float64)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.episodes = state_dict["episodes"].tolist()

    def _mark(self, trainer: Trainer) -> None:
        self._interval.mark(trainer.datamodule.env_frames)
        self._updates, self._time = trainer.lightning_module.updates, time.monotonic()

    def _report(self, trainer: Trainer) -> None:
        frames, updates = trainer.datamodule.env_frames, trainer.lightning_module.updates
        metrics = trainer.lightning_module.drain_metrics() | self._drain_episodes(trainer, frames)
        if metrics or self._interval.has_rest(frames):
            metrics |= {"train/updates": float(updates), "train/episodes": float(trainer.datamodule.episodes)}
            if trainer.datamodule.violations is not None:
                metrics["train/violations"] = float(trainer.datamodule.violations)
            since = self._interval.frames
            if since is not None and self._interval.is_due(frames):  # the rest of an interval is too short to time
                seconds = max(time.monotonic() - self._time, 1e-9)
                metrics["train/time/frames_per_second"] = (frames - since) / seconds
                metrics["train/time/updates_per_second"] = (updates - self._updates) / seconds
            log_metrics(trainer, metrics, frames)
            self.latest |= metrics
        self._mark(trainer)

    def _drain_episodes(self, trainer: Trainer, frames: int) -> dict[str, float]:
        finished = trainer.datamodule.drain_episodes()
        if not finished:
            return {}
        means = [float(sum(column) / len(finished)) for column in zip(*finished, strict=True)]
        self.episodes.append([float(frames), means[0], float(len(finished))])
        # Without a cost there are two of them.
        return dict(zip(("train/episode_return", "train/episode_length", "train/episode_cost"), means, strict=False))
