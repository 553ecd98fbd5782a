"""The parts of a run, put together from a validated configuration.

This is the one place where configuration meets code: everything below receives objects and numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from omegaconf import DictConfig

from pmoe_lightning.algorithms.base import AbstractAlgorithm
from pmoe_lightning.checkpoints.io import AtomicCheckpointIO
from pmoe_lightning.checkpoints.policy import ACTORS, CRITICS, ENCODERS
from pmoe_lightning.data.off_policy import Pictures
from pmoe_lightning.envs import MAKERS
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.modules.normalization import ObservationNormalizer, RewardScaler
from pmoe_lightning.processes.stop_after_iteration import StopAfterIteration
from pmoe_lightning.run.fit import AtLeastOneUpdate, RunRecord
from pmoe_lightning.run.nodes import accelerator_of, arguments_of, bound, call
from pmoe_lightning.run.resume import describe
from pmoe_lightning.run.surroundings import Spaces, inspect_env
from pmoe_lightning.run.warm_start import warm_start
from pmoe_lightning.safe.constraint import CostConstraint

#: Below this many updates in a process, a run is over before compiling has repaid the time it takes.
UPDATES_TO_REPAY_COMPILING = 10_000
_OF_CRITICS = ("hidden_sizes", "activation")


def make_trainer(
    cfg: DictConfig, logger: Any, output_dir: Path, already_read: dict[Path, dict[str, Any]] | None = None
) -> Trainer:
    """Lightning's Trainer with the configured callbacks; ``already_read`` as for ``AtomicCheckpointIO``."""
    callbacks: list[Callback] = [call(node) for node in cfg.callbacks.values()]
    return call(
        cfg.trainer,
        accelerator=accelerator_of(cfg.trainer.accelerator),
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


def make_run(
    cfg: DictConfig, rank: int = 0, world_size: int = 1, checkpoint_folder: Path | None = None
) -> tuple[LightningModule, LightningDataModule]:
    """The algorithm and its data, with networks that are the same in every process and experience that is not.

    Beside the checkpoints in ``checkpoint_folder`` lie the pictures of a replay buffer that they name.

    Raises:
        ConfigurationError: the algorithm learns from other data than these.
    """
    seed_everything(cfg.seed, verbose=False)
    make_env = bound(cfg.env)
    world = inspect_env(make_env)
    spaces, seen = world.spaces, world.seen
    described, normalizing = arguments_of(cfg.actor), {}
    of_data: dict[str, Any] = {}
    encoder = None
    if seen is not None:
        with torch.random.fork_rng():  # so that actor and critics start the same with every encoder of so many features
            encoder = call(cfg.encoder, shape=seen.shape)
        spaces = replace(spaces, observation_dim=encoder.features)
    environments = cfg.data.num_envs * max(cfg.data.num_workers, 1)
    of_rollouts = get_object(cfg.data._target_).on_policy
    normalizer = ObservationNormalizer(spaces.observation_dim) if cfg.data.get("normalize_observation") else None
    if normalizer is not None:
        described["observation_key"] = normalizer.out_keys[0]
    if of_rollouts:
        described["return_log_prob"] = True
        scaled = cfg.data.normalize_reward
        of_data = {"reward_scaler": RewardScaler(environments, gamma=cfg.algo.gamma) if scaled else None}
    elif cfg.data.get("n_step", 1) > 1:
        of_data = {"gamma": cfg.algo.gamma} | ({"cost_gamma": cfg.safe.get("gamma")} if cfg.safe else {})
    if world.action_repeat > 1:  # data of the user's own need not know of it
        of_data["action_repeat"] = world.action_repeat
    if of_rollouts or normalizer is not None:  # an algorithm of replayed transitions need not know of it
        normalizing = {"normalizer": normalizer}
    if seen is not None:
        of_data["pictures"] = Pictures(seen.shape, seen.stack, checkpoint_folder)
    algorithm = _make_algorithm(cfg, spaces, described, normalizing, encoder)
    if cfg.init_from is not None:
        algorithm.init_from = warm_start(cfg.init_from, algorithm, of_data.get("reward_scaler"))
    data = call(
        cfg.data,
        make_env=make_env,
        policy=algorithm.policy,
        total_frames=cfg.total_frames,
        seed=cfg.seed + rank * environments,
        **normalizing,
        **of_data,
    )
    if algorithm.on_policy is not data.on_policy:
        names = HydraConfig.get().runtime.choices
        kind = "rollouts of its own policy" if algorithm.on_policy else "a replay buffer"
        raise ConfigurationError(f"algo={names['algo']} learns from {kind}, which data={names['data']} is not")
    algorithm.compiles = data.compile = resolve_compile(cfg.compile, algorithm.planned_updates(data))
    algorithm.check_processes(world_size)
    data.check_processes(world_size)
    seed_everything(cfg.seed + rank, verbose=False)
    return algorithm, data


def _make_algorithm(
    cfg: DictConfig, spaces: Spaces, described: dict[str, Any], normalizing: dict[str, Any], encoder: Any
) -> AbstractAlgorithm:
    """The algorithm around an actor made with the arguments that a checkpoint is to describe."""
    actor = call(cfg.actor, **vars(spaces), **described)
    sizes = {"observation_dim": spaces.observation_dim, "action_dim": len(spaces.action_low)}
    options = {}
    if cfg.action_transform:
        with torch.random.fork_rng():  # so that the critics start the same with every transform
            options["action_transform"] = call(cfg.action_transform, **sizes)
    if cfg.safe:
        options["constraint"] = call(cfg.safe)
    if cfg.critic and not get_object(cfg.data._target_).on_policy:
        options["make_critic"] = bound(cfg.critic)
    if encoder is not None:
        options["encoder"] = encoder
    description = _describe_policy(cfg, spaces, described, normalizing.get("normalizer") is not None)
    if encoder is not None:
        description["encoder"] = _describe_encoder(cfg, encoder)
    algorithm = call(
        cfg.algo,
        actor=actor,
        estimator=call(cfg.estimator) if cfg.estimator else None,
        policy_description=description,
        **sizes,
        **normalizing,
        **options,
    )
    algorithm.parts = own_parts(cfg)
    return algorithm


def own_parts(cfg: DictConfig) -> dict[str, Callable[..., Any]]:
    """The factories of the policy and of the environment that are not this package's, under ``group/option``."""
    known = {"actor": ACTORS.values(), "action_transform": [make_hamiltonian_transform], "safe": [CostConstraint]}
    known |= {"critic": CRITICS.values(), "encoder": ENCODERS.values(), "env": MAKERS.values()}
    chosen = {group: get_object(cfg[group]._target_) for group in known if cfg[group]}
    names = HydraConfig.get().runtime.choices
    return {f"{group}/{names[group]}": part for group, part in chosen.items() if part not in known[group]}


def resolve_compile(setting: bool | str, updates: float) -> bool:
    """Whether to compile the run: as told, or by ``auto`` where a process makes enough updates to repay it."""
    return updates >= UPDATES_TO_REPAY_COMPILING if setting == "auto" else bool(setting)


def _describe_policy(cfg: DictConfig, spaces: Spaces, arguments: dict[str, Any], normalized: bool) -> dict[str, Any]:
    """What a checkpoint says about its policy, in plain values; see ``load_policy``."""
    own = dict(key.split("/", 1) for key in own_parts(cfg))
    known = {factory: name for name, factory in ACTORS.items()}
    environment, backends = arguments_of(cfg.env), {maker: name for name, maker in MAKERS.items()}
    if (environment.get("pixels") or {}).get("size") is None:
        environment.pop("pixels", None)
    if not environment.get("wrappers"):
        environment.pop("wrappers", None)
    backend = backends.get(get_object(cfg.env._target_), "gymnasium")
    return {
        "format": 1,
        "actor": own.get("actor") or known[get_object(cfg.actor._target_)],
        "arguments": arguments,
        **vars(spaces),
        "normalize_observation": normalized,
        "action_transform": arguments_of(cfg.action_transform) if cfg.action_transform else None,
        "safe": arguments_of(cfg.safe) if cfg.safe else None,
        "critic": _describe_critic(cfg),
        "own_parts": {group: name for group, name in own.items() if group != "actor"},
        # The first choice, and what makes the user's own, is not said: so did earlier versions.
        "env": {"id": environment.pop("id"), "kwargs": environment}
        | ({"backend": backend} if backend != "gymnasium" else {}),
    }


def _describe_encoder(cfg: DictConfig, encoder: Any) -> dict[str, Any]:
    """The kind, the shape of the pixels and the sizes; of the user's own, no kind."""
    kinds = {factory: name for name, factory in ENCODERS.items()}
    target = get_object(cfg.encoder._target_)
    kind = {"kind": kinds[target]} if target in kinds else {}
    return kind | {"shape": list(encoder.shape)} | arguments_of(cfg.encoder)


def _describe_critic(cfg: DictConfig) -> dict[str, Any]:
    """The kind, where it is not the plain one, and the sizes of the action values; of the user's own, all arguments."""
    if not cfg.critic:
        return {key: value for key, value in arguments_of(cfg.algo).items() if key in _OF_CRITICS}
    arguments, target = arguments_of(cfg.critic), get_object(cfg.critic._target_)
    kinds = {factory: name for name, factory in CRITICS.items()}
    if target not in kinds:
        return arguments
    kind = {} if kinds[target] == "plain" else {"kind": kinds[target]}
    return kind | {key: arguments[key] for key in _OF_CRITICS}
