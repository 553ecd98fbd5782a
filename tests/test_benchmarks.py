"""A study that is interrupted goes on where it stopped, and what was measured once keeps its format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"


@pytest.fixture
def resumable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import resumable

    yield resumable
    del sys.modules["resumable"]


def test_a_cell_is_measured_once(resumable, tmp_path: Path) -> None:
    cell = tmp_path / "study" / "a-Pendulum-v1-1.json"
    assert resumable.fill(cell, lambda: {"seed": 1}) == {"seed": 1}
    assert resumable.fill(cell, lambda: {"seed": 2}) is None
    assert list(resumable.finished(cell.parent)) == [{"seed": 1}]


def test_a_cell_that_was_cut_is_not_there(resumable, tmp_path: Path) -> None:
    cell = tmp_path / "a-1.json"

    def cut() -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resumable.fill(cell, cut)
    with pytest.raises(TypeError):
        resumable.fill(cell, lambda: {"a": object()})  # found out as it is written
    assert not list(resumable.finished(tmp_path))
    assert resumable.fill(cell, dict) == {}


@pytest.mark.parametrize("study", ["peers", "hamiltonian", "multi_goal"])
def test_committed_cells_are_in_the_format_that_is_written_today(resumable, study: str) -> None:
    paths = sorted((RESULTS / study).glob("*.json"))
    to_text = json.dumps if study == "multi_goal" else resumable.indented
    assert len(paths) >= 15
    assert all(to_text(json.loads(path.read_text())) == path.read_text() for path in paths)


def test_the_table_of_the_peers_shows_every_committed_cell() -> None:
    command = [sys.executable, str(BENCHMARKS / "peers.py"), "table"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    measured = [json.loads(path.read_text()) for path in (RESULTS / "peers").glob("*.json")]
    rows = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
    shown = {(row[0].strip(), row[1].strip(), row[3].split(",")[0].strip()) for row in rows}
    assert shown == {(cell["env"], cell["algo"], cell["learner"]) for cell in measured}


def run_gpu(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *words]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environ)


def test_the_table_of_a_gpu_is_refused_in_one_line_where_there_is_none() -> None:
    done = run_gpu()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "make gpu: no CUDA device is there; --device cpu runs the rows without it\n"


@pytest.mark.slow
def test_the_rows_of_a_gpu_run_without_one() -> None:
    done = run_gpu("--device", "cpu", "--rounds", "1", "--only", "gaussian float32 readable")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:]] == ["ppo gaussian float32 readable"]
    assert all(float(row[1]) > 0 and row[2:4] == ["-", "-"] for row in rows[2:])
    late = run_gpu("--device", "cpu", "--seconds", "-1", "--only", "ppo gaussian float32")
    assert "left out, for want of time: ppo gaussian float32 readable; ppo gaussian float32 graph" in late.stdout
