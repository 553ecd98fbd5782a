"""Send what a run could not deliver to MLflow while it lasted.

    python -m pmoe_lightning.tracking.resend outputs/sac-Hopper-v5/2026-11-21_10-00-00

Any number of folders; every spool below them is sent to the server and the run that it names: curves, files, model and
status. A run that was killed, and that MLflow takes for running, becomes KILLED; one that goes on sends its own.

Exit code 1 if something could not be sent, or what has arrived cannot be read back: it stays, and the command can be
repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pmoe_lightning.processes.output import outlive_output

#: Longer than MLflow waits for an answer.
_PATIENCE_SECONDS = 150.0


def main(folders: list[str]) -> int:
    """Send everything below the folders; returns the exit code."""
    if not folders or any(word.startswith("-") for word in folders):
        print(__doc__.strip())
        return 0 if folders else 2
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        print(f"error: {missing[0]} is not a folder", file=sys.stderr)
        return 2
    found = sorted({note.parent for folder in folders for note in Path(folder).rglob("run.json")})
    if not found:
        print("nothing is waiting to be sent")
    return max((_send(folder) for folder in found), default=0)


def _send(folder: Path) -> int:
    import os

    from pmoe_lightning.errors import ConfigurationError, RunError
    from pmoe_lightning.processes import run_folder
    from pmoe_lightning.tracking.leftovers import send_spool

    # One attempt: MLflow's client would ask a server that fails for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    try:
        if (folder.parent / run_folder.LOCK).exists():
            run_folder.hold(folder.parent)
        print(f"{folder}: {send_spool(folder, _PATIENCE_SECONDS)}")
    except ConfigurationError:
        who = run_folder.holder(folder.parent) or "another process"
        print(f"{folder}: left to {who}, whose run it is")
    except RunError as error:
        print(f"error: {folder}: {error}", file=sys.stderr)
        return 1
    finally:
        run_folder.release(folder.parent)
    return 0


if __name__ == "__main__":
    outlive_output()  # what is sent matters, not who reads of it
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
