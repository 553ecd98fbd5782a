"""What an environment must be and must return: Gymnasium's contract, as far as learning depends on it.

Gymnasium's own checker warns where it should refuse, and draws random numbers. Every error here is one line.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Tuple
from gymnasium.spaces.utils import flatten_space

from pmoe_lightning.errors import ConfigurationError, RunError, error_line, is_exit

__all__ = [
    "check_action_space",
    "check_observation",
    "check_reset",
    "check_step",
    "default_dtype_kept",
    "one_flag",
    "one_line",
    "one_number",
    "vector_size",
    "warn_of_lost_precision",
]

_log = logging.getLogger(__name__)
_RETURNS = {"reset": ("observation", "info"), "step": ("observation", "reward", "terminated", "truncated", "info")}
_KINDS = {"b": 0, "u": 1, "i": 1, "f": 2}  # of dtypes; one can stand for any that follows it
_LARGE_SIDE = 32  # of a picture, in pixels
_EXACT_INTEGERS = 2**24  # above it, float32 leaves integers out
_warned_of: set[str] = set()


def check_action_space(space: gymnasium.Space, name: str) -> Box:
    """The action space, if it is a vector of real numbers between bounds that float32 can tell apart.

    Raises:
        ConfigurationError: it is not; names the first dimension that is wrong.
    """
    described = f"environment {name!r} has the action space {_shown(space)}"
    if not isinstance(space, Box) or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
        raise ConfigurationError(f"{described}: only continuous vectors (Box) are supported; wrap it into one")
    if space.shape[0] == 0:
        raise ConfigurationError(f"{described}: it has no dimension, so there is nothing to learn")
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        width = high - low
    for faulty, what in (
        (np.isnan(space.low) | np.isnan(space.high), "a bound that is NaN"),
        (np.isinf(space.low) | np.isinf(space.high), "no bound (unbounded); wrap it so that its Box has bounds"),
        (space.low >= space.high, "a low bound that is not below the high one; leave this dimension out in a wrapper"),
        (~np.isfinite(width), "bounds too large for float32; scale the action in a wrapper"),
        (width <= 0, "bounds that are one number in float32; scale or shift the action in a wrapper"),
    ):
        if faulty.any():
            i = int(np.flatnonzero(faulty)[0])
            bounds = f"from {space.low[i]} to {space.high[i]}"
            raise ConfigurationError(f"environment {name!r}: dimension {i} of the action, {bounds}, has {what}")
    return space


def vector_size(space: gymnasium.Space, name: str) -> int:
    """The number of entries of an observation as a vector.

    Raises:
        ConfigurationError: the observation is no vector and cannot become one, is empty, or has images in it.
    """
    described = f"environment {name!r} has observations {_shown(space)}"
    try:
        parts = list(_parts(space, "observation"))
        for part, where in parts:
            if _is_image(part):
                raise ConfigurationError(
                    f"environment {name!r} has images as {where}, {_shown(part)}, of which no vector is made: "
                    "see its pictures by env.pixels.size=84 encoder=drq, or wrap it so that it observes a flat vector "
                    "of features"
                )
        flat = flatten_space(space) if parts else Box(0, 1, (0,))  # it cannot flatten a structure without parts
    except NotImplementedError:
        flat = None
    if not isinstance(flat, Box):
        raise ConfigurationError(f"{described}, which cannot be flattened to a vector: wrap it")
    if flat.shape[0] == 0:
        raise ConfigurationError(f"{described}, which are empty: wrap it so that it observes at least one number")
    return flat.shape[0]


def has_images(space: Any) -> bool:
    """Whether an observation is an image, or has one among its parts."""
    try:
        return any(_is_image(part) for part, _ in _parts(space, "observation"))
    except NotImplementedError:
        return False


def check_reset(space: gymnasium.Space, result: Any, name: str) -> None:
    """Refuse what a reset must not return."""
    _check_tuple(result, "reset", name)
    observation, info = result
    check_observation(space, observation, name)
    _check_info(info, "reset", name)


def check_step(space: gymnasium.Space, result: Any, name: str) -> None:
    """Refuse what a step must not return."""
    _check_tuple(result, "step", name)
    observation, reward, terminated, truncated, info = result
    check_observation(space, observation, name)
    one_number(reward, name)
    one_flag(terminated, "terminated", name)
    one_flag(truncated, "truncated", name)
    _check_info(info, "step", name)


def check_observation(space: gymnasium.Space, observation: Any, name: str) -> None:
    """Refuse an observation that is not one of its space: another structure, shape or kind of numbers.

    Bounds are not looked at: many environments exceed their own.

    Raises:
        ConfigurationError: what was returned, and what was declared.
    """
    for part, value, where in _leaves(space, observation, "observation", name):
        if not isinstance(part, Box):
            if not part.contains(value):
                raise ConfigurationError(f"environment {name!r} returned {where}={_shown(value)}, not in {part}")
            continue
        array = _as_array(value)
        if array.shape != part.shape:
            raise ConfigurationError(
                f"environment {name!r} returned an {where} of shape {array.shape}, but its space declares {part.shape}"
            )
        if _KINDS.get(array.dtype.kind, 9) > _KINDS[part.dtype.kind]:
            raise ConfigurationError(
                f"environment {name!r} returned an {where} of {array.dtype}, but its space declares {part.dtype}"
            )


def warn_of_lost_precision(space: gymnasium.Space, observation: Any, name: str) -> None:
    """Say, once per environment, where an observation has numbers so large that float32 rounds them visibly."""
    if name in _warned_of:
        return
    for part, value, where in _leaves(space, observation, "observation", name):
        if not isinstance(part, Box):
            continue
        array = np.asarray(value).reshape(-1)
        with np.errstate(over="ignore"):
            single = array.astype(np.float32)
        lost = (np.abs(array) > _EXACT_INTEGERS) & np.isfinite(single) & (single != array)
        if lost.any():
            i = int(np.flatnonzero(lost)[0])
            _warned_of.add(name)
            _log.warning(
                "environment %r: entry %d of its %s is %s, which float32 cannot tell from its neighbours within %g: "
                "subtract an offset or scale it in a wrapper",
                *(name, i, where, array[i], np.spacing(np.abs(single[i]))),
            )
            return


def one_number(value: Any, name: str) -> float:
    """A reward as a float: a number, or an array of exactly one."""
    array = _as_array(value)
    if array.size != 1 or array.dtype.kind not in _KINDS:
        raise ConfigurationError(f"environment {name!r} returned the reward {_shown(value)}: it must be one number")
    return float(array.item())


def one_flag(value: Any, flag: str, name: str) -> bool:
    """``terminated`` or ``truncated`` as a bool: that, 0 or 1, or an array of exactly one of them."""
    array = _as_array(value)
    if array.size != 1 or array.dtype.kind not in _KINDS or array.item() not in (0, 1):
        raise ConfigurationError(f"environment {name!r} returned {flag}={_shown(value)}: it must be True or False")
    return bool(array.item())


@contextmanager
def one_line(name: str, call: str) -> Iterator[None]:
    """What goes wrong in the first reset or step of somebody's environment, as one line.

    Raises:
        ConfigurationError: from any exception, whose traceback it keeps.
    """
    try:
        with default_dtype_kept(name):
            yield
    except (ConfigurationError, RunError):
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or is_exit(error)):
            raise
        wanted = f", which must return ({', '.join(_RETURNS[call])})"
        raise ConfigurationError(
            f"environment {name!r} failed in its first {call}{wanted}: {error_line(error, named=True)}"
        ) from error


@contextmanager
def default_dtype_kept(name: str) -> Iterator[None]:
    """Refuses somebody's environment that has changed the type of every tensor made from now on, networks included.

    Raises:
        ConfigurationError: it has; the type is as before then.
    """
    dtype = torch.get_default_dtype()
    yield
    changed = torch.get_default_dtype()
    if changed is not dtype:
        torch.set_default_dtype(dtype)
        raise ConfigurationError(
            f"environment {name!r} sets PyTorch's default type to {changed}, which the networks of the policy would "
            "have, too: give dtype= where it makes its own tensors"
        )


def _check_tuple(result: Any, call: str, name: str) -> None:
    wanted = _RETURNS[call]
    if not isinstance(result, tuple) or len(result) != len(wanted):
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else f"a {type(result).__name__}"
        raise ConfigurationError(
            f"environment {name!r} returned {got} from {call}, which must return ({', '.join(wanted)})"
        )


def _check_info(info: Any, call: str, name: str) -> None:
    if not isinstance(info, Mapping):
        raise ConfigurationError(
            f"environment {name!r} returned a {type(info).__name__} as the info of its {call}: it must be a dictionary"
        )


def _parts(space: gymnasium.Space, where: str) -> Iterator[tuple[gymnasium.Space, str]]:
    """The spaces of which a space is made, with their names."""
    if isinstance(space, Dict):
        named: Iterable[tuple[object, gymnasium.Space]] = space.spaces.items()
    elif isinstance(space, Tuple):
        named = enumerate(space.spaces)
    else:
        yield space, where
        return
    for key, part in named:
        yield from _parts(part, f"{where}[{key!r}]")


def _leaves(space: gymnasium.Space, value: Any, where: str, name: str) -> Iterator[tuple[gymnasium.Space, Any, str]]:
    """The parts of an observation with their spaces and names.

    Raises:
        ConfigurationError: it has other keys or another length than its space.
    """
    if isinstance(space, Dict):
        if not isinstance(value, Mapping) or value.keys() != space.spaces.keys():
            got = f"keys {sorted(map(str, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise ConfigurationError(
                f"environment {name!r} returned {got} as {where}, but its space declares {sorted(space.keys())}"
            )
        for key, part in space.spaces.items():
            yield from _leaves(part, value[key], f"{where}[{key!r}]", name)
    elif isinstance(space, Tuple):
        if not isinstance(value, tuple | list) or len(value) != len(space.spaces):
            got = f"{len(value)} parts" if isinstance(value, tuple | list) else f"a {type(value).__name__}"
            raise ConfigurationError(
                f"environment {name!r} returned {got} as {where}, but its space declares a tuple of {len(space.spaces)}"
            )
        for i, part in enumerate(space.spaces):
            yield from _leaves(part, value[i], f"{where}[{i}]", name)
    else:
        yield space, value, where


def _is_image(space: gymnasium.Space) -> bool:
    """Whether two of three signs of a picture are there: bytes, three dimensions, two of its sides large."""
    if not isinstance(space, Box):
        return False
    large = sum(side >= _LARGE_SIDE for side in space.shape) >= 2
    return (space.dtype == np.uint8) + (len(space.shape) >= 3) + large >= 2


def _as_array(value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError:  # lists of different lengths
        return np.asarray(value, dtype=object)


def _shown(value: Any, most: int = 100) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 4]} ..."
