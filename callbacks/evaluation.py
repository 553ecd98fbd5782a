"""Evaluation of the deterministic policy in environments of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from pmoe_lightning.callbacks.reporting import log_metrics
from pmoe_lightning.checkpoints import load_policy
from pmoe_lightning.envs import with_memory
from pmoe_lightning.evaluation import evaluate_policy

_MAX_ENVS = 16


class Evaluation(Callback):
    """Run whole episodes with the deterministic policy, before training and after epochs.

    The policy is what ``load_policy`` would make of a checkpoint saved now, because that is what a user will act with.
    An algorithm without a ``policy_description`` is judged by its ``policy`` itself.

    Logs against environment frames: ``eval/episode_return`` (mean undiscounted return),
    ``eval/episode_return_low`` and ``eval/episode_return_high`` (its 95 % interval), ``eval/episode_length`` and
    ``time/evaluation_seconds``; where the environment writes a cost, also ``eval/episode_cost`` (mean) and
    ``eval/violations`` (mean number of steps with a cost). ``ModelCheckpoint(monitor="eval/episode_return",
    mode="max")`` keeps the best policy; the evaluation before training is not offered to it.

    Training does not notice: the environments are separate, and the policy's mode and the global random states of
    Python, NumPy and torch are put back afterwards. Every evaluation starts from the same seed, so
    the policy alone decides the outcome. With several devices the first process evaluates and the others wait.

    Args:
        make_env: called as ``make_env(num_envs=..., seed=...)`` at the first evaluation; for a policy with memory also
            with ``carry=...``.
        episodes: episodes of one evaluation.
        seed: seed of the evaluation environments; choose one that the training environments do not use.
        every_epochs: epochs between two evaluations. The last epoch is always evaluated.

    Attributes:
        history: rows (env_frames, mean return, low, high), one per evaluation.
    """

    def __init__(
        self, make_env: Callable[..., EnvBase], *, episodes: int = 10, seed: int = 1_000_000, every_epochs: int = 1
    ) -> None:
        self.make_env, self.episodes, self.seed, self.every_epochs = make_env, episodes, seed, every_epochs
        self.history: list[list[float]] = []
        self._env: EnvBase | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.datamodule.env_frames == 0:
            self._evaluate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        if (trainer.current_epoch + 1) % self.every_epochs == 0 or data.env_frames >= data.total_frames:
            mean = self._evaluate(trainer, pl_module)
            pl_module.log("eval/episode_return", mean, logger=False, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def state_dict(self) -> dict[str, Any]:
        return {"history": torch.tensor(self.history, dtype=torch.float64)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"].tolist()

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> float:
        mean = 0.0
        if trainer.is_global_zero:
            start = time.monotonic()
            with isolate_rng():
                if self._env is None:
                    make_env = with_memory(self.make_env, pl_module.policy)
                    self._env = make_env(num_envs=min(self.episodes, _MAX_ENVS), seed=self.seed)
                policy = _judged_policy(pl_module)
                result = evaluate_policy(policy, self._env, episodes=self.episodes, seed=self.seed)
            mean, (low, high) = float(result.mean), result.interval
            frames = trainer.datamodule.env_frames
            self.history.append([float(frames), mean, float(low), float(high)])
            metrics = {
                "eval/episode_return": mean,
                "eval/episode_return_low": float(low),
                "eval/episode_return_high": float(high),
                "eval/episode_length": sum(result.lengths) / len(result.lengths),
                "time/evaluation_seconds": time.monotonic() - start,
            }
            if result.costs:
                metrics["eval/episode_cost"] = sum(result.costs) / len(result.costs)
                metrics["eval/violations"] = sum(result.violations) / len(result.violations)
            log_metrics(trainer, {name: value for name, value in metrics.items() if math.isfinite(value)}, frames)
        # Every process needs the value: they decide together whether the checkpoint is the best.
        return trainer.strategy.broadcast(mean)

    def _close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


def _judged_policy(pl_module: LightningModule) -> TensorDictModuleBase:
    if not pl_module.policy_description:
        return pl_module.policy
    return load_policy({"policy": pl_module.policy_state()}, device=pl_module.device, parts=pl_module.parts)
