"""What several callbacks need: the way to the loggers, to each other, and out of trouble while a run is ending."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch import Callback
from matplotlib.figure import Figure

from pmoe_lightning.modules.mixture import Offer, missing
from pmoe_lightning.tracking.address import store_line

if TYPE_CHECKING:
    from .contract import Trainer

_log = logging.getLogger(__name__)
C = TypeVar("C", bound=Callback)


def log_metrics(trainer: Trainer, metrics: Mapping[str, float], env_frames: int) -> None:
    """Send metrics to every logger of the trainer, against environment frames."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=env_frames)


def loggers_with(trainer: Trainer, method: str) -> list[Any]:
    """The loggers that have a method beyond Lightning's own; none on processes that do not log."""
    return [logger for logger in trainer.loggers if hasattr(logger, method)] if trainer.is_global_zero else []


def log_figure(trainer: Trainer, name: str, draw: Callable[[], Figure | None], env_frames: int | None = None) -> None:
    """Draw a figure and send it to the loggers that take figures, where there is any of each."""
    loggers = loggers_with(trainer, "log_figure")
    if loggers and (figure := draw()) is not None:
        for logger in loggers:
            logger.log_figure(name, figure, env_frames)


def log_artifact(trainer: Trainer, path: Path, folder: str) -> None:
    """Send a file to the loggers that take files."""
    for logger in loggers_with(trainer, "log_artifact"):
        logger.log_artifact(path, folder)


def log_blocks(trainer: Trainer, checkpoint: Path, folder: str) -> None:
    """Send the blocks of a replay buffer that a checkpoint names, each once, to MLflow's loggers."""
    from pmoe_lightning.checkpoints.blocks import named_blocks
    from pmoe_lightning.tracking import MLflowLogger

    loggers = [logger for logger in loggers_with(trainer, "log_artifact") if isinstance(logger, MLflowLogger)]
    for block in named_blocks(checkpoint) if loggers else ():
        for logger in loggers:
            logger.log_artifact(block, f"{folder}/{block.parent.name}", once=True)


def find_callback(trainer: Trainer, kind: type[C]) -> C | None:
    """The first callback of this kind, if the run has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)


@contextmanager
def warn_on_failure(what: str) -> Iterator[None]:
    """Turn an error into a one-line warning, where raising would hide the error that ended the run."""
    try:
        yield
    except Exception as error:
        _log.warning("%s: %s", what, store_line(error))
        _log.debug("%s", what, exc_info=True)


class LeftOut:
    """Says of a distribution, in one line of the log and once, which reports a callback makes without."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, distribution: object, reports: Mapping[str, Collection[Offer]]) -> None:
        """
        Args:
            distribution: what is measured.
            reports: what would be reported of it, with what each asks of it (``modules.mixture``).
        """
        lacking = {name: missing(type(distribution), asks) for name, asks in reports.items()}
        names = [name for name, offers in lacking.items() if offers and name not in self._told]
        if names:
            self._told.update(names)
            offers = sorted({offer for name in names for offer in lacking[name]})
            measured = type(distribution).__name__
            _log.info("%s is measured without %s: it does not offer %s", measured, ", ".join(names), ", ".join(offers))
