"""What a run needs of its machine: refused before anything is made, in one line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf
from torchrl.envs import EnvBase

from pmoe_lightning.errors import ConfigurationError, first_line
from pmoe_lightning.modules import onednn
from pmoe_lightning.modules.networks import MatmulPrecision, over_float32
from pmoe_lightning.run.nodes import accelerator_of, bound, call
from pmoe_lightning.run.warm_start import find
from pmoe_lightning.tracking.server import check_server

_log = logging.getLogger(__name__)
#: From this ratio of times on a product is called no faster than in float32. Between it and 1 is the noise of the
#: measurement and, for oneDNN, what the copies of transposed factors cost, which the measured product does without.
_NO_FASTER = {"bf16-hidden": 1.1, "float32-onednn": 0.9}


@dataclass(frozen=True)
class Spaces:
    """What the networks must know of the environment."""

    observation_dim: int
    action_low: list[float]
    action_high: list[float]


@dataclass(frozen=True)
class Seen:
    """What an environment shows in place of its state: the shape of ``pixels``, [S C, H, W], and S."""

    shape: tuple[int, ...]
    stack: int


@dataclass(frozen=True)
class World:
    """What a run must know of its environment; ``seen`` is None where the state is observed."""

    spaces: Spaces
    seen: Seen | None
    action_repeat: int


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
    seen = {}
    for key, env in {OmegaConf.to_yaml(cfg.env, resolve=True): cfg.env for cfg in jobs}.items():
        seen[key] = inspect_env(bound(env)).seen
    for cfg in jobs:
        _check_pixels(cfg, seen[OmegaConf.to_yaml(cfg.env, resolve=True)])


def _check_pixels(cfg: DictConfig, seen: Seen | None) -> None:
    """Refuse pixels without an encoder, an encoder without pixels, and a buffer that the memory will not hold."""
    if seen is None:
        if cfg.encoder:
            raise ConfigurationError("encoder=... encodes pixels, and this environment shows none: use encoder=none")
        return
    if not cfg.encoder:
        raise ConfigurationError("this environment shows pixels: use encoder=drq")
    try:
        with isolate_rng(include_cuda=False):
            call(cfg.encoder, shape=seen.shape)
    except ValueError as error:
        raise ConfigurationError(f"encoder: {first_line(error)}") from error
    if "buffer_size" in cfg.data:
        from pmoe_lightning.data.frames import check_memory, pictures_of

        device = torch.device(accelerator_of(cfg.trainer.accelerator).replace("gpu", "cuda"))
        check_memory(pictures_of(cfg.data.buffer_size, cfg.total_frames), seen.shape, seen.stack, device)


def check_matmul_precision(precision: MatmulPrecision, accelerator: str) -> None:
    """Refuse a precision that would have no effect, warn of one that brings nothing here.

    Raises:
        ConfigurationError: tf32 without a GPU, oneDNN with one, or with a PyTorch that has none.
    """
    on_cpu = accelerator == "cpu"
    if precision == "tf32" and on_cpu:
        raise ConfigurationError("matmul_precision=tf32 is a number format of GPUs: use float32 on a CPU")
    if precision == "float32-onednn" and not on_cpu:
        raise ConfigurationError("matmul_precision=float32-onednn is of a library for CPUs: use float32 on a GPU")
    if precision == "float32-onednn" and not onednn.is_available():
        raise ConfigurationError("matmul_precision=float32-onednn: this PyTorch is built without oneDNN, use float32")
    if precision in _NO_FASTER and on_cpu and (ratio := over_float32(precision)) > _NO_FASTER[precision]:
        _log.warning("matmul_precision=%s: a product takes %.1f times as long as in float32 here", precision, ratio)


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


def inspect_env(make_env: Callable[..., EnvBase]) -> World:
    """Make one environment, read its sizes and bounds, reset and step it, and close it; no random number is used up.

    The size of an observation is 0 where pixels are seen.

    Raises:
        ConfigurationError: it cannot be made, is not supported, or fails in its first reset or step.
        RunError: its first observation is not finite.
    """
    with isolate_rng(include_cuda=False):
        env = make_env(num_envs=1, seed=0)
        try:
            env.rollout(1)
            low, high = (bound.flatten().tolist() for bound in (env.action_spec.space.low, env.action_spec.space.high))
            repeat, pixels = getattr(env, "action_repeat", 1), env.observation_spec.get("pixels", None)
            if pixels is not None:
                seen = Seen(tuple(pixels.shape[1:]), getattr(env, "stack", 1))
                return World(Spaces(0, low, high), seen, repeat)
            return World(Spaces(env.observation_spec["observation"].shape[-1], low, high), None, repeat)
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
