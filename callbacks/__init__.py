"""Lightning callbacks: everything about a run that is not collecting data or updating the policy.

Callbacks read the run through a small contract: ``trainer.datamodule`` counts ``env_frames`` and ``episodes`` and
hands out finished episodes, ``trainer.lightning_module`` counts ``updates`` and hands out its metrics. Remove any of
them from the configuration and training is the same, bit for bit.
"""

from pmoe_lightning.callbacks.best_checkpoint import BestCheckpoint
from pmoe_lightning.callbacks.estimator_variance import EstimatorVariance
from pmoe_lightning.callbacks.evaluation import Evaluation
from pmoe_lightning.callbacks.final_policy import FinalPolicy
from pmoe_lightning.callbacks.last_checkpoint import LastCheckpoint
from pmoe_lightning.callbacks.learning_curve import LearningCurve
from pmoe_lightning.callbacks.metrics import MetricsLogger
from pmoe_lightning.callbacks.mixture import MixtureDiagnostics
from pmoe_lightning.callbacks.modes import ModeMeasures
from pmoe_lightning.callbacks.nonfinite import NonFiniteGuard
from pmoe_lightning.callbacks.progress import FramesProgressBar
from pmoe_lightning.callbacks.trajectories import ActionTrajectories

__all__ = [
    "ActionTrajectories",
    "BestCheckpoint",
    "EstimatorVariance",
    "Evaluation",
    "FinalPolicy",
    "FramesProgressBar",
    "LastCheckpoint",
    "LearningCurve",
    "MetricsLogger",
    "MixtureDiagnostics",
    "ModeMeasures",
    "NonFiniteGuard",
]
