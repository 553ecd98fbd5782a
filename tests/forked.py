"""The train command in processes of its own that start in a second: forks of one that has imported everything."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import mlflow
import torch
from conftest import restored_signals

from pmoe_lightning.checkpoints import files
from pmoe_lightning.data.collection import CollectedData
from pmoe_lightning.processes.stopping import STOPS
from pmoe_lightning.train import main

#: A run of an instant: networks of 16 units, updates on 16 transitions.
TINY = {
    "sac": ["algo=sac", "data.init_random_frames=64", "data.batch_size=16", "data.utd_ratio=0.25"],
    "ppo": ["algo=ppo", "data.frames_per_batch=64", "algo.num_epochs=2", "algo.minibatch_size=32"],
}
SMALL = [
    "algo.hidden_sizes=[16]",
    "actor.hidden_sizes=[16]",
    "data.num_envs=2",
    "trainer.accelerator=cpu",
    "compile=false",
]
LAST = Path("checkpoints", "last.ckpt")


class Watched:
    """What a parent sees of the run in its child, in memory that both share: it survives a kill."""

    def __init__(self) -> None:
        self._cells = RawArray("q", 3)

    frames = property(lambda self: self._cells[0], lambda self, value: self._cells.__setitem__(0, value))
    saving = property(lambda self: self._cells[1], lambda self, value: self._cells.__setitem__(1, value))
    orphans = property(lambda self: self._cells[2], lambda self, value: self._cells.__setitem__(2, value))


def fork(command: Callable[[], Any], log: Path) -> int:
    """Run ``command`` in a child, whose words go to ``log``; returns the child's process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        logging.getLogger().handlers.clear()  # they write to where the parent's words go
        for number in STOPS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        command()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child; negative is the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@functools.cache
def warm_up() -> None:
    """Import here, once, what a run imports late: its children then need not."""
    torch.set_num_threads(1)  # a forked child has none of its parent's threads, and would wait for them
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        command = train([*TINY["ppo"], *SMALL, "env=Pendulum-v1", "total_frames=128"], Path(folder))
        try:
            with restored_signals():
                command()
        finally:
            os.chdir(here)
            mlflow.set_tracking_uri(None)  # the store of this run is not that of the next


def train(
    words: list[str],
    folder: Path,
    *,
    environ: Mapping[str, str] | None = None,
    prepare: Callable[[], Any] = lambda: None,
) -> Callable[[], None]:
    """The train command as a function for :func:`fork`: in ``folder``, after ``prepare``."""

    def command() -> None:
        os.chdir(folder)
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "SLURM_"))]:
            del os.environ[name]
        os.environ.update(environ or {})
        tempfile.tempdir = None  # read TMPDIR again
        prepare()
        sys.argv = ["train", *words]
        main()

    return command


def run(words: list[str], folder: Path, **options: Any) -> int:
    """The train command from its start to its end; its exit code."""
    warm_up()
    return wait(fork(train(words, folder, **options), folder / "log.txt"))


def count_frames(watched: Watched, first: Callable[[], Any] = lambda: None) -> None:
    """In a child: tell the parent the frames after every iteration, and call ``first`` when training begins."""
    collect, begun = CollectedData.collect, []

    def counted(self: CollectedData) -> Any:
        if not begun:
            begun.append(True)
            watched.frames = self.env_frames
            first()
        rollout = collect(self)
        watched.frames = self.env_frames
        return rollout

    CollectedData.collect = counted


def save_slowly(watched: Watched, pause: float) -> None:
    """In a child: dwell in every step of writing a checkpoint, and tell the parent while it goes on."""
    write, write_checkpoint = files._Hashing.write, files.write_checkpoint

    def slow(function: Callable) -> Callable:
        def slowed(*arguments: Any, **named: Any) -> Any:
            time.sleep(10 * pause if watched.saving else 0)
            return function(*arguments, **named)

        return slowed

    def write_a_little(self: Any, content: Any) -> int:
        time.sleep(pause)
        return write(self, content)

    def marked(*arguments: Any) -> None:
        watched.saving = 1
        write_checkpoint(*arguments)
        watched.saving = 0

    from pmoe_lightning.checkpoints import io

    files._Hashing.write, io.write_checkpoint = write_a_little, marked
    os.fsync, os.link, os.replace = slow(os.fsync), slow(os.link), slow(os.replace)
