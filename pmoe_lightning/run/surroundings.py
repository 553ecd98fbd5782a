"""What a run needs of its machine: refused before anything is made, in one line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf
from torchrl.envs import EnvBase

from pmoe_lightning.errors import ConfigurationError, first_line
from pmoe_lightning.modules.networks import bfloat16_over_float32
from pmoe_lightning.run.nodes import accelerator_of, bound, call
from pmoe_lightning.run.warm_start import find
from pmoe_lightning.tracking.server import check_server

_log = logging.getLogger(__name__)
#: From this ratio of times on bfloat16 is called slower than float32; below it is the noise of the measurement.
_SLOWER = 1.1


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
        RunError: the tracking server does not answer, or there is no checkpoint to begin with.
    """
    quieten()
    for cfg in jobs:
        check_matmul_precision(cfg.matmul_precision, accelerator_of(cfg.trainer.accelerator))
    for trainer in {OmegaConf.to_yaml(cfg.trainer, resolve=True): cfg.trainer for cfg in jobs}.values():
        check_devices(trainer)
    for uri in {cfg.logger.get("tracking_uri") for cfg in jobs if cfg.logger}:
        check_server(uri)
    for reference in {cfg.init_from for cfg in jobs if cfg.init_from is not None and cfg.resume is None}:
        find(reference)
    for env in {OmegaConf.to_yaml(cfg.env, resolve=True): cfg.env for cfg in jobs}.values():
        inspect_env(bound(env))


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
        call(trainer, accelerator=accelerator_of(trainer.accelerator), logger=False, enable_checkpointing=False)
    except (MisconfigurationException, ValueError) as error:
        asked = f"trainer.accelerator={trainer.accelerator} trainer.devices={trainer.devices}"
        raise ConfigurationError(f"{asked}: {first_line(error)}") from error


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
