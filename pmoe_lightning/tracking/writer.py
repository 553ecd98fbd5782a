"""One background thread that empties a spool, so that training never waits for the server."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import traceback
from collections.abc import Callable
from typing import Any

from pmoe_lightning.tracking.address import without_secrets
from pmoe_lightning.tracking.spool import Spool

_LONGEST_PAUSE_SECONDS = 60.0
_EXIT_PATIENCE_SECONDS = 15.0
_SLOWEST_BYTES_PER_SECOND = 5e6
_log = logging.getLogger(__name__)


class BackgroundWriter:
    """Puts entries into a spool and has them delivered: within ``period`` seconds, or at once if they are urgent.

    What could not be delivered is tried again, with growing pauses, until it is or the process ends.

    Args:
        spool: holds what is waiting.
        deliver: called in the thread; True if everything in the spool was delivered.
        period: seconds after which entries are delivered at the latest.
        batch: number of waiting entries that are delivered without waiting for ``period``.
    """

    def __init__(self, spool: Spool, deliver: Callable[[Spool], bool], *, period: float, batch: int = 100) -> None:
        self.spool, self._deliver, self._period, self._batch = spool, deliver, period, batch
        self._failures = 0
        self._start_afresh()
        atexit.register(self._finish)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._leave_to_parent)

    def _start_afresh(self) -> None:
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._urgent = self._closing = self._busy = False

    def _leave_to_parent(self) -> None:
        # A forked process has neither the thread nor the right to its entries, and perhaps a lock nobody releases.
        self._start_afresh()
        self.spool.forget_all()

    def _finish(self) -> None:
        # Whoever closed in vain has waited and warned already.
        if not self._closing:
            self.close(_EXIT_PATIENCE_SECONDS)

    def put(self, kind: str, values: dict[str, Any], content: bytes | None = None) -> None:
        """Queue an entry (:meth:`Spool.put`); does not wait for the server."""
        self.spool.put(kind, values, content)
        with self._condition:
            self._wake()

    def flush(self, timeout: float) -> bool:
        """Send everything now; ``False`` when something is left after one attempt, or ``timeout`` seconds in vain.

        As long as entries arrive, it goes on; a large file may take longer.
        """
        with self._condition:
            if not (len(self.spool) or self._busy):
                return True
            # A round under way looked into the spool before this call, so only the next one counts.
            self._urgent = True
            self._wake()
            removed = -1
            while removed < self.spool.removed:
                removed = self.spool.removed
                patience = timeout + self.spool.uploading_bytes / _SLOWEST_BYTES_PER_SECOND
                if self._condition.wait_for(lambda: not (self._urgent or self._busy), patience):
                    break
            return not (self._urgent or self._busy or len(self.spool))

    def close(self, timeout: float) -> bool:
        """Flush and end the thread; a later :meth:`put` starts a new one. Returns what :meth:`flush` returns."""
        sent = self.flush(timeout)
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if sent:
            self.spool.close()
        return sent

    def _try(self) -> bool:
        try:
            return self._deliver(self.spool)
        except Exception:
            # The thread must outlive whatever it is: what is in the spool is tried again.
            _log.warning("could not send to MLflow\n%s", without_secrets(traceback.format_exc()))
            return False

    def _wake(self) -> None:
        self._closing = False
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
            self._thread.start()
        self._condition.notify_all()

    def _due(self) -> bool:
        return self._urgent or self._closing or (len(self.spool) >= self._batch and not self._failures)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(self._due, min(self._period * 2**self._failures, _LONGEST_PAUSE_SECONDS))
                if self._closing and not self._urgent:
                    self._thread = None
                    return
                self._urgent, self._busy = False, True
            delivered = self._try()
            with self._condition:
                self._failures = 0 if delivered else min(self._failures + 1, 10)
                self._busy = False
                self._condition.notify_all()
