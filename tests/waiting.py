"""Waiting for other processes on a machine of any speed: a test ends by what has happened, never by a clock."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

#: Nothing that the tests wait for takes this long at any load: only what hangs does.
HANG_SECONDS = 3600.0
#: MLflow's own client asks a dead server again and again for longer than this; the program asks once.
RETRIES_SECONDS = 120.0


def wait_until(happened: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Return when it has happened; fail if ``process``, which should do it, has ended before, or if it hangs."""
    deadline = time.monotonic() + HANG_SECONDS
    while not happened():
        if process is not None and process.poll() is not None and not happened():
            raise AssertionError(f"ended with {process.returncode} before: {process.communicate()[1]}")
        assert time.monotonic() < deadline, f"has not happened in {HANG_SECONDS:.0f} s"
        time.sleep(0.02)
