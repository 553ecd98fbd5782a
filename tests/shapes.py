"""Shapes are code: the annotated arrays of all mathematics are checked, at every call, while the tests run.

``enforce`` comes before whatever imports a function by its name. ``unchecked`` is for what traces Python, as
``torch.compile`` does, and cannot trace the checks. Functions inside functions are left alone: jaxtyping's import hook
would make their checks anew at every call, which costs more than the mathematics.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType
from typing import Any, get_args, get_origin

import jaxtyping
from beartype import beartype

ROOMS = ("modules", "estimators", "hamiltonian", "safe", "losses", "updates")


def enforce() -> None:
    """Check the shapes of every function, method and property in these rooms, and in no other."""
    modules = [module for room in ROOMS for module in modules_of(import_module(f"pmoe_lightning.{room}"))]
    checks: dict[Callable, Callable] = {}
    for module in modules:
        for value in list(vars(module).values()):
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value):
                checks[value] = checked(value, module)
            elif inspect.isclass(value) and not getattr(value, "_is_protocol", False):
                enforce_in(value, module)
    for module in modules:
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value):
                setattr(module, name, checks.get(value, value))


def modules_of(room: ModuleType) -> list[ModuleType]:
    return [room, *(import_module(found.name) for found in pkgutil.iter_modules(room.__path__, f"{room.__name__}."))]


def enforce_in(cls: type, module: ModuleType) -> None:
    for name, value in list(vars(cls).items()):
        if inspect.isfunction(value):
            setattr(cls, name, checked(value, module))
        elif type(value) is property:
            setattr(cls, name, property(checked(value.fget, module), value.fset, value.fdel))
        elif isinstance(value, staticmethod | classmethod):
            setattr(cls, name, type(value)(checked(value.__func__, module)))


def checked(function: Callable, module: ModuleType) -> Callable:
    """The function with its arrays checked. What else is wrong it must refuse itself, as it does for a user."""
    hints = {}
    for name, hint in function.__annotations__.items():
        # Left out: what has a name for the type checker only, and a shape with two free parts, which nobody can check.
        with suppress(NameError, ValueError):
            hints[name] = eval(hint, vars(module)) if isinstance(hint, str) else hint
    if not any(map(has_shape, hints.values())):
        return function
    function.__annotations__ = hints
    return jaxtyping.jaxtyped(function, typechecker=arrays_checked)


def arrays_checked(function: Callable) -> Callable:
    hints = function.__annotations__
    function.__annotations__ = {name: hint if has_shape(hint) else Any for name, hint in hints.items()}
    return beartype(function)


def has_shape(hint: Any) -> bool:
    is_array = inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return not draws(hint) and (is_array or any(map(has_shape, get_args(hint))))


def draws(hint: Any) -> bool:
    """Whether a check draws from Python's generator, which a run owns: beartype looks at one of many elements."""
    return get_origin(hint) in (list, Sequence) or ... in get_args(hint) or any(map(draws, get_args(hint)))


@contextmanager
def unchecked() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
