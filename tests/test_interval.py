"""The rule of the callbacks that act every so many frames: when they are due, and what a broken iteration leaves."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import torch

from pmoe_lightning.callbacks import ActionTrajectories, MixtureDiagnostics
from pmoe_lightning.callbacks.interval import FrameInterval
from pmoe_lightning.processes.stop_after_iteration import Preempted, StoppedAfterIteration
from pmoe_lightning.processes.stopping import Stopped


def due(interval: FrameInterval, frames: range) -> list[int]:
    found = []
    for now in frames:
        if interval.is_due(now):
            interval.mark(now)
            found.append(now)
    return found


def test_the_reports_of_all_runs_are_aligned() -> None:
    interval = FrameInterval(100)
    assert not interval.is_due(1000) and not interval.has_rest(1000)  # before a run has begun
    interval.start(0)
    assert due(interval, range(30, 500, 30)) == [120, 210, 300, 420]
    assert interval.has_rest(421) and not interval.has_rest(420)


def test_a_resumed_run_is_due_where_the_whole_one_is() -> None:
    whole, before, after = (FrameInterval(100) for _ in range(3))
    whole.start(0)
    before.start(0)
    points = due(before, range(30, 160, 30))
    after.frames = before.frames  # by way of a checkpoint
    after.start(150)
    assert due(whole, range(30, 500, 30)) == points + due(after, range(180, 500, 30))
    assert after.has_rest(430) and after.frames == whole.frames


def test_an_interval_of_another_run_begins_anew() -> None:
    interval = FrameInterval(100)
    interval.start(900)
    interval.start(50)
    assert interval.frames == 50


@pytest.mark.parametrize(
    ("frames", "error", "is_left"),
    [
        (80, ZeroDivisionError(), False),  # no report was due
        (120, ZeroDivisionError(), True),
        (120, KeyboardInterrupt(), True),
        (120, Stopped(signal.SIGTERM), True),
        (120, StoppedAfterIteration(signal.SIGTERM), False),  # that iteration was whole
        (120, Preempted(), False),
        (90, ZeroDivisionError(), False),
        (150, ZeroDivisionError(), True),  # the end of the run
    ],
)
def test_what_a_broken_iteration_leaves_to_the_run_that_goes_on(frames, error, is_left) -> None:
    interval, data = FrameInterval(100), SimpleNamespace(env_frames=frames, total_frames=150)
    assert not interval.is_left_to_resumed_run(data, error)  # nothing has begun
    interval.start(60)
    assert interval.is_left_to_resumed_run(data, error) is is_left


def test_intervals_of_earlier_checkpoints_are_read() -> None:
    history = torch.tensor([[100.0, 0.5, 0.5]], dtype=torch.float64)
    mixture = MixtureDiagnostics()
    mixture.load_state_dict({"history": history})  # of the time before there were figures
    assert mixture.state_dict()["frames"] is mixture.state_dict()["figure_frames"] is None
    mixture.load_state_dict({"history": history, "specialisation": history, "frames": 100, "figure_frames": 40})
    assert (mixture.state_dict()["frames"], mixture.state_dict()["figure_frames"]) == (100, 40)
    trajectories = ActionTrajectories()
    trajectories.load_state_dict({"frames": 7})
    assert trajectories.state_dict() == {"frames": 7}
