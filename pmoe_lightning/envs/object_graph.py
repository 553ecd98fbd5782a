"""Environments as graphs of objects: written down as plain values and tensors, and put back into fresh environments.

Only what can be put back to the last bit is accepted; anything else is refused by name:

* plain values by their exact type: a subclass or an enumeration may mean more than its value;
* NumPy arrays with their memory: two names for one array, or a view of a part of it, stay that;
* random generators of NumPy, Python and torch;
* environments and spaces with all their attributes, inside other environments too, the plain objects that
  Gymnasium-Robotics keeps in its own, and functions; with them the data of their classes, and the globals, classes and
  modules that their methods use;
* MuJoCo's models and data.

Sets are refused: the order in which they iterate depends on what was in them before.

A value is written as itself (None, bool, int, float, str) or as ``(i,)``: node i, a tuple that begins with its kind.
What is met twice is one node, so that shared objects stay shared and cycles end.
"""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch

from pmoe_lightning.envs import array_memory, mujoco_state
from pmoe_lightning.envs.object_parts import (
    NotCaptured,
    attributes,
    bind,
    class_bindings,
    fixed_label,
    full_name,
    function_bindings,
    function_label,
    import_as_before,
    is_all_python,
    is_builtin,
    is_foreign,
    is_object,
    is_searched,
    offers_its_state,
    searched_classes,
    set_attributes,
)
from pmoe_lightning.errors import error_line

__all__ = ["Decoder", "Encoder"]

Encoded = Any
_LARGEST = 1 << 1024  # the reader of checkpoints takes no integers of any length
_BIT_GENERATORS = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}
_ABSENT = object()


def _fixed(label: str, value: object) -> tuple:
    return ("fixed", label)


class Encoder:
    """Writes objects down in ``nodes``.

    Attributes:
        nodes: as far as they have been written.
        has_met_mujoco: whether one of them is MuJoCo's.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple | None] = []
        self.has_met_mujoco = False
        self._indices: dict[int, int] = {}
        self._met: list[Any] = []  # kept, else another object could get the id of one that is gone

    def encode(self, value: Any) -> Encoded:
        """The written form of a value.

        Raises:
            NotCaptured: naming the part that has none.
        """
        kind = type(value)
        if value is None or kind in (bool, float, str) or kind is int and abs(value) < _LARGEST:
            return value
        return self._node(value, self._node_of)

    def _node(self, value: Any, write: Callable[[Any], tuple]) -> Encoded:
        index = self._indices.get(id(value))
        if index is None:
            index = self._indices[id(value)] = len(self.nodes)
            self._met.append(value)
            self.nodes.append(None)
            self.nodes[index] = write(value)
        elif self.nodes[index] is None and type(value) is tuple:
            raise NotCaptured("is a tuple that holds itself")
        return (index,)

    def _node_of(self, value: Any) -> tuple:
        kind = type(value)
        if kind in self._WRITERS:
            return self._WRITERS[kind](self, value)
        if is_object(value):
            return self._offered(value) if offers_its_state(value) else self._object(value)
        if kind.__name__ in _BIT_GENERATORS and kind.__module__.startswith("numpy."):
            return self._bit_generator(value)
        if isinstance(value, np.number | np.bool_ | np.datetime64 | np.timedelta64) and kind.__module__ == "numpy":
            return ("scalar", *array_memory.pack_scalar(value))
        is_named = isinstance(value, np.dtype | np.ufunc | types.ModuleType) or is_builtin(value)
        if is_named and (label := fixed_label(value)) is not None:
            return ("fixed", label)
        if is_foreign(value):
            raise NotCaptured(f"is of {getattr(value, '__self__', value).__name__}, a module in C that may keep state")
        if kind is type and value.__module__ in ("builtins", "numpy"):
            return ("fixed", repr(value))
        if isinstance(value, type) and is_searched(value):
            return self._class(value)
        if mujoco_state.is_model(value) or mujoco_state.is_data(value):
            self.has_met_mujoco = True
            return self._mujoco_model(value) if mujoco_state.is_model(value) else self._mujoco_data(value)
        raise NotCaptured(f"is a {full_name(kind)}")

    def _child(self, value: Any, step: str) -> Encoded:
        try:
            return self.encode(value)
        except NotCaptured as error:
            raise error.within(step) from None

    def _children(self, owner: Any, parts: Mapping[str, Any]) -> dict[str, Encoded]:
        encoded = {}
        for key, value in parts.items():
            try:
                encoded[key] = self.encode(value)
            except NotCaptured as error:
                raise error.of(owner, key) from None
            except RecursionError:
                raise NotCaptured("is nested too deeply").of(owner, key) from None
        return encoded

    def _sequence(self, value: list | tuple) -> tuple:
        return (type(value).__name__, [self._child(element, f"[{i}]") for i, element in enumerate(value)])

    def _deque(self, value: deque) -> tuple:
        return ("deque", value.maxlen, [self._child(element, f"[{i}]") for i, element in enumerate(value)])

    def _dict(self, value: dict) -> tuple:
        keys = [self._child(key, " key") for key in value]
        return ("dict", keys, [self._child(element, f"[{str(key)[:40]!r}]") for key, element in value.items()])

    def _array(self, value: np.ndarray) -> tuple:
        owner = array_memory.owner_of(value)
        if owner is value or value.size == 0:
            return ("array", *array_memory.pack(value if value.size else np.empty(value.shape, value.dtype)))
        return ("view", self.encode(owner), *array_memory.pack_view(value, owner))

    def _generator(self, value: np.random.Generator) -> tuple:
        return ("generator", self.encode(value.bit_generator))

    def _random_state(self, value: np.random.RandomState) -> tuple:
        if value is np.random.mtrand._rand:
            raise NotCaptured("is NumPy's global random generator")
        state = value.get_state(legacy=False)
        return ("random_state", self.encode(value._bit_generator), state["has_gauss"], state["gauss"])

    def _bit_generator(self, value: np.random.BitGenerator) -> tuple:
        sequence, seeds = value.seed_seq, None
        if type(sequence) is np.random.SeedSequence:
            seeds = (sequence.entropy, sequence.spawn_key, sequence.pool_size, sequence.n_children_spawned)
        elif sequence is not None:  # as it is in a RandomState that was seeded by a number
            raise NotCaptured(f"is seeded by a {full_name(type(sequence))}")
        return ("bit_generator", type(value).__name__, self.encode(seeds), self.encode(value.state))

    def _python_random(self, value: random.Random) -> tuple:
        if value is random._inst:
            raise NotCaptured("is Python's global random generator")
        return ("python_random", self.encode(value.getstate()))

    def _torch_generator(self, value: torch.Generator) -> tuple:
        if value is torch.default_generator or value.device.type != "cpu":
            raise NotCaptured("is torch's global random generator or one of a GPU")
        return ("torch_generator", value.get_state())

    def _mujoco_model(self, value: Any) -> tuple:
        return ("mujoco_model", mujoco_state.capture_model(value))

    def _mujoco_data(self, value: Any) -> tuple:
        return ("mujoco_data", self.encode(value.model), mujoco_state.capture_data(value))

    def _object(self, value: Any) -> tuple:
        if not is_all_python(type(value)):
            raise NotCaptured(f"is a {full_name(type(value))}, which is not all Python's")
        parts = self._children(value, attributes(value))
        classes = () if isinstance(value, gymnasium.Space) else searched_classes(type(value))
        return ("object", full_name(type(value)), parts, [self._node(cls, self._class) for cls in classes])

    def _offered(self, value: Any) -> tuple:
        try:
            state = value.get_state()
        except Exception as error:
            raise NotCaptured(f"raised {error_line(error, named=True)}").of(value, "get_state()") from error
        parts = self._children(value, {"get_state()": state, **_beside_offered(value)})
        return ("offered", full_name(type(value)), parts)

    def _class(self, value: type) -> tuple:
        return ("class", full_name(value), self._referred(value, class_bindings(value)))

    def _function(self, value: types.FunctionType) -> tuple:
        return ("function", function_label(value), self._referred(value, function_bindings(value)))

    def _method(self, value: types.MethodType) -> tuple:
        name = value.__func__.__name__
        if getattr(type(value.__self__), name, None) is not value.__func__:
            raise NotCaptured(f"is a method that is not {full_name(type(value.__self__))}.{name}")
        return ("method", self.encode(value.__self__), name)

    def _referred(self, owner: Any, bindings: Mapping[str, Any]) -> dict[str, Encoded]:
        labels = {key: fixed_label(value) for key, value in bindings.items()}
        fixed = {key: self._node(bindings[key], partial(_fixed, label)) for key, label in labels.items() if label}
        return fixed | self._children(owner, {key: value for key, value in bindings.items() if not labels[key]})

    _WRITERS: dict[type, Callable[[Any, Any], tuple]] = {
        list: _sequence,
        tuple: _sequence,
        dict: _dict,
        deque: _deque,
        complex: lambda _, value: ("complex", value.real, value.imag),
        bytes: lambda _, value: ("bytes", value.decode("latin-1")),
        bytearray: lambda _, value: ("bytearray", value.decode("latin-1")),
        np.ndarray: _array,
        np.random.Generator: _generator,
        np.random.RandomState: _random_state,
        random.Random: _python_random,
        torch.Generator: _torch_generator,
        types.FunctionType: _function,
        types.MethodType: _method,
    }


class Decoder:
    """Makes the objects that an :class:`Encoder` has written.

    Environments, spaces, functions and simulators are not made but found: they are those that a fresh environment has
    in the same place. Nothing in them changes before :meth:`write`.
    """

    def __init__(self, nodes: list[tuple]) -> None:
        self.nodes = nodes
        self._values: dict[int, Any] = {}
        self._found: dict[int, int] = {}
        self._writes: list[Callable[[], Any]] = []

    def decode(self, encoded: Encoded, present: Any = _ABSENT) -> Any:
        """The value; ``present`` is what a fresh environment has in its place.

        Raises:
            NotCaptured: what should be found there is something else.
        """
        if type(encoded) is not tuple:
            return encoded
        (index,) = encoded
        if index not in self._values:
            kind, *content = self.nodes[index]
            if kind in self._LEAVES:
                self._values[index] = self._LEAVES[kind](*content)
            else:
                self._READERS[kind](self, index, present, *content)
        return self._values[index]

    def write(self) -> None:
        """Bring what was found into the captured state."""
        for write in self._writes:
            write()

    def _find(self, index: int, present: Any, label: str, is_it: bool) -> None:
        if not is_it:
            what = "missing" if present is _ABSENT else fixed_label(present) or f"a {full_name(type(present))}"
            raise NotCaptured(f"was {label} and is {what}")
        if self._found.setdefault(id(present), index) != index:
            raise NotCaptured(f"was two of {label} and is one")
        self._values[index] = present

    def _children(self, owner: Any, encoded: Mapping[str, Encoded], present: Mapping[str, Any]) -> dict[str, Any]:
        decoded = {}
        for key, part in encoded.items():
            try:
                decoded[key] = self.decode(part, present.get(key, _ABSENT))
            except NotCaptured as error:
                raise error.of(owner, key) from None
        return decoded

    def _elements(self, present: Any, encoded: list) -> list:
        return [self.decode(element, _element(present, i)) for i, element in enumerate(encoded)]

    def _list(self, index: int, present: Any, elements: list) -> None:
        self._values[index] = made = []
        made += self._elements(present, elements)

    def _tuple(self, index: int, present: Any, elements: list) -> None:
        self._values[index] = tuple(self._elements(present, elements))

    def _deque(self, index: int, present: Any, maxlen: int | None, elements: list) -> None:
        made: deque = deque(maxlen=maxlen)
        self._values[index] = made
        made.extend(self._elements(present, elements))

    def _dict(self, index: int, present: Any, keys: list, elements: list) -> None:
        self._values[index] = made = {}
        for key, element in zip(map(self.decode, keys), elements, strict=True):
            made[key] = self.decode(element, _element(present, key))

    def _view(self, index: int, present: Any, owner: Encoded, *layout: Any) -> None:
        self._values[index] = array_memory.unpack_view(self.decode(owner), *layout)

    def _generator(self, index: int, present: Any, bit_generator: Encoded) -> None:
        self._values[index] = np.random.Generator(self.decode(bit_generator))

    def _random_state(self, index: int, present: Any, bit_generator: Encoded, has_gauss: int, gauss: float) -> None:
        self._values[index] = made = np.random.RandomState(self.decode(bit_generator))
        made.set_state({**made.get_state(legacy=False), "has_gauss": has_gauss, "gauss": gauss})

    def _bit_generator(self, index: int, present: Any, name: str, seeds: Encoded, state: Encoded) -> None:
        if seeds is None:
            made = np.random.RandomState(0)._bit_generator
        else:
            entropy, key, size, spawned = self.decode(seeds)
            sequence = np.random.SeedSequence(entropy, spawn_key=key, pool_size=size, n_children_spawned=spawned)
            made = _BIT_GENERATORS[name](sequence)
        made.state = self.decode(state)
        self._values[index] = made

    def _python_random(self, index: int, present: Any, state: Encoded) -> None:
        self._values[index] = made = random.Random()
        made.setstate(self.decode(state))

    def _method(self, index: int, present: Any, owner: Encoded, name: str) -> None:
        self._values[index] = getattr(self.decode(owner, getattr(present, "__self__", _ABSENT)), name)

    def _fixed(self, index: int, present: Any, label: str) -> None:
        if label not in (fixed_label(present), repr(present)):
            raise NotCaptured(f"was {label} and is another")
        self._values[index] = present

    def _mujoco_model(self, index: int, present: Any, state: mujoco_state.State) -> None:
        self._find(index, present, "an MjModel", mujoco_state.is_model(present))
        mujoco_state.check_model(present, state)
        self._writes.append(lambda: mujoco_state.restore_model(present, state))

    def _mujoco_data(self, index: int, present: Any, model: Encoded, state: mujoco_state.State) -> None:
        self._find(index, present, "an MjData", mujoco_state.is_data(present))
        self.decode(model, present.model)
        mujoco_state.check_data(present, state)
        self._writes.append(lambda: mujoco_state.restore_data(present, state))

    def _object(self, index: int, present: Any, label: str, parts: Mapping[str, Encoded], classes: list) -> None:
        is_it = is_object(present) and full_name(type(present)) == label
        self._find(index, present, label, is_it and not offers_its_state(present))
        decoded = self._children(present, parts, attributes(present))
        for part, cls in zip(classes, searched_classes(type(present)) if classes else (), strict=True):
            self.decode(part, cls)
        self._writes.append(lambda: set_attributes(present, decoded))

    def _offered(self, index: int, present: Any, label: str, parts: Mapping[str, Encoded]) -> None:
        is_it = isinstance(present, gymnasium.Env) and full_name(type(present)) == label
        self._find(index, present, label, is_it and offers_its_state(present))
        decoded = self._children(present, parts, _beside_offered(present))
        state = decoded.pop("get_state()")

        def write() -> None:
            try:
                present.set_state(state)
            except Exception as error:
                raise NotCaptured(f"raised {error_line(error, named=True)}").of(present, "set_state()") from error
            vars(present).update(decoded)

        self._writes.append(write)

    def _class(self, index: int, present: Any, label: str, bindings: Mapping[str, Encoded]) -> None:
        self._find(index, present, label, isinstance(present, type) and full_name(present) == label)
        ours = class_bindings(present)
        decoded = self._children(present, bindings, ours)
        changed = {key: value for key, value in decoded.items() if value is not ours.get(key, _ABSENT)}

        def write() -> None:
            for key, value in changed.items():
                setattr(present, key, value)

        self._writes.append(write)

    def _function(self, index: int, present: Any, label: str, bindings: Mapping[str, Encoded]) -> None:
        self._find(index, present, label, function_label(present) == label)
        import_as_before(present, bindings)
        ours = function_bindings(present)
        decoded = self._children(present, bindings, ours)
        changed = {key: value for key, value in decoded.items() if value is not ours.get(key, _ABSENT)}
        self._writes.append(lambda: bind(present, changed))

    _LEAVES: dict[str, Callable[..., Any]] = {
        "complex": complex,
        "bytes": lambda text: text.encode("latin-1"),
        "bytearray": lambda text: bytearray(text, "latin-1"),
        "array": array_memory.unpack,
        "scalar": array_memory.unpack_scalar,
        "torch_generator": lambda state: torch.Generator().set_state(state),
    }
    _READERS: dict[str, Callable[..., None]] = {
        "list": _list,
        "tuple": _tuple,
        "deque": _deque,
        "dict": _dict,
        "view": _view,
        "generator": _generator,
        "random_state": _random_state,
        "bit_generator": _bit_generator,
        "python_random": _python_random,
        "method": _method,
        "fixed": _fixed,
        "mujoco_model": _mujoco_model,
        "mujoco_data": _mujoco_data,
        "object": _object,
        "offered": _offered,
        "class": _class,
        "function": _function,
    }


def _beside_offered(env: gymnasium.Env) -> dict[str, Any]:
    """What is kept for an environment that offers its state: Gymnasium's generator, and the environment it wraps."""
    names = ("_np_random", "env") if isinstance(env, gymnasium.Wrapper) else ("_np_random",)
    return {name: vars(env)[name] for name in names if name in vars(env)}


def _element(present: Any, key: Any) -> Any:
    try:
        return present[key] if isinstance(present, list | tuple | dict | deque) else _ABSENT
    except LookupError:
        return _ABSENT
