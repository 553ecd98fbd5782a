"""Progress in environment frames: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from .evaluation import Evaluation
from .metrics import MetricsLogger
from .reporting import find_callback

if TYPE_CHECKING:
    from .contract import AbstractAlgorithm, Trainer

_COMPILING = "compiling the acting policy and the update: about half a minute, which the time left does not count"
_BAR_FORMAT = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} frames [{elapsed}, {rate_fmt}{postfix}]"


class FramesProgressBar(ProgressBar):
    """Show frames done and to do, frames per second, time left, and the last training and evaluation return.

    Where standard output and standard error are terminals this is a bar; otherwise a plain line is printed after
    every 5 % of the frames and at the latest after 30 s (on runs over 25 minutes: 2 % of the time gone by). The
    returns are those of the ``MetricsLogger`` and ``Evaluation`` callbacks of the run, if it has them.

    The time left is that of the mean pace since the run has settled: after its first iteration with updates, because
    those before collect random actions only, and where programs are compiled after the second, because the update is
    compiled in the first and the acting policy at the latest in the one that follows. Before that none is shown.
    """

    REFRESH_SECONDS = 0.25
    LINE_FRACTION = 0.05
    LINE_SECONDS = 30.0

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm | None = None
        self._settling = 1  # iterations with updates until the pace is that of the rest of the run
        self._settled: tuple[int, float] | None = None  # frames and time of that moment
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

    def on_train_start(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        self._start = self._shown_at = time.monotonic()
        self._shown_frames = trainer.datamodule.env_frames
        self._settling, self._settled, self._updates = 1 + pl_module.compiles, None, pl_module.updates
        if self._enabled and pl_module.compiles and self._shown_frames < trainer.datamodule.total_frames:
            print(_COMPILING, flush=True)
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

    def on_train_batch_end(self, trainer: Trainer, pl_module: AbstractAlgorithm, *_: Any) -> None:
        now = time.monotonic()
        self._settle(trainer.datamodule.env_frames, pl_module.updates, now)
        if self._bar is not None:
            if now - self._shown_at >= self.REFRESH_SECONDS:
                self._show_bar(self._bar, trainer, now)
        elif self._enabled:
            frames, total = trainer.datamodule.env_frames, trainer.datamodule.total_frames
            patience = max(self.LINE_SECONDS, 0.02 * (now - self._start))
            due = frames - self._shown_frames >= self.LINE_FRACTION * total or now - self._shown_at >= patience
            if due and frames < total:  # the last line waits for the last evaluation
                self._print_line(trainer, now)

    def on_train_end(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: AbstractAlgorithm, exception: BaseException) -> None:
        self._finish(trainer)

    def _show_bar(self, bar: tqdm, trainer: Trainer, now: float) -> None:
        frames = min(trainer.datamodule.env_frames, bar.total)
        said = [self._returns(trainer), self._time_left(trainer, now)]
        bar.set_postfix_str(", ".join(filter(None, said)), refresh=False)
        bar.update(frames - bar.n)
        self._shown_at = now

    def _print_line(self, trainer: Trainer, now: float) -> None:
        frames, total = trainer.datamodule.env_frames, trainer.datamodule.total_frames
        speed = (frames - self._shown_frames) / max(now - self._shown_at, 1e-9)
        done = min(frames / total, 1.0)
        parts = [f"{done:4.0%}  {frames:,}/{total:,} frames", f"{speed:,.0f} frames/s"]
        parts += filter(None, [self._returns(trainer), self._time_left(trainer, now)])
        print(", ".join(parts), flush=True)
        self._shown_frames, self._shown_at = frames, now

    def _settle(self, frames: int, updates: int, now: float) -> None:
        if self._settling and updates > self._updates:
            self._settling, self._updates = self._settling - 1, updates
            if not self._settling:
                self._settled = frames, now

    def _time_left(self, trainer: Trainer, now: float) -> str:
        frames, total = trainer.datamodule.env_frames, trainer.datamodule.total_frames
        if self._settled is None or frames <= self._settled[0] or frames >= total:
            return ""
        pace = (now - self._settled[1]) / (frames - self._settled[0])
        return f"{tqdm.format_interval((total - frames) * pace)} left"

    def _finish(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._show_bar(self._bar, trainer, time.monotonic())
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
