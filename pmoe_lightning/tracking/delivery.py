"""Sending the entries of a spool to one MLflow run."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
from mlflow.entities import Metric, Param, Run, RunInfo, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient

from pmoe_lightning.errors import RunError, error_line
from pmoe_lightning.tracking.address import store_line, without_secrets
from pmoe_lightning.tracking.database import OpenDatabase
from pmoe_lightning.tracking.server import check_server
from pmoe_lightning.tracking.spool import START_TAG, Entry, Spool

_POINTS_PER_REQUEST = 900
_PARAMS_PER_REQUEST = 100
_MAX_TAG_LENGTH = 5000
_log = logging.getLogger(__name__)


class NotConfirmed(RunError):
    """The store has not said no, but what was sent cannot be read back: a proxy may have answered in its place."""


def runs_of_start(client: MlflowClient, experiment_id: str, start: str) -> list[RunInfo]:
    """The runs that bear the word of a start (``spool.Identity``), the first that was made first.

    Where an answer was lost there is more than one. A run uses one of them, and closes the others at its end, because a
    request that was given up may still be served much later.
    """
    condition = f"tags.`{START_TAG}` = '{start}'"
    found = client.search_runs([experiment_id], condition, order_by=["start_time ASC"])
    return [run.info for run in found]


def read_run(client: MlflowClient, run_id: str) -> Run:
    """The run as the store has it.

    Raises:
        NotConfirmed: something else answered.
        MlflowException: the store does not know it, or does not answer.
    """
    run = client.get_run(run_id)
    if run.info.run_id != run_id:
        raise NotConfirmed(f"what answers for {without_secrets(client.tracking_uri)} is not MLflow")
    return run


class Delivery:
    """Sends what a spool holds, and forgets only what can be read back from the store.

    What the store refuses for its own content, such as a name that is too long, is set aside. Any other answer may be
    another one next time (an expired token, a proxy's error, a store that was restarted on another database): what it
    was given for stays in the spool. Sending twice does no harm: MLflow knows a point that it has already, and an
    artifact is replaced by itself.

    Args:
        client: of the store.
        tracking_uri: of the same store.
        run_id: the run.
        announce: warn, in one line, when the store ceases to take what is sent, and when it takes it again.
    """

    def __init__(self, client: MlflowClient, tracking_uri: str, run_id: str, *, announce: bool = True) -> None:
        self.client, self.tracking_uri, self.run_id = client, tracking_uri, run_id
        self._announce = announce
        self.problem: str | None = None
        """Why the last attempt left something in the spool."""
        self._database = OpenDatabase(client, tracking_uri)
        for chatty in ("mlflow.store.db.utils", "mlflow.exceptions"):
            logging.getLogger(chatty).setLevel(logging.CRITICAL)  # a stack for what is one line here

    def deliver(self, spool: Spool) -> bool:
        """Send everything; False where something is left in the spool, with the reason as :attr:`problem`."""
        entries = spool.entries()
        if not entries:
            return True
        try:
            self._database.reopen()
            for batch in _batches([entry for entry in entries if entry.kind == "points"]):
                self._send_points(batch, spool)
        except Exception as error:
            return self._wait(error)
        failure = None
        for entry in (entry for entry in entries if entry.kind != "points"):
            try:
                self._send(entry, spool)
            except Exception as error:
                failure = error
                if not self._answers():
                    break  # else it may be this entry alone that cannot be sent
        if failure is not None:
            return self._wait(failure)
        if self.problem and self._announce:
            _log.warning("MLflow answers again, everything is sent")
        self.problem = None
        return True

    def read_run(self) -> Run:
        """The run as the store, not a connection that is open, has it; errors as :func:`read_run`."""
        self._database.reopen()
        return read_run(self.client, self.run_id)

    # ------------------------------------------------------------------ points, parameters, tags

    def _log(self, what: str, items: Sequence[Any], find: Callable[[Sequence[Any]], None]) -> list[tuple[Any, str]]:
        """Send items of a batch and read them back; those that the store refuses for what they are, with its reason.

        Args:
            what: ``metrics``, ``params`` or ``tags``.
            items: no more than the store takes in one request.
            find: raises where the store does not have them.
        """
        try:
            batch: dict[str, Any] = {what: items}
            self.client.log_batch(self.run_id, **batch)
        except MlflowException as error:
            if not self._is_refused(error):
                raise
            if len(items) == 1:
                return [(items[0], store_line(error))]
            half = len(items) // 2
            return self._log(what, items[:half], find) + self._log(what, items[half:], find)
        find(items)
        return []

    def _send_points(self, entries: list[Entry], spool: Spool) -> None:
        points = [Metric(*point) for entry in entries for point in entry.values["points"]]
        refused = []
        for some in _parts(points, _POINTS_PER_REQUEST):
            refused += self._log("metrics", some, self._find_points)
        if refused:
            names = "; ".join(sorted({f"{point.key!r}: {reason}" for point, reason in refused}))
            values = [[point.key, point.value, point.timestamp, point.step] for point, _ in refused]
            spool.put_aside("points", {"points": values}, f"MLflow refuses {names}")
        spool.remove(entries)

    def _find_points(self, points: Sequence[Metric]) -> None:
        """Raise unless the store has these points: MLflow takes the points of a request together, or none."""
        last = {metric.key: (metric.step, metric.timestamp) for metric in self.read_run().data.to_proto().metrics}
        for key in {point.key for point in points}:
            sent = {(point.step, point.timestamp) for point in points if point.key == key}
            if last.get(key) == max(sent):
                continue
            if last.get(key, (-1, 0)) > max(sent):  # it has later ones, which say nothing of these
                history = self.client.get_metric_history(self.run_id, key)
                if sent <= {(point.step, point.timestamp) for point in history}:
                    continue
            raise NotConfirmed(f"the store has said yes to points of {key!r} that it does not have")

    def _send_params(self, entry: Entry, spool: Spool) -> None:
        """MLflow's parameters cannot change: where the run has another value, the tag ``changed_params`` says both."""
        params, present = entry.values["params"], self.read_run().data.params
        new = [Param(name, value) for name, value in params.items() if name not in present]
        refused = []
        for some in _parts(new, _PARAMS_PER_REQUEST):
            refused += self._log("params", some, self._find_params)
        changed = {name: [present[name], value] for name, value in params.items() if present.get(name, value) != value}
        if changed:
            self.client.set_tag(self.run_id, "changed_params", json.dumps(changed)[:_MAX_TAG_LENGTH])
        self._put_aside("params", refused, spool)

    def _find_params(self, params: Sequence[Param]) -> None:
        if {param.key for param in params} - self.read_run().data.params.keys():
            raise NotConfirmed("the store has said yes to parameters that it does not have")

    def _send_tags(self, entry: Entry, spool: Spool) -> None:
        present = self.read_run().data.tags if entry.values.get("only_new") else {}
        tags = [RunTag(key, value) for key, value in entry.values["tags"].items() if key not in present]
        self._put_aside("tags", self._log("tags", tags, self._find_tags), spool)

    def _find_tags(self, tags: Sequence[RunTag]) -> None:
        if not {tag.key: tag.value for tag in tags}.items() <= self.read_run().data.tags.items():
            raise NotConfirmed("the store has said yes to tags that it does not have")

    def _put_aside(self, kind: str, refused: Sequence[tuple[Any, str]], spool: Spool) -> None:
        if refused:
            names = "; ".join(f"{item.key!r}: {reason}" for item, reason in refused)
            spool.put_aside(kind, {kind: {item.key: item.value for item, _ in refused}}, f"MLflow refuses {names}")

    # ------------------------------------------------------------------ everything else

    def _send(self, entry: Entry, spool: Spool) -> None:
        send = {
            "params": self._send_params,
            "tags": self._send_tags,
            "upload": self._send_upload,
            "model": self._send_model,
            "status": self._send_status,
        }
        try:
            send[entry.kind](entry, spool)
        except Exception as error:
            if not self._is_refused(error) and not isinstance(error, _CannotBeSent):
                raise
            spool.set_aside(entry, f"{entry.kind} {entry.values.get('name', '')}: {store_line(error)}")
        else:
            spool.remove([entry])

    def _send_upload(self, entry: Entry, spool: Spool) -> None:
        name, folder = entry.values["name"], entry.values["folder"]
        try:
            content = spool.content(entry)
        except (OSError, ValueError) as error:
            raise _CannotBeSent(error_line(error)) from error
        if content is None:
            # Below the run's folder it is found wherever that has been moved to.
            self._upload(spool.folder.parent / entry.values["source"], name, folder, spool, entry.values.get("once"))
            return
        # MLflow takes the name of an artifact from the name of the file. It lies beside the entry, where a killed run's
        # leftovers go with the spool.
        with tempfile.TemporaryDirectory(dir=spool.folder) as temporary:
            file = Path(temporary, name)
            file.write_bytes(content)
            self._upload(file, name, folder, spool)

    def _upload(self, file: Path, name: str, folder: str | None, spool: Spool, once: bool | None = None) -> None:
        if not file.is_file():
            raise _CannotBeSent(f"{file} is gone")
        # Not by the client, which would remember the place that something else has answered with.
        place = get_artifact_repository(self.read_run().info.artifact_uri, tracking_uri=self.tracking_uri)
        path, size = f"{folder}/{name}" if folder else name, file.stat().st_size
        sizes = lambda: {found.path: found.file_size for found in place.list_artifacts(folder)}  # noqa: E731
        if once and sizes().get(path) == size:  # its name says its content
            return
        spool.uploading_bytes = size
        try:
            place.log_artifact(str(file), folder)
        finally:
            spool.uploading_bytes = 0
        if sizes().get(path, -1) not in (None, size):
            raise NotConfirmed(f"the store has said yes to {path} but does not have it")

    def _send_model(self, entry: Entry, spool: Spool) -> None:
        from pmoe_lightning.tracking.model_upload import upload_model

        folder = spool.folder.parent / entry.values["source"]
        if not (folder / "MLmodel").is_file():
            raise _CannotBeSent(f"{folder} is gone")
        spool.uploading_bytes = sum(path.stat().st_size for path in folder.rglob("*"))
        try:
            upload_model(self.client, self.tracking_uri, self.read_run(), folder, **entry.values["model"])
        finally:
            spool.uploading_bytes = 0

    def _send_status(self, entry: Entry, spool: Spool) -> None:
        status, ended = entry.values["status"], entry.values["ended"]
        run = self.read_run()
        self._close_doubles(run)
        if entry.values.get("only_if_running"):
            if run.info.status != "RUNNING":
                return
            ended = max([ended, *(metric.timestamp for metric in run.data.to_proto().metrics)])
        self.client.set_terminated(self.run_id, status, end_time=ended)
        if self.read_run().info.status != status:
            raise NotConfirmed(f"the store has said yes to the status {status} but does not have it")

    def _close_doubles(self, run: Run) -> None:
        start = run.data.tags.get(START_TAG)
        for other in runs_of_start(self.client, run.info.experiment_id, start) if start else ():
            if other.run_id != self.run_id and other.status == "RUNNING":
                self.client.set_terminated(other.run_id, "KILLED")

    # ------------------------------------------------------------------ what an answer means

    def _is_refused(self, error: Exception) -> bool:
        """Whether the store refuses what it was given for its own content: only MLflow itself says so, by one code."""
        if _error_code(error) != "INVALID_PARAMETER_VALUE":
            return False
        # The same code is the answer for a run that was deleted, which may be restored.
        return self.read_run().info.lifecycle_stage == "active"

    def _answers(self) -> bool:
        try:
            check_server(self.tracking_uri)
            self.read_run()
        except Exception:
            return False
        return True

    def _wait(self, error: Exception) -> bool:
        if self.problem is None and self._announce:
            _log.warning(
                "MLflow does not take what is logged; everything is kept and sent later: %s", store_line(error)
            )
        self.problem = store_line(error)
        return False


class _CannotBeSent(RunError):
    """What was to be sent is not there any more."""


def _error_code(error: BaseException) -> str | None:
    """MLflow's own code; None where it is not MLflow that has answered."""
    if isinstance(error, MlflowException):
        return error.error_code
    if isinstance(error, requests.HTTPError) and error.response is not None:
        with suppress(ValueError, AttributeError):
            return error.response.json().get("error_code")
    return None


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


def _parts(items: Sequence[Any], length: int) -> list[Sequence[Any]]:
    return [items[start : start + length] for start in range(0, len(items), length)]
