"""Rollouts for on-policy learning, with running normalisation of observations and rewards."""

from collections.abc import Callable
from typing import Annotated, Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from pmoe_lightning.data.collection import CollectedData
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.limits import Of, PositiveInt, checked
from pmoe_lightning.modules.normalization import ObservationNormalizer, RewardScaler

__all__ = ["OnPolicyData"]

#: Neither a loss nor an advantage reads these: the flags of a root are always false, and totals are counted already.
_TOTALS = ("episode_return", "episode_length")
_LEFT_OUT = ("done", "terminated", "truncated", *_TOTALS, *(("next", total) for total in _TOTALS))


class OnPolicyData(CollectedData):
    """Yields one rollout [N, T] per collector iteration, T = frames_per_batch / N, collected by the live policy.

    A rollout holds observation, action, whatever else the policy writes (action_unsquashed, action_log_prob,
    observation_normalized) and next: observation, reward, done, terminated, truncated. ``next.observation`` is the true
    last observation where an episode ended.

    With a ``normalizer`` the policy must contain it, so that it writes ``observation_normalized`` while acting;
    ``next.observation_normalized`` is added with the same statistics, and only then does the rollout enter them. The
    first rollout of a fresh run only initialises the statistics: it is counted but not yielded, because a network whose
    input changes scale after its first update would have to unlearn that update. Where no other rollout follows, it is
    trained on as it is, and the statistics stay empty.
    With a ``reward_scaler`` the reward is the scaled one; episode returns remain in the environment's own units.

    Args: as :class:`pmoe_lightning.data.collection.CollectedData`, and
        normalizer: the one inside ``policy``, or None.
        reward_scaler: made for the same number of environments, or None.

    Raises:
        ConfigurationError: also if the reward scaler is made for another number of environments.
    """

    on_policy = True

    @checked
    def __init__(
        self,
        make_env: Callable[..., EnvBase],
        policy: TensorDictModuleBase,
        *,
        frames_per_batch: PositiveInt = 2048,
        num_envs: PositiveInt = 8,
        normalizer: ObservationNormalizer | None = None,
        reward_scaler: RewardScaler | None = None,
        **arguments: Annotated[Any, Of(CollectedData)],
    ) -> None:
        super().__init__(
            make_env,
            policy,
            frames_per_batch=frames_per_batch,
            num_envs=num_envs,
            **arguments,
        )
        if reward_scaler is not None and len(reward_scaler.discounted_return) != self.environments:
            raise ConfigurationError(
                f"{self.environments} environments, but the RewardScaler is made for "
                f"{len(reward_scaler.discounted_return)}"
            )
        self.normalizer, self.reward_scaler = normalizer, reward_scaler

    def make_batch(self, rollout: TensorDictBase) -> TensorDictBase | None:
        """Normalise the rollout and update the statistics; None if they had been empty and there are frames to come."""
        batch = rollout.exclude(*_LEFT_OUT).to(self.device)
        if self.reward_scaler is not None:
            reward, done = rollout.get(("next", "reward")), rollout.get(("next", "done"))
            batch.set(("next", "reward"), self.reward_scaler(reward, done, gather=self._gather).to(self.device))
        if self.normalizer is None:
            return batch
        batch.set(("next", "observation_normalized"), self.normalizer.normalize(batch.get(("next", "observation"))))
        uninitialised = int(self.normalizer.count) == 0
        if uninitialised and self.env_frames >= self.total_frames:
            return batch
        self.normalizer.update(self._gather(batch.get("observation")))
        return None if uninitialised else batch

    def state_dict(self) -> dict[str, Any]:
        modules = {"normalizer": self.normalizer, "reward_scaler": self.reward_scaler}
        return {
            **super().state_dict(),
            **{name: module.state_dict() for name, module in modules.items() if module is not None},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state_dict["normalizer"])
        if self.reward_scaler is not None:
            self.reward_scaler.load_state_dict(state_dict["reward_scaler"])
