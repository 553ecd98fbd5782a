"""Fit, with the exit codes of a shell, and with an end that hides no error."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from pmoe_lightning.errors import RunError, error_line, is_exit
from pmoe_lightning.processes.stop_after_iteration import Preempted, requeue
from pmoe_lightning.run.process_watch import ProcessWatch
from pmoe_lightning.tracking.address import without_secrets

_log = logging.getLogger(__name__)


def fit(trainer: Trainer, algorithm: LightningModule, data: LightningDataModule, resume: str | None = None) -> None:
    """``trainer.fit``, with the shell's exit codes for a run that was stopped.

    Raises:
        RunError: there was nothing to do an update with, or somebody's code called ``sys.exit()``.
    """
    for part in (*trainer.callbacks, data):  # type: ignore[attr-defined]  # Lightning does not declare them
        report_failures_of(part, "on_exception")
    for logger in trainer.loggers:
        report_failures_of(logger, "finalize")
    try:
        with ProcessWatch(trainer), _no_exit():
            trainer.fit(algorithm, datamodule=data, ckpt_path=resume)
    except SystemExit as ending:
        if isinstance(ending, Preempted) and trainer.is_global_zero:
            requeue()
        # Lightning turns a KeyboardInterrupt, which is not our signal handler's, into exit code 1.
        if isinstance(ending.__context__, KeyboardInterrupt):
            raise SystemExit(128 + signal.SIGINT) from None
        raise


@contextmanager
def _no_exit() -> Iterator[None]:
    """``sys.exit()`` of somebody's code would end a run as if it were done."""
    try:
        yield
    except SystemExit as ending:
        if is_exit(ending) and not isinstance(ending.__context__, KeyboardInterrupt):
            raise RunError(f"something called sys.exit({ending.code!r}) in the middle of the run") from ending
        raise


def report_failures_of(part: Any, hook: str) -> None:
    """Make an error in what a part does at the end of a run a line: raised, it would hide the error that ended it.

    It would also keep the parts behind from closing what they hold.
    """
    method = getattr(part, hook)

    @wraps(method)
    def report_failure(*arguments: Any, **keywords: Any) -> None:
        try:
            method(*arguments, **keywords)
        except Exception as error:
            _log.warning("%s.%s failed: %s", type(part).__name__, hook, error_line(error, named=True))

    setattr(part, hook, report_failure)


class AtLeastOneUpdate(Callback):
    """Ends a run that has trained nothing with an error, whatever the reason, because it looks like one that has.

    Not one that was killed after its last frame: of that, only what follows training is left to be done.
    """

    def __init__(self) -> None:
        self._updates = 0
        self._is_complete = False

    # Lightning declares neither the trainer's data nor that its module counts updates.
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._updates = pl_module.updates
        self._is_complete = trainer.datamodule.env_frames >= trainer.datamodule.total_frames
        if self._is_complete:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.updates == self._updates and not self._is_complete:
            raise RunError(
                f"nothing was trained: no update was due by frame {trainer.datamodule.env_frames:,}; raise total_frames"
            )


class RunRecord(Callback):
    """Writes into every checkpoint which run it is of: the configuration and the MLflow run."""

    def __init__(self, configuration: dict[str, Any]) -> None:
        self.configuration = configuration

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = {"configuration": self.configuration, "processes": trainer.world_size}
        if began := getattr(pl_module, "init_from", None):
            checkpoint["run"]["init_from"] = began
        for logger in trainer.loggers:
            if hasattr(logger, "tracking_uri") and hasattr(logger, "run_id"):  # the user's own may be another's
                where = without_secrets(logger.tracking_uri)
                checkpoint["run"]["mlflow"] = {"run_id": logger.run_id, "tracking_uri": where}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        pl_module.init_from = checkpoint["run"].get("init_from")
