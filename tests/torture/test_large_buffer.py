"""A full replay buffer of a million HalfCheetah transitions is saved in seconds and in no memory of its own."""

from __future__ import annotations

import os
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import cell
from tensordict import TensorDict

from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.checkpoints.files import write_checkpoint
from pmoe_lightning.data.off_policy import OffPolicyData
from pmoe_lightning.envs import make_env
from pmoe_lightning.modules.actors import make_pmoe_actor

pytestmark = pytest.mark.torture

TRANSITIONS = 1_000_000
CHUNK = 50_000
OBSERVATION, ACTION = 17, 6


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def full_data() -> OffPolicyData:
    """As after a million frames: a live collector, and a buffer filled chunk by chunk."""
    policy = make_pmoe_actor(OBSERVATION, [-1.0] * ACTION, [1.0] * ACTION)
    sizes = {"total_frames": 2 * TRANSITIONS, "frames_per_epoch": 5000, "buffer_size": TRANSITIONS}
    data = OffPolicyData(partial(make_env, "HalfCheetah-v5"), policy, **sizes)
    data.make_batch(data.collect())
    flag = torch.zeros(CHUNK, 1, dtype=torch.bool)
    for _ in range(TRANSITIONS // CHUNK):
        seen = {"observation": torch.randn(CHUNK, OBSERVATION), "reward": torch.randn(CHUNK, 1)}
        following = TensorDict(**seen, done=flag, terminated=flag, truncated=flag, batch_size=CHUNK)
        root = {"observation": torch.randn(CHUNK, OBSERVATION), "action": torch.randn(CHUNK, ACTION)}
        data.buffer.extend(TensorDict(**root, next=following, batch_size=CHUNK))
    return data


def save_and_read(folder: Path) -> dict[str, Any]:
    data, path = full_data(), folder / "last.ckpt"
    before, walls, cpus = peak_megabytes(), [], []
    for _ in range(5):
        wall, cpu = time.monotonic(), time.process_time()
        write_checkpoint({"experience": data.experience()}, path)
        walls.append(round(time.monotonic() - wall, 2))
        cpus.append(round(time.process_time() - cpu, 2))
    figures = {"transitions": len(data.buffer), "megabytes": round(os.path.getsize(path) / 1e6, 1)}
    figures |= {"wall_seconds": sorted(walls), "cpu_seconds": sorted(cpus), "peak_before_megabytes": round(before)}
    figures["peak_grew_by_megabytes"] = round(peak_megabytes() - before, 1)
    wall = time.monotonic()
    read_checkpoint(path)
    figures["read_wall_seconds"] = round(time.monotonic() - wall, 2)
    data.teardown("fit")
    return figures


def test_a_million_transitions_are_saved_in_seconds(tmp_path):
    figures = cell("large-buffer", lambda: save_and_read(tmp_path))
    assert figures["transitions"] == TRANSITIONS
    assert figures["wall_seconds"][2] < 10, "a training run waits for this"
    assert figures["peak_grew_by_megabytes"] < 0.1 * figures["megabytes"]
