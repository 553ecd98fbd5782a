"""What compiled updates share: the loss module traced as a function of tensors, Adam, and the calls of the programs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from pmoe_lightning.processes.collectives import average_over_processes
from pmoe_lightning.updates.adam import Moments, adam_, moments, step_factors
from pmoe_lightning.updates.compilation import Function, ModuleState, compile_tensors, signature


@dataclass
class _Layout:
    """Minibatches of one kind: what they hold, what the loss makes of them, and the programs made for them."""

    batch_size: torch.Size
    columns: list[NestedKey]
    outputs: dict[str, torch.Size] = field(default_factory=dict)
    programs: dict[str, Function] = field(default_factory=dict)


class AbstractUpdate(ABC):
    r"""Steps a loss module as its forward pass, its summed backward pass and ``torch.optim.Adam`` together would.

    The loss module itself is traced, so its mathematics has no second form. Left out is the work of Python, TensorDict
    and autograd. Parameters and optimizer state change in place, so checkpoints hold what they always hold, and the
    readable form can take over at any update. With several processes gradients are averaged between the gradient and
    the step, two programs then.

    A program belongs to the names, shapes and types of the entries of a minibatch, in whatever order they come. Other
    names, shapes or types, such as a minibatch of another size, get a program of their own.

    Args:
        loss: takes a minibatch, returns ``loss_*`` and diagnostics; each loss reaches only its own parameters.
        optimizer: Adam, without weight decay and the like.
        max_grad_norm: the gradient of all parameters together is scaled down to this norm; None leaves it.
        compile: compile when minibatches of a kind first come; otherwise the same functions run as they are, slower
            than the loss module.

    Raises:
        ValueError: another optimizer, or options of Adam that are left out here.
        KeyError: in a call, minibatches without an entry that the loss reads.
    """

    def __init__(
        self,
        loss: LossModule,
        optimizer: torch.optim.Adam,
        *,
        max_grad_norm: float | None = None,
        compile: bool = True,
    ) -> None:
        options = ("weight_decay", "amsgrad", "maximize")
        extras = [name for name in options if any(group.get(name) for group in optimizer.param_groups)]
        if type(optimizer) is not torch.optim.Adam or extras:
            found = " with ".join([type(optimizer).__name__, *extras])
            raise ValueError(f"a compiled update takes the steps of plain Adam, not of {found}: use compile=false")
        self.loss, self.optimizer, self.max_grad_norm, self.compiles = loss, optimizer, max_grad_norm, compile
        self.estimator = getattr(loss, "estimator", None)
        self._annealed = () if self.estimator is None else self.estimator.annealed
        self._module = ModuleState(loss)
        #: Where the tensors of each group of the optimizer are among those of the module.
        self._groups = [self.positions(group["params"]) for group in optimizer.param_groups]
        self._trained = list(chain(*self._groups))
        #: Of the tensors that last from call to call: the module's come first, then what Adam remembers.
        self._num_module = len(self._module.tensors)
        self._num_state = self._num_module + len(Moments._fields) * len(self._trained)
        self._layouts: dict[frozenset, _Layout] = {}
        self._layout = _Layout(torch.Size(), [])

    def positions(self, tensors: Iterable[Tensor]) -> list[int]:
        """Where these tensors are among those of the module."""
        places = {tensor.data_ptr(): i for i, tensor in enumerate(self._module.tensors)}
        return [places[tensor.data_ptr()] for tensor in tensors]

    @torch.no_grad()
    def __call__(self, minibatches: TensorDictBase) -> dict[str, Tensor]:
        """One update for each of the minibatches [U, B].

        Returns:
            what the loss returns, and ``gradient_norm`` before clipping, with U values in front of each. An update
            whose norm is not finite changes nothing.
        """
        layout = self._layout = self._layout_of(minibatches[0])
        module = [tensor.detach() for tensor in self._module.tensors]
        annealed = [getattr(self.estimator, name).to(module[0].device) for name in self._annealed]
        adam = [moments(self.optimizer, group["params"]) for group in self.optimizer.param_groups]
        stacks = [minibatches.get(key) for key in layout.columns]
        stacks.append(self._factors([own.step[0] for own in adam], len(minibatches)))
        memory = list(chain.from_iterable(column for own in adam for column in own))
        rows = zip(*(stack.unbind() for stack in stacks), strict=True)
        out = torch.stack([self._step(module, memory, [*annealed, *columns], factors) for *columns, factors in rows])
        entries = out.split([shape.numel() for shape in layout.outputs.values()], 1)
        shapes = layout.outputs.items()
        return {name: entry.view(-1, *shape) for (name, shape), entry in zip(shapes, entries, strict=True)}

    def _layout_of(self, minibatch: TensorDictBase) -> _Layout:
        columns = dict(minibatch.items(include_nested=True, leaves_only=True))
        kind = signature(columns) | {minibatch.batch_size}
        if kind not in self._layouts:
            missing = [key for key in self.required_keys() if key not in columns]
            if missing:
                raise KeyError(f"the minibatches lack what {type(self.loss).__name__} reads: {missing}")
            self._layouts[kind] = _Layout(minibatch.batch_size, list(columns))
        return self._layouts[kind]

    def required_keys(self) -> list[NestedKey]:
        """The entries without which no update is taken."""
        return self.loss.in_keys

    def _factors(self, steps: list[Tensor], num_steps: int) -> Tensor:
        groups = zip(self.optimizer.param_groups, steps, strict=True)
        return torch.stack([step_factors(group, step, num_steps) for group, step in groups], 1)

    def _step(self, module: list[Tensor], memory: list[Tensor], inputs: list[Tensor], factors: Tensor) -> Tensor:
        state = [*module, *memory]
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._run(self.update, "the update", state, [*inputs, factors])[0]
        *gradients, values = self._run(self.gradients, "the gradient", module, inputs)
        average_over_processes(gradients)
        (norm,) = self._run(self.step, "the optimizer step", state, [*gradients, factors])
        return torch.cat([values, norm])

    def update(self, *tensors: Tensor) -> tuple[Tensor]:
        """Change parameters and optimizer state by one minibatch; returns all diagnostics in one tensor."""
        *gradients, values = self.gradients(*tensors[: self._num_module], *tensors[self._num_state : -1])
        (norm,) = self.step(*tensors[: self._num_state], *gradients, tensors[-1])
        return (torch.cat([values, norm]),)

    def gradients(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The gradient of the summed losses for every trained tensor, and what the loss returned in one tensor."""
        remaining = iter(tensors)
        module = list(islice(remaining, len(self._module.tensors)))
        annealed = list(islice(remaining, len(self._annealed)))
        minibatch = TensorDict({}, batch_size=self._layout.batch_size)
        for key, column in zip(self._layout.columns, remaining, strict=True):
            minibatch.set(key, column)
        for i in self._trained:
            module[i] = module[i].detach().requires_grad_()
        with torch.enable_grad(), self._replaced(module, annealed):
            out = self.loss(minibatch)
            total = sum(value for name, value in out.items() if name.startswith("loss_"))
            gradients = torch.autograd.grad(total, [module[i] for i in self._trained])
        self._layout.outputs = {name: value.shape for name, value in out.items()} | {"gradient_norm": torch.Size([])}
        return *gradients, torch.cat([value.detach().reshape(-1) for value in out.values()])

    def step(self, *tensors: Tensor) -> tuple[Tensor]:
        """Clip the gradients, take Adam's step for every group, and what follows it; returns the norm, [1]."""
        module = list(tensors[: self._num_module])
        memory = iter(tensors[self._num_module : self._num_state])
        *gradients, factors = tensors[self._num_state :]
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        if self.max_grad_norm is not None:
            scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
            gradients = [gradient * scale for gradient in gradients]
        of_groups = iter(gradients)
        for group, places, row in zip(self.optimizer.param_groups, self._groups, factors.unbind(), strict=True):
            own = Moments(*(list(islice(memory, len(places))) for _ in Moments._fields))
            parameters, slopes = [module[i] for i in places], list(islice(of_groups, len(places)))
            adam_(parameters, slopes, own, row, norm.isfinite(), betas=group["betas"], eps=group["eps"])
        self.follow(module)
        return (norm.reshape(1),)

    @abstractmethod
    def follow(self, module: list[Tensor]) -> None:
        """Change in place what follows the trained tensors of the module, such as target networks."""

    def _run(self, function: Function, name: str, state: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        if not self.compiles:
            return function(*state, *inputs)
        programs = self._layout.programs
        if name not in programs:
            programs[name] = compile_tensors(function, state, inputs, f"{name} of {type(self.loss).__name__}")
        return programs[name](*state, *inputs)

    @contextmanager
    def _replaced(self, module: Sequence[Tensor], annealed: Sequence[Tensor]) -> Iterator[None]:
        """Within this context the loss consists of these tensors, and the estimator anneals to these values."""
        own = {name: getattr(self.estimator, name) for name in self._annealed}
        try:
            for name, tensor in zip(own, annealed, strict=True):
                setattr(self.estimator, name, tensor)
            with self._module.replaced(module):
                yield
        finally:
            for name, tensor in own.items():
                setattr(self.estimator, name, tensor)
