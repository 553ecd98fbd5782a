"""One background thread that sends metric points and artifacts, so that training never waits for the server."""

import atexit
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

_LONGEST_PAUSE_SECONDS = 60.0
_EXIT_PATIENCE_SECONDS = 15.0
_log = logging.getLogger(__name__)


class BackgroundWriter:
    """Collects metric points and sends them in batches; runs other uploads in the order given.

    Points whose sending failed are kept and sent again, with growing pauses, until the server answers or the process
    ends. Points refused for good, and uploads that fail, are dropped with a warning.

    Args:
        send: called in the thread with at most ``batch`` points.
        refused: tells whether an exception of ``send`` is final, so that trying again is useless.
        period: seconds after which points are sent at the latest.
        batch: number of points that are sent at once, without waiting for ``period``.
    """

    def __init__(
        self, send: Callable[[list], Any], *, refused: Callable[[Exception], bool], period: float, batch: int = 900
    ) -> None:
        self._send, self._refused, self._period, self._batch = send, refused, period, batch
        self._failures = 0
        self._start_afresh()
        atexit.register(self._finish)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start_afresh)

    def _start_afresh(self) -> None:
        # A forked process has neither the thread nor the right to its queue, and perhaps a lock that nobody releases.
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._points: list = []
        self._jobs: list[tuple[str, Callable[[], Any]]] = []
        self._urgent = self._closing = self._busy = False

    def _finish(self) -> None:
        # Whoever closed in vain has waited and warned already.
        if not self._closing:
            self.close(_EXIT_PATIENCE_SECONDS)

    @property
    def pending(self) -> int:
        """Number of points and uploads still waiting."""
        with self._condition:
            return len(self._points) + len(self._jobs)

    def add(self, points: list) -> None:
        """Queue metric points; returns at once."""
        with self._condition:
            self._points += points
            self._wake()

    def submit(self, what: str, job: Callable[[], Any]) -> None:
        """Queue an upload; ``what`` names it in the warning should it fail. Returns at once."""
        with self._condition:
            self._jobs.append((what, job))
            self._wake()

    def flush(self, timeout: float) -> bool:
        """Send everything now; ``False`` when something is left after one attempt or ``timeout`` seconds."""
        with self._condition:
            if not (self._points or self._jobs or self._busy):
                return True
            # A round under way took its points before this call, so only the next one counts.
            self._urgent = True
            self._wake()
            self._condition.wait_for(lambda: not (self._urgent or self._busy), timeout)
            return not (self._urgent or self._busy or self._points or self._jobs)

    def close(self, timeout: float) -> bool:
        """Flush and end the thread; a later :meth:`add` starts a new one. Returns what :meth:`flush` returns."""
        sent = self.flush(timeout)
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        return sent

    def _wake(self) -> None:
        self._closing = False
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
            self._thread.start()
        self._condition.notify_all()

    def _due(self) -> bool:
        waiting = bool(self._jobs) or len(self._points) >= self._batch
        return self._urgent or self._closing or (waiting and not self._failures)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(self._due, min(self._period * 2**self._failures, _LONGEST_PAUSE_SECONDS))
                if self._closing and not self._urgent:
                    self._thread = None
                    return
                points, self._points = self._points, []
                jobs, self._jobs = self._jobs, []
                self._urgent, self._busy = False, True
            left = self._send_all(points)
            for what, job in jobs:
                self._do(what, job)
            with self._condition:
                self._points[:0] = left
                self._busy = False
                self._condition.notify_all()

    def _send_all(self, points: list) -> list:
        for start in range(0, len(points), self._batch):
            batch = points[start : start + self._batch]
            try:
                self._send(batch)
            except Exception as error:
                if self._refused(error):
                    _log.warning("MLflow refused %d metric points, dropped: %s", len(batch), _first_line(error))
                    continue
                if not self._failures:
                    _log.warning("MLflow does not answer, metric points are sent later: %s", _first_line(error))
                self._failures = min(self._failures + 1, 10)
                return points[start:]
        if points and self._failures:
            _log.warning("MLflow answers again, all metric points sent")
            self._failures = 0
        return []

    def _do(self, what: str, job: Callable[[], Any]) -> None:
        try:
            job()
        except Exception as error:
            _log.warning("could not log %s to MLflow: %s", what, _first_line(error))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
