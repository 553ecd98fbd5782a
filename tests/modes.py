"""One test in every mode of running: as written and traced into one graph, in single and in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import shapes
import torch


class Mode(NamedTuple):
    dtype: torch.dtype
    compiled: bool = False

    def run(self, function: Callable) -> Callable:
        """The function as this mode runs it.

        The compiled one is torch.compile's graph with its derivative, without a break, and with PyTorch's own kernels,
        so that it draws the same random numbers. Generated kernels are compared in ``test_sac_update``.
        """
        if not self.compiled:
            return function
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

        def run(*arguments: Any) -> Any:
            with shapes.unchecked():
                return compiled(*arguments)

        return run


_DTYPES = {"float32": torch.float32, "float64": torch.float64}
#: Gives a test its ``mode``; the compiled ones run in ``make test-slow``.
in_every_mode = pytest.mark.parametrize(
    "mode",
    [
        *(pytest.param(Mode(dtype), id=name) for name, dtype in _DTYPES.items()),
        *(
            pytest.param(Mode(dtype, compiled=True), id=f"{name}-compiled", marks=[pytest.mark.slow])
            for name, dtype in _DTYPES.items()
        ),
    ],
)
