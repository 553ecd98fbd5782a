"""What the mixture policy is doing: how it shares states between components and how far these lie apart."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from pmoe_lightning.envs import with_memory
from pmoe_lightning.evaluation import figures
from pmoe_lightning.evaluation.episodes import follow_episode
from pmoe_lightning.limits import PositiveInt, checked
from pmoe_lightning.modules.acting import ASKS_ACTING, acting_component, find_actor, mixture_at
from pmoe_lightning.modules.mixture import MixtureDistribution, Offer, offers

from .evaluation import Evaluation
from .interval import FrameInterval
from .reporting import LeftOut, find_callback, log_figure, log_metrics, warn_on_failure

if TYPE_CHECKING:
    from .contract import AbstractAlgorithm, Trainer

#: What each of the reports asks of the policy's distribution.
_WEIGHTS: frozenset[Offer] = frozenset({"weights"})
_MODES: frozenset[Offer] = frozenset({"component_modes"})
_SCALES: frozenset[Offer] = frozenset({"diagonal_scales"})
_REPORTS = {
    "the mixture's weights": _WEIGHTS,
    "the distance of its components": _MODES,
    "the scale of its components": _SCALES,
    "the figure of its component modes": ASKS_ACTING,
}
_STATES = 8  # columns of component_modes


class MixtureDiagnostics(Callback):
    """Measure the policy's mixture on a recent batch of states.

    With w_k(s) the weights, H the entropy in nats and bars the mean over the states of the batch, logged against
    environment frames:

    ================================================ ================================================================
    ``train/mixture/weight_k``                       mean weight of component k
    ``train/mixture/heaviest_k``                     share of the states in which component k has the largest weight
    ``train/mixture/router_entropy``                 mean over states of H(w(s)); log K where the router never decides
    ``train/mixture/mutual_information``             H(mean w) - mean H(w(s)): what the state says about the
                                                     component; 0 where nothing, log K where each state has one
                                                     and all are used
    ``train/mixture/effective_components``           exp H(mean w): components in use at all; 1 means collapse
    ``train/mixture/effective_components_per_state`` mean of exp H(w(s)): components in use within one state
    ``train/mixture/component_distance``             mean distance between two component modes (see below); K > 1
    ``train/mixture/scale``                          mean standard deviation of the unsquashed action
    ================================================ ================================================================

    The distance between two modes is the root mean square over action dimensions of their difference divided by the
    range of the action: 0 where they coincide, 1 at opposite corners.

    Figures: ``mixture_weights``, how states were shared over the run, and ``component_modes``, the actions that the
    components offer along one episode of the policy as it is judged, in the environment of the run's ``Evaluation``
    (without one: in recent states). Global random states are as before afterwards, so training is not changed. A policy
    whose distribution does not offer what one of these needs (``modules.mixture``) is measured without it, which one
    line of the log says.

    Args:
        every_frames: environment frames between two measurements.
        figure_every_frames: environment frames between two versions of the figures, which are also logged at the end.
        max_states: states of the batch that are used at most.
    """

    @checked
    def __init__(
        self,
        every_frames: PositiveInt = 5000,
        figure_every_frames: PositiveInt = 100_000,
        max_states: PositiveInt = 256,
    ) -> None:
        self.max_states = max_states
        self.history: list[list[float]] = []
        self.specialisation: list[list[float]] = []
        self._measured, self._drawn = FrameInterval(every_frames), FrameInterval(figure_every_frames)
        self._left_out = LeftOut()

    def on_train_start(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        frames = trainer.datamodule.env_frames
        self._measured.start(frames)
        self._drawn.start(frames)

    def on_train_batch_end(self, trainer: Trainer, pl_module: AbstractAlgorithm, *_: Any) -> None:
        frames = trainer.datamodule.env_frames
        with warn_on_failure("the mixture was not measured"):
            if self._measured.is_due(frames):
                self._measure(trainer, pl_module, frames)
            if self._drawn.is_due(frames):
                self._draw(trainer, pl_module, frames)

    def on_train_end(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        with warn_on_failure("the mixture figures were not logged"):
            self._finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: AbstractAlgorithm, exception: BaseException) -> None:
        with warn_on_failure("the mixture figures were not logged"):
            data = trainer.datamodule
            if self._measured.is_left_to_resumed_run(data, exception):
                self._measured.mark(data.env_frames)
            self._finish(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        rows = {"history": self.history, "specialisation": self.specialisation}
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}
        return tensors | {"frames": self._measured.frames, "figure_frames": self._drawn.frames}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        history = state_dict["history"]
        # Earlier checkpoints have the mean weights alone.
        specialisation = state_dict.get("specialisation", torch.full_like(history, torch.nan))
        self.history, self.specialisation = history.tolist(), specialisation.tolist()
        self._measured.frames, self._drawn.frames = state_dict.get("frames"), state_dict.get("figure_frames")

    def _finish(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        frames = trainer.datamodule.env_frames
        if self._drawn.has_rest(frames):
            self._draw(trainer, pl_module, frames)
        elif self._measured.has_rest(frames):
            self._measure(trainer, pl_module, frames)

    def _measure(self, trainer: Trainer, pl_module: AbstractAlgorithm, frames: int) -> None:
        self._measured.mark(frames)
        mixture = recent_mixture(pl_module, self.max_states)
        if mixture is not None:
            self._left_out.tell(mixture, _REPORTS)
        if mixture is not None and offers(mixture, _WEIGHTS):
            metrics, components = mixture_metrics(mixture), range(mixture.num_components)
            log_metrics(trainer, metrics, frames)
            weights, heaviest = (
                [metrics[f"train/mixture/{name}_{k}"] for k in components] for name in ("weight", "heaviest")
            )
            self.history.append([float(frames), *weights])
            self.specialisation.append([*heaviest, metrics["train/mixture/router_entropy"]])

    def _draw(self, trainer: Trainer, pl_module: AbstractAlgorithm, frames: int) -> None:
        self._drawn.mark(frames)
        if self._measured.has_rest(frames):
            self._measure(trainer, pl_module, frames)
        if self.history:
            log_figure(trainer, "mixture_weights", self._draw_weights, frames)
        mixture = recent_mixture(pl_module, 1)
        if mixture is not None and offers(mixture, ASKS_ACTING):
            log_figure(trainer, "component_modes", partial(_draw_modes, trainer, pl_module), frames)

    def _draw_weights(self) -> Figure:
        heaviest, entropy = [row[:-1] for row in self.specialisation], [row[-1] for row in self.specialisation]
        return figures.mixture_weights(self.history, heaviest, entropy)


@torch.no_grad()
def mixture_metrics(mixture: MixtureDistribution) -> dict[str, float]:
    """What a mixture with batch shape [B] gives of :class:`MixtureDiagnostics`'s table; one transfer from the device.

    It must offer ``weights``.
    """
    weights = mixture.weights
    mean_weights, entropy = weights.mean(0), _entropy(weights)
    values = {f"train/mixture/weight_{k}": mean_weights[k] for k in range(mixture.num_components)}
    heaviest = torch.nn.functional.one_hot(weights.argmax(-1), mixture.num_components).to(weights).mean(0)
    values |= {f"train/mixture/heaviest_{k}": heaviest[k] for k in range(mixture.num_components)}
    values |= {
        "train/mixture/router_entropy": entropy.mean(),
        "train/mixture/mutual_information": (_entropy(mean_weights) - entropy.mean()).clamp(min=0.0),
        "train/mixture/effective_components": _entropy(mean_weights).exp(),
        "train/mixture/effective_components_per_state": entropy.exp().mean(),
    }
    if offers(mixture, _SCALES):
        values["train/mixture/scale"] = mixture.scale.mean()
    if mixture.num_components > 1 and offers(mixture, _MODES):
        values["train/mixture/component_distance"] = _component_distance(mixture)
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def _entropy(weights: Tensor) -> Tensor:
    return torch.special.entr(weights).sum(-1)


def _component_distance(mixture: MixtureDistribution) -> Tensor:
    modes = mixture.component_modes / (mixture.high - mixture.low)  # [B, K, A]
    first, second = torch.triu_indices(mixture.num_components, mixture.num_components, 1, device=modes.device)
    return (modes[:, first] - modes[:, second]).square().mean(-1).sqrt().mean()


@torch.no_grad()
def recent_mixture(pl_module: AbstractAlgorithm, num_states: int) -> object | None:
    """What the policy draws from in that many of the last states; None before the first update."""
    observation = pl_module.last_observation
    if observation is None or find_actor(pl_module.actor) is None:
        return None
    observation = observation[:: max(1, len(observation) // num_states)][:num_states]
    return pl_module.actor.get_dist(TensorDict({pl_module.observation_key: observation}, [len(observation)]))


def _draw_modes(trainer: Trainer, pl_module: AbstractAlgorithm) -> Figure:
    evaluation = find_callback(trainer, Evaluation)
    if evaluation is None:
        recent = recent_mixture(pl_module, _STATES)
        assert offers(recent, ASKS_ACTING)  # the caller has asked
        return _modes_figure(recent)
    with isolate_rng():
        return modes_along_an_episode(evaluation.judged_policy(pl_module), evaluation)


@torch.no_grad()
def modes_along_an_episode(policy: TensorDictModuleBase, evaluation: Evaluation) -> Figure:
    """``component_modes`` of a mixture, along the first episode by which it was judged."""
    with isolate_rng():
        env = with_memory(evaluation.make_env, policy)(num_envs=1, seed=evaluation.seed)
        try:
            episode = follow_episode(policy, env, seed=evaluation.seed)
        finally:
            env.close()
    steps = torch.linspace(0, len(episode) - 1, min(_STATES, len(episode))).long()
    states = episode[steps]
    mixture = mixture_at(policy, states)
    assert mixture is not None  # that of the judged policy is of the same kind
    title = f"What each component would do along an episode of {len(episode)} steps"
    labels = [f"step {step}" for step in steps.tolist()]
    return _modes_figure(mixture, states=labels, acting=acting_component(mixture, states).cpu().numpy(), title=title)


def _modes_figure(mixture: MixtureDistribution, **arguments: Any) -> Figure:
    action_dim = mixture.loc.shape[-1]
    if offers(mixture, _SCALES):
        ends = (mixture.squash(mixture.loc + sign * mixture.scale) for sign in (-1, 1))
        arguments |= {name: end.cpu().numpy() for name, end in zip(("lower", "upper"), ends, strict=True)}
    return figures.component_modes(
        mixture.component_modes.cpu().numpy(),
        mixture.weights.cpu().numpy(),
        mixture.low.expand(action_dim).cpu().numpy(),
        mixture.high.expand(action_dim).cpu().numpy(),
        **arguments,
    )
