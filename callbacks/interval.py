"""When a callback acts that does so every so many environment frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pmoe_lightning.processes.stop_after_iteration import StoppedAfterIteration

if TYPE_CHECKING:
    from .contract import CollectedData


class FrameInterval:
    """Due after the iteration that reaches a multiple of ``every_frames``, so that the reports of all runs are aligned.

    What remains when a run ends is an interval that is not over; whether to act then is the callback's choice.

    Args:
        every_frames: environment frames between two times.

    Attributes:
        frames: of the last time, or where the run began; None before. What a checkpoint keeps of an interval.
    """

    def __init__(self, every_frames: int) -> None:
        self.every_frames = every_frames
        self.frames: int | None = None

    def start(self, frames: int) -> None:
        """Begin a run here, unless a checkpoint has said where the interval began."""
        if self.frames is None or self.frames > frames:  # not resumed, or used for another run before
            self.frames = frames

    def mark(self, frames: int) -> None:
        """An interval begins here."""
        self.frames = frames

    def is_due(self, frames: int) -> bool:
        """Whether a multiple has been reached since the last time."""
        return self.frames is not None and frames // self.every_frames > self.frames // self.every_frames

    def has_rest(self, frames: int) -> bool:
        """Whether there are frames that no report has seen."""
        return self.frames is not None and frames > self.frames

    def is_left_to_resumed_run(self, data: CollectedData, exception: BaseException) -> bool:
        """Whether the iteration that this broke off would have been followed by a report.

        A point is logged once, and the run that goes on, which does that iteration again, knows the right one.
        """
        if self.frames is None or isinstance(exception, StoppedAfterIteration):
            return False
        return data.env_frames >= data.total_frames or self.is_due(data.env_frames)
