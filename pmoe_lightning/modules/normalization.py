"""Running normalisation for on-policy learning: observations to zero mean and unit variance, rewards to unit scale.

Statistics are kept as (count, mean, variance) and merged batch by batch with the parallel formula of Chan, Golub and
LeVeque (1983), which gives the statistics of the concatenated data whatever the batch sizes.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

__all__ = ["ObservationNormalizer", "RewardScaler"]

_EPSILON = 1e-8


def _merge_moments(count: Tensor, mean: Tensor, var: Tensor, values: Tensor) -> None:
    """Merge the rows of ``values`` [M, D] into ``count`` [], ``mean`` [D] and ``var`` [D], in place.

    n' = n + m;  mean' = mean + d m / n';  n' var' = n var + m var_m + d^2 n m / n',  d = mean_m - mean

    Computed in float64, and on the CPU because not every device has it; what is kept is float32.
    """
    values = values.detach().to("cpu", torch.float64)
    n, m = int(count), len(values)
    old_mean, old_var = mean.to("cpu", torch.float64), var.to("cpu", torch.float64)
    delta = values.mean(0) - old_mean
    total = n + m
    new_var = (n * old_var + m * values.var(0, unbiased=False) + delta.square() * (n * m / total)) / total
    mean.copy_(old_mean + delta * (m / total))
    var.copy_(new_var)
    count.fill_(total)


class ObservationNormalizer(TensorDictModuleBase):
    """Writes ``clip((observation - mean) / sqrt(var + 1e-8), -clip, clip)`` as ``observation_normalized``, float32.

    Before the first :meth:`update` mean is 0 and var 1: the identity, up to the clip. ``forward`` never changes the
    statistics, so the same module serves acting, training, evaluation and the exported policy.

    Buffers: ``mean`` [O] and ``var`` [O] float32, ``count`` [] int64 (observations seen).

    Args:
        observation_dim: O.
        clip: largest magnitude of a normalised component.

    Example:
        >>> normalizer = ObservationNormalizer(3)
        >>> normalizer.update(torch.randn(4, 100, 3) * 5 + 2)
        >>> normalizer(TensorDict(observation=torch.randn(7, 3), batch_size=7))["observation_normalized"].shape
        torch.Size([7, 3])
    """

    in_keys = ["observation"]
    out_keys = ["observation_normalized"]

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, observation_dim: int, *, clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.zeros(observation_dim))
        self.register_buffer("var", torch.ones(observation_dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set("observation_normalized", self.normalize(tensordict.get("observation")))

    def normalize(self, observation: Float[Tensor, "*B O"]) -> Float[Tensor, "*B O"]:
        """Normalise ``observation`` [..., O] with the present statistics."""
        return ((observation - self.mean) * (self.var + _EPSILON).rsqrt()).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, observation: Float[Tensor, "*B O"]) -> None:
        """Merge the statistics of ``observation`` [..., O] into the running ones."""
        _merge_moments(self.count, self.mean, self.var, observation.reshape(-1, observation.shape[-1]))


class RewardScaler(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return, then clips them.

    R_t = r_t + gamma R_{t-1}, where R restarts from 0 after a termination or truncation;
    scaled r_t = clip(r_t / sqrt(Var[R] + 1e-8), -clip, clip)

    The mean is not subtracted, so a reward never changes its sign. As in Stable-Baselines3's VecNormalize the
    statistics include the rewards being scaled; unlike there, one rollout is scaled by one number (its statistics are
    merged as a whole), so rewards of the same rollout stay comparable.

    Buffers: ``discounted_return`` [N] (R after the last step of the previous rollout), ``mean`` [1], ``var`` [1] and
    ``count`` [] of all R seen.

    Args:
        num_envs: N, the number of environments of a rollout.
        gamma: discount of R; use the one of the algorithm.
        clip: largest magnitude of a scaled reward.
    """

    discounted_return: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, num_envs: int = 1, *, gamma: float = 0.99, clip: float = 10.0) -> None:
        super().__init__()
        self.gamma, self.clip = gamma, clip
        self.register_buffer("discounted_return", torch.zeros(num_envs))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("var", torch.ones(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(
        self,
        reward: Float[Tensor, "N T 1"],
        done: Bool[Tensor, "N T 1"],
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "N T 1"]:
        """Merge one rollout into the statistics and return its scaled rewards.

        Args:
            reward: [N, T, 1], in time order along T, following on from the previous rollout.
            done: [N, T, 1] bool, terminated or truncated at that step.
            gather: from the values R of this process to those of all, where the statistics are shared.
        """
        returns = self._discounted_returns(reward, done)
        if gather is not None:
            returns = gather(returns)
        _merge_moments(self.count, self.mean, self.var, returns.reshape(-1, 1))
        return (reward * (self.var + _EPSILON).rsqrt()).clamp(-self.clip, self.clip)

    def _discounted_returns(self, reward: Tensor, done: Tensor) -> Tensor:
        """All R_t, [T, N]; the accumulator moves on to the end of the rollout."""
        rewards = reward.squeeze(-1).T.to("cpu", torch.float64).numpy()
        going_on = self.gamma * ~done.squeeze(-1).T.cpu().numpy()
        current = self.discounted_return.to("cpu", torch.float64).numpy().copy()
        returns = np.empty_like(rewards)
        for t in range(len(rewards)):
            returns[t] = current = rewards[t] + current
            current = current * going_on[t]
        self.discounted_return.copy_(torch.from_numpy(current))
        return torch.from_numpy(returns)
