"""Milliseconds of learning from pixels: an update beside its products, a minibatch from replay, and a frame of a run.

All are taken in turns in one process and in its CPU time, as in benchmarks/update.py, whose floor here also convolves:
the convolutions of the update with their gradients, and nothing else. The settings are those of experiment=dmc_pixels.

    python benchmarks/pixels.py

Compiling takes about a minute. Results: benchmarks/results/update/pixels.csv.
"""

from __future__ import annotations

import csv
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from update import RESULTS, Products, readable_form

from pmoe_lightning.algorithms import SAC, make_sac
from pmoe_lightning.data.frames import FrameStore, random_shift
from pmoe_lightning.envs import make_env
from pmoe_lightning.estimators import Frequency
from pmoe_lightning.modules.actors import make_pmoe_actor
from pmoe_lightning.modules.encoders import make_drq_encoder
from pmoe_lightning.updates import SACUpdate

SHAPE, BATCH, ACTION_DIM = (3, 64, 64), 128, 6
UPDATES, ROUNDS, FRAMES = 3, 7, 50
PIXELS = {"size": 64, "grey": True, "look": "fast"}
TASKS = ("HalfCheetah-v5", "InvertedPendulum-v5")


def make() -> SAC:
    torch.manual_seed(0)
    encoder = make_drq_encoder(SHAPE, channels=[16, 32, 32], strides=[2, 2, 2])
    actor = make_pmoe_actor(encoder.features, [-1.0] * ACTION_DIM, [1.0] * ACTION_DIM)
    return make_sac(actor, Frequency(), observation_dim=encoder.features, action_dim=ACTION_DIM, encoder=encoder)


def minibatches(updates: int) -> TensorDict:
    pixels = torch.randint(0, 256, (2, updates, BATCH, *SHAPE), dtype=torch.uint8)
    flag = torch.zeros(updates, BATCH, 1, dtype=torch.bool)
    after = {"pixels": pixels[1], "reward": torch.randn(updates, BATCH, 1)}
    after |= {"terminated": flag, "truncated": flag, "done": flag}
    root = {"pixels": pixels[0], "action": torch.randn(updates, BATCH, ACTION_DIM).tanh()}
    return TensorDict({**root, "next": TensorDict(after, [updates, BATCH])}, [updates, BATCH])


class Convolutions(Products):
    """Collects convolutions and their gradients too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            like = [torch.randn_like(x) if isinstance(x, torch.Tensor) else x for x in args]
            self.calls.append(partial(func, *like, **(kwargs or {})))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def replay(self, updates: int) -> None:
        super().replay(updates)
        for _ in range(updates):
            for call in self.calls:
                call()


def draw_minibatch(store: FrameStore) -> None:
    """Both observations of a minibatch, made of pictures and moved."""
    for _ in range(2):
        first = torch.randint(store.count - 3, (BATCH, 1))
        random_shift(store.look_up(first + torch.arange(3)))


def play(task: str) -> Callable[[], None]:
    """Frames of a task, drawn and acted in by the policy of the benchmark's sizes."""
    env = make_env(task, seed=0, pixels=PIXELS)
    encoder = make_drq_encoder(SHAPE, channels=[16, 32, 32], strides=[2, 2, 2])
    space = env.action_spec.space
    actor = make_pmoe_actor(encoder.features, space.low.flatten().tolist(), space.high.flatten().tolist())

    def frames() -> None:
        with torch.no_grad():
            root = env.reset()
            for _ in range(FRAMES):
                _, root = env.step_and_maybe_reset(actor(encoder(root)))

    return frames


def forms() -> dict[str, tuple[int, Callable[[], None]]]:
    """What is timed, and how many of it there are in a call."""
    batch, compiled, counted = minibatches(UPDATES), make(), make()
    update = SACUpdate(compiled.loss, compiled.configure_optimizers(), tau=0.005)
    with Convolutions() as products:
        SACUpdate(counted.loss, counted.configure_optimizers(), tau=0.005, compile=False)(batch[:1])
    store = FrameStore(5000, SHAPE, stack=3, num_envs=1)
    store._frames.random_(0, 256)
    store.count = store.capacity
    found = {
        "readable update": (UPDATES, partial(readable_form(make()), batch)),
        "compiled update": (UPDATES, partial(update, batch)),
        "floor": (UPDATES, partial(products.replay, UPDATES)),
        "minibatch": (1, partial(draw_minibatch, store)),
    }
    return found | {f"frame of {task}": (FRAMES, play(task)) for task in TASKS}


def main() -> None:
    warnings.filterwarnings("ignore", message="No target network updater")
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    timed = forms()
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(ROUNDS + 1):  # the first is a warm-up
        for name, (number, call) in timed.items():
            start = time.process_time()
            call()
            times[name].append((time.process_time() - start) / number * 1000)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    medians["compiled/floor"] = medians["compiled update"] / medians["floor"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "pixels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "milliseconds"])
        for name, value in medians.items():
            print(f"{name:<30}{value:8.2f}")
            writer.writerow([name, f"{value:.3f}"])


if __name__ == "__main__":
    main()
