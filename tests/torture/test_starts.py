"""Two, three and five starts at once, into one folder, one resume, one new store: one works, the others say why."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cells import cell
from forked import LAST, SMALL, TINY, fork, run, train, wait, warm_up
from test_one_writer import ended
from waiting import wait_until

from pmoe_lightning.checkpoints import read_checkpoint

pytestmark = pytest.mark.torture

ROUNDS = 10
WORDS = [*TINY["sac"], *SMALL, "env=Pendulum-v1", "callbacks=minimal", "data.frames_per_epoch=128"]
HOW = {"new": [], "auto": ["resume=auto"], "resume": ["resume=run"]}


def start_together(number: int, words: list[str], folder: Path, rng: random.Random) -> dict[int, Path]:
    """Children that begin within 50 ms, with the files of their words."""
    warm_up()
    moment = time.monotonic() + 0.1 + 0.05 * number
    started = {}
    for i in range(number):
        at = moment + 0.05 * rng.random()
        waits = lambda at=at: time.sleep(max(0.0, at - time.monotonic()))  # noqa: E731
        started[fork(train(words, folder, prepare=waits), folder / f"log{i}.txt")] = folder / f"log{i}.txt"
    return started


def one_works(number: int, how: str, folder: Path, rng: random.Random) -> dict[str, int]:
    """One round: exit codes and words of all but the one that works, which goes on from where the folder was."""
    words, frames = [*WORDS, "logger=none", "hydra.run.dir=run"], 0
    if how == "resume":
        assert run([*words, "total_frames=128"], folder) == 0
        frames = read_checkpoint(folder / "run" / LAST)["policy"]["env_frames"]
    children = start_together(number, [*words, "total_frames=1000000", *HOW[how]], folder, rng)
    wait_until(lambda: sum(map(ended, children)) >= number - 1)
    others = [child for child in children if ended(child)]
    last = folder / "run" / LAST
    (working,) = set(children) - set(others)
    wait_until(lambda: last.exists() and read_checkpoint(last)["policy"]["env_frames"] > frames)
    still = not ended(working)
    os.kill(working, signal.SIGKILL)
    wait(working)
    said = [children[child].read_text() for child in others]
    why = f"in use by process {working} on"
    return {
        "works": int(still),
        "refused with exit code 2": sum(wait(child) == 2 for child in others),
        "one line that says by whom": sum(text.count("\n") == 1 and why in text for text in said),
    }


def rounds(number: int, how: str, folder: Path) -> dict[str, int]:
    rng, counts = random.Random(f"{number}{how}"), Counter()
    for i in range(ROUNDS):
        place = folder / str(i)
        place.mkdir()
        counts.update(one_works(number, how, place, rng))
        shutil.rmtree(place)
    return dict(counts)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("number", [2, 3, 5])
def test_of_starts_at_once_in_one_folder_one_works(number, how, tmp_path):
    figures = cell(f"starts-{number}-{how}", lambda: rounds(number, how, tmp_path))
    others = ROUNDS * (number - 1)
    assert figures == {
        "works": ROUNDS,
        "refused with exit code 2": others,
        "one line that says by whom": others,
    }


def share_a_store(number: int, folder: Path) -> dict[str, Any]:
    """Every process with a folder of its own, all with a store that none of them finds there."""
    warm_up()
    words = [*WORDS, "total_frames=128"]
    started = [fork(train([*words, f"hydra.run.dir=run{i}"], folder), folder / f"log{i}.txt") for i in range(number)]
    codes = [wait(child) for child in started]
    with sqlite3.connect(folder / "mlflow.db") as connection:
        finished = connection.execute("select count(*) from runs where status = 'FINISHED'").fetchone()[0]
    return {"codes": codes, "finished": finished}


@pytest.mark.parametrize("number", [2, 3, 5])
def test_starts_at_once_share_a_new_store(number, tmp_path):
    figures = cell(f"starts-{number}-store", lambda: share_a_store(number, tmp_path))
    assert figures == {"codes": [0] * number, "finished": number}
