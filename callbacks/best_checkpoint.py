"""The checkpoint of the best policy, verified when a run goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from pmoe_lightning.checkpoints.files import read_checkpoint, verify_checkpoint, write_checkpoint
from pmoe_lightning.errors import RunError

from .evaluation import Evaluation
from .reporting import find_callback

if TYPE_CHECKING:
    from .contract import AbstractAlgorithm, Trainer

_RETURN = "eval/episode_return"
#: What is in a whole checkpoint and not in one for acting.
_FOR_RESUMING = ("callbacks", "optimizer_states", "lr_schedulers", "experience", "metrics", "last_observation", "run")
_log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, for the one policy with the highest evaluation return.

    A run that goes on verifies the file. One that is damaged or gone is said in a line, and made again of the best
    policy that a checkpoint beside it holds, of those that were evaluated: often it is the very same. If none is,
    the best policy so far is lost, and the next evaluation begins anew. An evaluation that a stop had broken off, and
    that the run has made up for as it went on, takes part in the choice.
    """

    @property
    def state_key(self) -> str:
        # As in checkpoints of the time when this was Lightning's own class.
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.dirpath is not None  # set up before it is loaded
        folder = self.dirpath

        def here(path: str) -> str:
            return str(Path(folder, Path(path).name)) if path else path

        # The folder of the run may have another name by now.
        models = {here(path): score for path, score in state_dict["best_k_models"].items()}
        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        super().load_state_dict({**state_dict, **paths, "dirpath": self.dirpath, "best_k_models": models})

    def on_train_start(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        super().on_train_start(trainer, pl_module)
        if self.best_model_path and self.best_model_score is not None and self.save_top_k == 1:
            # Every process needs the outcome: they decide together which checkpoint is the best.
            is_intact, score = trainer.strategy.broadcast(
                self._verify(trainer, self.best_model_score) if trainer.is_global_zero else (True, None)
            )
            if not is_intact:
                self._count_as_best(score)
        evaluation = find_callback(trainer, Evaluation) if self.monitor == _RETURN else None
        if evaluation is not None and evaluation.made_up is not None:
            made_up = {_RETURN: torch.tensor(evaluation.made_up)}
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer) | made_up)

    def _verify(self, trainer: Trainer, recorded: Tensor) -> tuple[bool, float | None]:
        """Whether the file is as it was written; if not, the score of what stands there now, if anything does."""
        path = Path(self.best_model_path)
        try:
            verify_checkpoint(path)
        except RunError as error:
            evaluation = find_callback(trainer, Evaluation) if self.monitor == _RETURN else None
            history = evaluation.history if evaluation is not None else []
            found = _best_beside(path, {int(row[0]): row[1] for row in history if row[0] > 0})
            said = f"{error}; it was the best policy, {self.monitor} {float(recorded):.1f}"
            if found is None:
                _log.warning("%s, and is lost: the next evaluation chooses among those to come", said)
                return False, None
            checkpoint, score, source = found
            is_same = torch.tensor(score) == recorded.cpu()
            what = "found again" if is_same else f"lost, and the best of the rest, with {score:.1f}, taken from"
            _log.warning("%s, and is %s%s %s", said, what, " in" * bool(is_same), source)
            write_checkpoint(checkpoint, path)
            return False, score
        return True, None

    def _count_as_best(self, score: float | None) -> None:
        """As if only a checkpoint with this score had been saved; none where it is None."""
        path, worst = self.best_model_path, torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        value = None if score is None else torch.tensor(score)
        self.best_k_models = {} if value is None else {path: value}
        self.best_model_path = self.kth_best_model_path = "" if value is None else path
        self.best_model_score = self.current_score = value
        self.kth_value = worst if value is None else value


def _best_beside(path: Path, returns: Mapping[int, float]) -> tuple[dict[str, Any], float, Path] | None:
    """Of the other checkpoints in the folder, the policy with the highest return, which is given by env frames."""
    best = None
    for other in sorted(path.parent.glob(f"*{path.suffix}")):
        try:
            checkpoint = read_checkpoint(other)
            score = returns[checkpoint["policy"]["env_frames"]]
        except (RunError, KeyError, TypeError):
            continue
        if best is None or score > best[1]:
            best = ({key: value for key, value in checkpoint.items() if key not in _FOR_RESUMING}, score, other)
    return best
