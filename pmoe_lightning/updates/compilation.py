"""Functions of tensors as compiled programs.

``torch.compile`` checks on every call that nothing has changed since it looked at the Python code, and for networks as
small as a policy these checks cost more than the work. Here a function is traced once, with real shapes and no values,
and the trace goes to the same compiler. What such a program depends on is therefore said, not found out: it reads its
arguments, and every Python number in it is that of the day it was traced.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pmoe_lightning.modules import onednn
from pmoe_lightning.processes.stopping import stop

__all__ = ["ModuleState", "compile_tensors", "signature"]

_log = logging.getLogger(__name__)
Function = Callable[..., tuple[Tensor, ...]]


def compile_tensors(function: Function, state: Sequence[Tensor], examples: Sequence[Tensor], name: str) -> Function:
    """``function`` for arguments of these shapes, types and devices; compiled before this returns.

    The program does not look at what it is given: whoever calls it makes another where the ``signature`` differs. It
    writes into its arguments where the function does. It draws its random numbers from PyTorch's generator in the order
    of the function, so the same seed gives the same draws. Neither the arguments nor the generator are touched here.
    The program has to be called without gradients; gradients may be taken inside the function. A signal ends
    the process while it compiles (``stop.unbreakable``).

    On a GPU the program is recorded as a CUDA graph.

    Args:
        function: takes tensors, returns a tuple of tensors, depends on no other tensor that ever changes.
        state: its first arguments, which are the same tensors from call to call, such as parameters.
        examples: its other arguments; their values do not matter.
        name: what is compiled, for the log, where the seconds it took are shown.
    """
    start = time.monotonic()
    inputs: list[Any] = [example.detach() for example in (*state, *examples)]
    on_gpu = inputs[0].device.type == "cuda"
    decompositions = {} if on_gpu else {torch.ops.aten.addmm.default: _product_then_bias}
    options: dict[str, Any] = {"fallback_random": True}
    if not on_gpu:
        # Written in Python, the code around the kernels takes as long as a small network's kernels.
        options["cpp_wrapper"] = True
        # Loops that share less than this, a bias for instance, stay apart. Joined, they would wait for each other's
        # products, and what the first product has left in the cache would be gone by then.
        options["score_fusion_memory_threshold"] = 2**16  # bytes
    with stop.unbreakable():
        onednn.teach_compiler()
        graph = make_fx(function, decompositions, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        with torch.no_grad():
            program = torch._inductor.compile(graph, inputs, options=options)
    _log.info("compiled %s in %.0f s", name, time.monotonic() - start)
    return _CudaGraph(program, len(state)) if on_gpu else program


def signature(entries: Mapping[NestedKey, Tensor]) -> frozenset:
    """Names, shapes, types and devices of named tensors, equal for every order of the names: what a program is for."""
    return frozenset((name, value.shape, value.dtype, value.device) for name, value in entries.items())


def _product_then_bias(bias: Tensor, x: Tensor, y: Tensor, **factors: float) -> Tensor:
    """x y + bias as two operations. On a CPU ``addmm`` copies the bias to every row first, a pass over memory; a sum of
    its own is taken along with the activation that follows. ``aten.add`` the compiler would turn into ``addmm`` again.
    """
    if factors:
        return NotImplemented
    product = x @ y
    return torch.ops.prims.add(product, bias.expand_as(product))


class _CudaGraph:
    """A program whose kernels are launched all at once, because each of them is shorter than its own launch.

    A first call runs the program as it is, which makes ready what cannot be made while recording; the second records
    it. Both happen again where the state has moved in memory, as when a checkpoint was loaded. The other arguments are
    copied to where the recording reads them, and its results from where it writes them.
    """

    def __init__(self, program: Function, state: int) -> None:
        self._program, self._state = program, state
        self._addresses: list[int] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        addresses = [tensor.data_ptr() for tensor in tensors[: self._state]]
        if addresses != self._addresses:
            self._addresses, self._graph = addresses, None
            return self._program(*tensors)
        graph = self._record(tensors) if self._graph is None else self._graph
        for own, given in zip(self._inputs, tensors[self._state :], strict=True):
            own.copy_(given)
        graph.replay()
        return tuple(output.clone() for output in self._outputs)

    def _record(self, tensors: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        self._inputs = [tensor.clone() for tensor in tensors[self._state :]]
        self._graph = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._outputs = self._program(*tensors[: self._state], *self._inputs)
        return graph


class ModuleState:
    """The parameters and buffers of a module, to run it with other tensors in their places.

    Attributes:
        tensors: the module's own, in a fixed order.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        named = dict(TensorDict.from_module(module).items(include_nested=True, leaves_only=True))
        self._keys, self.tensors = list(named), list(named.values())

    def replaced(self, tensors: Sequence[Tensor]) -> AbstractContextManager:
        """Within this context the module consists of ``tensors``, in the order of ``self.tensors``."""
        state = TensorDict({}, batch_size=[])
        for key, tensor in zip(self._keys, tensors, strict=True):
            state.set(key, tensor)
        return state.to_module(self.module, preserve_module_state=False)
