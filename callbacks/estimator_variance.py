"""How noisy the gradient of the policy is while it trains, and whether it points where the exact one does."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensordict import TensorDict

from pmoe_lightning.callbacks.reporting import log_metrics, reached
from pmoe_lightning.estimators import Marginalized
from pmoe_lightning.gradient_statistics import cosine, gradient_statistics


class EstimatorVariance(Callback):
    """Measure the chosen gradient estimator on a recent batch of states, beside ``marginalized``, which is unbiased.

    For each group of mixture parameters, ``router`` (more than one component only), ``loc`` and ``scale``:

    ====================================== =============================================================================
    ``train/estimator/variance_<group>``   summed variance of one estimate, mean per state
    ``train/estimator/signal_to_noise_..`` |E g| / sqrt(variance), see ``gradient_statistics``
    ``train/estimator/cosine_<group>``     between the mean estimates of the two; 1 for an unbiased one, but for
                                           the noise of the means
    ====================================== =============================================================================

    For SAC the objective is that of the actor; for PPO that of the entropy bonus, the part that an estimator serves
    there. The random numbers of training are left as they are.

    Args:
        every_frames: environment frames between two measurements.
        num_samples: independent estimates per state, at least 2.
        max_states: states of the batch that are used at most.
    """

    def __init__(self, every_frames: int = 10_000, num_samples: int = 32, max_states: int = 64) -> None:
        if num_samples < 2:
            raise ValueError(f"a variance needs num_samples of at least 2, not {num_samples}")
        self.every_frames, self.num_samples, self.max_states = every_frames, num_samples, max_states
        self._frames = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._frames = trainer.datamodule.env_frames

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        frames = trainer.datamodule.env_frames
        if reached(self.every_frames, self._frames, frames) and trainer.is_global_zero:
            log_metrics(trainer, self.measure(pl_module), frames)
        self._frames = frames

    def measure(self, algorithm: LightningModule) -> dict[str, float]:
        """The metrics above, for the states that the algorithm trained on last.

        Nothing before its first update, and nothing for an algorithm without an estimator.
        """
        if algorithm.last_observation is None or algorithm.estimator is None:
            return {}
        observation = algorithm.last_observation
        observation = observation[:: max(1, len(observation) // self.max_states)][: self.max_states]
        states = TensorDict({algorithm.observation_key: observation}, batch_size=observation.shape[:1])
        devices = [observation.device] if observation.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            with torch.no_grad():
                distribution = algorithm.actor.get_dist(states.copy())
            chosen, exact = (
                gradient_statistics(
                    estimator,
                    distribution,
                    lambda repeated: algorithm.loss.objective(states, repeated),
                    num_samples=self.num_samples,
                )
                for estimator in (algorithm.estimator, Marginalized())
            )
        metrics = {}
        for group in chosen if distribution.num_components > 1 else ("loc", "scale"):
            metrics[f"train/estimator/variance_{group}"] = chosen[group].variance / len(states)
            metrics[f"train/estimator/signal_to_noise_{group}"] = chosen[group].signal_to_noise
            metrics[f"train/estimator/cosine_{group}"] = cosine(chosen[group].mean, exact[group].mean)
        return metrics
