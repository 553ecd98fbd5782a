"""The learning curve of the run as a figure."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lightning.pytorch import Callback

from pmoe_lightning.checkpoints.policy import trained_rule
from pmoe_lightning.evaluation import figures

from .evaluation import Evaluation
from .metrics import MetricsLogger
from .reporting import find_callback, log_figure, warn_on_failure

if TYPE_CHECKING:
    from .contract import AbstractAlgorithm, Trainer


class LearningCurve(Callback):
    """Log the figure ``learning_curve`` when training ends, also when an error or an interrupt ends it.

    Shows the training returns of the run's ``MetricsLogger`` and the evaluations of its ``Evaluation``, and says
    by which rule a mixture acted in these; put this callback after both.

    Args:
        title: text above the axes, for example the environment and the algorithm.
    """

    def __init__(self, title: str = "Learning curve") -> None:
        self.title = title

    def on_train_end(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        self._draw(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: AbstractAlgorithm, exception: BaseException) -> None:
        with warn_on_failure("the learning curve was not logged"):
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        metrics, evaluation = find_callback(trainer, MetricsLogger), find_callback(trainer, Evaluation)
        episodes = metrics.episodes if metrics is not None else []
        evaluations = evaluation.history if evaluation is not None else []
        if episodes or evaluations:
            chosen = evaluation is not None and evaluation.choice is not None and evaluation.rule == "chosen"
            rule = "chosen on other episodes" if chosen else _rule(pl_module)
            draw = partial(figures.learning_curve, episodes, evaluations, rule=rule, title=self.title)
            log_figure(trainer, "learning_curve", draw)


def _rule(pl_module: AbstractAlgorithm) -> str | None:
    """How the mixture acted in the evaluations; None where there is no choice, or nobody said."""
    if not pl_module.policy_description:
        return None
    arguments = pl_module.policy_description["arguments"]
    several = max(arguments.get(key, 1) for key in ("num_components", "num_options")) > 1
    return trained_rule(pl_module.policy_state()) if several else None
