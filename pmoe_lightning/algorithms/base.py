"""What all algorithms share as LightningModules: the policy, one manually stepped optimizer, counters and metrics."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.objectives import LossModule

from pmoe_lightning.errors import NonFiniteError
from pmoe_lightning.estimators import AbstractEstimator
from pmoe_lightning.hamiltonian import HamiltonianTransform
from pmoe_lightning.processes.collectives import gather_objects


class AbstractAlgorithm(LightningModule, ABC):
    """Optimises one TorchRL loss module on the batches it is given.

    One Lightning batch is one collector iteration, which holds many updates, so that Lightning's overhead is paid once
    per iteration. Metrics are summed as tensors and read out by ``drain_metrics``: nothing waits for the device inside
    an update.

    A subclass says what it is (``on_policy``, ``planned_updates``), what it optimises with (``configure_optimizers``)
    and what it does with a batch (``training_step``, which may leave ``last_observation`` [B, O] for the figures); and,
    where it has them, its ``estimator`` and the ``action_values`` that ``load_policy`` can rank actions by. It is made
    by a function of an actor, an estimator, the sizes O and A and its own numbers, see ``docs/extending.md``.

    Args:
        loss: the loss module; it holds every parameter that is trained.
        actor: the actor inside ``loss``.
        policy: what acts in the environment; the actor, or a sequence that ends with it.
        policy_description: plain values from which ``load_policy`` rebuilds ``policy``; written to checkpoints.

    Attributes:
        on_policy: whether it learns from rollouts of the present policy, with a normaliser where there is one and with
            the log-probabilities of what was done, or from minibatches of a replay buffer.
        compiles: whether ``training_step`` is to run as a compiled program, where there is one.
        parts: what else ``load_policy`` needs, the factories that are not this package's; empty at first.
        init_from: what a run has begun with in place of fresh weights, in plain values; None where it has not.
    """

    on_policy: ClassVar[bool]

    def __init__(
        self,
        loss: LossModule,
        actor: TensorDictModuleBase,
        policy: TensorDictModuleBase,
        policy_description: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.loss, self.actor, self.policy = loss, actor, policy
        self.policy_description = dict(policy_description or {})
        self.parts: dict[str, Callable[..., Any]] = {}
        self.init_from: dict[str, Any] | None = None
        self.compiles = False
        self.updates = 0
        self.last_observation: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    @property
    def observation_key(self) -> str:
        """The entry the actor reads."""
        return self.actor.in_keys[0]

    @property
    def estimator(self) -> AbstractEstimator | None:
        """What estimates the gradient of the mixture; None for an algorithm that estimates none."""
        return None

    @property
    def action_transform(self) -> HamiltonianTransform | None:
        """What evolves actions along the action values; None for an algorithm that has none."""
        return None

    @property
    def _optimizer(self) -> Any:
        """The one optimizer, in Lightning's wrapper, which has all that the optimizer has."""
        return self.optimizers()

    @property
    def _data(self) -> Any:
        """The data module, None where there is none; Lightning does not declare it."""
        return getattr(self.trainer, "datamodule", None)

    def planned_updates(self, data: Any) -> float:
        """Optimizer steps that the whole run will take, by which ``compile=auto`` is decided; 0: it does not say."""
        return 0.0

    def check_processes(self, number: int) -> None:
        """Refuse a number of training processes that cannot share the work evenly, with a ``ConfigurationError``."""

    def setup(self, stage: str) -> None:
        """Refuse a trainer with too many processes."""
        self.check_processes(self.trainer.world_size)

    def on_train_batch_start(self, batch: TensorDictBase, batch_idx: int) -> None:
        data = self._data
        if data is not None and self.estimator is not None:
            self.estimator.anneal(min(1.0, data.env_frames / data.total_frames))

    @abstractmethod
    def training_step(self, batch: TensorDictBase, batch_idx: int) -> None:
        """Every update of one collector iteration."""

    def step(self, out: TensorDictBase, *, max_grad_norm: float | None = None) -> None:
        """One optimizer step on the sum of the ``loss_*`` entries; each reaches only its own parameters.

        A loss module whose output has ``statistics`` takes them over with the step (``take_statistics``).
        """
        optimizer, statistics = self._optimizer, out.get("statistics", None)
        optimizer.zero_grad()
        self.differentiate(sum(value for name, value in out.items() if name.startswith("loss_")), statistics)
        norm = torch.nn.utils.clip_grad_norm_(self._trained_parameters(), max_grad_norm or math.inf)
        if statistics is not None:  # one that is not finite makes the norm not finite
            total = torch.stack([value.sum() for value in statistics.values()]).sum()
            norm = torch.where(total.isfinite(), norm, torch.nan)
        self.record({"train/gradient_norm": norm})
        # Where it is not finite, weights and moments stay as they are.
        if optimizer.optimizer.defaults.get("fused"):  # it sees to that itself, and nobody waits for the device
            optimizer.optimizer.found_inf = (~norm.isfinite()).float()
        elif not norm.isfinite():
            optimizer.zero_grad()
        optimizer.step()
        if statistics is not None:
            self.loss.take_statistics(statistics, norm.isfinite())
        self.updates += 1

    def differentiate(self, total: Tensor, statistics: TensorDictBase | None) -> None:
        """Leave the gradient in the parameters, its mean over all processes; ``statistics`` are to be averaged too."""
        self.manual_backward(total)

    def count_updates(self, count: int) -> None:
        """Count optimizer steps that a compiled update has taken without the wrapper by which Lightning counts them."""
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for _ in range(count):
            progress.increment_ready()
            progress.increment_completed()
        self.updates += count

    def _trained_parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def record(self, metrics: Mapping[str, Tensor], *, count: int | None = None) -> None:
        """Add to the running means, each entry as one value or as ``count`` of them; they stay on their device."""
        for name, value in metrics.items():
            value = value.detach() if count is None else value.sum(0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] += count or 1

    def record_loss(self, out: Mapping[str, Tensor] | TensorDictBase, *, count: int | None = None) -> None:
        """Record every entry of a loss module's output, or of ``count`` outputs stacked, under its public name."""
        self.record({_public_name(name): value for name, value in out.items()}, count=count)

    def drop_nonfinite(self) -> list[str]:
        """Forget the metrics whose running means are not finite, and return their names in the order of recording."""
        if not self._sums:
            return []
        finite = torch.stack([total.sum().isfinite() for total in self._sums.values()]).tolist()
        names = [name for name, good in zip(self._sums, finite, strict=True) if not good]
        for name in names:
            del self._sums[name], self._counts[name]
        return names

    def drain_metrics(self) -> dict[str, float]:
        """Means since the last call; elements are numbered, as in ``train/mixture/winner_frequency_0``."""
        metrics: dict[str, float] = {}
        for name, total in self._sums.items():
            mean = (total / self._counts[name]).cpu()
            for place in itertools.product(*map(range, mean.shape)):
                metrics["_".join([name, *map(str, place)])] = mean[place].item()
        self._sums, self._counts = {}, defaultdict(int)
        return metrics

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Lightning's own transfer rebuilds a TensorDict even where it is in place already."""
        if isinstance(batch, TensorDictBase) and batch.device != device:
            return batch.to(device, non_blocking=True)
        return batch

    def action_values(self) -> list[dict[str, Tensor]]:
        """The state dict of every action-value network, for acting by the best value; none where there is none."""
        return []

    @property
    def alpha(self) -> float | None:
        """The temperature, by which the entropy is weighed against the return; None for an algorithm without one."""
        return None

    def follow_rule(self, rule: str, chosen: Mapping[str, Any]) -> None:
        """Describe the policy from now on as one that acts by this deterministic rule, and how that was chosen."""
        arguments = {**self.policy_description["arguments"], "deterministic": rule}
        self.policy_description = {**self.policy_description, "arguments": arguments, "rule_chosen": dict(chosen)}

    def policy_state(self) -> dict[str, Any]:
        """What ``load_policy`` reads: the policy's description, its weights, its action values and its temperature."""
        return {
            # The units are what the critics read, and so what whoever acts by them must hand them.
            "description": {**self.policy_description, "action_units": "normalized"},
            "state_dict": dict(self.policy.state_dict()),
            "action_values": self.action_values(),
            "alpha": self.alpha,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        _check_finite(checkpoint)
        data = self._data
        # A checkpoint of the weights alone is for acting; only a whole one can be resumed from.
        if data is not None and "optimizer_states" in checkpoint:
            checkpoint["experience"] = gather_objects(data.experience())
            checkpoint["metrics"] = {"sums": dict(self._sums), "counts": dict(self._counts)}
            if data.env_frames >= data.total_frames and self.last_observation is not None:
                # For what is drawn at the end, should another process have to do it.
                checkpoint["last_observation"] = self.last_observation.clone()
        checkpoint["updates"] = self.updates
        progress = {"env_frames": data.env_frames if data else 0, "updates": self.updates}
        checkpoint["policy"] = self.policy_state() | progress

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.updates = checkpoint["updates"]
        attached = self._trainer is not None  # not in load_from_checkpoint
        if attached and "experience" in checkpoint and (data := self._data) is not None:
            data.load_experience(checkpoint["experience"][self.trainer.global_rank])
            metrics = checkpoint["metrics"]
            self._sums, self._counts = dict(metrics["sums"]), defaultdict(int, metrics["counts"])
            self.last_observation = checkpoint.get("last_observation")

    def on_fit_start(self) -> None:
        # Where the module has moved to since they were loaded.
        self._sums = {name: value.to(self.device) for name, value in self._sums.items()}
        if self.last_observation is not None:
            self.last_observation = self.last_observation.to(self.device)


def _check_finite(checkpoint: Mapping[str, Any]) -> None:
    """Refuse to write what could never be learned from again, over a checkpoint that could."""
    tensors = dict(checkpoint["state_dict"])
    for optimizer in checkpoint.get("optimizer_states", ()):
        for i, moments in optimizer["state"].items():
            tensors |= {f"optimizer.{i}.{name}": moment for name, moment in moments.items()}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not tensor.isfinite().all():
            raise NonFiniteError(f"{name} is not finite: not saved, the last checkpoint is kept")


def _public_name(name: str) -> str:
    """``loss_actor`` is logged as ``train/loss_actor``, ``hamiltonian_distance`` as ``train/hamiltonian/distance``."""
    if name.startswith("hamiltonian_"):
        return f"train/hamiltonian/{name.removeprefix('hamiltonian_')}"
    return f"train/mixture/{name}" if name.startswith("winner") else f"train/{name}"
