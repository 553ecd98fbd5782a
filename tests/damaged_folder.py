"""A run's folder with one file damaged, and what ``resume`` makes of it: nothing may be wrong without a word."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import SMALL, TINY, run
from test_resume import differing, state_of

from pmoe_lightning.callbacks import MetricsLogger
from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.data.collection import CollectedData

FRAMES = 512
WORDS = [*TINY["ppo"], *SMALL, "env=Pendulum-v1", "+env.max_episode_steps=30", f"total_frames={FRAMES}"]
WORDS += ["callbacks=[nonfinite,metrics,evaluation,mixture,checkpoint_best,checkpoint_last,final_policy]"]
WORDS += ["callbacks.evaluation.episodes=1", "callbacks.metrics.every_frames=100", "callbacks.mixture.every_frames=100"]
WORDS += ["callbacks.final_policy.video=false", "callbacks.final_policy.model=false", "data.frames_per_epoch=128"]
#: Nothing is sent before the end, so that the spool of a killed run holds all of its points.
WORDS += ["logger.flush_seconds=1000", "hydra.run.dir=run"]
#: What a checkpoint says of its MLflow run.
NAMES = {"run": None}
BEST = Path("checkpoints", "best.ckpt")
#: How a line says that a file is not as it was written.
COMPLAINTS = ("damaged", "cannot be read", "is not what was written", "SHA-256", "does not exist")
Points = dict[tuple[str, int], list[float]]


def kill_in_the_middle() -> None:
    """In a child: SIGKILL to itself between its second checkpoint and its third."""
    collect = CollectedData.collect

    def collect_or_die(self: CollectedData) -> Any:
        if self.env_frames >= 320:
            os.kill(os.getpid(), signal.SIGKILL)
        return collect(self)

    CollectedData.collect = collect_or_die


def kill_after_training() -> None:
    """In a child: SIGKILL to itself behind its last checkpoint."""
    MetricsLogger.on_train_end = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


#: How the run ended that is damaged.
ENDS: dict[str, Callable[[], Any]] = {
    "killed in training": kill_in_the_middle,
    "killed behind its last checkpoint": kill_after_training,
    "finished": lambda: None,
}


@dataclass
class Outcome:
    """What a resume of a damaged folder came to.

    Attributes:
        file: the damaged file, below the run's folder; names of entries without their numbers.
        how: ``refused``, ``said``, or ``unread`` where nothing was said and everything is as it would be.
        wrong: what is not as it should be; a resume that said nothing of it has accepted the damage.
    """

    file: str
    how: str
    wrong: list[str] = field(default_factory=list)


class DamagedFolder:
    """One run in ``root`` that ended in one of :data:`ENDS`, put back before every damage.

    Args:
        root: an empty folder.
        end: a key of :data:`ENDS`.
        store: an MLflow database without runs.
    """

    def __init__(self, root: Path, end: str, store: Path) -> None:
        self.root, self.end = root, end
        self._kept = root.with_name(f"{root.name}-kept")
        shutil.copy(store, root / "mlflow.db")
        code = self._train(prepare=ENDS[end])
        assert code == (0 if end == "finished" else -signal.SIGKILL), self.log()
        shutil.copytree(root, self._kept)
        files = (path for path in (root / "run").rglob("*") if path.is_file() and path.stat().st_size)
        self.files = sorted(path.relative_to(root / "run") for path in files)
        # What an intact one comes to.
        assert self._resume() == 0, self.log()
        self.state, self.points = state_of(root / "run") | NAMES, points_in(root / "mlflow.db")
        self.best = read_checkpoint(root / "run" / BEST)

    @property
    def kinds(self) -> list[str]:
        """The kinds of its files: those of a spool are few."""
        return sorted({named(file) for file in self.files})

    def damage(self, kind: str, rng: random.Random) -> Outcome:
        """Put the folder back, flip a bit of a file of this kind or cut it, and resume."""
        shutil.rmtree(self.root)
        shutil.copytree(self._kept, self.root)
        file = rng.choice([file for file in self.files if named(file) == kind])
        path = self.root / "run" / file
        content = bytearray(path.read_bytes())
        if rng.random() < 0.5:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        code = self._resume()
        said = any(path.stem in line and any(word in line for word in COMPLAINTS) for line in self.log().splitlines())
        wrong = ["a traceback"] * ("Traceback" in self.log())
        if code:
            return Outcome(named(file), "refused", wrong + ["not named"] * (not said))
        if different := differing(self.state, state_of(self.root / "run") | NAMES):
            wrong.append(f"weights or values: {different[:3]}")
        if not said and differing(self.best, read_checkpoint(self.root / "run" / BEST)):
            wrong.append("the best policy")
        points = points_in(self.root / "mlflow.db")
        wrong += [
            f"{name} at {step}" for (name, step), value in points.items() if value != self.points.get((name, step))
        ]
        if not said and points != self.points:
            wrong.append("points are missing")
        return Outcome(named(file), "said" if said else "unread", wrong)

    def log(self) -> str:
        """What the last command said."""
        return (self.root / "log.txt").read_text(errors="replace")

    def _resume(self) -> int:
        (self.root / "log.txt").unlink()
        return self._train("resume=run")

    def _train(self, *words: str, prepare: Callable[[], Any] = lambda: None) -> int:
        return run([*WORDS, *words, f"logger.tracking_uri=sqlite:///{self.root}/mlflow.db"], self.root, prepare=prepare)


def named(file: Path) -> str:
    """Entries of a spool are all one kind of file."""
    return str(file.with_name(f"*{file.suffix}")) if file.suffix in (".entry", ".content") else str(file)


def points_in(database: Path) -> Points:
    """All values of every metric at every step; timings excepted, which never repeat."""
    points: Points = {}
    with sqlite3.connect(database) as connection:
        for key, step, value in connection.execute("select key, step, value from metrics order by key, step"):
            if "time/" not in key:
                points.setdefault((key, step), []).append(value)
    return points
