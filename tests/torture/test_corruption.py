"""A thousand damaged, exchanged or foreign checkpoints: every one is refused before anything live has changed."""

from __future__ import annotations

import functools
import random
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import cell
from forked import LAST, SMALL, TINY, run
from lightning.pytorch import Trainer
from test_checkpoints import seal
from test_nonfinite import data_for, fit, pendulum, sac, tensors_of
from test_resume import differing

from pmoe_lightning.checkpoints import AtomicCheckpointIO, read_checkpoint
from pmoe_lightning.checkpoints.files import previous_checkpoint, write_checkpoint
from pmoe_lightning.configuration import compose_jobs, register
from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.run.resume import resume_words

pytestmark = pytest.mark.torture

WORDS = [*TINY["sac"], *SMALL, "env.id=Pendulum-v1", "logger=none", "callbacks=[metrics,evaluation,checkpoint_last]"]
WORDS += ["callbacks.evaluation.episodes=1", "data.frames_per_epoch=128"]


def flip_a_bit(path: Path, rng: random.Random, others: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut_short(path: Path, rng: random.Random, others: list[Path]) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def leave_a_hole(path: Path, rng: random.Random, others: list[Path]) -> None:
    """What a filesystem may show after a power cut: the right length, a part of zeros."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content) - 512)
    content[start : start + 512] = bytes(512) if any(content[start : start + 512]) else b"\1" * 512
    path.write_bytes(content)


def exchange_two_tensors(path: Path, rng: random.Random, others: list[Path]) -> None:
    """Every entry of the archive is intact, but two have changed places; the archive's own checksums are right."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    names = [name for name, content in entries.items() if "/data/" in name]
    a, b = rng.sample(names, 2)
    while entries[a] == entries[b]:
        a, b = rng.sample(names, 2)
    entries[a], entries[b] = entries[b], entries[a]
    with zipfile.ZipFile(path) as archive:
        end = archive.comment
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = end
        for name, content in entries.items():
            archive.writestr(name, content)


def exchange_the_file(path: Path, rng: random.Random, others: list[Path]) -> None:
    """An intact checkpoint, but of another run."""
    path.write_bytes(rng.choice(others).read_bytes())


def write_another_version(path: Path, rng: random.Random, others: list[Path]) -> None:
    checkpoint = read_checkpoint(path)
    versions = [0, 2, rng.randrange(3, 10_000), -1, None, "1", "1.0", [1]]
    checkpoint["policy"]["description"]["format"] = rng.choice(versions)
    write_checkpoint(checkpoint, path)
    previous_checkpoint(path).unlink()


def write_without_a_seal(path: Path, rng: random.Random, others: list[Path]) -> None:
    torch.save(read_checkpoint(path), path)


def write_something_else(path: Path, rng: random.Random, others: list[Path]) -> None:
    """Sealed, so that only its content can give it away."""
    torch.save(rng.choice([[], {}, {"policy": 3}, {"policy": {}}, 7, torch.zeros(3), {"state_dict": {}}]), path)
    seal(path)


DAMAGES: dict[Callable, int] = {
    flip_a_bit: 400,
    cut_short: 200,
    leave_a_hole: 50,
    exchange_two_tensors: 100,
    exchange_the_file: 100,
    write_another_version: 100,
    write_without_a_seal: 25,
    write_something_else: 25,
}
#: Intact files whose content is wrong for the run: found by the command, before there is anything live.
FOR_THE_COMMAND = (exchange_the_file, write_another_version, write_something_else)


def make_checkpoints(folder: Path) -> tuple[Path, list[Path]]:
    """One of a run, and others that are intact too: of another seed, another algorithm, another task."""
    others = [
        ["seed=7"],
        ["algo.gamma=0.9"],
        ["env.id=MountainCarContinuous-v0"],
        ["actor=gaussian", "estimator=pathwise"],
    ]
    for i, words in enumerate([[], *others]):
        assert run([*WORDS, *words, "total_frames=256", f"hydra.run.dir={i}"], folder) == 0
    return folder / "0" / LAST, [folder / str(i + 1) / LAST for i in range(len(others))]


@functools.cache
def configuration() -> Any:
    register()
    (cfg,) = compose_jobs([*WORDS, "total_frames=512"], multirun=False, config_dir=None)
    return cfg


def resume(path: Path) -> None:
    """What the command does with ``resume`` before anything else."""
    cfg = configuration()
    cfg.resume = str(path)
    resume_words([*WORDS, "total_frames=512", f"resume={path}"], cfg)


def refused_by_the_command(path: Path) -> bool:
    try:
        resume(path)
    except (RunError, ConfigurationError):
        return True
    return False


def refused_by_the_trainer(path: Path, live: dict[str, Any]) -> bool:
    """Into an algorithm and data that are alive: refused, and nothing of them moved."""
    algorithm, data = live["algorithm"], live["data"]
    trainer = Trainer(**live["settings"], plugins=[AtomicCheckpointIO()])
    before = live["state"]
    try:
        trainer.fit(algorithm, datamodule=data, ckpt_path=path)
    except RunError:
        return not differing(before, state(algorithm, data))
    return False


def state(algorithm: Any, data: Any) -> dict[str, Any]:
    replay = data.buffer[:].flatten_keys(".").to_dict()
    return {"tensors": {k: v.clone() for k, v in algorithm.state_dict().items()}, "replay": replay} | data.state_dict()


def damage_and_read(folder: Path) -> dict[str, Any]:
    intact, others = make_checkpoints(folder)
    content, path = intact.read_bytes(), folder / "damaged" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "max_epochs": -1}
    algorithm = sac()
    data = data_for(algorithm, pendulum, frames_per_batch=16)
    fit(algorithm, data)
    assert all(value.isfinite().all() for value in tensors_of(algorithm).values())
    live = {"algorithm": algorithm, "data": data, "settings": settings, "state": state(algorithm, data)}
    rng, counts, accepted = random.Random(0), Counter(), Counter()
    path.write_bytes(content)
    resume(path)
    for damage, count in DAMAGES.items():
        for _ in range(count):
            path.write_bytes(content)
            damage(path, rng, others)
            counts[damage.__name__] += 1
            accepted[damage.__name__] += not refused_by_the_command(path)
            if damage not in FOR_THE_COMMAND:
                accepted[f"{damage.__name__}, by the trainer"] += not refused_by_the_trainer(path, live)
    return {"damaged": dict(counts), "accepted": sum(accepted.values()), "which": dict(+accepted)}


def test_a_thousand_damaged_checkpoints_are_refused(tmp_path):
    figures = cell("corruption", lambda: damage_and_read(tmp_path))
    assert sum(figures["damaged"].values()) == 1000
    assert figures["accepted"] == 0, figures["which"]
