"""How noisy the gradient of the policy is while it trains, and whether it points where the exact one does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from lightning.pytorch import Callback
from tensordict import TensorDict

from pmoe_lightning.estimators import AbstractEstimator, Marginalized, Objective
from pmoe_lightning.estimators.gradient_statistics import (
    ASKS_SLOPES,
    ASKS_STATISTICS,
    GroupStatistics,
    cosine,
    directional_slopes,
    gradient_statistics,
)
from pmoe_lightning.limits import Limit, PositiveInt, checked
from pmoe_lightning.modules.mixture import MixtureDistribution, offers

from .interval import FrameInterval
from .reporting import LeftOut, log_metrics, warn_on_failure

if TYPE_CHECKING:
    from .contract import AbstractAlgorithm, Trainer

#: Of the shares of wrong signs: three standard errors of their difference over 64 states, at most.
_CLEAR_EXCESS = 0.25
#: What each of the reports asks of the policy's distribution.
_REPORTS = {"the gradient's statistics": ASKS_STATISTICS, "the cosine": Marginalized.asks}
_OF_EVOLVED = {"the share of wrong signs": ASKS_SLOPES}
_log = logging.getLogger(__name__)


class EstimatorVariance(Callback):
    """Measure the chosen gradient estimator on a recent batch of states, beside ``marginalized``, which is unbiased.

    For each group of mixture parameters, ``router`` (more than one component only), ``loc`` and ``scale`` (or what else
    the distribution calls its parameters):

    ====================================== =============================================================================
    ``train/estimator/variance_<group>``   summed variance of one estimate, mean per state
    ``train/estimator/signal_to_noise_..`` |E g| / sqrt(variance), see ``gradient_statistics``
    ``train/estimator/cosine_<group>``     between the mean estimates of the two; 1 for an unbiased one, but for
                                           the noise of the means
    ====================================== =============================================================================

    Where the actor's loss has an action transform in it, also two shares of the states, see ``directional_slopes``:

    ======================================== ===========================================================================
    ``train/hamiltonian/wrong_signs``        the estimate has another sign, along a random direction of the means, than
                                             a finite difference of the loss has
    ``train/hamiltonian/wrong_signs_control`` the finite difference itself has, with other draws: what is noise
    ======================================== ===========================================================================

    Where the former is clearly larger, a line says so, once: the actor cannot learn through such a transform.

    For SAC the objective is that of the actor; for PPO that of the entropy bonus, the part that an estimator serves
    there. What the distribution cannot be asked for (``modules.mixture``) is left out, which one line of the log says.
    The random numbers of training are left as they are.

    Args:
        every_frames: environment frames between two measurements.
        num_samples: independent estimates per state; one alone has no variance.
        max_states: states of the batch that are used at most.
    """

    @checked
    def __init__(
        self,
        every_frames: PositiveInt = 10_000,
        num_samples: Annotated[int, Limit(low=2)] = 32,
        max_states: PositiveInt = 64,
    ) -> None:
        self.num_samples, self.max_states = num_samples, max_states
        self._interval, self._has_warned, self._left_out = FrameInterval(every_frames), False, LeftOut()

    def on_train_start(self, trainer: Trainer, pl_module: AbstractAlgorithm) -> None:
        self._interval.mark(trainer.datamodule.env_frames)

    def on_train_batch_end(self, trainer: Trainer, pl_module: AbstractAlgorithm, *_: Any) -> None:
        frames = trainer.datamodule.env_frames
        if self._interval.is_due(frames):
            self._interval.mark(frames)
            if trainer.is_global_zero:
                with warn_on_failure("the gradient estimator was not measured"):
                    log_metrics(trainer, self.measure(pl_module), frames)

    def measure(self, algorithm: AbstractAlgorithm) -> dict[str, float]:
        """The metrics above, for the states that the algorithm trained on last.

        Nothing before its first update, and nothing for an algorithm without an estimator.
        """
        observation, estimator = algorithm.last_observation, algorithm.estimator
        if observation is None or estimator is None:
            return {}
        observation = observation[:: max(1, len(observation) // self.max_states)][: self.max_states]
        states = TensorDict({algorithm.observation_key: observation}, batch_size=observation.shape[:1])
        devices = [observation.device] if observation.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            with torch.no_grad():
                distribution = algorithm.actor.get_dist(states.copy())

            transform = algorithm.action_transform
            evolves = transform is not None and transform.is_used_in("actor_loss")
            self._left_out.tell(distribution, _REPORTS | (_OF_EVOLVED if evolves else {}))
            if not offers(distribution, ASKS_STATISTICS):
                return {}

            def make_objective(repeated: MixtureDistribution) -> Objective:
                return algorithm.loss.objective(states, repeated)

            statistics = partial(
                gradient_statistics,
                distribution=distribution,
                make_objective=make_objective,
                num_samples=self.num_samples,
            )
            chosen = statistics(estimator)
            exact = statistics(Marginalized()) if offers(distribution, Marginalized.asks) else {}
            signs = {}
            if evolves and offers(distribution, ASKS_SLOPES):
                signs = self._signs(estimator, distribution, make_objective)
        if distribution.num_components == 1:
            chosen.pop("router", None)
        return _metrics(chosen, exact, len(states)) | signs

    def _signs(
        self,
        estimator: AbstractEstimator,
        distribution: MixtureDistribution,
        make_objective: Callable[[MixtureDistribution], Objective],
    ) -> dict[str, float]:
        # More than a variance needs: a sign is lost in noise long before a length is.
        slopes = directional_slopes(estimator, distribution, make_objective, num_samples=128)
        wrong, control = slopes.wrong_signs, slopes.wrong_signs_control
        if wrong - control > _CLEAR_EXCESS and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "the actor's gradient through the action transform has the wrong sign in %.0f %% of the states, "
                "where noise alone has it in %.0f %%: lower action_transform.step_size, or leave actor_loss out of its "
                "used_in",
                *(100 * wrong, 100 * control),
            )
        return {"train/hamiltonian/wrong_signs": wrong, "train/hamiltonian/wrong_signs_control": control}


def _metrics(
    chosen: Mapping[str, GroupStatistics], exact: Mapping[str, GroupStatistics], num_states: int
) -> dict[str, float]:
    metrics = {}
    for group, found in chosen.items():
        metrics[f"train/estimator/variance_{group}"] = found.variance / num_states
        metrics[f"train/estimator/signal_to_noise_{group}"] = found.signal_to_noise
        if exact:
            metrics[f"train/estimator/cosine_{group}"] = cosine(found.mean, exact[group].mean)
    return metrics
