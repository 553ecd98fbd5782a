"""120 NaNs and infinities, in every tensor of SAC and PPO: none enters replay, weights, optimizer or a checkpoint."""

from __future__ import annotations

import itertools
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import cell
from lightning.pytorch import Callback, Trainer
from test_nonfinite import VALUES, Poison, data_for, is_finite, iterations, pendulum, ppo, sac, sick_env, tensors_of

from pmoe_lightning.callbacks import LastCheckpoint, NonFiniteGuard
from pmoe_lightning.checkpoints import AtomicCheckpointIO, read_checkpoint
from pmoe_lightning.errors import NonFiniteError

pytestmark = pytest.mark.torture

LOSSES = {sac: ("actor", "qvalue", "frequency"), ppo: ("objective", "critic", "qvalue", "frequency")}
TENSORS = ("observation", "reward", "action", "loss", "gradient", "weight")
EACH = 10  # injections per tensor and algorithm, at iterations and with values that change


class PoisonWeight(Callback):
    """One number of one weight, as a flipped bit of the memory would."""

    def __init__(self, name: str, value: float, iteration: int) -> None:
        self.name, self.value, self.iteration = name, value, iteration

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if iterations(trainer) == self.iteration:
            with torch.no_grad():
                dict(pl_module.loss.named_parameters())[self.name].view(-1)[0] = self.value


class PoisonAction(Callback):
    """The policy's action in the rollout after an iteration."""

    def __init__(self, value: float, iteration: int) -> None:
        self.value, self.iteration = value, iteration

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if iterations(trainer) == self.iteration:
            pl_module.policy.register_forward_hook(
                lambda module, inputs, output: output.set("action", torch.full_like(output["action"], self.value))
            )


def everything_finite(checkpoint: Any) -> bool:
    if isinstance(checkpoint, torch.Tensor):
        return not checkpoint.is_floating_point() or bool(checkpoint.isfinite().all())
    if isinstance(checkpoint, dict):
        return all(everything_finite(value) for name, value in checkpoint.items() if name != "callbacks")
    return all(map(everything_finite, checkpoint)) if isinstance(checkpoint, list | tuple) else True


def inject(make_algorithm: Any, tensor: str, value: float, iteration: int, rng: random.Random, folder: Path) -> dict:
    """One run with one injection: where something that is not finite was found after it, and whether it stopped."""
    algorithm, callbacks, make = make_algorithm(), [], pendulum
    trained = [name for name, parameter in algorithm.loss.named_parameters() if parameter.requires_grad]
    if tensor in ("observation", "reward"):
        make = partial(sick_env, tensor, value)
    elif tensor == "action":
        callbacks = [PoisonAction(value, iteration)]
    elif tensor == "loss":
        callbacks = [Poison(f"loss loss_{rng.choice(LOSSES[make_algorithm])}", value, iteration)]
    elif tensor == "gradient":
        callbacks = [Poison(f"gradient {rng.choice(trained)}", value, iteration)]
    else:
        callbacks = [PoisonWeight(rng.choice(trained), value, iteration)]
    data = data_for(algorithm, make, frames_per_batch=16, frames_per_epoch=32, total_frames=192)
    saver = LastCheckpoint(folder, filename="last", save_on_exception=True, enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=[*callbacks, NonFiniteGuard(), saver],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    stopped = False
    try:
        trainer.fit(algorithm, datamodule=data)
    except NonFiniteError:
        stopped = True
    buffer = getattr(data, "buffer", None)
    files = list(folder.glob("*.ckpt"))
    # The weight that was put in is in the memory of the process that stopped; nowhere else may it be.
    tensors = {} if tensor == "weight" else tensors_of(algorithm)
    return {
        "not_stopped": not stopped,
        "replay": buffer is not None and not is_finite(buffer[:]),
        "weights_or_optimizer": not all(value.isfinite().all() for value in tensors.values()),
        "checkpoints": sum(not everything_finite(read_checkpoint(path)) for path in files),
        "no_checkpoint_left": not files and iteration > 2,
    }


def inject_everywhere(folder: Path) -> dict[str, Any]:
    rng, figures = random.Random(0), {"injections": 0}
    for number, (algorithm, tensor, i) in enumerate(itertools.product(LOSSES, TENSORS, range(EACH))):
        found = inject(algorithm, tensor, VALUES[i % 3], 1 + i % 5, rng, folder / str(number))
        figures["injections"] += 1
        for name, count in found.items():
            figures[name] = figures.get(name, 0) + int(count)
        if any(found.values()):
            figures.setdefault("where", []).append(f"{algorithm.__name__} {tensor} {VALUES[i % 3]}: {found}")
    return figures


def test_none_of_120_injections_gets_through(tmp_path):
    figures = cell("injections", lambda: inject_everywhere(tmp_path))
    assert figures.pop("injections") == 120
    assert not any(figures.values()), figures
