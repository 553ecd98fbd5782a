"""How an update is compiled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import torch

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


def compiled(function: Callable[..., Result], name: str, device: torch.device) -> Callable[..., Result]:
    """``function`` as one graph, compiled at the first call, which logs how long that took.

    Random numbers are drawn by torch's own generator in the order of the program, as they are without compiling: the
    two forms can be compared draw for draw, and on a CPU it is the faster way too. On a GPU the graph is recorded as a
    CUDA graph, which wants its tensors to stay where they are (``torch._dynamo.mark_static_address``).
    """
    options = {"fallback_random": True, "triton.cudagraphs": device.type == "cuda"}
    graph = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    called = False

    def call(*arguments) -> Result:
        nonlocal called
        if called:
            return graph(*arguments)
        _log.info("compiling %s; compile=false does without", name)
        start = time.perf_counter()
        result = graph(*arguments)
        _log.info("compiled %s in %.0f s", name, time.perf_counter() - start)
        called = True
        return result

    return call
