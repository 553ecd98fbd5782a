"""Matrix products whose last bit depends on where their factors lie, as those of some processors do.

MKL gives the same bits for factors at the same place within 64 bytes and the same number of threads, and promises no
more (Intel oneMKL Developer Guide, "Obtaining Numerically Reproducible Results"). On many processors it gives the same
bits wherever they lie; not on all. Here it never does, so that on every processor one sees what relies on that:
``python -m pytest -p alignment tests/test_resume.py`` with ``PYTHONPATH=tests``, or the context manager in a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

#: Operators of ATen and how many of their first arguments are not factors of the product.
_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "addmv": 1, "baddbmm": 1}
_CACHE_LINE = 64


@contextmanager
def products_depend_on_alignment() -> Iterator[None]:
    """Within this context a product of factors that lie elsewhere within 64 bytes differs by up to seven roundings."""
    library = torch.library.Library("aten", "IMPL")
    for name, first in _PRODUCTS.items():
        library.impl(name, _dependent(name, first), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def numpy_memory_begins(past: int) -> Iterator[None]:
    """Within this context ``numpy.empty`` gives memory ``past`` bytes after a cache line: it differs by process."""
    empty = np.empty

    def empty_at(shape: int | tuple[int, ...], dtype: type = float) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = empty(size + 2 * _CACHE_LINE, np.uint8)
        start = -memory.ctypes.data % _CACHE_LINE + past
        return memory[start : start + size].view(dtype).reshape(shape)

    np.empty = empty_at
    try:
        yield
    finally:
        np.empty = empty


def _dependent(name: str, first: int):
    product = getattr(torch.ops.aten, name).out

    def dependent(*arguments, **options):
        out = product(*arguments, **options, out=arguments[-1].new_empty(0))
        if not out.is_floating_point():
            return out
        return out.mul_(1 + _place(arguments[first:]) * torch.finfo(out.dtype).eps)

    return dependent


def _place(factors: tuple[Tensor, ...]) -> int:
    """0 if all factors begin on a cache line, else a number from 1 to 7 that belongs to their places."""
    places = [factor.data_ptr() % _CACHE_LINE for factor in factors if isinstance(factor, Tensor)]
    return 1 + sum(3**i * place // 4 for i, place in enumerate(places)) % 7 if any(places) else 0


def pytest_configure(config) -> None:
    context = products_depend_on_alignment()
    context.__enter__()
    config.add_cleanup(lambda: context.__exit__(None, None, None))
