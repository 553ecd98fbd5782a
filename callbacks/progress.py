"""Progress in environment frames: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from pmoe_lightning.callbacks.evaluation import Evaluation
from pmoe_lightning.callbacks.metrics import MetricsLogger
from pmoe_lightning.callbacks.reporting import find_callback

_BAR_FORMAT = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} frames [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class FramesProgressBar(ProgressBar):
    """Show frames done and to do, frames per second, time left, and the last training and evaluation return.

    Where standard output and standard error are terminals this is a bar; otherwise a plain line is printed after
    every 5 % of the frames and at the latest after 30 s (on runs over 25 minutes: 2 % of the time gone by). The
    returns are those of the ``MetricsLogger`` and ``Evaluation`` callbacks of the run, if it has them.
    """

    REFRESH_SECONDS = 0.25
    LINE_FRACTION = 0.05
    LINE_SECONDS = 30.0

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm | None = None
        self._start = self._shown_at = time.monotonic()
        self._shown_frames = 0

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._bar is None:
            print(*args, **kwargs)
        else:
            self._bar.write(" ".join(map(str, args)), **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = self._shown_at = time.monotonic()
        self._shown_frames = trainer.datamodule.env_frames
        if self._enabled and sys.stdout.isatty() and sys.stderr.isatty():
            total = trainer.datamodule.total_frames
            self._bar = tqdm(
                total=total,
                initial=min(self._shown_frames, total),
                unit="",
                unit_scale=True,
                smoothing=0.05,
                dynamic_ncols=True,
                bar_format=_BAR_FORMAT,
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if self._bar is not None:
            if now - self._shown_at >= self.REFRESH_SECONDS:
                self._show_bar(trainer, now)
        elif self._enabled:
            frames, total = trainer.datamodule.env_frames, trainer.datamodule.total_frames
            patience = max(self.LINE_SECONDS, 0.02 * (now - self._start))
            due = frames - self._shown_frames >= self.LINE_FRACTION * total or now - self._shown_at >= patience
            if due and frames < total:  # the last line waits for the last evaluation
                self._print_line(trainer, now)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish(trainer)

    def _show_bar(self, trainer: Trainer, now: float) -> None:
        frames = min(trainer.datamodule.env_frames, self._bar.total)
        self._bar.set_postfix_str(self._returns(trainer), refresh=False)
        self._bar.update(frames - self._bar.n)
        self._shown_at = now

    def _print_line(self, trainer: Trainer, now: float) -> None:
        frames, total = trainer.datamodule.env_frames, trainer.datamodule.total_frames
        speed = (frames - self._shown_frames) / max(now - self._shown_at, 1e-9)
        done = min(frames / total, 1.0)
        parts = [f"{done:4.0%}  {frames:,}/{total:,} frames", f"{speed:,.0f} frames/s"]
        if returns := self._returns(trainer):
            parts.append(returns)
        if 0 < frames < total and speed > 0:
            parts.append(f"{tqdm.format_interval((total - frames) / speed)} left")
        print(", ".join(parts), flush=True)
        self._shown_frames, self._shown_at = frames, now

    def _finish(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._show_bar(trainer, time.monotonic())
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        elif self._enabled and trainer.datamodule.env_frames > self._shown_frames:
            self._print_line(trainer, time.monotonic())

    def _returns(self, trainer: Trainer) -> str:
        metrics, evaluation = find_callback(trainer, MetricsLogger), find_callback(trainer, Evaluation)
        parts = []
        if metrics is not None and "train/episode_return" in metrics.latest:
            parts.append(f"return {metrics.latest['train/episode_return']:.4g}")
        if evaluation is not None and evaluation.history:
            parts.append(f"evaluation {evaluation.history[-1][1]:.4g}")
        return ", ".join(parts)
