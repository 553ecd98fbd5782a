"""What environments, classes and functions are made of, where state may hide."""

from __future__ import annotations

import collections
import dataclasses
import dis
import enum
import hashlib
import importlib
import importlib.util
import inspect
import logging
import random
import re
import sys
import sysconfig
import types
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import cache, cached_property
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import PurePath
from typing import Any

import gymnasium
import numpy as np

__all__ = ["NotCaptured"]

_CONSTRUCTOR_ARGUMENTS = ("_ezpickle_args", "_ezpickle_kwargs", "_saved_kwargs", "_cached_spec")
# Descriptions and what draws: no step depends on them.
_IGNORED = (
    "gymnasium.envs.registration.EnvSpec",
    "gymnasium.envs.mujoco.mujoco_rendering.MujocoRenderer",
    "mujoco.renderer.Renderer",
    "pygame.surface.Surface",
    "pygame.time.Clock",
)
# What classes and modules are made of beside data.
_CODE = (
    *(types.ModuleType, types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType),
    *(types.MethodDescriptorType, types.GenericAlias, np.ufunc, type(np.clip), logging.Logger),
    # Of named tuples and of data classes, neither of which has a public name.
    *(vars(collections)["_tuplegetter"], type(vars(dataclasses)["_HAS_DEFAULT_FACTORY"])),
)
_IMMUTABLE = (PurePath, re.Pattern, range, np.dtype, np.ufunc)
# Parts of Gymnasium-Robotics' environments. All that such an object knows is in its attributes, which cannot be said of
# any class: one may hold the number of a simulator that lives elsewhere. So a subclass is another.
_PLAIN_OBJECTS = (
    "gymnasium_robotics.envs.maze.maze.Maze",
    "gymnasium_robotics.envs.maze.maze_v4.Maze",
    "gymnasium_robotics.utils.mujoco_utils.MujocoModelNames",
)
_PLAIN_MODULES = ("gymnasium_robotics.utils.mujoco_utils",)  # functions alone
# Their classes and functions are not searched: they keep no state there that a step depends on, or training keeps it.
_LIBRARIES = {"gymnasium", "mujoco", "numpy", "scipy", "torch", *sys.stdlib_module_names} - {"__main__"}
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class NotCaptured(Exception):
    """What an environment holds that cannot be captured, or not put back, and where: one phrase.

    Args:
        reason: follows the name of the part.
        part: its name, such as ``Cart.socket``.
    """

    def __init__(self, reason: str, part: str = "") -> None:
        super().__init__(reason)
        self.reason, self.part, self._is_named = reason, part, bool(part)

    def within(self, step: str) -> NotCaptured:
        """The same, of a container that holds the part at ``step``."""
        if not self._is_named:
            self.part = step + self.part
        return self

    def of(self, owner: Any, key: str) -> NotCaptured:
        """The same, of an object of which the part is an attribute; the innermost one names it."""
        if not self._is_named:
            name = getattr(owner, "__qualname__", type(owner).__qualname__)
            self.part, self._is_named = f"{name}.{key}{self.part}".replace(".<locals>", ""), True
        return self

    def __str__(self) -> str:
        return " ".join(f"{self.part} {self.reason}".split())


def full_name(kind: type) -> str:
    """Such as ``collections.deque``."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def is_all_python(kind: type) -> bool:
    """Whether instances have no memory beside their attributes, as those of classes written in C may have."""
    pointers = len(_slots(kind)) + (kind.__weakrefoffset__ > 0) + (kind.__dictoffset__ > 0)
    return kind.__itemsize__ == 0 and kind.__basicsize__ == object.__basicsize__ + pointers * object.__basicsize__ // 2


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of an environment or a space, without what no step depends on."""
    found = {key: value for key, value in vars(value).items() if key not in _CONSTRUCTOR_ARGUMENTS}
    for key, slot in _slots(type(value)).items():
        try:
            found[key] = slot.__get__(value)
        except AttributeError:  # not assigned
            continue
    return {key: part for key, part in found.items() if full_name(type(part)) not in _IGNORED}


def is_object(value: Any) -> bool:
    """Whether a value is what its attributes are: an environment, a space, or a known part of one."""
    return isinstance(value, gymnasium.Env | gymnasium.Space) or full_name(type(value)) in _PLAIN_OBJECTS


def set_attributes(owner: Any, values: dict[str, Any]) -> None:
    """Make :func:`attributes` of an object these, and no others."""
    slots = _slots(type(owner))
    for key in attributes(owner).keys() - values.keys():
        slots[key].__delete__(owner) if key in slots else vars(owner).pop(key)
    for key, value in values.items():
        if key in slots:
            slots[key].__set__(owner, value)
        else:
            vars(owner)[key] = value


def _slots(kind: type) -> dict[str, types.MemberDescriptorType]:
    """By name and class, because a subclass may have a slot of the same name."""
    slots = ((cls, key, value) for cls in kind.__mro__ for key, value in vars(cls).items())
    return {f"{key} of {cls.__qualname__}": s for cls, key, s in slots if type(s) is types.MemberDescriptorType}


def offers_its_state(env: Any) -> bool:
    """Whether an environment has ``get_state()`` and ``set_state(state)``.

    MuJoCo environments of Gymnasium have a ``set_state(qpos, qvel)``, which is something else.
    """
    get_state, set_state = (getattr(type(env), name, None) for name in ("get_state", "set_state"))
    if not isinstance(env, gymnasium.Env) or not (callable(get_state) and callable(set_state)):
        return False
    own: Any = env
    try:
        inspect.signature(own.get_state).bind()
        inspect.signature(own.set_state).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def searched_classes(kind: type) -> list[type]:
    """The classes of an environment that may hold state themselves."""
    return [cls for cls in kind.__mro__ if is_searched(cls)]


def is_searched(kind: type) -> bool:
    """Whether a class may hold state itself; an enumeration holds its members, which are constants."""
    return _package(kind) not in _LIBRARIES and not issubclass(kind, enum.Enum)


def class_bindings(kind: type) -> dict[str, Any]:
    """The data in a class, the functions of its methods and properties, its own bases, metaclass and nested classes."""
    bindings: dict[str, Any] = {f"base {cls.__qualname__}": cls for cls in kind.__bases__} | {"metaclass": type(kind)}
    bindings = {key: cls for key, cls in bindings.items() if not _is_class_of_others(cls, kind)}
    for key, value in vars(kind).items():
        if isinstance(value, types.FunctionType | classmethod | staticmethod | property | cached_property):
            bindings |= {f"{key}({i})": function for i, function in enumerate(_functions(value))}
        elif isinstance(value, type) and _is_class_of_others(value, kind):
            continue
        elif is_foreign(value) or not (
            key.startswith("__") and key.endswith("__") or key == "_abc_impl" or isinstance(value, _CODE)
        ):
            bindings[key] = value
    return bindings


def is_foreign(value: Any) -> bool:
    """Whether this is a module written in C, or a function of one, that may keep what a step depends on.

    PyBullet does: its simulators are numbers to whoever calls it. Modules of libraries and of what draws are known.
    """
    module = value.__self__ if type(value) is types.BuiltinFunctionType else value
    if not isinstance(module, types.ModuleType) or _top(module.__name__) in _LIBRARIES | {"pygame"}:
        return False
    return (getattr(module, "__file__", None) or "").endswith(tuple(EXTENSION_SUFFIXES))


def _functions(value: Any) -> list[types.FunctionType]:
    names = ("fget", "fset", "fdel", "func", "__func__")
    functions = [value, *(getattr(value, name, None) for name in names)]
    return [function for function in functions if type(function) is types.FunctionType]


def function_bindings(function: types.FunctionType) -> dict[str, Any]:
    """The data and functions that a function refers to: closed over, defaults, attributes, globals of its module."""
    bindings = {f"attribute {key}": value for key, value in vars(function).items()}
    bindings |= {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    bindings |= {f"default {key}": value for key, value in (function.__kwdefaults__ or {}).items()}
    bindings |= {f"variable {key}": cell.cell_contents for key, cell in _cells(function).items()}
    if _package(function) not in _LIBRARIES:
        for key in sorted(_global_names(function.__code__) & function.__globals__.keys()):
            bindings[f"global {key}"] = function.__globals__[key]
        imported = {name: sys.modules.get(name) for name in _imported(function)}
        bindings |= {f"import {name}": module for name, module in imported.items() if is_foreign(module)}
        for label, module in _modules(function).items():
            names = sorted(_attribute_names(function.__code__) & vars(module).keys())
            bindings |= {f"module {label}.{name}": vars(module)[name] for name in names}
    return {key: value for key, value in bindings.items() if not _is_code_of_others(value, function)}


def bind(function: types.FunctionType, values: dict[str, Any]) -> None:
    """Make some of :func:`function_bindings` these."""
    defaults = list(function.__defaults__ or ())
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for key, value in values.items():
        kind, name = key.split(" ", 1)
        if kind == "attribute":
            vars(function)[name] = value
        elif kind == "variable":
            cells[name].cell_contents = value
        elif kind == "global":
            function.__globals__[name] = value
        elif kind == "module":
            label, _, name = name.rpartition(".")
            setattr(_modules(function)[label], name, value)
        elif name.isdigit():
            defaults[int(name)] = value
            function.__defaults__ = tuple(defaults)
        else:
            keywords: Any = function.__kwdefaults__
            keywords[name] = value


def import_as_before(function: types.FunctionType, bindings: Collection[str]) -> None:
    """Import what a function imports in its body, where it had done so when its bindings were captured."""
    for name in _imported(function):
        if any(key.startswith(f"module {name}.") for key in bindings):
            importlib.import_module(name)


def is_builtin(value: Any) -> bool:
    """Whether this is a function written in C that belongs to no object."""
    return type(value) is types.BuiltinFunctionType and isinstance(value.__self__, types.ModuleType | None)


def _cells(function: types.FunctionType) -> dict[str, types.CellType]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {key: cell for key, cell in cells if cell != types.CellType()}


def _is_code_of_others(value: Any, function: types.FunctionType) -> bool:
    """Whether a function refers to code, which does not change; that of the environment's own package is searched."""
    if is_foreign(value):
        return False
    if type(value) is types.FunctionType:
        return _package(value) in _LIBRARIES or (
            _package(value) != _package(function) and _is_installed(value.__code__.co_filename)
        )
    if type(value) is types.BuiltinFunctionType:
        owner = value.__self__
        return is_builtin(value) or isinstance(owner, type) or owner in (random._inst, np.random.mtrand._rand)
    if isinstance(value, type):
        return _is_class_of_others(value, function)
    return isinstance(value, _CODE)


def _is_class_of_others(kind: type, owner: Any) -> bool:
    """Whether a class keeps no state of the environment's: that of a library, or one installed beside its package."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return not is_searched(kind) or (_package(kind) != _package(owner) and _is_installed(file))


def _is_installed(file: str | None) -> bool:
    return file is None or file.startswith(_INSTALLED)


@cache
def _global_names(code: types.CodeType) -> frozenset[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname.endswith("_GLOBAL")}
    return frozenset(names).union(*map(_global_names, _nested(code)))


def _modules(function: types.FunctionType) -> dict[str, types.ModuleType]:
    """The modules to which a function refers, but for installed ones, by the names that lead to them from there."""
    names = _global_names(function.__code__) & function.__globals__.keys()
    met = {key: function.__globals__[key] for key in sorted(names)}
    met |= {name: sys.modules.get(name) for name in _imported(function)}
    found: dict[str, types.ModuleType] = {}
    while met:
        label, module = met.popitem()
        is_one = isinstance(module, types.ModuleType) and not _is_installed(getattr(module, "__file__", None))
        if is_one and all(module is not other for other in found.values()):
            found[label] = module
            inside = _attribute_names(function.__code__) & vars(module).keys()
            met |= {f"{label}.{name}": vars(module)[name] for name in inside}
    return found


def _imported(function: types.FunctionType) -> list[str]:
    """The full names of the modules that a function imports in its body."""
    names = set()
    for level, name in _imported_names(function.__code__):
        with suppress(ImportError):  # it lies outside of every package, so it was never imported
            names.add(importlib.util.resolve_name("." * level + name, function.__globals__.get("__package__")))
    return sorted(names)


@cache
def _imported_names(code: types.CodeType) -> frozenset[tuple[int, str]]:
    """(number of dots, name) of each import."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    names = {(steps[i - 2].argval, step.argval) for i, step in enumerate(steps) if step.opname == "IMPORT_NAME"}
    return frozenset(names).union(*map(_imported_names, _nested(code)))


@cache
def _attribute_names(code: types.CodeType) -> frozenset[str]:
    return frozenset(code.co_names).union(*map(_attribute_names, _nested(code)))


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, types.CodeType))


def _package(value: Any) -> str:
    return _top(value.__module__ or "")


def _top(module: str) -> str:
    return module.split(".")[0]


def fixed_label(value: Any) -> str | None:
    """A name for a value that is left as it is where a fresh environment has the same; None for any other."""
    if isinstance(value, enum.Enum):
        return f"{full_name(type(value))}.{value.name}"
    if isinstance(value, types.ModuleType) and (_top(value.__name__) in _LIBRARIES or value.__name__ in _PLAIN_MODULES):
        return f"module {value.__name__}"
    if isinstance(value, set | frozenset):
        return f"a {type(value).__name__} of {sorted(map(repr, value))}"
    return repr(value) if isinstance(value, _IMMUTABLE) or is_builtin(value) and not is_foreign(value) else None


def function_label(function: Any) -> str | None:
    """A name for the code of a function; None for anything else."""
    if type(function) is not types.FunctionType:
        return None
    digest = hashlib.sha256(repr(_content(function.__code__)).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"function {function.__qualname__} ({digest})"


def _content(code: types.CodeType) -> tuple:
    constants = (value for value in code.co_consts if not isinstance(value, types.CodeType))
    labels = [fixed_label(value) or repr(value) for value in constants]  # a frozenset has another order in each process
    return (code.co_code, code.co_names, labels, [_content(nested) for nested in _nested(code)])
