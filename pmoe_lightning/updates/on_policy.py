"""One minibatch of PPO or DAC as a graph of tensors: loss, gradient, norm clip and Adam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule

from pmoe_lightning.compilation import Function, ModuleState, compile_tensors
from pmoe_lightning.updates.adam import Moments, adam_, moments, step_factors
from pmoe_lightning.updates.processes import average_over_processes


class OnPolicyUpdate:
    r"""Steps a loss module as its forward, backward, ``clip_grad_norm_`` and ``torch.optim.Adam`` together would.

    The loss module itself is traced, so its mathematics has no second form. Left out is the work of Python, TensorDict
    and autograd, nearly all the time of an update of networks as small as these. Parameters and optimizer state change
    in place, so checkpoints hold what they always hold, and the readable form can take over at any update. With several
    processes gradients are averaged between the gradient and the step, two programs then.

    Args:
        loss: takes a minibatch, returns ``loss_*`` and diagnostics.
        optimizer: Adam with one group, every trained parameter of ``loss``, without weight decay and the like.
        max_grad_norm: the gradient of all parameters together is scaled down to this norm.
        compile: compile at the first call; otherwise the same functions run as they are, slower than the loss module.

    Example:
        >>> update = OnPolicyUpdate(loss, torch.optim.Adam(loss.parameters()), max_grad_norm=0.5)
        >>> out = update(transitions[torch.randperm(2048)].view(32, 64))  # 32 updates
    """

    def __init__(
        self, loss: LossModule, optimizer: torch.optim.Adam, *, max_grad_norm: float, compile: bool = True
    ) -> None:
        (self.group,) = optimizer.param_groups
        self.loss, self.optimizer, self.max_grad_norm, self.compiles = loss, optimizer, max_grad_norm, compile
        self.estimator = getattr(loss, "estimator", None)
        self._annealed = () if self.estimator is None else self.estimator.annealed
        self._module = ModuleState(loss)
        self._trained = [i for i, tensor in enumerate(self._module.tensors) if tensor.requires_grad]
        self._parameters = [self._module.tensors[i] for i in self._trained]
        self._programs: dict[str, Function] = {}
        self._columns: list[str] = []
        self._entries: dict[str, torch.Size] = {}

    @torch.no_grad()
    def __call__(self, minibatches: TensorDictBase) -> dict[str, Tensor]:
        """One update for each of the minibatches [U, B], always of one size B.

        Returns:
            what the loss returns, and ``gradient_norm`` before clipping, with U values in front of each.
        """
        self._columns = list(minibatches.keys())
        module = [tensor.detach() for tensor in self._module.tensors]
        annealed = [getattr(self.estimator, name) for name in self._annealed]
        adam = moments(self.optimizer, self._parameters)
        factors = step_factors(self.group, adam.step[0], len(minibatches))
        stacks = [minibatches.get(key) for key in self._columns]
        rows = zip(*(stack.unbind() for stack in (*stacks, factors)), strict=True)
        memory = list(chain(*adam))
        out = torch.stack([self._step([*module, *annealed, *columns], memory, row) for *columns, row in rows])
        entries = out.split([shape.numel() for shape in self._entries.values()], 1)
        shapes = self._entries.items()
        return {name: entry.view(-1, *shape) for (name, shape), entry in zip(shapes, entries, strict=True)}

    def _step(self, inputs: list[Tensor], memory: list[Tensor], factors: Tensor) -> Tensor:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._run(self.update, "the update", [*inputs, *memory, factors])[0]
        *gradients, values = self._run(self.gradients, "the gradient", inputs)
        average_over_processes(gradients)
        parameters = [inputs[i] for i in self._trained]
        (norm,) = self._run(self.apply, "the optimizer step", [*parameters, *gradients, *memory, factors])
        return torch.cat([values, norm])

    def update(self, *tensors: Tensor) -> tuple[Tensor]:
        """Change parameters and optimizer state by one minibatch; returns all diagnostics in one tensor."""
        memory = 3 * len(self._trained)
        inputs = tensors[: -memory - 1]
        *gradients, values = self.gradients(*inputs)
        (norm,) = self.apply(*(inputs[i] for i in self._trained), *gradients, *tensors[-memory - 1 :])
        return (torch.cat([values, norm]),)

    def gradients(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The gradient of the summed losses for every trained parameter, and what the loss returned in one tensor."""
        module, annealed = list(tensors[: len(self._module.tensors)]), tensors[len(self._module.tensors) :]
        columns = annealed[len(self._annealed) :]
        for i in self._trained:
            module[i] = module[i].detach().requires_grad_()
        minibatch = TensorDict(dict(zip(self._columns, columns, strict=True)), batch_size=columns[0].shape[:1])
        with torch.enable_grad(), self._module.replaced(module), self._annealing(annealed):
            out = self.loss(minibatch)
            total = sum(value for name, value in out.items() if name.startswith("loss_"))
            gradients = torch.autograd.grad(total, [module[i] for i in self._trained])
        self._entries = {name: value.shape for name, value in out.items()} | {"gradient_norm": torch.Size([])}
        return *gradients, torch.cat([value.detach().reshape(-1) for value in out.values()])

    def apply(self, *tensors: Tensor) -> tuple[Tensor]:
        """Clip the gradients and take Adam's step; returns the norm before clipping, [1]."""
        n, factors = len(self._trained), tensors[-1]
        parameters, gradients, *memory = (tensors[i * n : (i + 1) * n] for i in range(5))
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        clipped = [gradient * scale for gradient in gradients]
        adam = {name: self.group[name] for name in ("betas", "eps")}
        adam_(parameters, clipped, Moments(*memory), factors, norm.isfinite(), **adam)
        return (norm.reshape(1),)

    def _run(self, function: Function, name: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        if not self.compiles:
            return function(*tensors)
        if name not in self._programs:
            self._programs[name] = compile_tensors(function, tensors, f"{name} of {type(self.loss).__name__}")
        return self._programs[name](*tensors)

    @contextmanager
    def _annealing(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Within this context the estimator has these values of what it anneals, as arguments of the program."""
        own = {name: getattr(self.estimator, name) for name in self._annealed}
        try:
            for name, tensor in zip(own, tensors, strict=False):
                setattr(self.estimator, name, tensor)
            yield
        finally:
            for name, tensor in own.items():
                setattr(self.estimator, name, tensor)
