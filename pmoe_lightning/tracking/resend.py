"""Send what a run could not deliver to MLflow while it lasted.

    python -m pmoe_lightning.tracking.resend outputs/sac-Hopper-v5/2026-11-21_10-00-00

Any number of folders; every spool below them is sent to the server and the run that it names. Exit code 1 if something
could not be sent: it stays, and the command can be repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(folders: list[str]) -> int:
    """Send everything below the folders; returns the exit code."""
    if not folders or any(word.startswith("-") for word in folders):
        print(__doc__.strip())
        return 0 if folders else 2
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        print(f"error: {missing[0]} is not a folder", file=sys.stderr)
        return 2
    notes = {note for folder in folders for note in Path(folder).rglob("run.json")}
    found = sorted(note.parent for note in notes if any(note.parent.glob("*.entry")))
    if not found:
        print("nothing is waiting to be sent")
    return max((_send(folder) for folder in found), default=0)


def _send(folder: Path) -> int:
    from mlflow.tracking import MlflowClient

    from pmoe_lightning.errors import RunError
    from pmoe_lightning.tracking.delivery import Delivery
    from pmoe_lightning.tracking.server import check_server
    from pmoe_lightning.tracking.spool import Spool

    spool = Spool(folder)
    try:
        noted, run_id = spool.identity()
        tracking_uri = _with_secrets(noted)
        check_server(tracking_uri)
    except (OSError, ValueError, KeyError, RunError) as error:
        print(f"error: {folder}: {error}", file=sys.stderr)
        return 1
    waiting = len(spool)
    if not Delivery(MlflowClient(tracking_uri), tracking_uri, run_id).deliver(spool):
        print(f"error: {folder}: {len(spool)} of {waiting} entries could not be sent", file=sys.stderr)
        return 1
    spool.close()
    print(f"{folder}: {waiting} entries sent to run {run_id}")
    return 0


def _with_secrets(noted: str) -> str:
    """The URI that a spool names, with the user and the password that it does not: those of ``MLFLOW_TRACKING_URI``.

    Raises:
        RunError: that is the URI of another store.
    """
    import mlflow

    from pmoe_lightning.errors import RunError
    from pmoe_lightning.tracking.address import HIDDEN, without_secrets

    here = mlflow.get_tracking_uri()
    if HIDDEN not in noted:
        return noted
    if without_secrets(here) != noted:
        raise RunError(f"set MLFLOW_TRACKING_URI to {noted}, with what {HIDDEN} stands for")
    return here


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
