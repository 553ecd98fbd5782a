"""A sweep is one MLflow run with a child run per job, and says at its end how the jobs compare.

    python -m pmoe_lightning.train -m seed=1,2,3 estimator=frequency,marginalized

Hydra makes the jobs and runs them one after another in this process. A job that fails leaves the others alone; one that
is stopped (Ctrl-C, SIGTERM) ends the sweep. The parent run holds ``sweep.csv`` and the figure ``sweep``; its status is
``FINISHED`` where every job has finished.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from io import StringIO
from math import isfinite, nan
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra.core.hydra_config import HydraConfig
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from omegaconf import DictConfig, OmegaConf

from pmoe_lightning.configuration import read_value, validate
from pmoe_lightning.configuration.schemas import schemas
from pmoe_lightning.errors import ConfigurationError, RunError, error_line
from pmoe_lightning.evaluation import figures
from pmoe_lightning.evaluation.statistics import student_t_interval
from pmoe_lightning.processes import run_folder
from pmoe_lightning.run.surroundings import quieten
from pmoe_lightning.run.training import closed_as_it_ends, run_training
from pmoe_lightning.tracking import MLflowLogger, describe_sweep, store_line, sweep_name, without_secrets
from pmoe_lightning.tracking.logger import MAX_TAG_LENGTH

_log = logging.getLogger(__name__)
_RETURN = "eval/episode_return"
_MAX_CHILDREN = 1000


@dataclass(frozen=True)
class Child:
    """One line of the table."""

    job: str
    """The words of its command that not every job has."""
    status: str
    env_frames: int
    final_return: float
    """Of the last evaluation; nan where there was none after training began."""
    best_return: float
    run_id: str


def check_sweep(jobs: Sequence[DictConfig]) -> None:
    """Refuse jobs that cannot be children of one MLflow run.

    Raises:
        ConfigurationError: they record into different places.
    """
    for key in ("logger._target_", "logger.tracking_uri", "logger.experiment_name"):
        if len(places := {OmegaConf.select(cfg, key) for cfg in jobs}) > 1:
            raise ConfigurationError(
                f"a sweep is one MLflow run with a child per job, so {key} must be the same for all, "
                f"not {', '.join(sorted(without_secrets(str(place)) for place in places))}"
            )


@contextmanager
def sweep_run(jobs: Sequence[DictConfig], words: Sequence[str] = ()) -> Iterator[None]:
    """Within this context the jobs' runs are children of one run, which is closed and described at the end.

    Args:
        jobs: their configurations.
        words: the command line, which names the run and, by ``hydra.sweep.dir``, the folder of its spool.

    Raises:
        RunError: a job failed, or the tracking server cannot be used.
    """
    quieten()
    logger = _parent_logger(jobs[0], words)
    if logger is not None:
        logger.start(describe_sweep(words, len(jobs)))
    with closed_as_it_ends(logger):
        try:
            with _parent_of_new_runs(logger):
                yield
        except Exception as failure:
            raise RunError("jobs of the sweep have failed: see what they said above") from failure
        finally:
            if logger is not None:
                _summarise(logger)


def run_job(cfg: DictConfig) -> None:
    """Train as one job of a sweep. A failure is reported here, because Hydra keeps it to itself until the end."""
    # What was compiled for the jobs before counts against a limit.
    torch.compiler.reset()
    folder = HydraConfig.get().runtime.output_dir
    try:
        run_folder.hold(folder)
        validate(cfg)
        run_training(cfg)
    except Exception as error:
        is_plain = isinstance(error, ConfigurationError | RunError)
        said = error_line(error) if is_plain else traceback.format_exc()
        job = " ".join(HydraConfig.get().overrides.task)
        print(without_secrets(f"error: job {job}: {said}"), file=sys.stderr)
        raise
    finally:
        run_folder.release(folder)


def read_children(client: MlflowClient, parent_id: str) -> list[Child]:
    """The children of a run, in the order in which they were started."""
    experiment = client.get_run(parent_id).info.experiment_id
    condition = f"tags.`mlflow.parentRunId` = '{parent_id}'"
    runs = client.search_runs([experiment], condition, max_results=_MAX_CHILDREN, order_by=["start_time ASC"])
    commands = [_command(client, run) for run in runs]
    shared = set.intersection(*map(set, commands)) if len(commands) > 1 else set()
    children = []
    for run, command in zip(runs, commands, strict=True):
        history = client.get_metric_history(run.info.run_id, _RETURN)
        trained = sorted((point.step, point.value) for point in history if point.step > 0) or [(0, nan)]
        frames, final = trained[-1]
        best = max(value for _, value in trained)
        job = shlex.join(word for word in command if word not in shared)
        children.append(Child(job, run.info.status, frames, final, best, run.info.run_id))
    return children


def _command(client: MlflowClient, run: Run) -> list[str]:
    """The words that the run was started with; a long tag is cut, so that they are taken from its file then."""
    tag = run.data.tags.get("overrides", "")
    if len(tag) < MAX_TAG_LENGTH:
        return shlex.split(tag)
    with TemporaryDirectory() as folder:
        path = Path(client.download_artifacts(run.info.run_id, "overrides.json", folder))
        return [str(word) for word in json.loads(path.read_text())["overrides"]]


def as_csv(children: Sequence[Child]) -> str:
    """A line per child below the names of its fields."""
    text = StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Child)], lineterminator="\n")
    table.writeheader()
    table.writerows(map(asdict, children))
    return text.getvalue()


def by_configuration(children: Sequence[Child]) -> dict[str, list[tuple[float, float]]]:
    """(final, best) returns of the children that differ in their seeds alone, under what they have in common."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for child in children:
        words = [word for word in shlex.split(child.job) if not word.startswith("seed=")]
        groups.setdefault(" ".join(words) or "all seeds", []).append((child.final_return, child.best_return))
    return groups


def _parent_logger(cfg: DictConfig, words: Sequence[str]) -> MLflowLogger | None:
    """The logger of the parent run, which it opens, or adopts where ``mlflow run`` has opened one."""
    if OmegaConf.get_type(cfg.logger) is not schemas()["logger"]["mlflow"]:
        return None
    where = {key: cfg.logger[key] for key in ("experiment_name", "tracking_uri", "flush_seconds")}
    folder = read_value(words, "hydra.sweep.dir")
    spool = None if folder is None else Path(folder).absolute() / "mlflow-spool"
    return MLflowLogger(run_name=sweep_name(words), spool=spool, **where)


@contextmanager
def _parent_of_new_runs(logger: MLflowLogger | None) -> Iterator[None]:
    """Loggers made for jobs open their runs below the one that this variable names."""
    if logger is None:
        yield
        return
    opened = os.environ.get("MLFLOW_RUN_ID")
    os.environ["MLFLOW_RUN_ID"] = _run_id(logger)
    try:
        yield
    finally:
        if opened is None:
            del os.environ["MLFLOW_RUN_ID"]


def _run_id(logger: MLflowLogger) -> str:
    run_id = logger.run_id
    assert run_id is not None  # of the only process of a sweep
    return run_id


def _summarise(logger: MLflowLogger) -> None:
    """Log the table and the figure, and print the table."""
    try:
        children = read_children(logger.experiment, _run_id(logger))
    except (MlflowException, OSError, RunError) as error:
        _log.warning("the jobs of the sweep cannot be compared: %s", store_line(error))
        return
    logger.log_text(as_csv(children), "sweep.csv")
    if any(isfinite(child.final_return) for child in children):
        groups = by_configuration(children)
        finals = {name: [final for final, _ in runs if isfinite(final)] for name, runs in groups.items()}
        intervals = {name: student_t_interval(returns) for name, returns in finals.items()}
        logger.log_figure("sweep", figures.sweep_returns(groups, intervals))
    print(
        f"\nsweep      {len(children)} runs below MLflow run {logger.run_id} in {without_secrets(logger.tracking_uri)}"
    )
    for child in children:
        print(f"  {child.status:<8}  final {child.final_return:>10.1f}  best {child.best_return:>10.1f}  {child.job}")
