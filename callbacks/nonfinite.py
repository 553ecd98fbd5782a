"""NaN and infinity end a run, or cost it one step, but never reach its weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback

from pmoe_lightning.errors import NonFiniteError
from pmoe_lightning.limits import checked

from .reporting import log_metrics

if TYPE_CHECKING:
    from .contract import AbstractAlgorithm, Trainer

_log = logging.getLogger(__name__)
_NORM = "train/gradient_norm"  # what a loss that is not finite makes not finite too
#: Weights that started below one and are larger than this may have been driven there by the learning rate.
_GROWN = 10.0


class NonFiniteGuard(Callback):
    """Looks, after every iteration, for losses, gradients and simulators that were not finite.

    By then nothing has happened: an update whose gradient is not finite leaves weights and optimizer as they are, and a
    transition in which a simulator broke down never reaches replay or an update. What is left to decide is whether to
    go on.

    Args:
        mode: ``stop`` ends the run with the name of the first loss or gradient that was not finite, or of the
            environment that returned such numbers. ``skip`` goes on and counts: ``train/skipped_iterations`` and
            ``train/breakdowns``. MuJoCo's own instabilities are always skipped.
        patience: ``skip`` gives up too after this many iterations in a row with losses or gradients not finite.
    """

    @checked
    def __init__(self, mode: Literal["stop", "skip"] = "stop", patience: int = 10) -> None:
        self.mode, self.patience = mode, patience
        self._skipped = self._in_a_row = self._breakdowns = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped, "in_a_row": self._in_a_row, "breakdowns": self._breakdowns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._breakdowns = state_dict["breakdowns"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: AbstractAlgorithm, *_: Any) -> None:
        data = trainer.datamodule
        if data.breakdowns > self._breakdowns:
            self._breakdowns = data.breakdowns
            log_metrics(trainer, {"train/breakdowns": float(data.breakdowns)}, data.env_frames)
            if self.mode == "stop" and not data.simulated_by_mujoco:
                raise NonFiniteError(
                    f"the environment returned numbers that are not finite, before frame {data.env_frames:,}; "
                    "callbacks.nonfinite=skip leaves such transitions out"
                )
        names = pl_module.drop_nonfinite()
        self._in_a_row = self._in_a_row + 1 if names else 0
        if names:
            self._report(trainer, pl_module, names)

    def _report(self, trainer: Trainer, pl_module: AbstractAlgorithm, names: list[str]) -> None:
        frames = trainer.datamodule.env_frames
        # Where only a diagnostic was not finite, the update itself was taken.
        kept = "; the weights are as before" if _NORM in names else ""
        first = min(names, key=lambda name: name == _NORM)
        what = f"{first} is not finite by update {pl_module.updates:,} (frame {frames:,}){kept}"
        if self.mode == "stop" or self._in_a_row >= self.patience:
            hint = _advice(pl_module) if self.mode == "stop" else f"{self.patience} in a row"
            raise NonFiniteError(f"{what}: {hint}")
        self._skipped += 1
        _log.warning("%s; skipped", what)
        log_metrics(trainer, {"train/skipped_iterations": float(self._skipped)}, frames)


def _advice(algorithm: AbstractAlgorithm) -> str:
    """What to try; the learning rate only where weights are large, by way of which one that is too high overflows."""
    largest = max(float(parameter.detach().abs().max()) for parameter in algorithm.loss.parameters())
    if largest > _GROWN:
        return f"weights have grown to {largest:.3g}: lower algo.lr, or callbacks.nonfinite=skip"
    return "look at the observations and rewards of that time, or leave the step out: callbacks.nonfinite=skip"
