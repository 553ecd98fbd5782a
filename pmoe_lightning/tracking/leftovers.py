"""What a process that has ended left in its spool: sent to its own run, and that run closed."""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from pmoe_lightning.errors import RunError
from pmoe_lightning.tracking.address import HIDDEN, store_line, without_secrets
from pmoe_lightning.tracking.database import check_database_exists
from pmoe_lightning.tracking.delivery import Delivery, runs_of_start
from pmoe_lightning.tracking.server import check_server
from pmoe_lightning.tracking.spool import IDENTITY, Identity, Spool
from pmoe_lightning.tracking.writer import BackgroundWriter

_START_PATIENCE_SECONDS = 15.0
_log = logging.getLogger(__name__)


def close_what_was_left(folder: str | Path) -> None:
    """At a start in a run's folder: deliver what earlier processes left in the spools there, each to its own run.

    A run that is still RUNNING in its store is closed as KILLED. What cannot be delivered now, within seconds, is
    renamed, so that it is in nobody's way, and named with the command that sends it.
    """
    for note in sorted(Path(folder).glob(f"*/{IDENTITY}")):
        _close(note.parent)


def close_spool(folder: Path) -> None:
    """:func:`close_what_was_left` for the spool of this name, and those that were renamed at earlier starts."""
    for spool in (folder, *sorted(folder.parent.glob(f"{folder.name}-[0-9]*"))):
        if (spool / IDENTITY).exists() or any(spool.glob("*.entry")):
            _close(spool)


def _close(folder: Path) -> None:
    spool = Spool(folder)
    try:
        _send(spool, _START_PATIENCE_SECONDS)
    except RunError as error:
        if not re.search(r"-\d+$", folder.name):
            spool.move(_free_name(folder))
        _log.warning(
            "an earlier run in this folder is not complete in MLflow (%s); send the rest with: "
            "python -m pmoe_lightning.tracking.resend %s",
            error,
            shlex.quote(str(spool.folder)),
        )


def send_spool(folder: Path, patience: float) -> str:
    """Deliver a spool to its run, close that, and remove the spool; returns a line about it.

    Args:
        folder: of the spool.
        patience: seconds without anything that arrives after which it gives up.

    Raises:
        RunError: something could not be sent; it stays.
    """
    return _send(Spool(folder), patience)


def _send(spool: Spool, patience: float) -> str:
    try:
        identity = spool.identity()
        tracking_uri = _with_secrets(identity.tracking_uri)
        check_server(tracking_uri)
        check_database_exists(tracking_uri)
        client = MlflowClient(tracking_uri)
        run_id = identity.run_id or _find(client, identity)
    except (OSError, ValueError, MlflowException, SQLAlchemyError) as error:
        raise RunError(store_line(error)) from error
    if run_id is None:
        spool.close()
        return "its run was never opened"
    spool.identify(tracking_uri, run_id)
    aside = spool.aside()
    if not any(entry.kind == "status" for entry in spool.entries()):
        ended = {"ended": int(1000 * spool.last_change()), "only_if_running": True}
        spool.put("status", {"status": "KILLED", **ended})
    waiting, delivery = len(spool), Delivery(client, tracking_uri, run_id, announce=False)
    if not BackgroundWriter(spool, delivery.deliver, period=patience).close(patience):
        reason = delivery.problem or "no answer"
        raise RunError(f"{len(spool)} of {waiting} entries could not be sent to run {run_id}: {reason}")
    refused = spool.aside() - aside
    return f"{waiting - refused} entries sent to run {run_id}" + f", {refused} set aside" * bool(refused)


def _find(client: MlflowClient, identity: Identity) -> str | None:
    if identity.start is None or identity.experiment_id is None:
        return None
    return next((run.run_id for run in runs_of_start(client, identity.experiment_id, identity.start)), None)


def _free_name(folder: Path) -> Path:
    number = 1
    while (name := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return name


def _with_secrets(noted: str) -> str:
    """The URI that a spool names, with the user and the password that it does not: those of ``MLFLOW_TRACKING_URI``.

    Raises:
        RunError: that is the URI of another store.
    """
    here = mlflow.get_tracking_uri()
    if HIDDEN not in noted:
        return noted
    if without_secrets(here) != noted:
        raise RunError(f"set MLFLOW_TRACKING_URI to {noted}, with what {HIDDEN} stands for")
    return here
