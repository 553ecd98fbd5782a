"""NumPy arrays as bytes, with their layout in memory, on which the last bit of a sum depends, and views of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pmoe_lightning.envs.object_parts import NotCaptured


def owner_of(array: np.ndarray) -> np.ndarray:
    """The array whose memory this one is, or is a view of.

    Raises:
        NotCaptured: the memory is not NumPy's, or holds objects.
    """
    owner = array
    while type(owner) is np.ndarray and owner.base is not None:
        owner = owner.base
    if type(owner) is not np.ndarray:
        raise NotCaptured(f"is an array in the memory of a {type(owner).__name__}")
    for dtype in (array.dtype, owner.dtype):
        if dtype.kind not in "biufcSUMmV" or dtype.hasobject or dtype.itemsize == 0 or _restored(dtype) != dtype:
            raise NotCaptured(f"is an array of {dtype}")
    return owner


def pack(array: np.ndarray) -> tuple:
    """An array that owns its memory: (bytes, dtype, shape in memory order, axes that bring it into that order).

    Of an array that must not be written to, with False behind.

    Raises:
        NotCaptured: the memory has gaps.
    """
    axes = _memory_order(array)
    ordered = array.transpose(axes)
    if not ordered.flags.c_contiguous:
        raise NotCaptured("is an array with gaps in its memory")
    content = torch.from_numpy(memory(array).copy())
    return content, _description(array.dtype), list(ordered.shape), axes, *_protection(array)


def unpack(
    content: torch.Tensor, description: Any, shape: list[int], axes: list[int], writeable: bool = True
) -> np.ndarray:
    """The array that :func:`pack` was given."""
    array = np.empty_like(np.empty(shape, _dtype(description)).transpose(np.argsort(axes)), order="K")
    memory(array)[...] = content.numpy()
    array.flags.writeable = writeable
    return array


def memory(array: np.ndarray) -> np.ndarray:
    """All bytes of an array that owns its memory, in their order; shared, not copied."""
    if array.size == 0:
        return np.empty(0, np.uint8)
    return array.transpose(_memory_order(array)).reshape(-1).view(np.uint8)


def pack_view(view: np.ndarray, owner: np.ndarray) -> tuple:
    """Where a view lies in the memory of its owner: (dtype, shape, strides, offset); False behind as :func:`pack`."""
    offset = _address(view) - _address(memory(owner))
    return _description(view.dtype), list(view.shape), list(view.strides), offset, *_protection(view)


def unpack_view(
    owner: np.ndarray,
    description: Any,
    shape: list[int],
    strides: list[int],
    offset: int,
    writeable: bool = True,
) -> np.ndarray:
    """The view that :func:`pack_view` was given, of another owner."""
    view = np.ndarray(shape, _dtype(description), memory(owner), offset, strides)
    view.flags.writeable &= writeable
    return view


def pack_scalar(scalar: np.generic) -> tuple:
    """(bytes, dtype) of a NumPy scalar."""
    array = np.array([scalar])
    return torch.from_numpy(memory(array).copy()), _description(array.dtype)


def unpack_scalar(content: torch.Tensor, description: Any) -> np.generic:
    """The scalar that :func:`pack_scalar` was given."""
    return unpack(content, description, [1], [0])[0]


def _memory_order(array: np.ndarray) -> list[int]:
    if array.flags.c_contiguous:
        return list(range(array.ndim))
    return sorted(range(array.ndim), key=lambda axis: -array.strides[axis])


def _protection(array: np.ndarray) -> tuple:
    return () if array.flags.writeable else (False,)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _description(dtype: np.dtype) -> Any:
    return np.lib.format.dtype_to_descr(dtype)


def _dtype(description: Any) -> np.dtype:
    return np.lib.format.descr_to_dtype(description)


def _restored(dtype: np.dtype) -> np.dtype:
    return _dtype(_description(dtype))
