"""One training run, from its start to the last line it prints."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlflow
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pmoe_lightning.checkpoints.blocks import FOLDER
from pmoe_lightning.errors import ConfigurationError, RunError, first_line
from pmoe_lightning.modules.networks import set_matmul_precision
from pmoe_lightning.processes import run_folder
from pmoe_lightning.processes.interprocess import named_after
from pmoe_lightning.processes.partial_files import remove_leftovers
from pmoe_lightning.processes.stopping import stop
from pmoe_lightning.run.assemble import make_run, make_trainer
from pmoe_lightning.run.fit import fit, report_failures_of
from pmoe_lightning.run.nodes import arguments_of, call
from pmoe_lightning.run.report import describe_results
from pmoe_lightning.run.resume import take_checkpoint
from pmoe_lightning.run.surroundings import quieten
from pmoe_lightning.run.warm_start import describe as describe_warm_start
from pmoe_lightning.tracking.address import without_secrets
from pmoe_lightning.tracking.logger import run_status
from pmoe_lightning.tracking.naming import describe_run, run_name

_log = logging.getLogger(__name__)
_TOP_LEVEL_PARAMETERS = ("seed", "total_frames", "num_threads", "compile", "matmul_precision")


def run_training(cfg: DictConfig) -> None:
    """Train as configured, inside a Hydra job."""
    stop.raise_if_asked()
    _prepare_process(cfg)
    output_dir = Path(HydraConfig.get().runtime.output_dir)
    _hide_secrets(output_dir / (HydraConfig.get().output_subdir or ".hydra"))
    if run_folder.is_first_process():
        remove_leftovers(output_dir)
        remove_leftovers(output_dir / "checkpoints")
        remove_leftovers(output_dir / "checkpoints" / FOLDER)
    already_read = {Path(cfg.resume): take_checkpoint(cfg.resume)} if cfg.resume else {}
    resumed = already_read[Path(cfg.resume)]["run"] if cfg.resume else {}
    with stop.interruptible():
        logger = _make_logger(cfg, resumed.get("mlflow", {}))
    with recorded(output_dir), named_after(output_dir), closed_as_it_ends(logger), out_of_memory_in_one_line():
        with stop.interruptible():
            trainer = make_trainer(cfg, logger, output_dir, already_read)
            if resumed and resumed["processes"] != trainer.world_size:
                raise ConfigurationError(
                    f"resume={cfg.resume} holds the experience of {resumed['processes']} training processes, and this "
                    f"run has {trainer.world_size}: set trainer.devices, times trainer.num_nodes, to as many"
                )
            folder = output_dir / "checkpoints"
            algorithm, data = make_run(cfg, trainer.global_rank, trainer.world_size, folder)
        began: Any = algorithm.init_from
        if logger is not None:
            words = [without_secrets(word) for word in HydraConfig.get().overrides.task]
            logger.start(describe_run(_run_name(cfg), words, cfg.total_frames, output_dir))
            logger.set_tags({"overrides": shlex.join(words)})
            logger.log_dict({"overrides": words}, "overrides.json")
            logger.log_hyperparams(_parameters(cfg))
            logger.log_text(OmegaConf.to_yaml(cfg, resolve=True), "config.yaml")
            if began:
                logger.set_tags({"init_from": without_secrets(describe_warm_start(began))})
        if began and trainer.is_global_zero:
            print(f"init_from  {describe_warm_start(began)}", flush=True)
        try:
            stop.raise_if_asked()
            fit(trainer, algorithm, data, cfg.resume)
        finally:
            if trainer.is_global_zero:
                print(describe_results(trainer, output_dir), flush=True)


@contextmanager
def out_of_memory_in_one_line() -> Iterator[None]:
    """What asks for more memory than there is, on the processor or on a GPU, can be asked for less.

    Raises:
        RunError: there was not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if isinstance(error, RunError) or not is_memory:
            raise
        raise RunError(f"out of memory: {first_line(error)}; ask for smaller networks, buffers or batches") from error


def _prepare_process(cfg: DictConfig) -> None:
    # Denormal numbers, which relu networks and Adam produce, are many times slower than others on a CPU.
    torch.set_flush_denormal(True)
    torch.set_num_threads(cfg.num_threads)
    set_matmul_precision(cfg.matmul_precision)
    quieten()


def _make_logger(cfg: DictConfig, resumed: Mapping[str, str]) -> Any:
    """The logger; it continues a resumed MLflow run, unless ``mlflow run`` has opened one or it is in another store."""
    if not cfg.logger:
        return None
    here, there = cfg.logger.tracking_uri or mlflow.get_tracking_uri(), resumed.get("tracking_uri")
    is_same = there is not None and without_secrets(there) == without_secrets(here)
    run_id = resumed["run_id"] if is_same and "MLFLOW_RUN_ID" not in os.environ else None
    name = {"run_name": _run_name(cfg)} if cfg.logger.get("run_name", "") is None else {}
    # A tag of its opening, because `resume=<run id>` finds the folder by it, however early the run was killed.
    tags = {"output_dir": HydraConfig.get().runtime.output_dir}
    return call(cfg.logger, run_id=run_id, nested=HydraConfig.get().mode is RunMode.MULTIRUN, tags=tags, **name)


def _hide_secrets(folder: Path) -> None:
    """Take the passwords of addresses out of the files in which Hydra keeps the configuration."""
    for path in folder.glob("*.yaml"):
        text = path.read_text()
        if without_secrets(text) != text:
            path.write_text(without_secrets(text))


def _run_name(cfg: DictConfig) -> str:
    hydra = HydraConfig.get()
    return run_name({**hydra.runtime.choices, "env": cfg.env.id}, list(hydra.overrides.task), cfg.seed)


def _parameters(cfg: DictConfig) -> dict[str, Any]:
    """What tells runs apart: the options chosen and the numbers of the learning itself, under dotted names."""
    chosen = HydraConfig.get().runtime.choices
    of_method = ("algo", "actor", "estimator", "critic", "encoder", "action_transform", "safe")
    parameters = {group: chosen[group] for group in of_method}
    for group in (*of_method, "env", "data", "trainer"):
        if cfg[group]:
            parameters |= {f"{group}.{key}": value for key, value in arguments_of(cfg[group]).items()}
    for key in ("data.normalize_observation", "data.normalize_reward"):
        if (value := OmegaConf.select(cfg, key)) is not None:
            parameters[key] = value
    return parameters | {key: cfg[key] for key in _TOP_LEVEL_PARAMETERS}


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """The folder says that its run is under way, and as this context ends how it ended: a kill is not recorded.

    Raises:
        RunError: the folder cannot be written.
    """
    if not run_folder.is_first_process():
        yield
        return
    run_folder.write_record(folder, "RUNNING")
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
        raise
    finally:
        try:
            run_folder.write_record(folder, run_status(error))
        except RunError as failure:
            if error is None:  # else it has said so, and to resume it is one that was broken off anyway
                _log.warning("%s: resume takes the run for one that was killed", failure)


@contextmanager
def closed_as_it_ends(logger: Any) -> Iterator[None]:
    """The logger's run is ``FINISHED``, ``KILLED`` or ``FAILED`` as this context ends; nothing happens without one.

    At its end is the last look for a signal: one that comes later finds the run as it is.
    """
    error: BaseException | None = None
    closing = nullcontext() if logger is None else stop.closing(lambda: logger.finish("KILLED"))
    try:
        with closing:
            yield
            stop.raise_if_asked()
    except BaseException as caught:
        error = caught
        raise
    finally:
        if logger is not None:
            if error is not None:
                report_failures_of(logger, "finish")
            logger.finish(run_status(error))
