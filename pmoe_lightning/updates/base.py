"""What compiled updates share: the loss module traced as a function of tensors, Adam, and the calls of the programs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from pmoe_lightning.processes.collectives import average_over_processes
from pmoe_lightning.updates.adam import Moments, adam_, moments, step_factors
from pmoe_lightning.updates.compilation import Function, ModuleState, compile_tensors, signature


class Turn(NamedTuple):
    """A kind of update, where several take turns."""

    losses: Callable[[TensorDictBase], TensorDictBase]
    """What is evaluated: the loss module, or a part of what it evaluates."""
    groups: tuple[int, ...]
    """Which groups of the optimizer are stepped."""


@dataclass
class _Layout:
    """Minibatches of one kind: what they hold, what a turn makes of them, and the programs made for that."""

    batch_size: torch.Size
    columns: list[NestedKey]
    outputs: dict[int, dict[str, torch.Size]] = field(default_factory=dict)
    programs: dict[tuple[int, str], Function] = field(default_factory=dict)


class AbstractUpdate(ABC):
    r"""Steps a loss module as its forward pass, its summed backward pass and ``torch.optim.Adam`` together would.

    The loss module itself is traced, so its mathematics has no second form. Left out is the work of Python, TensorDict
    and autograd. Parameters and optimizer state change in place, so checkpoints hold what they always hold, and the
    readable form can take over at any update. With several processes gradients are averaged between the gradient and
    the step, two programs then.

    What a loss returns as ``statistics`` are new values of its buffers. They take the way of the gradients: averaged
    over processes, and taken over by a step that is taken.

    A program belongs to a turn, and to the names, shapes and types of the entries of a minibatch, in whatever order
    they come. Other names, shapes or types, such as a minibatch of another size, get a program of their own.

    Args:
        loss: takes a minibatch, returns ``loss_*`` and diagnostics; each loss reaches only its own parameters.
        optimizer: Adam, without weight decay and the like.
        max_grad_norm: the gradient of all parameters together is scaled down to this norm; None leaves it.
        turns: the kinds of update there are; None: one, of the whole loss.
        statistics: the buffers that the loss returns anew, by their names there.
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
        turns: Sequence[Turn] | None = None,
        statistics: Mapping[str, Tensor] | None = None,
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
        self.turns = turns or [Turn(loss, tuple(range(len(self._groups))))]
        self._statistics = dict(zip(statistics or {}, self.positions((statistics or {}).values()), strict=True))
        self._num_module = len(self._module.tensors)
        self._layouts: dict[frozenset, _Layout] = {}
        self._layout = _Layout(torch.Size(), [])

    def positions(self, tensors: Iterable[Tensor]) -> list[int]:
        """Where these tensors are among those of the module."""
        places = {tensor.data_ptr(): i for i, tensor in enumerate(self._module.tensors)}
        return [places[tensor.data_ptr()] for tensor in tensors]

    def turn_of(self, update: int) -> int:
        """Which of the turns the update is that comes after this many."""
        return 0

    @torch.no_grad()
    def __call__(self, minibatches: TensorDictBase, first: int = 0) -> dict[str, Tensor]:
        """One update for each of the minibatches [U, B].

        Args:
            first: the number of updates that were taken before, where there are turns.

        Returns:
            what the loss returns, and ``gradient_norm`` before clipping, with as many values in front of each as there
            were updates that returned it. An update whose norm, or whose statistics, are not finite changes nothing.
        """
        layout = self._layout = self._layout_of(minibatches[0])
        module = [tensor.detach() for tensor in self._module.tensors]
        annealed = [getattr(self.estimator, name).to(module[0].device) for name in self._annealed]
        order = [self.turn_of(first + i) for i in range(len(minibatches))]
        factors, memories = self._factors(order), {turn: self._memory(turn) for turn in set(order)}
        rows = zip(*(minibatches.get(key).unbind() for key in layout.columns), strict=True)
        values: dict[int, list[Tensor]] = {turn: [] for turn in order}
        for turn, columns, row in zip(order, rows, factors, strict=True):
            values[turn].append(self._step(turn, module, memories[turn], [*annealed, *columns], row))
        outs = [self._named(layout.outputs[turn], torch.stack(own)) for turn, own in values.items()]
        if len(outs) == 1:
            return outs[0]
        return _in_order(outs, [[i for i, each in enumerate(order) if each == turn] for turn in values])

    def _memory(self, turn: int) -> list[Tensor]:
        """What Adam remembers of what the turn trains."""
        groups = (self.optimizer.param_groups[group]["params"] for group in self.turns[turn].groups)
        return list(chain.from_iterable(column for group in groups for column in moments(self.optimizer, group)))

    def _factors(self, order: Sequence[int]) -> Iterator[Float[Tensor, "groups 2"]]:
        """Of each of the coming updates, the factors of the groups that it steps."""
        of_groups = {}
        for i, group in enumerate(self.optimizer.param_groups):
            if number := sum(i in self.turns[turn].groups for turn in order):
                step = moments(self.optimizer, group["params"]).step[0]
                of_groups[i] = step_factors(group, step, number)
        if len(set(order)) == 1:
            return iter(torch.stack(list(of_groups.values()), 1).unbind())
        steps = {i: iter(factors.unbind()) for i, factors in of_groups.items()}
        return (torch.stack([next(steps[i]) for i in self.turns[turn].groups]) for turn in order)

    def _named(self, shapes: Mapping[str, torch.Size], out: Float[Tensor, "U _"]) -> dict[str, Tensor]:
        entries = out.split([shape.numel() for shape in shapes.values()], 1)
        return {name: entry.view(-1, *shape) for (name, shape), entry in zip(shapes.items(), entries, strict=True)}

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

    def _step(
        self, turn: int, module: list[Tensor], memory: list[Tensor], inputs: list[Tensor], factors: Tensor
    ) -> Tensor:
        state = [*module, *memory]
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._run(turn, self.update, "the update", state, [*inputs, factors])[0]
        *results, values = self._run(turn, self.gradients, "the gradient", module, inputs)
        average_over_processes(results)
        (norm,) = self._run(turn, self.step, "the optimizer step", state, [*results, factors])
        return torch.cat([values, norm])

    def update(self, turn: int, *tensors: Tensor) -> tuple[Tensor]:
        """Change parameters and optimizer state by one minibatch; returns all diagnostics in one tensor."""
        num_state = self._num_state(turn)
        *results, values = self.gradients(turn, *tensors[: self._num_module], *tensors[num_state:-1])
        (norm,) = self.step(turn, *tensors[:num_state], *results, tensors[-1])
        return (torch.cat([values, norm]),)

    def gradients(self, turn: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The gradient of the turn's summed losses for every tensor that it trains, the new statistics, and what else
        the losses returned, in one tensor."""
        remaining = iter(tensors)
        module = list(islice(remaining, len(self._module.tensors)))
        annealed = list(islice(remaining, len(self._annealed)))
        minibatch = TensorDict({}, batch_size=self._layout.batch_size)
        for key, column in zip(self._layout.columns, remaining, strict=True):
            minibatch.set(key, column)
        trained = self._trained(turn)
        for i in trained:
            module[i] = module[i].detach().requires_grad_()
        with torch.enable_grad(), self._replaced(module, annealed):
            out = self.turns[turn].losses(minibatch)
            total = sum(value for name, value in out.items() if name.startswith("loss_"))
            gradients = torch.autograd.grad(total, [module[i] for i in trained])
        statistics = [out["statistics"][name] for name in self._statistics]
        out = {name: value for name, value in out.items() if name != "statistics"}
        shapes = {name: value.shape for name, value in out.items()}
        self._layout.outputs[turn] = shapes | {"gradient_norm": torch.Size([])}
        return *gradients, *statistics, torch.cat([value.detach().reshape(-1) for value in out.values()])

    def step(self, turn: int, *tensors: Tensor) -> tuple[Tensor]:
        """Clip the gradients, take Adam's step for every group of the turn and the statistics with it, and what
        follows; returns the norm, [1]."""
        module, num_state = list(tensors[: self._num_module]), self._num_state(turn)
        memory = iter(tensors[self._num_module : num_state])
        *results, factors = tensors[num_state:]
        trained = len(self._trained(turn))
        gradients, statistics = results[:trained], results[trained:]
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        if statistics:  # one that is not finite makes the norm not finite
            total = torch.stack([value.sum() for value in statistics]).sum()
            norm = torch.where(total.isfinite(), norm, torch.nan)
        if self.max_grad_norm is not None:
            scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
            gradients = [gradient * scale for gradient in gradients]
        of_groups, finite = iter(gradients), norm.isfinite()
        for g, row in zip(self.turns[turn].groups, factors.unbind(), strict=True):
            group, places = self.optimizer.param_groups[g], self._groups[g]
            own = Moments(*(list(islice(memory, len(places))) for _ in Moments._fields))
            parameters, slopes = [module[i] for i in places], list(islice(of_groups, len(places)))
            adam_(parameters, slopes, own, row, finite, betas=group["betas"], eps=group["eps"])
        for place, value in zip(self._statistics.values(), statistics, strict=True):
            module[place].copy_(torch.where(finite, value, module[place]))
        self.follow(module)
        return (norm.reshape(1),)

    def _trained(self, turn: int) -> list[int]:
        return list(chain(*(self._groups[group] for group in self.turns[turn].groups)))

    def _num_state(self, turn: int) -> int:
        """Of the tensors that last from call to call: the module's come first, then what Adam remembers."""
        return self._num_module + len(Moments._fields) * len(self._trained(turn))

    @abstractmethod
    def follow(self, module: list[Tensor]) -> None:
        """Change in place what follows the trained tensors of the module, such as target networks."""

    def _run(
        self, turn: int, function: Callable, name: str, state: list[Tensor], inputs: list[Tensor]
    ) -> tuple[Tensor, ...]:
        if not self.compiles:
            return function(turn, *state, *inputs)
        programs = self._layout.programs
        if (turn, name) not in programs:
            number = f" {turn + 1}" if len(self.turns) > 1 else ""
            said = f"{name}{number} of {type(self.loss).__name__}"
            programs[turn, name] = compile_tensors(partial(function, turn), state, inputs, said)
        return programs[turn, name](*state, *inputs)

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


def _in_order(outs: Sequence[Mapping[str, Tensor]], places: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What several turns returned by name, in the order of the updates that returned it."""
    merged = {}
    for name in dict.fromkeys(chain(*outs)):
        found = [(out[name], updates) for out, updates in zip(outs, places, strict=True) if name in out]
        values, updates = torch.cat([value for value, _ in found]), list(chain(*(own for _, own in found)))
        merged[name] = values[sorted(range(len(updates)), key=updates.__getitem__)] if len(found) > 1 else values
    return merged
