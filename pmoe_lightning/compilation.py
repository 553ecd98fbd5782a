"""Functions of tensors as compiled programs.

``torch.compile`` checks on every call that nothing has changed since it looked at the Python code, and for networks as
small as a policy these checks cost more than the work. Here a function is traced once, with real shapes and no values,
and the trace goes to the same compiler. What such a program depends on is therefore said, not found out: it reads its
arguments, and every Python number in it is that of the day it was traced.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["ModuleState", "compile_tensors"]

_log = logging.getLogger(__name__)
Function = Callable[..., tuple[Tensor, ...]]


def compile_tensors(function: Function, examples: Sequence[Tensor], name: str) -> Function:
    """``function`` for arguments of the shapes, types and devices of ``examples``; compiled before this returns.

    The program writes into its arguments where the function does. It draws its random numbers from PyTorch's generator
    in the order of the function, so the same seed gives the same draws. Neither the examples nor the generator are
    touched here. The program has to be called without gradients; gradients may be taken inside the function.

    Args:
        function: takes tensors, returns a tuple of tensors, depends on no other tensor that ever changes.
        examples: its arguments; their values do not matter.
        name: what is compiled, for the log, where the seconds it took are shown.
    """
    start = time.monotonic()
    examples = [example.detach() for example in examples]
    graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    # Written in Python, the code around the kernels takes as long as a small network's kernels.
    options = {"fallback_random": True, "cpp_wrapper": examples[0].device.type == "cpu"}
    with torch.no_grad():
        program = torch._inductor.compile(graph, examples, options=options)
    _log.info("compiled %s in %.0f s", name, time.monotonic() - start)
    return program


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
