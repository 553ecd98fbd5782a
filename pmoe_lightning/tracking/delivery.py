"""Sending the entries of a spool to one MLflow run."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pmoe_lightning.errors import RunError
from pmoe_lightning.tracking.address import first_line
from pmoe_lightning.tracking.server import check_server
from pmoe_lightning.tracking.spool import Entry, Spool

_POINTS_PER_REQUEST = 900
_log = logging.getLogger(__name__)


class Delivery:
    """Sends what a spool holds, and forgets only what has arrived or was refused for good.

    Sending twice does no harm: MLflow knows a point that it has already, and an artifact is replaced by itself.
    """

    def __init__(self, client: MlflowClient, tracking_uri: str, run_id: str) -> None:
        self.client, self.tracking_uri, self.run_id = client, tracking_uri, run_id
        self._away = False

    def deliver(self, spool: Spool) -> bool:
        """Send everything; False as soon as the server does not answer, with the rest still in the spool."""
        entries = spool.entries()
        points = [entry for entry in entries if entry.kind == "points"]
        arrived = all(self._send_points(batch, spool) for batch in _batches(points))
        for entry in entries:
            if arrived and entry.kind != "points":
                arrived = self._send(entry, spool)
        if arrived and entries and self._away:
            _log.warning("MLflow answers again, everything is sent")
            self._away = False
        return arrived

    def _send_points(self, entries: list[Entry], spool: Spool) -> bool:
        points = [Metric(*point) for entry in entries for point in entry.values["points"]]
        try:
            for start in range(0, len(points), _POINTS_PER_REQUEST):
                self.client.log_batch(self.run_id, metrics=points[start : start + _POINTS_PER_REQUEST])
        except Exception as error:
            if not _refused(error):
                return self._wait(error)
            if len(entries) > 1:
                return all(self._send_points([entry], spool) for entry in entries)
            _log.warning("MLflow refused %d metric points, dropped: %s", len(points), first_line(error))
        spool.remove(entries)
        return True

    def _send(self, entry: Entry, spool: Spool) -> bool:
        try:
            if entry.kind == "status":
                self.client.set_terminated(self.run_id, entry.values["status"], end_time=entry.values["ended"])
            else:
                self._upload(entry)
        except Exception as error:
            if not _refused(error) and (entry.kind == "status" or not self._answers()):
                return self._wait(error)
            _log.warning("could not log %s to MLflow: %s", entry.values.get("name", entry.kind), first_line(error))
        spool.remove([entry])
        return True

    def _upload(self, entry: Entry) -> None:
        folder, name = entry.values["folder"], entry.values["name"]
        if entry.content is None:
            self.client.log_artifact(self.run_id, entry.values["source"], folder)
            return
        # MLflow takes the name of an artifact from the name of the file. It lies beside the entry, where a killed run's
        # leftovers go with the spool.
        with tempfile.TemporaryDirectory(dir=entry.path.parent) as temporary:
            self.client.log_artifact(self.run_id, shutil.copy(entry.content, Path(temporary, name)), folder)

    def _answers(self) -> bool:
        try:
            check_server(self.tracking_uri)
        except RunError:
            return False
        return True

    def _wait(self, error: Exception) -> bool:
        if not self._away:
            _log.warning("MLflow does not answer, everything is kept and sent later: %s", first_line(error))
        self._away = True
        return False


def _batches(entries: list[Entry]) -> Iterator[list[Entry]]:
    batch, size = [], 0
    for entry in entries:
        batch.append(entry)
        size += len(entry.values["points"])
        if size >= _POINTS_PER_REQUEST:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _refused(error: Exception) -> bool:
    """A 4xx answer is final (bad name, deleted run); everything else may pass (no connection, locked database)."""
    return (
        isinstance(error, MlflowException)
        and 400 <= error.get_http_status_code() < 500
        and error.get_http_status_code() not in (408, 429)
    )
