"""What a callback reads of the run it is in: names for the type checker, which nothing imports while a run is running.

Lightning says neither that its trainer has data nor of which class its module is. Here the data module counts
``env_frames`` and hands out finished episodes, and the module counts ``updates`` and hands out its metrics.
"""

from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer

from pmoe_lightning.algorithms.base import AbstractAlgorithm
from pmoe_lightning.data.collection import CollectedData

__all__ = ["AbstractAlgorithm", "CollectedData", "Trainer"]


class Trainer(LightningTrainer):
    """Lightning's trainer as callbacks get it."""

    datamodule: CollectedData
    lightning_module: AbstractAlgorithm
    callbacks: list[Callback]
