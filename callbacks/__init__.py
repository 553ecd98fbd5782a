"""Lightning callbacks: everything about a run that is not collecting data or updating the policy.

Callbacks read the run through a small contract, ``contract.py``: ``trainer.datamodule`` counts ``env_frames`` and
``episodes`` and hands out finished episodes, ``trainer.lightning_module`` counts ``updates`` and hands out its metrics.
Remove any of them from the configuration and training is the same, bit for bit.
"""

from .best_checkpoint import BestCheckpoint
from .estimator_variance import EstimatorVariance
from .evaluation import Evaluation
from .final_policy import FinalPolicy
from .last_checkpoint import LastCheckpoint
from .learning_curve import LearningCurve
from .metrics import MetricsLogger
from .mixture import MixtureDiagnostics
from .modes import ModeMeasures
from .nonfinite import NonFiniteGuard
from .progress import FramesProgressBar
from .trajectories import ActionTrajectories

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
