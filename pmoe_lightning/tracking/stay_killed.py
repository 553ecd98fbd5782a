"""A small process that outlives a stopped run: ``mlflow run`` overwrites ``KILLED``, and this puts it back.

    MLFLOW_TRACKING_URI=<uri> python -m pmoe_lightning.tracking.stay_killed <run id>

``mlflow run`` records a run as ``FAILED`` when its command exits with anything but 0, unless the run has ended already.
That exception never applies (seen in MLflow 3.17.2: it compares the status as text with numbers), so a run that was
stopped on purpose would look like one that broke.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

_PATIENCE_SECONDS = 60.0


def stay_killed(tracking_uri: str, run_id: str) -> None:
    """Start the process where ``mlflow run`` opened this run, and return at once."""
    if os.environ.get("MLFLOW_RUN_ID") != run_id:
        return
    subprocess.Popen(
        [sys.executable, "-m", __name__, run_id],
        env=os.environ
        | {"MLFLOW_TRACKING_URI": tracking_uri},  # a command can be read by everybody, with a password in it
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches every process of the terminal's session
    )


def main(run_id: str) -> None:
    """Wait until somebody else has closed the run, then say again how it ended; gives up after a minute."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        run = client.get_run(run_id)
        # Anything but FAILED is ours, or that of somebody who has started the run again.
        if run.info.status == "FAILED":
            client.set_terminated(run_id, "KILLED", end_time=run.info.end_time)
            return
        time.sleep(0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
