"""Stopped at random points and resumed, a run is the run that was never stopped, to the last bit.

Every combination is one run, tracked in MLflow: compared are weights, targets, optimizer, replay, counters, random
generators, simulators, and every point of every curve but the timings.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from cells import cell
from forked import LAST, SMALL, TINY, run
from test_resume import differing, state_of

from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.data.collection import CollectedData

pytestmark = pytest.mark.torture

STOPS = 20
FRAMES = {"sac": 1280, "ppo": 2560}
BATCH = {"sac": 16, "ppo": 64}
ENVS = ["Pendulum-v1", "HalfCheetah-v5", "Ant-v5", "Humanoid-v5"]
CASES = [(algo, env, "none") for algo in TINY for env in ENVS] + [("sac", "HalfCheetah-v5", "hamiltonian_gated")]
# Neither the interval of the metrics nor that of saves and evaluations fits the others: stops fall between all of them.
WATCHED = ["callbacks=[nonfinite,metrics,evaluation,mixture,checkpoint_last]", "callbacks.metrics.every_frames=100"]
WATCHED += ["callbacks.mixture.every_frames=100", "callbacks.evaluation.episodes=1", "data.frames_per_epoch=320"]
WATCHED += ["+env.max_episode_steps=70", "logger.flush_seconds=1000"]
# What a checkpoint says of its MLflow run: the two are in stores of their own.
NAMES = {"run": None}


def stop_at(frames: int) -> None:
    """In a child: SIGTERM to itself, in the middle of an iteration, when it has taken so many frames."""
    collect = CollectedData.collect

    def collect_and_stop(self: CollectedData) -> Any:
        rollout = collect(self)
        if self.env_frames == frames:
            os.kill(os.getpid(), signal.SIGTERM)
        return rollout

    CollectedData.collect = collect_and_stop


def curves(database: Path) -> dict[tuple[str, int], list[float]]:
    """All values of every metric at every step; timings excepted, which never repeat."""
    points: dict[tuple[str, int], list[float]] = {}
    with sqlite3.connect(database) as connection:
        for key, step, value in connection.execute("select key, step, value from metrics order by key, step"):
            if not key.startswith("train/time/"):
                points.setdefault((key, step), []).append(value)
    return points


def tracked(folder: Path) -> str:
    return f"logger.tracking_uri=sqlite:///{folder}/mlflow.db"


def stop_and_resume(algo: str, env: str, transform: str, folder: Path, store: Path) -> dict[str, Any]:
    rng = random.Random(f"{algo}{env}{transform}")
    words = [*TINY[algo], *SMALL, *WATCHED, f"env={env}", "actor=pmoe", f"total_frames={FRAMES[algo]}"]
    words += [f"action_transform={transform}"] if algo == "sac" else []
    words.append("hydra.run.dir=run")
    whole, parts = folder / "whole", folder / "parts"
    for place in (whole, parts):
        place.mkdir()
        (place / "mlflow.db").write_bytes(store.read_bytes())
    assert run([*words, tracked(whole)], whole) == 0, (whole / "log.txt").read_text()[-3000:]
    words += ["resume=auto", tracked(parts)]
    # Not in the warm-up of SAC, which Lightning sees as one long wait for its first batch.
    stops = sorted(rng.sample(range(128, FRAMES[algo], BATCH[algo]), STOPS))
    for frames in stops:
        code = run(words, parts, prepare=lambda at=frames: stop_at(at))
        assert code == 128 + signal.SIGTERM, (parts / "log.txt").read_text()[-3000:]
        assert read_checkpoint(parts / "run" / LAST)["policy"]["env_frames"] == frames
    assert run(words, parts) == 0
    expected, resumed = curves(whole / "mlflow.db"), curves(parts / "mlflow.db")
    extra = resumed.keys() - expected.keys()
    return {
        "stops": stops,
        "tensors_and_values_that_differ": differing(*(state_of(place / "run") | NAMES for place in (whole, parts))),
        "points": sum(map(len, expected.values())),
        "points_missing_or_different": sum(resumed.get(point) != values for point, values in expected.items()),
        # A stop measures the mixture once more, where it stops.
        "points_added_besides_the_mixture_at_a_stop": len(
            [name for name, step in extra if step not in stops or not name.startswith("train/mixture/")]
        ),
    }


@pytest.mark.parametrize(("algo", "env", "transform"), CASES)
def test_stops_leave_no_trace(algo, env, transform, tmp_path, empty_store):
    name = f"bitwise-{algo}-{env}" + f"-{transform}" * (transform != "none")
    figures = cell(name, lambda: stop_and_resume(algo, env, transform, tmp_path, empty_store))
    assert len(figures["stops"]) == STOPS
    assert figures["tensors_and_values_that_differ"] == []
    assert figures["points"] > 0 and figures["points_missing_or_different"] == 0
    assert figures["points_added_besides_the_mixture_at_a_stop"] == 0
