"""Two hundred SIGKILLs: nothing unreadable, at most one save interval lost, nothing left behind, and the same end.

Four runs, two of SAC and two of PPO, each killed fifty times in a row and resumed as often by ``resume=auto``. After
the last kill the run goes on to its end, and is then what a run without any kill is, to the last bit.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cells import cell
from forked import LAST, SMALL, TINY, Watched, count_frames, fork, run, save_slowly, train, wait, warm_up
from test_resume import differing, state_of

from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.checkpoints.files import previous_checkpoint
from pmoe_lightning.errors import RunError

pytestmark = pytest.mark.torture

KILLS = 50
INTERVAL = 64  # frames between two saves
WRITES = 0.001  # seconds a slowed writer dwells in each of the few hundred pieces of a checkpoint
ENDLESS = ["callbacks=[nonfinite,metrics,checkpoint_last]", "logger=none", f"data.frames_per_epoch={INTERVAL}"]
ENDLESS += ["env=Pendulum-v1"]

# The replay buffer is small enough to go round many times.
SHORT_OF_A_SAVE = {
    "sac": ["data.buffer_size=512", "data.init_random_frames=32"],
    "ppo": ["data.frames_per_batch=32"],
}
AUTO = ["resume=auto", "hydra.run.dir=run"]


def bytes_below(*folders: Path) -> int:
    return sum(path.lstat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def orphan_bytes(run: Path, temporary: Path) -> int:
    """What a killed writer has left: anything among the checkpoints but the two, anything in the temporary folder."""
    kept = ("last.ckpt", "last.previous.ckpt")
    strays = [path for path in (run / "checkpoints").glob("*") if path.name not in kept]
    return sum(path.lstat().st_size for path in strays) + bytes_below(temporary)


def until(reached: Any, child: int) -> None:
    """Wait for the child to get somewhere; its end, or two minutes, are failures."""
    deadline = time.monotonic() + 120
    while not reached():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
        assert time.monotonic() < deadline, "the run does not get anywhere"
        time.sleep(0.0005)


def kill_once(words: list[str], folder: Path, temporary: Path, rng: random.Random, moment: str) -> Watched:
    """Start or resume the run and kill it at a random time of the given kind."""
    watched = Watched()
    watched.orphans = -1

    def look_around() -> None:
        watched.orphans = orphan_bytes(folder / "run", temporary)

    def prepare() -> None:
        count_frames(watched, first=look_around)
        if moment == "save":
            save_slowly(watched, WRITES)

    command = train(words, folder, environ={"TMPDIR": str(temporary)}, prepare=prepare)
    child = fork(command, folder / "log.txt")
    if moment == "start":
        time.sleep(2.0 * rng.random())
    else:
        until(lambda: watched.orphans >= 0, child)
        begun, ahead = watched.frames, rng.uniform(0, 3 * INTERVAL)
        until(lambda: watched.saving if moment == "save" else watched.frames >= begun + ahead, child)
        time.sleep(rng.uniform(0, 0.25 if moment == "save" else 0.05))
    os.kill(child, signal.SIGKILL)
    assert wait(child) == -signal.SIGKILL
    return watched


def kill_again_and_again(algo: str, temporary: Path, folder: Path, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    words = [*TINY[algo], *SMALL, *ENDLESS, f"seed={seed}"]
    # Saves follow updates: a first interval must not be all warm-up, nor the rollout that PPO begins its statistics by.
    words += SHORT_OF_A_SAVE[algo]
    moments = ["save"] * 20 + ["start"] * 5 + ["training"] * (KILLS - 25)
    rng.shuffle(moments)
    figures = {"kills": 0, "inside_a_save": 0, "unreadable": 0, "most_frames_lost": 0, "orphan_bytes_left_by_kills": 0}
    figures |= {"orphan_bytes_after_resume": 0, "resumes": 0}
    last, known = folder / "run" / LAST, 0
    warm_up()
    for moment in moments:
        watched = kill_once([*words, *AUTO, "total_frames=1000000"], folder, temporary, rng, moment)
        figures["kills"] += 1
        figures["inside_a_save"] += watched.saving
        figures["orphan_bytes_after_resume"] += max(watched.orphans, 0)
        figures["orphan_bytes_left_by_kills"] += orphan_bytes(folder / "run", temporary)
        figures["resumes"] += bool(known and watched.orphans >= 0)
        for path in (last, previous_checkpoint(last)):
            try:
                figures["unreadable"] += path.exists() and not read_checkpoint(path)
            except RunError:
                figures["unreadable"] += 1
        saved = read_checkpoint(last)["policy"]["env_frames"] if last.exists() else 0
        assert saved >= known, "a newer checkpoint gave way to an older one"
        figures["most_frames_lost"] = max(figures["most_frames_lost"], watched.frames - saved)
        known = saved
    end = known + 2 * INTERVAL
    words.append(f"total_frames={end}")
    assert run([*words, *AUTO], folder, environ={"TMPDIR": str(temporary)}) == 0
    figures["resumes"] += 1
    figures["orphan_bytes_after_resume"] += orphan_bytes(folder / "run", temporary)
    assert run([*words, "hydra.run.dir=whole"], folder) == 0
    figures["frames"] = end
    figures["differs_from_a_run_without_kills"] = differing(state_of(folder / "whole"), state_of(folder / "run"))
    return figures


@pytest.mark.parametrize("where", ["same filesystem", "other filesystem"])
@pytest.mark.parametrize("algo", ["sac", "ppo"])
def test_two_hundred_kills(algo, where, tmp_path):
    temporary = Path(tempfile.mkdtemp(dir="/dev/shm" if where == "other filesystem" else tmp_path))
    assert (os.stat(temporary).st_dev != os.stat(tmp_path).st_dev) == (where == "other filesystem")
    try:
        seed = 10 * len(algo) + len(where)
        measure = partial(kill_again_and_again, algo, temporary, tmp_path, seed)
        figures = cell(f"kills-{algo}-{where.split()[0]}", measure)
    finally:
        shutil.rmtree(temporary)
    assert figures["kills"] == KILLS and figures["inside_a_save"] >= 15
    assert figures["unreadable"] == 0
    assert figures["most_frames_lost"] <= INTERVAL
    assert figures["orphan_bytes_after_resume"] == 0
    assert figures["orphan_bytes_left_by_kills"] > 0, "no kill hit a writer: nothing was proved"
    assert figures["differs_from_a_run_without_kills"] == []
