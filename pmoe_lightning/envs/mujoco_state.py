"""The state of MuJoCo's models and data, as tensors and numbers.

Of a model, every array and option, because an environment may draw masses, friction or gravity anew at each reset. Of
the data, the integration state, and every other array: after a step the poses and forces still belong to the instant
before the integration, and Ant and Humanoid read them when they are next stepped. Contacts are found anew from those
poses. What the constraint solver writes in its arena is not state: every step computes it before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

State = dict[str, Any]

# The shapes of the solver's scratch depend on the contacts, and what lies behind its last entry is whatever was there.
_SCRATCH = ("efc_", "iefc_", "efm_", "iacc", "ifrc_", "island_", "map_", "plugin")
_DRAWN = "tex_data"  # the pixels of textures, which are most of a model and have no part in its motion


def is_model(value: Any) -> bool:
    """Whether this is an ``MjModel``; MuJoCo need not be installed."""
    return type(value).__name__ == "MjModel" and type(value).__module__.startswith("mujoco.")


def is_data(value: Any) -> bool:
    """Whether this is an ``MjData``; MuJoCo need not be installed."""
    return type(value).__name__ == "MjData" and type(value).__module__.startswith("mujoco.")


def version() -> str:
    """Of the MuJoCo installed. Results of another one are others."""
    import mujoco

    return mujoco.__version__


def capture_model(model: Any) -> State:
    """Every array, size and option of a model, and the names in it."""
    fields = dict(_fields(model))
    numbers = {key: value for key, value in fields.items() if not isinstance(value, np.ndarray)}
    arrays = {key: value for key, value in fields.items() if key not in numbers}
    return {"arrays": _pack(arrays), "numbers": numbers, "names": model.names.decode("latin-1")}


def check_model(model: Any, state: State) -> None:
    """Refuse the state of a model that another description was compiled to.

    Raises:
        ValueError: it is.
    """
    ours = capture_model(model)
    same = ours["names"] == state["names"] and ours["arrays"]["layout"] == state["arrays"]["layout"]
    same &= ours["numbers"].keys() == state["numbers"].keys()
    if not same or any(value != state["numbers"][key] for key, value in ours["numbers"].items() if "." not in key):
        raise ValueError("is of another MuJoCo model")


def restore_model(model: Any, state: State) -> None:
    """Bring a model that was checked into a captured state."""
    fields = dict(_fields(model))
    for key, value in _unpack(state["arrays"]).items():
        fields[key][...] = value
    for key, value in state["numbers"].items():
        part, _, name = key.rpartition(".")
        if part:  # what belongs to the model itself are sizes
            setattr(getattr(model, part), name, value)


def capture_data(data: Any) -> State:
    """The integration state and all arrays but the solver's."""
    import mujoco

    integration = np.empty(mujoco.mj_stateSize(data.model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(data.model, data, integration, mujoco.mjtState.mjSTATE_INTEGRATION)
    forces = torch.from_numpy(data.efc_force.copy())
    warnings = torch.from_numpy(np.stack([data.warning.number, data.warning.lastinfo]))
    return {
        "integration": torch.from_numpy(integration),
        "arrays": _pack(dict(_arrays(data))),
        "forces": forces,
        "warnings": warnings,
    }


def check_data(data: Any, state: State) -> None:
    """Refuse the state of data that belong to another model.

    Raises:
        ValueError: they do.
    """
    import mujoco

    if state["integration"].shape != (mujoco.mj_stateSize(data.model, mujoco.mjtState.mjSTATE_INTEGRATION),):
        raise ValueError("is of another MuJoCo model")


def restore_data(data: Any, state: State, *, halfway: bool = False) -> None:
    """Bring data that were checked into a captured state, once their model is in its own.

    Args:
        data, state: as of :func:`check_data`.
        halfway: the next step begins with ``mj_step2``, as dm_control's do, and reads the contacts and constraints that
            ``mj_step1`` has found. Otherwise it finds its own.
    """
    import mujoco

    model, integration = data.model, state["integration"].numpy()
    mujoco.mj_resetData(model, data)
    mujoco.mj_setState(model, data, integration, mujoco.mjtState.mjSTATE_INTEGRATION)
    _write(data, state["arrays"])
    if halfway:
        mujoco.mj_step1(model, data)
    else:
        mujoco.mj_collision(model, data)
        mujoco.mj_makeConstraint(model, data)
    # They have written into arrays, and mj_makeConstraint has read positions of another instant than its forces are of.
    mujoco.mj_setState(model, data, integration, mujoco.mjtState.mjSTATE_INTEGRATION)
    _write(data, state["arrays"])
    if data.efc_force.shape == state["forces"].shape:
        data.efc_force[...] = state["forces"].numpy()
    data.warning.number[...], data.warning.lastinfo[...] = state["warnings"].numpy()


def _write(data: Any, packed: State) -> None:
    arrays = _unpack(packed)
    for name, array in _arrays(data):
        if name in arrays and arrays[name].shape == array.shape:
            array[...] = arrays[name]


def _pack(arrays: dict[str, np.ndarray]) -> State:
    """One tensor for all of them, because a checkpoint with hundreds for each environment takes long to write."""
    layout = [(name, array.dtype.str, list(array.shape)) for name, array in arrays.items()]
    content = bytearray(b"".join(array.tobytes() for array in arrays.values()))
    return {"layout": layout, "content": torch.frombuffer(content, dtype=torch.uint8)}


def _unpack(packed: State) -> dict[str, np.ndarray]:
    content, offset, arrays = packed["content"].numpy(), 0, {}
    for name, dtype, shape in packed["layout"]:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        arrays[name] = content[offset : offset + size].view(dtype).reshape(shape)
        offset += size
    return arrays


def _arrays(data: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name in dir(data):
        if not name.startswith(("_", *_SCRATCH)):
            array = getattr(data, name)
            if isinstance(array, np.ndarray) and array.size and not name.endswith("_island"):
                yield name, array


def _fields(model: Any) -> Iterator[tuple[str, Any]]:
    for prefix, struct in {"": model, "opt.": model.opt, "stat.": model.stat}.items():
        for name in dir(struct):
            if not name.startswith("_") and name != _DRAWN:
                value = getattr(struct, name)
                if isinstance(value, np.ndarray | bool | int | float):
                    yield prefix + name, value
