"""The MLflow logger: one run per training, written in the background, closed with the status it deserves."""

import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

import mlflow
from lightning.fabric.utilities.logger import _convert_params
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from sqlalchemy.exc import SQLAlchemyError

from pmoe_lightning.errors import RunError
from pmoe_lightning.limits import Limit, PositiveFloat, Text, checked
from pmoe_lightning.processes.stopping import STOP_CODES, stop
from pmoe_lightning.tracking.address import store_line, without_secrets
from pmoe_lightning.tracking.database import absolute_uri
from pmoe_lightning.tracking.delivery import Delivery, NotConfirmed, read_run, runs_of_start
from pmoe_lightning.tracking.leftovers import close_spool
from pmoe_lightning.tracking.naming import EXPERIMENT_NOTE, NOTE, is_invented
from pmoe_lightning.tracking.origin import provenance
from pmoe_lightning.tracking.server import check_server, prepare_store
from pmoe_lightning.tracking.spool import SET_ASIDE, START_TAG, Identity, Spool
from pmoe_lightning.tracking.stay_killed import stay_killed
from pmoe_lightning.tracking.writer import BackgroundWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_NAME_LENGTH = 250
_MAX_VALUE_LENGTH = 6000
#: A longer tag is cut; MLflow itself allows 8,000 characters today and 5,000 before.
MAX_TAG_LENGTH = 5000
_DEFAULT_EXPERIMENT = "0"
_EXIT_PATIENCE_SECONDS = 15.0
_OPENING_PATIENCE_SECONDS = 30.0
_ANSWER_PATIENCE_SECONDS = 10
_log = logging.getLogger(__name__)


def run_status(error: BaseException | None) -> str:
    """MLflow's word for how a run ended: ``FINISHED``, ``KILLED`` (Ctrl-C, SIGTERM, SIGHUP) or ``FAILED``."""
    if error is None:
        return "FINISHED"
    stopped = isinstance(error, (KeyboardInterrupt, SIGTERMException)) or (
        isinstance(error, SystemExit) and error.code in STOP_CODES
    )
    return "KILLED" if stopped else "FAILED"


class MLflowLogger(MLFlowLogger):
    """Lightning's MLflow logger, made safe for long runs.

    Metrics and artifacts are written to a spool on disk and sent from there by one background thread (see
    :class:`BackgroundWriter`): a logging call never waits for the server, and neither a server that goes away nor the
    end of this process loses a point. The run opened by ``mlflow run`` is adopted, so that one training is one MLflow
    run. A run that is continued gets no second point at a step it has one for. No run exists before :meth:`start` or
    the first use. All methods do nothing on ranks other than 0.

    Args:
        experiment_name: default ``MLFLOW_EXPERIMENT_ID`` or ``MLFLOW_EXPERIMENT_NAME``, else ``"pmoe_lightning"``.
        run_name: shown in the MLflow UI, also in place of a name that MLflow has invented for an adopted run; MLflow
            invents one when ``None``.
        tracking_uri: default ``mlflow.get_tracking_uri()``.
        run_id: continue this run; default ``MLFLOW_RUN_ID``, which ``mlflow run`` sets.
        nested: with ``MLFLOW_RUN_ID`` set, open a child of that run in its experiment, in place of adopting it (one
            per job of a sweep).
        tags: tags of the run.
        flush_seconds: metrics reach the server at most this late.
        spool: folder for what has not arrived yet; by default a temporary one, which is not found again after a crash.

    Raises:
        RunError: the store cannot be opened.
    """

    _tracking_uri: str
    tags: dict[str, Any]

    @checked
    def __init__(
        self,
        experiment_name: Text | None = None,
        *,
        run_name: Text | None = None,
        tracking_uri: Text | None = None,
        run_id: str | None = None,
        nested: bool = False,
        tags: Mapping[str, Any] | None = None,
        flush_seconds: PositiveFloat = 5.0,
        spool: Annotated[str | Path, Limit(text=True, numeric=False)] | None = None,
    ) -> None:
        opened = os.environ.get("MLFLOW_RUN_ID") or None
        # A progress bar per uploaded file would tear the training's own one to pieces.
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        uri = tracking_uri or mlflow.get_tracking_uri()
        if without_secrets(uri) != uri:
            os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # MLflow would print the password with it
        prepare_store(uri)
        try:
            super().__init__(
                experiment_name=experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "pmoe_lightning",
                run_name=run_name,
                tracking_uri=uri,
                run_id=run_id or (None if nested else opened),
                tags={key: _tag(value) for key, value in (tags or {}).items()},
            )
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise RunError(f"cannot open the MLflow store {without_secrets(uri)}: {store_line(error)}") from error
        if experiment_name is None:
            self._experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
        self._store = absolute_uri(uri)  # for a process in another folder
        self._parent_run_id = opened if nested and not run_id else None
        self._flush_seconds = flush_seconds
        self._spool_folder = spool
        self._spool: Spool | None = None
        self._start = uuid4().hex
        self._last_steps: dict[str, int] = {}
        self._status: str | None = None
        self._started = False

    # ------------------------------------------------------------------ the run

    @rank_zero_only
    def start(self, description: str | None = None) -> str:
        """Open the run (or adopt one), describe it and where it comes from, and return its id.

        Whoever starts the run ends it: after ``start`` a successful ``Trainer.fit`` leaves the run open for what
        follows (packaging, a last evaluation) until :meth:`finish`.

        Args:
            description: shown on the run's page, unless it has one.

        Raises:
            RunError: when the tracking server cannot be used or the run to continue does not exist.
        """
        check_server(self._tracking_uri)
        self._started = True
        run_id = self.run_id
        assert run_id is not None  # this process has opened the run
        origin = provenance()
        tags = {key: str(value) for key in ("git_commit", "git_dirty") if (value := origin[key]) is not None}
        self.set_tags(tags | {"python": origin["python"], "platform": origin["platform"]})
        if description:
            self._writer.put("tags", {"tags": {NOTE: _tag(description)}, "only_new": True})
        self.log_dict(origin, "versions.json")
        return run_id

    @property
    def tracking_uri(self) -> str:
        """The store this run is written to; it may hold a password."""
        return self._tracking_uri

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """The MLflow client; opens the run on first use, and is patient for a while with a store that does not answer.

        Raises:
            RunError: when the run cannot be opened.
        """
        deadline = time.monotonic() + _OPENING_PATIENCE_SECONDS
        while not self._initialized:
            try:
                with _asking_once():
                    self._open()
                self._initialized = True
            except (MlflowException, OSError, NotConfirmed) as error:
                if time.monotonic() > deadline or not _may_pass(error):
                    where = without_secrets(self._tracking_uri)
                    raise RunError(f"cannot open an MLflow run in {where}: {store_line(error)}") from error
                time.sleep(1.0)
                stop.raise_if_asked()
        return self._mlflow_client

    def _open(self) -> None:
        mlflow.set_tracking_uri(self._tracking_uri)
        if self._spool is None:
            folder = Path(self._spool_folder or tempfile.mkdtemp(prefix="mlflow-spool-"))
            self._spool = self._take_spool(folder)
        spool, run_id = self._spool, self._run_id
        if run_id is not None:
            self._continue_run(run_id, spool)
        else:
            run_id = self._create_run(spool)
        self._delivery = Delivery(self._mlflow_client, self._tracking_uri, run_id)
        self._writer = BackgroundWriter(spool, self._delivery.deliver, period=self._flush_seconds)

    def _take_spool(self, folder: Path) -> Spool:
        """The spool in this folder, with what an earlier process of this same run has left; no other run's."""
        if self._run_id is not None:
            spool, own = Spool(folder), Identity(without_secrets(self._store), self._run_id)
            with suppress(OSError, ValueError):
                if spool.identity() == own:
                    return spool
        close_spool(folder)
        return Spool(folder)

    def _continue_run(self, run_id: str, spool: Spool) -> None:
        client = self._mlflow_client
        run = read_run(client, run_id)
        if run.info.lifecycle_stage == "deleted":
            raise RunError(f"run {run_id} was deleted; restore it or start a new one")
        spool.identify(self._store, run_id)
        self._experiment_id = run.info.experiment_id
        if run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
        if self._run_name and is_invented(run.info.run_name):
            client.update_run(run_id, name=self._run_name)
        self._describe_experiment(client.get_experiment(self._experiment_id))
        self._last_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        for entry in spool.entries():
            if entry.kind == "status":  # how the run had ended; it is running again
                spool.remove([entry])
            for name, _, _, step in entry.values.get("points", ()):
                self._last_steps[name] = max(step, self._last_steps.get(name, -1))
        if self.tags:
            spool.put("tags", {"tags": self.tags})

    def _create_run(self, spool: Spool) -> str:
        """Open a run that is found again, by the note in the spool, whenever this process ends."""
        client = self._mlflow_client
        if self._parent_run_id is not None:
            self._experiment_id = read_run(client, self._parent_run_id).info.experiment_id
            self.tags["mlflow.parentRunId"] = self._parent_run_id
        elif self._experiment_id is None:
            self._experiment_id = self._find_experiment()
        spool.identify(self._store, None, start=self._start, experiment_id=self._experiment_id)
        # It is there already where an earlier attempt has made it and its answer was lost.
        opened = runs_of_start(client, self._experiment_id, self._start)
        if not opened:
            tags = resolve_tags(self.tags | {START_TAG: self._start})
            client.create_run(self._experiment_id, tags=tags, run_name=self._run_name)
            opened = runs_of_start(client, self._experiment_id, self._start)
            if not opened:
                raise NotConfirmed("the store has said yes to a run that it does not have")
        self._run_id = run_id = opened[0].run_id
        spool.identify(self._store, run_id)
        return run_id

    def _describe_experiment(self, experiment: Experiment) -> None:
        """Say what the experiment holds, unless somebody has, and that MLflow's pages are those for training."""
        if experiment.experiment_id == _DEFAULT_EXPERIMENT:
            if self._run_id == os.environ.get("MLFLOW_RUN_ID"):
                _log.warning(
                    "this run is in MLflow's experiment Default, as `mlflow run` opened it there: give it "
                    "--experiment-name pmoe_lightning, or set MLFLOW_EXPERIMENT_NAME"
                )
            return
        tags = {NOTE: EXPERIMENT_NOTE, "mlflow.experimentKind": "custom_model_development"}
        with suppress(MlflowException):  # whoever may not change the experiment may still train
            for key in tags.keys() - experiment.tags.keys():
                self._mlflow_client.set_experiment_tag(experiment.experiment_id, key, tags[key])

    def _find_experiment(self) -> str:
        client, name = self._mlflow_client, self._experiment_name
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                found = client.get_experiment(client.create_experiment(name))
            except MlflowException:
                # Another run of the same sweep may have created it in between.
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.name != name or not found.experiment_id:
            raise NotConfirmed(f"the store says nothing of experiment {name!r}")
        if found.lifecycle_stage == "deleted":
            raise RunError(f"experiment {name!r} was deleted; restore it or choose another name")
        self._describe_experiment(found)
        return found.experiment_id

    @rank_zero_only
    def finish(self, status: str) -> None:
        """Send what is queued and close the run as ``FINISHED``, ``FAILED`` or ``KILLED`` (:func:`run_status`).

        Safe to call more than once; a later, different status replaces the earlier one. Waits a bounded time for a
        server that does not answer.
        """
        if not self._initialized:
            return
        if status != self._status:
            self._writer.put("status", {"status": status, "ended": int(time.time() * 1000)})
            self._status = status
        if self._writer.close(_EXIT_PATIENCE_SECONDS) and status == "KILLED":
            stay_killed(self._tracking_uri, self._delivery.run_id)
        for line in self._describe_what_is_missing():
            print(f"warning: run {self._run_id} in {without_secrets(self._tracking_uri)}: {line}", file=sys.stderr)

    def _describe_what_is_missing(self) -> list[str]:
        spool, lines = self._writer.spool, []
        if entries := spool.entries():
            points = sum(len(entry.values.get("points", ())) for entry in entries)
            others = sum(entry.kind != "points" for entry in entries)
            reason = self._delivery.problem or "the store did not answer in time"
            lines.append(
                f"{points} points and {others} other entries are not there yet ({reason}); they are kept; send them "
                f"with: python -m pmoe_lightning.tracking.resend {shlex.quote(str(spool.folder))}"
            )
        if spool.unwritten:
            lines.append(f"{spool.unwritten} of these could not be written to {spool.folder} and end with this process")
        if spool.dropped:
            lines.append(f"{spool.dropped} entries were lost, because the spool {spool.folder} was full")
        if aside := spool.aside():
            lines.append(f"{aside} entries were refused or damaged and lie in {spool.folder / SET_ASIDE}")
        return lines

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Called by Lightning when it ends: closes the run, except after a success of a run opened by ``start``."""
        if not self._initialized:
            return
        if status in ("success", "finished"):
            if self._started:
                self.flush()
            else:
                self.finish("FINISHED")
        else:
            self.finish(run_status(sys.exc_info()[1] or RuntimeError(status)))

    @rank_zero_only
    def flush(self, timeout: float = _EXIT_PATIENCE_SECONDS) -> bool:
        """Wait until everything queued has been sent; ``False`` when the server did not take all of it in time."""
        return not self._initialized or self._writer.flush(timeout)

    # ------------------------------------------------------------------ metrics and parameters

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Queue one point per entry at ``step`` (environment frames); numbers or one-element tensors."""
        _ = self.experiment
        now, step = int(time.time() * 1000), int(step or 0)
        legal = {_legal(name): float(value) for name, value in metrics.items()}
        points = [[name, value, now, step] for name, value in legal.items() if step > self._last_steps.get(name, -1)]
        if points:
            self._writer.put("points", {"points": points})

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace | None = None, *_: Any, **__: Any) -> None:
        """Queue parameters, nested ones under dotted names.

        MLflow parameters cannot change. One that the run already holds (``mlflow run`` records its own, a resumed run
        has all of them) is left as it is; where the value differs, the tag ``changed_params`` tells both. A value
        longer than MLflow allows is cut, and says so.
        """
        _ = self.experiment
        given = _convert_params(params if isinstance(params, Namespace) else dict(params or {}))
        flat = {_legal(name): _short(without_secrets(str(value))) for name, value in _flatten(given)}
        self._writer.put("params", {"params": flat})

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Queue tags of the run; a long value is cut and says so, a password in it is left out."""
        _ = self.experiment
        self._writer.put("tags", {"tags": {key: _tag(value) for key, value in tags.items()}})

    # ------------------------------------------------------------------ artifacts

    @rank_zero_only
    def log_figure(self, name: str, figure: "Figure", step: int | None = None) -> None:
        """Queue a matplotlib figure as ``figures/<name>[_<step>].png``; it is drawn here and may be closed after."""
        suffix = "" if step is None else f"_{step:09d}"
        self._log_bytes(_png(figure), f"figures/{name}{suffix}.png")

    @rank_zero_only
    def log_text(self, text: str, artifact_file: str) -> None:
        """Queue a text file, for example the resolved configuration as ``config.yaml``; without the passwords in it."""
        self._log_bytes(without_secrets(text).encode(), artifact_file)

    @rank_zero_only
    def log_dict(self, dictionary: Mapping[str, Any], artifact_file: str) -> None:
        """Queue plain values as a JSON file."""
        self._log_bytes((json.dumps(dictionary, indent=2, default=str) + "\n").encode(), artifact_file)

    @rank_zero_only
    def log_artifact(self, path: str | Path, folder: str | None = None, *, once: bool = False) -> None:
        """Queue the upload of a file into artifact folder ``folder``; it must stay in place until :meth:`flush`.

        One whose name says its content needs to be sent ``once``: not again where the run has it.
        """
        _ = self.experiment
        path = Path(path).absolute()
        values = {"source": self._relative(path), "name": path.name, "folder": folder}
        self._writer.put("upload", values | ({"once": True} if once else {}))

    @rank_zero_only
    def log_model(self, folder: str | Path, model: Mapping[str, Any]) -> None:
        """Queue a packaged model, which must stay in place like an artifact.

        Args:
            folder: what :func:`~pmoe_lightning.tracking.policy_model.save_policy_model` has written.
            model: further arguments of :func:`~pmoe_lightning.tracking.model_upload.upload_model`.
        """
        _ = self.experiment
        self._writer.put("model", {"source": self._relative(Path(folder).absolute()), "model": dict(model)})

    def _relative(self, path: Path) -> str:
        """The path seen from the run's folder where it lies in there, so that the folder may be moved."""
        root = self._writer.spool.folder.absolute().parent
        return str(path.relative_to(root) if path.is_relative_to(root) else path)

    def _log_bytes(self, content: bytes, artifact_file: str) -> None:
        _ = self.experiment
        folder, name = os.path.split(artifact_file)
        self._writer.put("upload", {"name": name, "folder": folder or None}, content)


def _png(figure: "Figure", dpi: float = 120) -> bytes:
    """A picture of everything in the figure, cut to its edges unless the figure arranges itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = BytesIO()
    if figure.get_layout_engine() is None:
        figure.savefig(picture, format="png", dpi=dpi, bbox_inches="tight")
        return picture.getvalue()
    # Arranged while it is drawn. `savefig` would draw it twice, the first time only to arrange it.
    before = figure.canvas, figure.dpi
    try:
        figure.dpi = dpi
        FigureCanvasAgg(figure).print_png(picture)
    finally:
        figure.canvas, figure.dpi = before
    return picture.getvalue()


@contextmanager
def _asking_once() -> Iterator[None]:
    """MLflow's client asks a server once, here and, because the writer does so, later; here it is also impatient.

    Left alone it would ask again for minutes, and a run be made twice where an answer was lost.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    patience = "MLFLOW_HTTP_REQUEST_TIMEOUT"  # uploads need more
    given = os.environ.get(patience)
    os.environ.setdefault(patience, str(_ANSWER_PATIENCE_SECONDS))
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(patience, None)


def _may_pass(error: Exception) -> bool:
    """Whether the store may answer otherwise in a while."""
    if not isinstance(error, MlflowException):
        return isinstance(error, NotConfirmed)
    return error.get_http_status_code() >= 500 or error.get_http_status_code() in (408, 429)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        pairs += _flatten(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return pairs


def _short(text: str, limit: int = _MAX_VALUE_LENGTH) -> str:
    if len(text) <= limit:
        return text
    note = f"... (cut, {len(text)} characters)"
    return text[: limit - len(note)] + note


def _tag(value: Any) -> str:
    return _short(without_secrets(str(value)), MAX_TAG_LENGTH)


def _legal(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_/. -]", "_", name)[:_MAX_NAME_LENGTH]
