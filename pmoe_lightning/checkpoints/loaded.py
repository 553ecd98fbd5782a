"""A loaded policy: for TensorDicts as every policy, and for plain arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torch.distributions import Distribution

from pmoe_lightning.errors import error_line
from pmoe_lightning.modules.acting import Actor, distribution_at, find_actor
from pmoe_lightning.modules.option_policies import OptionPolicies


class LoadedPolicy(TensorDictModuleBase):
    """What ``load_policy`` returns: ``tensordict["observation"] [*B, O] -> tensordict["action"] [*B, A]``.

    Observations may be of any number type, NumPy's included: they are cast to that of the weights. What the caller's
    tensordict holds stays as it is. A policy that sees pixels reads ``pixels`` uint8 [*B, C, H, W] in place of it.

    Args:
        policy: an actor, with its normaliser in front, its action transform behind and its candidates around it.
        observation_dim: O.
        pixels: C, H and W of what is seen; None: the policy reads observations.
    """

    def __init__(
        self, policy: TensorDictModuleBase, observation_dim: int, pixels: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.policy, self.observation_dim, self.pixels = policy, observation_dim, pixels
        self.in_keys = list(policy.in_keys)
        self.out_keys = [key for key in policy.out_keys if pixels is None or key != "observation"]

    @property
    def actor(self) -> Actor:
        """The actor alone, which loss modules take. It reads what the normaliser writes, where there is one."""
        return find_actor(self.policy)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = self.policy(self._inputs(tensordict))
        hidden = self.in_keys if self.pixels is None else [*self.in_keys, "observation"]
        return tensordict.update(out.exclude(*hidden))

    def get_dist(self, tensordict: TensorDictBase) -> Distribution | OptionPolicies:
        """The mixture at the observations of the tensordict; the ``OptionPolicies`` of a policy with options.

        ``ExplorationType.RANDOM`` draws from it; an action transform evolves the draw, a safe policy chooses among
        several.
        """
        return distribution_at(self.policy, self._inputs(tensordict, self.policy.in_keys[:1]))

    @torch.no_grad()
    def predict(self, observation: Any) -> np.ndarray:
        """The action [A] for an observation [O], or the actions [B, A] for a batch of them [B, O], as float32.

        A policy that sees pixels takes them, [C, H, W] or [B, C, H, W] of whole numbers from 0 to 255.

        Acts by the exploration type in force, so deterministically unless one is set.

        Args:
            observation: an array or whatever NumPy makes one of.

        Raises:
            ValueError: it is of another shape, holds something else than finite numbers, or the policy has a memory.

        Example:
            >>> observation, _ = env.reset()
            >>> observation, *_ = env.step(load_policy("checkpoints/best.ckpt").predict(observation))
        """
        if memory := [str(key) for key in self.in_keys if key not in ("observation", "pixels")]:
            raise ValueError(
                f"predict takes observations alone, but this policy also reads {', '.join(memory)}: call it with a "
                "TensorDict, in an environment made by envs.with_memory"
            )
        values = self._observation(observation) if self.pixels is None else self._seen(observation, self.pixels)
        single = (self.observation_dim,) if self.pixels is None else self.pixels
        rows = values.reshape(-1, *single)
        batch = TensorDict({self.in_keys[0]: rows}, batch_size=len(rows))
        action = self.policy(batch).get("action").numpy(force=True).astype(np.float32, copy=False)
        return action.reshape(*values.shape[: values.ndim - len(single)], action.shape[-1])

    def _seen(self, pixels: Any, shape: tuple[int, ...]) -> Tensor:
        """Pixels as a tensor beside the weights, checked."""
        values = _numbers(pixels, "the pixels are")
        if values.ndim not in (3, 4) or values.shape[-3:] != shape:
            raise ValueError(f"the pixels must be of shape {list(shape)} or [B, ...], not {list(values.shape)}")
        with np.errstate(invalid="ignore"):  # what is no byte is said below
            whole = values.astype(np.uint8)
        if not np.array_equal(whole, values):
            raise ValueError("the pixels must be whole numbers from 0 to 255")
        return torch.from_numpy(whole.copy()).to(next(self.policy.parameters()).device)

    def _observation(self, observation: Any) -> Tensor:
        """The observation as a tensor beside the weights, checked."""
        values = _numbers(observation, "the observation is")
        if values.ndim not in (1, 2) or values.shape[-1] != self.observation_dim:
            size = self.observation_dim
            raise ValueError(f"the observation must be of shape [{size}] or [B, {size}], not {list(values.shape)}")
        observation = torch.from_numpy(values.astype(np.float64, order="C")).to(next(self.policy.parameters()))
        if not observation.isfinite().all():
            raise ValueError("the observation holds NaN, an infinity, or a number too large for the policy's float32")
        return observation

    def _inputs(self, tensordict: TensorDictBase, keys: list | None = None) -> TensorDictBase:
        """What the policy reads, numbers of any width in that of its weights."""
        dtype = next(self.policy.parameters()).dtype
        inputs = tensordict.select(*(self.in_keys if keys is None else keys))
        if self.pixels is not None:
            return inputs
        key = self.in_keys[0]
        return inputs.set(key, inputs.get(key).to(dtype))


def _numbers(given: Any, subject: str) -> np.ndarray:
    """The array of real numbers that NumPy makes of it; text, times and what a mask hides are none.

    Raises:
        ValueError: it is something else.
    """
    try:
        if isinstance(given, Tensor):
            given = given.detach().cpu()
            given = (given.float() if given.dtype == torch.bfloat16 else given).numpy()  # which NumPy does not know
        values = np.asarray(given)
        values = values.astype(np.float64) if values.dtype.kind == "O" else values
    except (TypeError, ValueError) as error:
        raise ValueError(f"{subject} not an array of numbers: {error_line(error)}") from None
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{subject} not an array of numbers: it holds {values.dtype}")
    if np.ma.is_masked(given):
        raise ValueError(f"{subject} masked in places: fill them first")
    return values
