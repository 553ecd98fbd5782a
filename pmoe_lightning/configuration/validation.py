"""Check a composed configuration as a whole: every value against its limit, then the values against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pmoe_lightning.configuration.arguments import check_finite
from pmoe_lightning.configuration.composition import nearest
from pmoe_lightning.configuration.schemas import parameters_of, schemas
from pmoe_lightning.errors import ConfigurationError, first_line
from pmoe_lightning.limits import Parameter

_ON_POLICY = ("dac", "ppo")


def validate(cfg: DictConfig) -> None:
    """Raise at the first value that cannot work.

    Raises:
        ConfigurationError: one line that names the key, its value and what is expected.
    """
    if _choice(cfg, "algo") == "sac" and not cfg.critic:  # which its learning rate is taken from
        raise ConfigurationError("algo=sac learns from critics: use critic=plain, not critic=none")
    for path, value, parameter in _leaves(cfg):
        if parameter is not None and not parameter.accepts(value):
            raise ConfigurationError(f"{path}={_shown(value)} must be {parameter}")
        check_finite(path, value)
    if not isinstance(cfg.env.get("id"), str) or not cfg.env.id:
        raise ConfigurationError(f"env.id={cfg.env.get('id')} must be the name of an environment")
    if cfg.init_from is not None and cfg.resume not in (None, "auto"):
        raise ConfigurationError(
            f"init_from={cfg.init_from} begins a run and resume={cfg.resume} goes on with one: leave out one of them"
        )
    for name, node in cfg.callbacks.items():
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise ConfigurationError(f"callbacks.{name} has no _target_: choose callbacks that include it, or drop it")
    _check_algorithm_and_data(cfg)
    _check_algorithm_and_actor(cfg)
    _check_estimator_and_actor(cfg)
    _check_latent_and_flow(cfg)
    _check_critic(cfg)
    _check_pixels(cfg)
    _check_action_transform(cfg)
    _check_safe(cfg)


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any, Parameter | None]]:
    """Every value with its dotted key and what it may be, where that is stated."""
    schema: Any = OmegaConf.get_type(node)
    known = [field.name for field in dataclasses.fields(schema)] if dataclasses.is_dataclass(schema) else list(node)
    stated = parameters_of(schema)
    for key in map(str, node):
        path = f"{prefix}{key}"
        if key not in known:
            raise ConfigurationError(f"unknown key {path}{nearest(path, [f'{prefix}{name}' for name in known])}")
        # Known only once Hydra runs the job.
        if OmegaConf.is_interpolation(node, key) and "hydra:" in str(cast(Any, node._get_node(key))._value()):
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            raise ConfigurationError(f"{path}: {first_line(error)}") from None
        if isinstance(value, DictConfig):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, list(value) if isinstance(value, ListConfig) else value, stated.get(key)


def _choice(cfg: DictConfig, group: str) -> str | None:
    """Which of the program's own choices the part is, under whatever name; None for one that is the user's."""
    kind = OmegaConf.get_type(cfg[group]) if cfg[group] else None
    return next((choice for choice, schema in schemas()[group].items() if schema is kind), None)


def _check_algorithm_and_data(cfg: DictConfig) -> None:
    algo, data = _choice(cfg, "algo"), _choice(cfg, "data")
    if algo == "sac" and data == "on_policy":
        raise ConfigurationError("algo=sac learns from a replay buffer: use data=off_policy")
    if algo in _ON_POLICY and data == "off_policy":
        raise ConfigurationError(f"algo={algo} learns from fresh rollouts: use data=on_policy")
    if algo in _ON_POLICY and cfg.algo.minibatch_size * _action_repeat(cfg) > cfg.data.frames_per_batch:
        raise ConfigurationError(
            f"algo.minibatch_size={cfg.algo.minibatch_size}{_times_repeat(cfg)} must not exceed "
            f"data.frames_per_batch={cfg.data.frames_per_batch}"
        )
    if data is not None:
        _check_frames(cfg)
        _check_backend(cfg)


def _action_repeat(cfg: DictConfig) -> int:
    """How many frames make a transition."""
    return cfg.env.action_repeat if _choice(cfg, "env") == "dm_control" else 1


def _times_repeat(cfg: DictConfig) -> str:
    return f" times env.action_repeat={_action_repeat(cfg)}" if _action_repeat(cfg) > 1 else ""


def _check_frames(cfg: DictConfig) -> None:
    data, repeat = cfg.data, _action_repeat(cfg)
    if data.frames_per_batch % (data.num_envs * max(data.num_workers, 1) * repeat):
        workers = f" times data.num_workers={data.num_workers}" if data.num_workers else ""
        raise ConfigurationError(
            f"data.frames_per_batch={data.frames_per_batch} must be a multiple of "
            f"data.num_envs={data.num_envs}{workers}{_times_repeat(cfg)}"
        )
    if data.frames_per_epoch < data.frames_per_batch:
        raise ConfigurationError(
            f"data.frames_per_epoch={data.frames_per_epoch} must be at least "
            f"data.frames_per_batch={data.frames_per_batch}"
        )
    if _choice(cfg, "data") == "off_policy":
        # Whole iterations: the warm-up and the run are both rounded up to them.
        warm_up, frames = (
            -(-count // data.frames_per_batch) * data.frames_per_batch
            for count in (data.init_random_frames, cfg.total_frames)
        )
        if warm_up >= cfg.total_frames:
            raise ConfigurationError(
                f"data.init_random_frames={data.init_random_frames} leaves nothing of "
                f"total_frames={cfg.total_frames} to learn from"
            )
        if (frames - warm_up) * data.utd_ratio < repeat:
            raise ConfigurationError(
                f"data.utd_ratio={data.utd_ratio} owes no update for the {frames - warm_up} frames after the warm-up: "
                f"raise it, or total_frames={cfg.total_frames}"
            )
        if data.buffer_size < max(
            data.batch_size, *(n / repeat for n in (data.init_random_frames, data.frames_per_batch))
        ):
            raise ConfigurationError(
                f"data.buffer_size={data.buffer_size}{_times_repeat(cfg)} must hold data.batch_size={data.batch_size}, "
                f"data.init_random_frames={data.init_random_frames} and data.frames_per_batch={data.frames_per_batch}"
            )


def _check_backend(cfg: DictConfig) -> None:
    if cfg.data.backend != "ray":
        return
    if not cfg.data.num_workers:
        raise ConfigurationError("data.backend=ray collects with workers alone: set data.num_workers")
    if find_spec("ray") is None:
        raise ConfigurationError('data.backend=ray needs Ray: pip install "pmoe-lightning[ray]"')


def _check_algorithm_and_actor(cfg: DictConfig) -> None:
    learns_options, acts_by_options = _choice(cfg, "algo") == "dac", _choice(cfg, "actor") == "options"
    if learns_options and not acts_by_options:
        raise ConfigurationError("algo=dac learns options: use actor=options")
    if acts_by_options and not learns_options:
        raise ConfigurationError("actor=options is learnt by algo=dac alone: use algo=dac or another actor")


def _check_estimator_and_actor(cfg: DictConfig) -> None:
    if not cfg.estimator:
        if _choice(cfg, "algo") in ("sac", "ppo"):
            raise ConfigurationError("estimator=none leaves the mixture without a gradient: use estimator=frequency")
        return
    estimator = _choice(cfg, "estimator")
    components = cfg.actor.num_components if _choice(cfg, "actor") == "pmoe" else 1
    if estimator == "pathwise" and components > 1:
        raise ConfigurationError(
            f"estimator=pathwise differentiates one component, not actor.num_components={components}: "
            "use actor=gaussian or estimator=frequency"
        )
    if (
        estimator in ("half_reparameterized", "score_function")
        and cfg.estimator.baseline != "none"
        and (cfg.estimator.num_samples < 2)
    ):
        raise ConfigurationError(
            f"estimator.baseline={cfg.estimator.baseline} needs estimator.num_samples of at least 2: "
            "use more samples or estimator.baseline=none"
        )


def _check_latent_and_flow(cfg: DictConfig) -> None:
    algo, actor, estimator = (_choice(cfg, group) for group in ("algo", "actor", "estimator"))
    if actor == "flow" and find_spec("zuko") is None:
        raise ConfigurationError('actor=flow needs zuko: pip install "pmoe-lightning[flow]"')
    if actor != "latent":
        return
    if algo in _ON_POLICY:
        raise ConfigurationError(
            f"actor=latent has no density, which the probability ratio of {algo} needs: use algo=sac or another actor"
        )
    if estimator not in ("pathwise", None):
        raise ConfigurationError(
            f"actor=latent has no density, which estimator={estimator} needs: use estimator=pathwise or another actor"
        )
    if cfg.action_transform:
        raise ConfigurationError(
            "actor=latent has no density, which the score of evolved actions needs: use action_transform=none"
        )


def _check_critic(cfg: DictConfig) -> None:
    algo = _choice(cfg, "algo")
    if algo == "sac" and len(cfg.algo.betas) != 2:
        raise ConfigurationError(f"algo.betas={_shown(list(cfg.algo.betas))} must be two numbers, such as [0.9,0.999]")
    if algo in _ON_POLICY and cfg.critic:
        own = all(cfg.critic.get(key) == cfg.algo[key] for key in ("hidden_sizes", "activation"))
        if _choice(cfg, "critic") != "plain" or not own:
            raise ConfigurationError(
                f"critic=... chooses the critics of sac; those of {algo} are plain, of the sizes algo.hidden_sizes: "
                "use algo=sac or critic=none"
            )


def _check_pixels(cfg: DictConfig) -> None:
    seen = cfg.env.get("pixels")
    size = seen.get("size") if isinstance(seen, DictConfig) else None
    if size is None:
        # One of the user's own may show pixels without being asked.
        if cfg.encoder and isinstance(seen, DictConfig):
            raise ConfigurationError("encoder=... encodes pixels: set env.pixels.size, such as 84, or encoder=none")
        return
    if _choice(cfg, "algo") in _ON_POLICY:
        raise ConfigurationError(
            f"env.pixels.size={size}: algo={_choice(cfg, 'algo')} learns from the state alone; use algo=sac, "
            "or env.pixels.size=null"
        )
    if not cfg.encoder:
        raise ConfigurationError(f"env.pixels.size={size} needs an encoder: use encoder=drq")
    if cfg.data.get("normalize_observation"):
        raise ConfigurationError(
            "data.normalize_observation=true normalises states, and pixels are not: use false with env.pixels.size"
        )


def _check_action_transform(cfg: DictConfig) -> None:
    transform = cfg.action_transform
    if not transform:
        return
    if _choice(cfg, "algo") in _ON_POLICY:
        raise ConfigurationError(
            "action_transform=hamiltonian_... evolves actions along an action value, and the probability ratio of "
            "ppo and dac needs the exact density of what was done: use algo=sac or action_transform=none"
        )
    if _choice(cfg, "action_transform") is None:
        return  # one of the user's own
    learns = transform.learn_step_size or transform.get("learn_magnitude", False) or transform.force == "gated"
    if learns and "actor_loss" not in transform.used_in:
        raise ConfigurationError(
            "action_transform: what it learns, it learns from the actor loss: add actor_loss to its used_in"
        )
    if transform.learn_step_size and transform.force == "raw":
        raise ConfigurationError(
            "action_transform.learn_step_size=true needs action_transform=hamiltonian_normalized or hamiltonian_gated: "
            "with the raw force its gradient is mostly that of an integration error, at times of the wrong sign"
        )
    if transform.metropolis and transform.temperature != 1:
        raise ConfigurationError(
            f"action_transform.metropolis=true needs action_transform.temperature=1, not {transform.temperature}: "
            "a tempered trajectory has no reverse"
        )


def _check_safe(cfg: DictConfig) -> None:
    if not cfg.safe:
        return
    if _choice(cfg, "algo") in _ON_POLICY:
        raise ConfigurationError(
            "safe=velocity chooses among actions by their reward and cost values, which ppo and dac do not learn: "
            "use algo=sac or safe=none"
        )
    if _choice(cfg, "safe") is None:
        return
    if cfg.env.get("velocity_limit") is None:
        raise ConfigurationError("safe=velocity needs env.velocity_limit: a number in m/s, or published")


def _shown(value: Any) -> str:
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)
