"""Transitions over n steps, from rollouts that follow on from one another."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

__all__ = ["NStepTransitions"]

_ENDS = "ends"


class NStepTransitions:
    r"""Turns rollouts [N, T] into transitions [M] over up to n steps (Sutton 1988).

        R_t = sum_{k < m} gamma^k r_{t+k},   then the state s_{t+m},   m = min(n, steps to the end of the episode)

    m is ``steps_to_next_obs``, by which TorchRL's value estimators discount what they ask of s_{t+m}. A cost is summed
    in the same way with a discount of its own. A transition is given out, once, when its last step is there; what is
    incomplete waits for the next rollout. An episode that ends, by termination or truncation, ends every transition in
    it; so does a step in which the simulator broke down (``unusable``, itself left out), the step before being the
    last, and a rollout that does not begin where the one before stopped.

    The steps between are those of earlier policies, without correction, and their entropy is left out: with n > 1 what
    the critics learn is biased, as in every n-step method of a replay buffer.

    Args:
        n: the most steps of a transition.
        gamma, cost_gamma: discounts per step of the reward and of the cost.
    """

    def __init__(self, n: int, gamma: float, cost_gamma: float | None = None) -> None:
        self.n, self.gamma, self.cost_gamma = n, gamma, cost_gamma
        #: The last n - 1 steps [N, <= n - 1], with where episodes were known to end when they were last looked at.
        self.waiting: TensorDictBase | None = None

    def __call__(self, rollout: TensorDictBase) -> TensorDictBase:
        """The transitions that this rollout completes, of all environments one after the other."""
        unusable = rollout.get("unusable", None)
        steps = rollout.exclude("unusable")
        broken = torch.zeros_like(rollout.get(("next", "done"))) if unusable is None else unusable
        steps.set(_ENDS, rollout.get(("next", "done")) | broken)
        steps.set("broken", broken)
        waited = 0
        given = None
        if self.waiting is not None:
            waited, given = self.waiting.shape[1], _end_follows(self.waiting.get(_ENDS).squeeze(-1))
            self._end_where_interrupted(steps)
            steps = torch.cat([self.waiting, steps], 1)
        ends, broken = steps.get(_ENDS).squeeze(-1), steps.get("broken").squeeze(-1)
        ends[:, :-1] |= broken[:, 1:]
        last, complete = self._last_steps(ends)
        complete &= ~broken
        if given is not None:
            complete[:, :waited] &= ~given
        kept = min(self.n - 1, steps.shape[1])
        self.waiting = steps[:, steps.shape[1] - kept :].clone() if kept else None
        return self._summed(steps, last, complete)

    def _end_where_interrupted(self, steps: TensorDictBase) -> None:
        """Environments that were made anew, as after a worker was lost, do not go on where they were."""
        waiting = self.waiting
        assert waiting is not None  # nothing else is called without
        before, now = waiting.get(("next", "observation"))[:, -1], steps.get("observation")[:, 0]
        waiting.get(_ENDS)[:, -1] |= (before != now).flatten(1).any(1, keepdim=True)

    def _last_steps(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """For a transition from every step [N, S], which step is its last, and whether that is there."""
        size = ends.shape[1]
        last = torch.arange(size, device=ends.device).expand(ends.shape).clone()
        for _ in range(self.n - 1):
            last += (~ends.gather(1, last) & (last < size - 1)).long()
        there = last - torch.arange(size, device=ends.device) == self.n - 1
        return last, there | ends.gather(1, last)

    def _summed(self, steps: TensorDictBase, last: Tensor, complete: Tensor) -> TensorDictBase:
        places = torch.arange(last.shape[1], device=last.device).expand_as(last)
        env, first = complete.nonzero(as_tuple=True)
        last = last[env, first]
        after = steps.get("next")[env, last]
        after.set("reward", _discounted(steps.get(("next", "reward")), env, first, last, self.n, self.gamma))
        if "cost" in after.keys():  # noqa: SIM118 (a TensorDict iterates over its batch)
            cost_gamma = self.gamma if self.cost_gamma is None else self.cost_gamma
            after.set("cost", _discounted(steps.get(("next", "cost")), env, first, last, self.n, cost_gamma))
        root = steps.exclude("next", _ENDS, "broken")[env, first]
        taken = (last - places[env, first] + 1).unsqueeze(-1)
        return root.set("next", after).set("steps_to_next_obs", taken)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors by dotted names."""
        return {} if self.waiting is None else dict(self.waiting.flatten_keys(".").clone().items())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.waiting = TensorDict(state).auto_batch_size_(2).unflatten_keys(".") if state else None


def _end_follows(ends: Tensor) -> Tensor:
    """Whether there is an end at a step [N, S] or behind it."""
    return ends.flip(1).long().cummax(1).values.flip(1).bool()


def _discounted(values: Tensor, env: Tensor, first: Tensor, last: Tensor, n: int, gamma: float) -> Tensor:
    """Sums [M, 1] of values [N, S, 1] from a first to a last step."""
    total = values[env, first]
    for k in range(1, n):
        goes_on = (first + k <= last).unsqueeze(-1)
        total = total + gamma**k * torch.where(goes_on, values[env, (first + k).minimum(last)], 0.0)
    return total
