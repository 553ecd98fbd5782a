"""A TorchRL collector that spends its time in the environment and the policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs.utils import set_exploration_type

from pmoe_lightning.envs import AbstractEnvironment
from pmoe_lightning.updates.compilation import Function, ModuleState, compile_tensors, signature

__all__ = ["RolloutCollector"]

Arrays = Mapping[str, np.ndarray]


class RolloutCollector(Collector):
    """TorchRL's ``Collector``, whose rollouts of an ``AbstractEnvironment`` are written straight into their storage.

    Under the same seed it yields what ``Collector`` yields, key by key and draw by draw. ``Collector`` builds nested
    TensorDicts at every step and stacks them at the end; here the environments write into arrays of the whole rollout,
    the policy reads from there, and what it writes is stacked once. All but ``rollout`` is inherited: iteration,
    warm-up, weights, shutdown. With another environment, a policy that names no keys, or an argument that concerns
    single steps (``track_traj_ids``, ``use_buffers``, ``replay_buffer`` ...), so is ``rollout``.

    Args:
        *args, **kwargs: as for ``Collector``.
        compile: run the policy as a compiled program (see ``compile_tensors``), made when it first acts on entries of
            these shapes and types under this exploration type.
    """

    _carrier: TensorDict

    def __init__(self, *args: Any, compile: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compiles = compile
        self._policy_programs: dict[frozenset, Function] = {}
        self._acts_on = self.policy_device or torch.device("cpu")
        self._is_plain = (
            isinstance(self.env, AbstractEnvironment)
            and isinstance(self.policy, TensorDictModuleBase)
            and set(self.policy.in_keys) <= set(self.env.empty_root())
            and not (self._use_buffers or self.track_traj_ids or self.reset_at_each_iter or self.set_truncated)
            and not (self.replay_buffer is not None or self.interruptor or self.compact_obs or self.pre_collect_hook)
        )

    @property
    def is_mujoco(self) -> bool:
        """Whether the environments are MuJoCo's."""
        return getattr(self.env, "is_mujoco", False)

    def experience(self) -> dict[str, Any]:
        """What the next rollout depends on beside policy and random generators, as plain values and tensors."""
        return {
            "root": self._carrier.to_dict(),
            "collected_frames": self._frames,
            "simulators": self.env.simulator_state(),
        }

    def load_experience(self, experience: dict[str, Any]) -> str | None:
        """Go on from an :meth:`experience`.

        Returns:
            why the environments start a new episode instead, where they do: one line.
        """
        root = TensorDict(experience["root"], batch_size=self.env.batch_size)
        reason = self.env.load_simulator_state(experience["simulators"])
        if reason is not None:
            root = self.env.reset()
        self._carrier.update(root)
        self._frames = experience["collected_frames"]
        return reason

    @torch.no_grad()
    def rollout(self) -> TensorDictBase:
        """``frames_per_batch`` frames of the environments, [N, T]."""
        if not self._is_plain:
            return super().rollout()
        num_steps = self.frames_per_batch
        roots, outcomes = self.env.empty_root(num_steps + 1), self.env.empty_outcome(num_steps)
        observed = {key: torch.from_numpy(values) for key, values in roots.items()}
        for key, values in observed.items():
            values[0] = self._carrier.get(key)
        with set_exploration_type(self.exploration_type):
            written = self._play(roots, outcomes, observed)
        self._carrier = TensorDict({key: values[-1] for key, values in observed.items()}, self.env.batch_size)
        rollout = self._by_environment({key: values[:-1] for key, values in observed.items()} | written)
        following = self._by_environment({key: torch.from_numpy(values) for key, values in outcomes.items()})
        return rollout.set("next", following)

    def _play(self, roots: Arrays, outcomes: Arrays, observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fill the arrays step by step; returns what the policy wrote, each [T, N, ...]."""
        inputs = [observed[key].unbind() for key in self.policy.in_keys]
        if self._should_use_random_frames():
            keys, act = ["action"], self._act_at_random
        else:
            keys, act = self.policy.out_keys, self._policy_step([values[0] for values in inputs])
        carry, played = [key for key in keys if key in self.env.carry], []
        for t in range(self.frames_per_batch):
            outputs = act(*(values[t].to(self._acts_on) for values in inputs))
            played.append(outputs)
            written = dict(zip(keys, outputs, strict=True))
            self.env.step_into(
                written["action"].cpu().numpy(),
                {key: written[key].cpu().numpy() for key in carry},
                {key: values[t] for key, values in outcomes.items()},
                {key: values[t + 1] for key, values in roots.items()},
            )
        return {key: torch.stack(values) for key, values in zip(keys, zip(*played, strict=True), strict=True)}

    def _policy_step(self, inputs: list[Tensor]) -> Function:
        """The policy as a function of what it reads, N rows each."""
        if not self._compiles:
            return self._act
        examples = {key: values.to(self._acts_on) for key, values in zip(self.policy.in_keys, inputs, strict=True)}
        kind = signature(examples) | {self.exploration_type}
        if kind not in self._policy_programs:
            state = ModuleState(self.policy)

            def act(*tensors: Tensor) -> tuple[Tensor, ...]:
                with state.replaced(tensors[: len(state.tensors)]):
                    return self._act(*tensors[len(state.tensors) :])

            program = compile_tensors(act, state.tensors, list(examples.values()), "the acting policy")
            live = [tensor.detach() for tensor in state.tensors]
            self._policy_programs[kind] = lambda *inputs: program(*live, *inputs)
        return self._policy_programs[kind]

    def _act(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        entries = dict(zip(self.policy.in_keys, inputs, strict=True))
        state = self.policy(TensorDict._new_unsafe(entries, batch_size=self.env.batch_size))
        return tuple(state.get(key) for key in self.policy.out_keys)

    def _act_at_random(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self.env.rand_action(TensorDict({}, self.env.batch_size)).get("action"),)

    def _by_environment(self, entries: Mapping[str, Tensor]) -> TensorDict:
        """[T, N, ...] as a TensorDict [N, T]."""
        tensors = {key: value.transpose(0, 1).contiguous() for key, value in entries.items()}
        return TensorDict(tensors, (*self.env.batch_size, self.frames_per_batch), device=self.storing_device)
