"""A disk that fills up under a run: one line, exit code 1, the last complete checkpoint intact, and resumed from.

On a real filesystem of a few megabytes where one may be mounted; else files of the process cannot grow beyond a limit,
which the system reports by the same kind of error. The figures say which it was.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cells import cell
from forked import LAST, SMALL, TINY, run
from test_kills import orphan_bytes

from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.checkpoints.files import previous_checkpoint

pytestmark = pytest.mark.torture

MEGABYTE = 1 << 20
# Humanoid's replay grows by three kilobytes a frame: the disk is full within a few saves.
WORDS = [*TINY["sac"], *SMALL, "env=Humanoid-v5", "logger=none", "callbacks=[nonfinite,metrics,checkpoint_last]"]
WORDS += ["data.frames_per_epoch=128", "data.utd_ratio=0.05"]


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """What kind it is, and what a child must do to live on it."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={6 * MEGABYTE}", "tmpfs", str(folder)]
    if os.name == "posix" and subprocess.run(command, capture_output=True).returncode == 0:
        try:
            yield "tmpfs of 6 MB", lambda: None
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    else:
        limit = (2 * MEGABYTE, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        yield "files limited to 2 MB", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def fill(folder: Path) -> dict[str, Any]:
    disk, log = folder / "disk", folder / "log.txt"
    disk.mkdir()
    with small_disk(disk) as (kind, live_on_it):
        code = run([*WORDS, "total_frames=100000", "hydra.run.dir=disk/run"], folder, prepare=live_on_it)
        said = [line for line in log.read_text().splitlines() if line.startswith("error:")]
        last = disk / "run" / LAST
        frames = [read_checkpoint(path)["policy"]["env_frames"] for path in (previous_checkpoint(last), last)]
        figures = {"disk": kind, "exit_code": code, "errors": said, "tracebacks": log.read_text().count("Traceback")}
        figures |= {"frames_kept": frames, "orphan_bytes": orphan_bytes(disk / "run", folder / "none")}
        # Room again, as after deleting something: the run moves to a larger disk and goes on.
        roomy = folder / "roomy"
        subprocess.run(["cp", "-r", str(disk / "run"), str(roomy)], check=True)
        words = [*WORDS, f"total_frames={frames[1] + 128}", "resume=auto", "hydra.run.dir=roomy"]
        figures["exit_code_of_the_resumed"] = run(words, folder)
        figures["frames_of_the_resumed"] = read_checkpoint(roomy / LAST)["policy"]["env_frames"]
    return figures


def test_a_full_disk_is_one_line_and_costs_one_save(tmp_path):
    figures = cell("full-disk", lambda: fill(tmp_path))
    before, last = figures["frames_kept"]
    assert figures["exit_code"] == 1 and figures["tracebacks"] == 0
    (line,) = figures["errors"]
    assert "cannot be written: " in line and "the one before it is intact" in line
    assert last - before == 128 and figures["orphan_bytes"] == 0
    assert (figures["exit_code_of_the_resumed"], figures["frames_of_the_resumed"]) == (0, last + 128)
