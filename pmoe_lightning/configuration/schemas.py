"""What every configuration key must be: its type and the values it may take.

Values live in ``conf/``; here each group has one dataclass, which Hydra merges under the group's files. A key that is
not declared here is refused; a value outside its ``Limit`` is refused by ``validation.py``. Only the standard library
and Hydra are imported, so that ``--help`` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, Optional, Union

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass(frozen=True)
class Limit:
    """Values a key accepts: finite numbers in an interval, one of some words, true and false, or any of these."""

    low: float = -inf
    high: float = inf
    low_included: bool = True
    words: tuple[str, ...] = ()
    numeric: bool = True
    boolean: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether the value, or every element of a list, is allowed. None is left to the type."""
        if value is None:
            return True
        if isinstance(value, list | tuple):
            return len(value) > 0 and all(self.accepts(element) for element in value)
        if isinstance(value, str):
            return value in self.words
        if isinstance(value, bool):
            return self.boolean
        if not self.numeric:
            return False
        inside = self.low <= value if self.low_included else self.low < value
        return inside and value <= self.high and isfinite(value)

    def __str__(self) -> str:
        """What is allowed, to complete the sentence 'must be ...'."""
        parts = [f"one of {', '.join(self.words)}" if len(self.words) > 1 else repr(word) for word in self.words[:1]]
        if self.numeric:
            sign = ">=" if self.low_included else ">"
            bounds = [f"{sign} {self.low}"] * (self.low > -inf) + [f"<= {self.high}"] * (self.high < inf)
            parts.insert(0, " ".join(["a finite number", " and ".join(bounds)]).strip())
        return " or ".join(["true, false"] * self.boolean + parts)


def _limited(limit: Limit) -> Any:
    return field(default=MISSING, metadata={"limit": limit})


def _finite() -> Any:
    return _limited(Limit())


def _positive() -> Any:
    return _limited(Limit(low=0, low_included=False))


def _at_least(low: float) -> Any:
    return _limited(Limit(low=low))


def _between(low: float, high: float) -> Any:
    return _limited(Limit(low=low, high=high))


def _one_of(*words: str) -> Any:
    return _limited(Limit(words=words, numeric=False))


def _number_or(word: str, low: float = -inf) -> Any:
    return _limited(Limit(low=low, words=(word,)))


# -- algo --------------------------------------------------------------------------------------------------------------
@dataclass
class Suggestions:
    """What an algorithm hands to other groups, which take it by interpolation unless they are told otherwise."""

    total_frames: int = _at_least(1)
    scale: str = _one_of("state_dependent", "state_independent")
    initialization: str = _one_of("default", "orthogonal")


@dataclass
class SACSchema:
    _target_: str = MISSING
    lr: float = _positive()
    lr_actor: float = _positive()
    lr_qvalue: float = _positive()
    lr_alpha: float = _positive()
    betas: list[float] = _between(0, 1)
    gamma: float = _between(0, 1)
    tau: float = _between(0, 1)
    policy_delay: int = _at_least(1)
    alpha_init: float = _positive()
    target_entropy: Optional[float] = _finite()  # noqa: UP045  (OmegaConf reads typing.Optional)
    hidden_sizes: list[int] = _at_least(1)
    activation: str = _one_of("relu", "tanh")
    suggests: Suggestions = field(default_factory=Suggestions)


@dataclass
class DACSchema:
    _target_: str = MISSING
    lr: float = _positive()
    gamma: float = _between(0, 1)
    lmbda: float = _between(0, 1)
    clip_epsilon: float = _positive()
    entropy_coeff: float = _at_least(0)
    critic_coeff: float = _at_least(0)
    max_grad_norm: float = _positive()
    num_epochs: int = _at_least(1)
    minibatch_size: int = _at_least(1)
    target_kl: Optional[float] = _positive()  # noqa: UP045
    hidden_sizes: list[int] = _at_least(1)
    activation: str = _one_of("relu", "tanh")
    suggests: Suggestions = field(default_factory=Suggestions)


@dataclass
class PPOSchema(DACSchema):
    qvalue_coeff: float = _at_least(0)


# -- critic ------------------------------------------------------------------------------------------------------------
@dataclass
class CriticSuggestions:
    """What critics hand to the algorithm, which takes it by interpolation unless it is told otherwise."""

    lr: float = _positive()
    betas: list[float] = _between(0, 1)
    policy_delay: int = _at_least(1)


@dataclass
class CriticSchema:
    _target_: str = MISSING
    hidden_sizes: list[int] = _at_least(1)
    activation: str = _one_of("relu", "tanh")
    suggests: CriticSuggestions = field(default_factory=CriticSuggestions)


@dataclass
class PlainCriticSchema(CriticSchema):
    """Its own type tells it from the others."""


@dataclass
class CrossQSchema(CriticSchema):
    momentum: float = _between(0, 1)
    warm_up: int = _at_least(0)


# -- actor, estimator, action_transform --------------------------------------------------------------------------------
@dataclass
class GaussianSchema:
    _target_: str = MISSING
    hidden_sizes: list[int] = _at_least(1)
    activation: str = _one_of("relu", "tanh")
    scale: str = _one_of("state_dependent", "state_independent")
    initialization: str = _one_of("default", "orthogonal")


@dataclass
class PMOESchema(GaussianSchema):
    num_components: int = _at_least(1)
    router: str = _one_of("detached", "attached")
    deterministic: str = _one_of("best_value", "max_weight", "sample_component")


@dataclass
class ExpertsSchema(GaussianSchema):
    num_experts: int = _at_least(1)


@dataclass
class OptionsSchema(GaussianSchema):
    num_options: int = _at_least(2)
    deterministic: str = _one_of("max_weight", "sample_component")


@dataclass
class FrequencySchema:
    _target_: str = MISSING
    backpropagate: str = _one_of("max", "all")
    log_prob: str = _one_of("component", "mixture")
    reduction: str = _one_of("mean", "sum")
    rank_by: str = _one_of("q", "soft_q")
    weight: float = _at_least(0)


@dataclass
class MarginalizedSchema:
    _target_: str = MISSING


@dataclass
class PathwiseSchema:
    _target_: str = MISSING


@dataclass
class ImplicitSchema:
    _target_: str = MISSING


@dataclass
class ScoreSchema:
    _target_: str = MISSING
    num_samples: int = _at_least(1)
    baseline: str = _one_of("none", "mean", "leave_one_out")


@dataclass
class GumbelSoftmaxSchema:
    _target_: str = MISSING
    temperature: float = _positive()
    final_temperature: Optional[float] = _positive()  # noqa: UP045
    straight_through: bool = MISSING


@dataclass
class HamiltonianSchema:
    _target_: str = MISSING
    force: str = _one_of("raw", "normalized", "gated")
    num_leapfrog_steps: int = _at_least(0)
    step_size: float = _positive()
    learn_step_size: bool = MISSING
    momentum_scale: float = _positive()
    temperature: float = _at_least(1)
    metropolis: bool = MISSING
    log_prob: str = _one_of("joint", "base")
    critic_reduction: str = _one_of("min", "mean")
    used_in: list[str] = _one_of("acting", "actor_loss", "critic_target")


@dataclass
class NormalizedSchema(HamiltonianSchema):
    magnitude: float = _positive()
    learn_magnitude: bool = MISSING


@dataclass
class GatedSchema(NormalizedSchema):
    hidden_size: int = _at_least(1)


# -- safe --------------------------------------------------------------------------------------------------------------
@dataclass
class CostConstraintSchema:
    _target_: str = MISSING
    cost_limit: float = _at_least(0)
    gamma: float = _between(0, 1)
    lr_multiplier: float = _positive()
    multiplier_init: float = _at_least(0)
    num_candidates: int = _between(1, 1000)


# -- data --------------------------------------------------------------------------------------------------------------
@dataclass
class DataSchema:
    _target_: str = MISSING
    frames_per_batch: int = _at_least(1)
    frames_per_epoch: int = _at_least(1)
    num_envs: int = _at_least(1)
    num_workers: int = _at_least(0)
    backend: str = _one_of("process", "ray")


@dataclass
class OffPolicySchema(DataSchema):
    init_random_frames: int = _at_least(0)
    buffer_size: int = _at_least(1)
    batch_size: int = _at_least(1)
    utd_ratio: float = _positive()
    n_step: int = _at_least(1)
    normalize_observation: bool = MISSING


@dataclass
class OnPolicySchema(DataSchema):
    normalize_observation: bool = MISSING
    normalize_reward: bool = MISSING


# -- trainer -----------------------------------------------------------------------------------------------------------
@dataclass
class TrainerSchema:
    _target_: str = MISSING
    accelerator: str = _one_of("auto", "cpu", "cuda", "gpu")
    devices: Union[int, str] = _number_or("auto", low=1)  # noqa: UP007
    num_nodes: int = _at_least(1)
    strategy: str = _one_of("auto", "ddp")
    deterministic: bool = MISSING
    detect_anomaly: bool = MISSING
    profiler: Optional[str] = _one_of("simple", "advanced", "pytorch")  # noqa: UP045


# -- callbacks, logger -------------------------------------------------------------------------------------------------
@dataclass
class EvaluationSchema:
    _target_: str = MISSING
    make_env: Any = MISSING
    episodes: int = _at_least(1)
    seed: int = _between(0, 2**31 - 1)
    every_epochs: int = _at_least(1)
    max_episode_steps: int = _at_least(1)


@dataclass
class MetricsLoggerSchema:
    _target_: str = MISSING
    every_frames: int = _at_least(1)


@dataclass
class MixtureDiagnosticsSchema:
    _target_: str = MISSING
    every_frames: int = _at_least(1)
    figure_every_frames: int = _at_least(1)
    max_states: int = _at_least(1)


@dataclass
class EstimatorVarianceSchema:
    _target_: str = MISSING
    every_frames: int = _at_least(1)
    num_samples: int = _at_least(2)
    max_states: int = _at_least(1)


@dataclass
class NonFiniteGuardSchema:
    _target_: str = MISSING
    mode: str = _one_of("stop", "skip")


@dataclass
class ActionTrajectoriesSchema:
    _target_: str = MISSING
    every_frames: int = _at_least(1)
    num_states: int = _at_least(1)
    num_actions: int = _at_least(1)
    resolution: int = _at_least(2)


@dataclass
class FinalPolicySchema:
    _target_: str = MISSING
    video: bool = MISSING
    video_seed: int = _between(0, 2**31 - 1)
    video_frames: int = _at_least(1)
    model: bool = MISSING
    register_as: Optional[str] = MISSING  # noqa: UP045


@dataclass
class MLflowSchema:
    _target_: str = MISSING
    experiment_name: Optional[str] = MISSING  # noqa: UP045
    run_name: Optional[str] = MISSING  # noqa: UP045
    tracking_uri: Optional[str] = MISSING  # noqa: UP045
    flush_seconds: float = _positive()
    spool: Optional[str] = MISSING  # noqa: UP045


# -- the whole ---------------------------------------------------------------------------------------------------------
@dataclass
class Configuration:
    """The keys at the top. ``experiment`` and ``debug`` are groups that change these and add none."""

    algo: Any = MISSING
    actor: Any = MISSING
    estimator: Any = MISSING
    critic: Any = None
    action_transform: Any = None
    safe: Any = None
    env: Any = MISSING
    data: Any = MISSING
    trainer: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: Any = None
    seed: int = _between(0, 2**31 - 1)
    total_frames: int = _at_least(1)
    num_threads: int = _at_least(1)
    resume: Optional[str] = MISSING  # noqa: UP045
    compile: Union[bool, str] = _limited(Limit(words=("auto",), numeric=False, boolean=True))  # noqa: UP007
    matmul_precision: str = _one_of("float32", "bf16-hidden", "tf32")


SCHEMAS = {
    "algo": {"dac": DACSchema, "ppo": PPOSchema, "sac": SACSchema},
    "critic": {"crossq": CrossQSchema, "layer_norm": CriticSchema, "plain": PlainCriticSchema},
    "actor": {
        "additive_moe": ExpertsSchema,
        "gaussian": GaussianSchema,
        "mcp": ExpertsSchema,
        "options": OptionsSchema,
        "pmoe": PMOESchema,
    },
    "estimator": {
        "frequency": FrequencySchema,
        "gumbel_softmax": GumbelSoftmaxSchema,
        "half_reparameterized": ScoreSchema,
        "implicit": ImplicitSchema,
        "marginalized": MarginalizedSchema,
        "pathwise": PathwiseSchema,
        "score_function": ScoreSchema,
    },
    "action_transform": {
        "hamiltonian_gated": GatedSchema,
        "hamiltonian_normalized": NormalizedSchema,
        "hamiltonian_raw": HamiltonianSchema,
    },
    "safe": {"velocity": CostConstraintSchema},
    "data": {"off_policy": OffPolicySchema, "on_policy": OnPolicySchema},
    "trainer": {"default": TrainerSchema},
    "callbacks": {
        "estimator_variance": EstimatorVarianceSchema,
        "evaluation": EvaluationSchema,
        "final_policy": FinalPolicySchema,
        "metrics": MetricsLoggerSchema,
        "mixture": MixtureDiagnosticsSchema,
        "nonfinite": NonFiniteGuardSchema,
        "trajectories": ActionTrajectoriesSchema,
    },
    "logger": {"mlflow": MLflowSchema},
}


def register() -> None:
    """Make the schemas known to Hydra as ``schema/<group>/<name>``."""
    store = ConfigStore.instance()
    store.store(group="schema", name="configuration", node=Configuration)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=schema)
