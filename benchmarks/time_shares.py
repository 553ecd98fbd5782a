"""Where the time of a training run goes: the share of environment, policy, updates and all the rest.

    python benchmarks/time_shares.py algo=ppo
    python benchmarks/time_shares.py algo=sac actor=gaussian total_frames=5000

Runs the train command with the words given, times its parts by process CPU time, all threads, and prints a row of a
table. Start-up, compilation and the first ``WARM_UP`` batches are left out. "evaluation" is the evaluations and, at the
end, the film and the packaging of the policy. What remains of ``Trainer.fit`` is called "Lightning, logging": loops,
callbacks with their figures and checkpoints, progress and the tracking store.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer

from pmoe_lightning.algorithms.base import AbstractAlgorithm
from pmoe_lightning.algorithms.on_policy import OnPolicyAlgorithm
from pmoe_lightning.callbacks import Evaluation, FinalPolicy
from pmoe_lightning.data.collection import CollectedData
from pmoe_lightning.data.collector import RolloutCollector
from pmoe_lightning.data.off_policy import OffPolicyData
from pmoe_lightning.data.on_policy import OnPolicyData
from pmoe_lightning.envs import GymnasiumEnv

WARM_UP = 3


class Stopwatch:
    """Process CPU seconds spent in functions, nested calls included; started anew after ``WARM_UP`` batches."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.batches = self.first_frames = self.frames = 0
        self.start = self.end = 0.0

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            start, before = time.process_time(), self.seconds.copy()
            result = function(*arguments, **named)
            if name == "evaluation":  # whose steps are not those of training
                self.seconds = before
            self.seconds[name] += time.process_time() - start
            return result

        return call

    def watch(self, owner: type, method: str, name: str) -> None:
        setattr(owner, method, self.timed(name, getattr(owner, method)))

    def batch_ends(self, trainer: Trainer, *_: Any) -> None:
        self.batches += 1
        self.frames = trainer.datamodule.env_frames
        if self.batches == WARM_UP:
            self.seconds.clear()
            self.start, self.first_frames = time.process_time(), self.frames


def instrument(watch: Stopwatch) -> None:
    watch.watch(GymnasiumEnv, "step_into", "environment")
    watch.watch(RolloutCollector, "rollout", "rollout")
    watch.watch(CollectedData, "collect", "collect")
    watch.watch(OnPolicyData, "make_batch", "make_batch")
    watch.watch(OffPolicyData, "make_batch", "make_batch")
    watch.watch(OnPolicyAlgorithm, "_epoch", "updates")
    watch.watch(Evaluation, "on_train_epoch_end", "evaluation")
    watch.watch(FinalPolicy, "on_train_end", "evaluation")
    policy_step = RolloutCollector._policy_step
    RolloutCollector._policy_step = lambda self, inputs: watch.timed("policy", policy_step(self, inputs))
    for algorithm in AbstractAlgorithm.__subclasses__():
        watch.watch(algorithm, "training_step", "training_step")
    plain_fit = Trainer.fit

    def fit(trainer: Trainer, *arguments: Any, **named: Any) -> None:
        marks = Callback()
        marks.on_train_batch_end = watch.batch_ends
        trainer.callbacks.append(marks)
        plain_fit(trainer, *arguments, **named)
        watch.end = time.process_time()

    Trainer.fit = fit


def report(watch: Stopwatch) -> None:
    s, total = watch.seconds, watch.end - watch.start
    data = s["collect"] + s["make_batch"]
    updates = s["updates"] or s["training_step"]
    shares = {
        "environment": s["environment"],
        "policy": s["policy"],
        "collector": s["rollout"] - s["environment"] - s["policy"],
        "normalisation, buffer": data - s["rollout"],
        "advantages, metrics": s["training_step"] - updates,
        "updates": updates,
        "evaluation": s["evaluation"],
        "Lightning, logging": total - data - s["training_step"] - s["evaluation"],
    }
    frames = watch.frames - watch.first_frames
    print("| us per frame | " + " | ".join(shares) + " |")
    print("|---" * (len(shares) + 1) + "|")
    cells = [f"{1e6 * seconds / frames:.1f} ({seconds / total:.1%})" for seconds in shares.values()]
    print(f"| {1e6 * total / frames:.1f} | " + " | ".join(cells) + " |")


def main() -> None:
    from pmoe_lightning.train import main as train

    watch = Stopwatch()
    instrument(watch)
    sys.argv[0] = "train"
    train()
    report(watch)


if __name__ == "__main__":
    main()
