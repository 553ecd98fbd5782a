"""One training run: assemble its parts from a validated configuration, fit, close the MLflow run, say where things are.

This is the one place where configuration meets code: everything below receives objects and numbers.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import mlflow
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf
from torchrl.envs import EnvBase

from pmoe_lightning.checkpoints.files import remove_leftovers
from pmoe_lightning.checkpoints.io import AtomicCheckpointIO
from pmoe_lightning.checkpoints.policy import ACTORS
from pmoe_lightning.envs import make_env
from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.networks import bfloat16_over_float32, set_matmul_precision
from pmoe_lightning.normalization import ObservationNormalizer, RewardScaler
from pmoe_lightning.peers import PeerWatch
from pmoe_lightning.resume import command, describe, take_checkpoint
from pmoe_lightning.safety import CostConstraint
from pmoe_lightning.stopping import Preempted, StopAfterIteration, ignore_further_stops, requeue
from pmoe_lightning.tracking import check_server, describe_run, run_name, run_status, runs_page, without_secrets

_log = logging.getLogger(__name__)
#: Below this many updates in a process, a run is over before compiling has repaid the time it takes.
UPDATES_TO_REPAY_COMPILING = 10_000
#: From this ratio of times on bfloat16 is called slower than float32; below it is the noise of the measurement.
_SLOWER = 1.1
_TOP_LEVEL_PARAMETERS = ("seed", "total_frames", "num_threads", "compile", "matmul_precision")
#: What names a part's class or what only other parts read, as opposed to its arguments.
_NOT_ARGUMENTS = ("_target_", "_partial_", "suggests", "normalize_observation", "normalize_reward")


@dataclass(frozen=True)
class Spaces:
    """What the networks must know of the environment."""

    observation_dim: int
    action_low: list[float]
    action_high: list[float]


def check_surroundings(jobs: Sequence[DictConfig]) -> None:
    """Refuse an environment that cannot be made, devices that are not there or a tracking store that does not answer.

    Raises:
        ConfigurationError: unknown environment, or one without continuous actions; a precision without its hardware;
            devices that this machine does not have.
        RunError: the tracking server does not answer.
    """
    quieten()
    for cfg in jobs:
        check_matmul_precision(cfg.matmul_precision, _accelerator(cfg.trainer.accelerator))
    for trainer in {OmegaConf.to_yaml(cfg.trainer, resolve=True): cfg.trainer for cfg in jobs}.values():
        check_devices(trainer)
    for uri in {cfg.logger.get("tracking_uri") for cfg in jobs if cfg.logger}:
        check_server(uri)
    for env in {OmegaConf.to_yaml(cfg.env, resolve=True): cfg.env for cfg in jobs}.values():
        inspect_env(_partial(env))


def run_training(cfg: DictConfig) -> None:
    """Train as configured, inside a Hydra job."""
    _prepare_process(cfg)
    output_dir = Path(HydraConfig.get().runtime.output_dir)
    _hide_secrets(output_dir / (HydraConfig.get().output_subdir or ".hydra"))
    remove_leftovers(output_dir / "checkpoints")
    already_read = {Path(cfg.resume): take_checkpoint(cfg.resume)} if cfg.resume else {}
    resumed = already_read[Path(cfg.resume)]["run"] if cfg.resume else {}
    logger = _make_logger(cfg, resumed.get("mlflow", {}))
    with closed_as_it_ends(logger), stopped_once(), exit_on_signals():
        trainer = make_trainer(cfg, logger, output_dir, already_read)
        if resumed and resumed["processes"] != trainer.world_size:
            raise ConfigurationError(
                f"resume={cfg.resume} holds the experience of {resumed['processes']} training processes, and this "
                f"run has {trainer.world_size}: set trainer.devices, times trainer.num_nodes, to as many"
            )
        algorithm, data = make_run(cfg, trainer.global_rank, trainer.world_size)
        if logger is not None:
            words = [without_secrets(word) for word in HydraConfig.get().overrides.task]
            logger.start(describe_run(_run_name(cfg), words, cfg.total_frames, output_dir))
            logger.set_tags({"output_dir": output_dir, "overrides": shlex.join(words)})
            logger.log_dict({"overrides": words}, "overrides.json")
            logger.log_hyperparams(_parameters(cfg))
            logger.log_text(OmegaConf.to_yaml(cfg, resolve=True), "config.yaml")
        try:
            fit(trainer, algorithm, data, cfg.resume)
        finally:
            if trainer.is_global_zero:
                print(describe_results(trainer, output_dir), flush=True)


def make_trainer(
    cfg: DictConfig, logger: Any, output_dir: Path, already_read: dict[Path, dict[str, Any]] | None = None
) -> Trainer:
    """Lightning's Trainer with the configured callbacks; ``already_read`` as for ``AtomicCheckpointIO``."""
    callbacks: list[Callback] = [_call(node) for node in cfg.callbacks.values()]
    return _call(
        cfg.trainer,
        accelerator=_accelerator(cfg.trainer.accelerator),
        max_epochs=-1,  # the data end the run, at total_frames
        callbacks=[AtLeastOneUpdate(), *callbacks, RunRecord(describe(cfg)), StopAfterIteration()],
        logger=logger or False,
        plugins=[AtomicCheckpointIO(already_read)],
        default_root_dir=output_dir,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def make_run(cfg: DictConfig, rank: int = 0, world_size: int = 1) -> tuple[LightningModule, LightningDataModule]:
    """The algorithm and its data, with networks that are the same in every process and experience that is not."""
    seed_everything(cfg.seed, verbose=False)
    make_env = _partial(cfg.env)
    spaces = inspect_env(make_env)
    on_policy = "normalize_observation" in cfg.data
    normalizer = None
    if on_policy and cfg.data.normalize_observation:
        normalizer = ObservationNormalizer(spaces.observation_dim)
    arguments = _arguments(cfg.actor)
    if on_policy:
        arguments["return_log_prob"] = True
    if normalizer is not None:
        arguments["observation_key"] = normalizer.out_keys[0]
    actor = _call(cfg.actor, **vars(spaces), **arguments)
    compile = resolve_compile(cfg.compile, planned_updates(cfg))
    shared = {"normalizer": normalizer} if on_policy else {}
    options = {}
    if cfg.action_transform:
        sizes = {"observation_dim": spaces.observation_dim, "action_dim": len(spaces.action_low)}
        with torch.random.fork_rng():  # so that the critics start the same with every transform
            options["action_transform"] = _call(cfg.action_transform, **sizes)
    if cfg.safe:
        options["safety"] = _call(cfg.safe)
    algorithm = _call(
        cfg.algo,
        actor=actor,
        estimator=_call(cfg.estimator),
        observation_dim=spaces.observation_dim,
        action_dim=len(spaces.action_low),
        compile=compile,
        policy_description=_describe_policy(cfg, spaces, arguments, normalizer is not None),
        **shared,
        **options,
    )
    algorithm.parts = own_parts(cfg)
    environments = cfg.data.num_envs * max(cfg.data.num_workers, 1)
    if on_policy:
        scaled = cfg.data.normalize_reward
        shared["reward_scaler"] = RewardScaler(environments, gamma=cfg.algo.gamma) if scaled else None
    data = _call(
        cfg.data,
        make_env=make_env,
        policy=algorithm.policy,
        total_frames=cfg.total_frames,
        seed=cfg.seed + rank * environments,
        compile=compile,
        **shared,
    )
    algorithm.check_processes(world_size)
    data.check_processes(world_size)
    seed_everything(cfg.seed + rank, verbose=False)
    return algorithm, data


def own_parts(cfg: DictConfig) -> dict[str, Callable[..., Any]]:
    """The factories of the policy and of the environment that are not this package's, under ``group/option``."""
    known = {"actor": ACTORS.values(), "action_transform": [make_hamiltonian_transform], "safe": [CostConstraint]}
    known["env"] = [make_env]
    chosen = {group: get_object(cfg[group]._target_) for group in known if cfg[group]}
    names = HydraConfig.get().runtime.choices
    return {f"{group}/{names[group]}": part for group, part in chosen.items() if part not in known[group]}


def planned_updates(cfg: DictConfig) -> float:
    """Optimizer steps in the whole run; every process takes part in each."""
    if "utd_ratio" in cfg.data:
        return (cfg.total_frames - cfg.data.init_random_frames) * cfg.data.utd_ratio
    if {"num_epochs", "minibatch_size"} <= cfg.algo.keys():
        return cfg.total_frames * cfg.algo.num_epochs / cfg.algo.minibatch_size
    return 0.0  # an algorithm of the user's own, which does not say


def resolve_compile(setting: bool | str, updates: float) -> bool:
    """Whether to compile the run: as told, or by ``auto`` where a process makes enough updates to repay it."""
    return updates >= UPDATES_TO_REPAY_COMPILING if setting == "auto" else bool(setting)


def check_matmul_precision(precision: str, accelerator: str) -> None:
    """Refuse a precision that would have no effect, warn of one that would only cost time.

    Raises:
        ConfigurationError: tf32 without a GPU.
    """
    on_cpu = accelerator == "cpu"
    if precision == "tf32" and on_cpu:
        raise ConfigurationError("matmul_precision=tf32 is a number format of GPUs: use float32 on a CPU")
    if precision == "bf16-hidden" and on_cpu and (ratio := bfloat16_over_float32()) > _SLOWER:
        _log.warning("matmul_precision=bf16-hidden: a product takes %.1f times as long as in float32 here", ratio)


def check_devices(trainer: DictConfig) -> None:
    """Refuse devices that this machine does not have.

    Raises:
        ConfigurationError: in the words of Lightning, which looks for them.
    """
    try:
        _call(trainer, accelerator=_accelerator(trainer.accelerator), logger=False, enable_checkpointing=False)
    except (MisconfigurationException, ValueError) as error:
        asked = f"trainer.accelerator={trainer.accelerator} trainer.devices={trainer.devices}"
        raise ConfigurationError(f"{asked}: {str(error).splitlines()[0]}") from error


def inspect_env(make_env: Callable[..., EnvBase]) -> Spaces:
    """Make one environment, read its sizes and bounds, reset and step it, and close it; no random number is used up.

    Raises:
        ConfigurationError: it cannot be made, is not supported, or fails in its first reset or step.
        RunError: its first observation is not finite.
    """
    with isolate_rng(include_cuda=False):
        env = make_env(num_envs=1, seed=0)
        try:
            env.rollout(1)
            low, high = (bound.flatten().tolist() for bound in (env.action_spec.space.low, env.action_spec.space.high))
            return Spaces(env.observation_spec["observation"].shape[-1], low, high)
        finally:
            env.close()


def fit(trainer: Trainer, algorithm: LightningModule, data: LightningDataModule, resume: str | None = None) -> None:
    """``trainer.fit``, with the shell's exit codes for a run that was stopped.

    Raises:
        RunError: there was nothing to do an update with.
    """
    for part in (*trainer.callbacks, data):
        _report_failures_of(part, "on_exception")
    for logger in trainer.loggers:
        _report_failures_of(logger, "finalize")
    try:
        with PeerWatch(trainer):
            trainer.fit(algorithm, datamodule=data, ckpt_path=resume)
    except (SIGTERMException, SystemExit) as stop:
        ignore_further_stops()  # Lightning has put back the handlers from before the iterations
        if isinstance(stop, SIGTERMException):
            raise SystemExit(128 + signal.SIGTERM) from None
        if isinstance(stop, Preempted) and trainer.is_global_zero:
            requeue()
        # Lightning turns Ctrl-C into exit code 1.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise SystemExit(128 + signal.SIGINT) from None
        raise


def _report_failures_of(part: Any, hook: str) -> None:
    """Make an error in what a part does at the end of a run a line: raised, it would hide the error that ended it.

    It would also keep the parts behind from closing what they hold.
    """
    method = getattr(part, hook)

    @wraps(method)
    def report_failure(*arguments: Any, **keywords: Any) -> None:
        try:
            method(*arguments, **keywords)
        except Exception as error:
            reason = " ".join(str(error).split())
            _log.warning("%s.%s failed: %s: %s", type(part).__name__, hook, type(error).__name__, reason)

    setattr(part, hook, report_failure)


class AtLeastOneUpdate(Callback):
    """Ends a run that has trained nothing with an error, whatever the reason, because it looks like one that has."""

    def __init__(self) -> None:
        self._updates = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._updates = pl_module.updates

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.updates == self._updates:
            raise RunError(
                f"nothing was trained: no update was due by frame {trainer.datamodule.env_frames:,}; raise total_frames"
            )


class RunRecord(Callback):
    """Writes into every checkpoint which run it is of: the configuration and the MLflow run."""

    def __init__(self, configuration: dict[str, Any]) -> None:
        self.configuration = configuration

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = {"configuration": self.configuration, "processes": trainer.world_size}
        for logger in trainer.loggers:
            where = without_secrets(logger.tracking_uri)
            checkpoint["run"]["mlflow"] = {"run_id": logger.run_id, "tracking_uri": where}


def describe_results(trainer: Trainer, output_dir: Path) -> str:
    """Where the results are and how to look at them."""
    lines = ["", f"results    {output_dir}"]
    best = last = None
    for saver in (saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)):
        # What was saved because of an error does not become a best_model_path.
        path = saver.best_model_path if saver.monitor else saver.format_checkpoint_name({})
        if Path(path).is_file():
            if saver.monitor:
                best = path
                lines.append(f"best       {best}  ({saver.monitor} {float(saver.best_model_score):.1f})")
            else:
                last = path
                lines.append(f"last       {last}")
    for logger in trainer.loggers:
        lines += _describe_run_pages(logger)
    flags = ["--config-dir", folder] if (folder := _config_dir()) else []
    if last:
        words = list(map(without_secrets, HydraConfig.get().overrides.task))
        lines.append(f"resume     {command(words, output_dir, flags)}")
    if best or last:
        words = [Path(sys.executable).name, "-m", "pmoe_lightning.evaluate", *flags, f"checkpoint={best or last}"]
        lines.append(f"evaluate   {shlex.join(words)}")
    return "\n".join(lines)


def _describe_run_pages(logger: Any) -> list[str]:
    where = without_secrets(logger.tracking_uri)
    lines = [f"MLflow     run {logger.run_id} in {where}"]
    if where.startswith("http"):
        return [*lines, f"curves     {runs_page(where, logger.experiment_id)}"]
    lines.append(f"curves     mlflow ui --backend-store-uri {shlex.quote(where)}")
    return [*lines, f"           then {runs_page('http://127.0.0.1:5000', logger.experiment_id)}"]


def _config_dir() -> str | None:
    """The folder of ``--config-dir``, if one was given."""
    sources = HydraConfig.get().runtime.config_sources
    return next((source.path for source in sources if source.provider == "command-line"), None)


def _prepare_process(cfg: DictConfig) -> None:
    # Denormal numbers, which relu networks and Adam produce, are many times slower than others on a CPU.
    torch.set_flush_denormal(True)
    torch.set_num_threads(cfg.num_threads)
    set_matmul_precision(cfg.matmul_precision)
    quieten()


def quieten() -> None:
    """Silence what libraries say to their own developers."""
    for chatty in ("lightning.pytorch", "pytorch_lightning", "torchrl", "alembic", "mlflow", "OpenGL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for meant_for_others in (
        "The number of training batches",  # Lightning's own logging interval, which is not used
        "You have overridden `transfer_batch_to_device`",
        "`isinstance.treespec, LeafSpec.` is deprecated",  # inside Lightning, as is the next
        "torch.distributed.nn.functional.all_gather is deprecated",
        "It is recommended to use `self.log",  # the evaluation is broadcast
        "Checkpoint directory",  # a resumed run goes on in its own folder
        "You're resuming from a checkpoint that ended before the epoch ended",  # the data themselves go on exactly
    ):
        warnings.filterwarnings("ignore", message=meant_for_others)


def _make_logger(cfg: DictConfig, resumed: Mapping[str, str]) -> Any:
    """The logger; it continues a resumed MLflow run, unless ``mlflow run`` has opened one or it is in another store."""
    if not cfg.logger:
        return None
    here, there = cfg.logger.tracking_uri or mlflow.get_tracking_uri(), resumed.get("tracking_uri")
    is_same = there is not None and without_secrets(there) == without_secrets(here)
    run_id = resumed["run_id"] if is_same and "MLFLOW_RUN_ID" not in os.environ else None
    name = {"run_name": _run_name(cfg)} if cfg.logger.get("run_name", "") is None else {}
    return _call(cfg.logger, run_id=run_id, nested=HydraConfig.get().mode is RunMode.MULTIRUN, **name)


def _hide_secrets(folder: Path) -> None:
    """Take the passwords of addresses out of the files in which Hydra keeps the configuration."""
    for path in folder.glob("*.yaml"):
        text = path.read_text()
        if without_secrets(text) != text:
            path.write_text(without_secrets(text))


def _run_name(cfg: DictConfig) -> str:
    hydra = HydraConfig.get()
    return run_name({**hydra.runtime.choices, "env": cfg.env.id}, list(hydra.overrides.task), cfg.seed)


def _partial(node: DictConfig) -> Callable[..., Any]:
    """The node's target with the node's values bound."""
    return instantiate({"_target_": node._target_, **_arguments(node)}, _partial_=True)


def _call(node: DictConfig, **objects: Any) -> Any:
    """Call the node's target with its values and with objects, which never pass through the configuration."""
    return _partial(node)(**objects)


def _arguments(node: DictConfig) -> dict[str, Any]:
    """The node's values as plain Python objects, without those that are not arguments of its target."""
    values = OmegaConf.to_container(node, resolve=True)
    return {key: value for key, value in values.items() if key not in _NOT_ARGUMENTS}


def _describe_policy(cfg: DictConfig, spaces: Spaces, arguments: dict[str, Any], normalized: bool) -> dict[str, Any]:
    """What a checkpoint says about its policy, in plain values; see ``load_policy``."""
    own = dict(key.split("/", 1) for key in own_parts(cfg))
    known = {factory: name for name, factory in ACTORS.items()}
    return {
        "format": 1,
        "actor": own.get("actor") or known[get_object(cfg.actor._target_)],
        "arguments": arguments,
        **vars(spaces),
        "normalize_observation": normalized,
        "action_transform": _arguments(cfg.action_transform) if cfg.action_transform else None,
        "safe": _arguments(cfg.safe) if cfg.safe else None,
        "critic": {key: value for key, value in _arguments(cfg.algo).items() if key in ("hidden_sizes", "activation")},
        "own_parts": {group: name for group, name in own.items() if group != "actor"},
        "env": {"id": cfg.env.id, "kwargs": {key: value for key, value in _arguments(cfg.env).items() if key != "id"}},
    }


def _parameters(cfg: DictConfig) -> dict[str, Any]:
    """What tells runs apart: the options chosen and the numbers of the learning itself, under dotted names."""
    chosen = HydraConfig.get().runtime.choices
    parameters = {group: chosen[group] for group in ("algo", "actor", "estimator", "action_transform", "safe")}
    for group in ("algo", "actor", "estimator", "action_transform", "safe", "env", "data", "trainer"):
        if cfg[group]:
            parameters |= {f"{group}.{key}": value for key, value in _arguments(cfg[group]).items()}
    for key in ("data.normalize_observation", "data.normalize_reward"):
        if (value := OmegaConf.select(cfg, key)) is not None:
            parameters[key] = value
    return parameters | {key: cfg[key] for key in _TOP_LEVEL_PARAMETERS}


def _accelerator(name: str) -> str:
    # Lightning's own "auto" would choose the GPU of a Mac, which lacks float64.
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


@contextmanager
def closed_as_it_ends(logger: Any) -> Iterator[None]:
    """The logger's run is ``FINISHED``, ``KILLED`` or ``FAILED`` as this context ends; nothing happens without one."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
        raise
    finally:
        if logger is not None:
            if error is not None:
                _report_failures_of(logger, "finish")
            logger.finish(run_status(error))


@contextmanager
def stopped_once() -> Iterator[None]:
    """What follows a stop is not cut short by another one: `mlflow run` answers Ctrl-C with a SIGTERM on top."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        ignore_further_stops()
        raise


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Before and after the iterations, where ``StopAfterIteration`` takes over: end at once, through the normal exits.

    So that the run is closed, at whatever stage Ctrl-C or SIGTERM comes.
    """

    def stop(number: int, frame: Any) -> None:
        ignore_further_stops()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)
