"""The state of MuJoCo's models and data, as tensors and numbers.

Of a model, every array and option, because an environment may draw masses, friction or gravity anew at each reset. Of
the data, the integration state, and every other array: after a step the poses and forces still belong to the instant
before the integration, and Ant and Humanoid read them when they are next stepped. Contacts are found anew from those
poses. What the constraint solver writes in its arena is not state: every step computes it before it is used.
"""

from __future__ import annotations

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
    parts = {"model": model, "opt": model.opt, "stat": model.stat}
    state: State = {part: dict(_fields(struct)) for part, struct in parts.items()}
    return state | {"names": model.names.decode("latin-1")}


def check_model(model: Any, state: State) -> None:
    """Refuse the state of a model that another description was compiled to.

    Raises:
        ValueError: it is.
    """
    ours = capture_model(model)
    sizes = {key for key, value in ours["model"].items() if not isinstance(value, torch.Tensor)}
    same = ours["names"] == state["names"] and all(ours["model"][key] == state["model"].get(key) for key in sizes)
    for part in ("model", "opt", "stat"):
        same &= {key: _kind(value) for key, value in ours[part].items()} == {
            key: _kind(value) for key, value in state[part].items()
        }
    if not same:
        raise ValueError("is of another MuJoCo model")


def restore_model(model: Any, state: State) -> None:
    """Bring a model that was checked into a captured state."""
    for part, struct in {"model": model, "opt": model.opt, "stat": model.stat}.items():
        for name, value in state[part].items():
            if isinstance(value, torch.Tensor):
                getattr(struct, name)[...] = value.numpy()
            elif part != "model":
                setattr(struct, name, value)


def capture_data(data: Any) -> State:
    """The integration state and all arrays but the solver's."""
    import mujoco

    integration = np.empty(mujoco.mj_stateSize(data.model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(data.model, data, integration, mujoco.mjtState.mjSTATE_INTEGRATION)
    arrays = {name: torch.from_numpy(array.copy()) for name, array in _arrays(data)}
    forces = torch.from_numpy(data.efc_force.copy())
    warnings = torch.from_numpy(np.stack([data.warning.number, data.warning.lastinfo]))
    return {"integration": torch.from_numpy(integration), "arrays": arrays, "forces": forces, "warnings": warnings}


def check_data(data: Any, state: State) -> None:
    """Refuse the state of data that belong to another model.

    Raises:
        ValueError: they do.
    """
    import mujoco

    if state["integration"].shape != (mujoco.mj_stateSize(data.model, mujoco.mjtState.mjSTATE_INTEGRATION),):
        raise ValueError("is of another MuJoCo model")


def restore_data(data: Any, state: State) -> None:
    """Bring data that were checked into a captured state, once their model is in its own."""
    import mujoco

    model, integration = data.model, state["integration"].numpy()
    mujoco.mj_resetData(model, data)
    mujoco.mj_setState(model, data, integration, mujoco.mjtState.mjSTATE_INTEGRATION)
    _write(data, state["arrays"])
    mujoco.mj_collision(model, data)
    mujoco.mj_makeConstraint(model, data)
    # Both have written into arrays, and the second has read positions of another instant than its forces are of.
    mujoco.mj_setState(model, data, integration, mujoco.mjtState.mjSTATE_INTEGRATION)
    _write(data, state["arrays"])
    if data.efc_force.shape == state["forces"].shape:
        data.efc_force[...] = state["forces"].numpy()
    data.warning.number[...], data.warning.lastinfo[...] = state["warnings"].numpy()


def _write(data: Any, arrays: State) -> None:
    for name, array in _arrays(data):
        saved = arrays.get(name)
        if saved is not None and saved.shape == array.shape:
            array[...] = saved.numpy()


def _arrays(data: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name in dir(data):
        if not name.startswith(("_", *_SCRATCH)):
            array = getattr(data, name)
            if isinstance(array, np.ndarray) and array.size and not name.endswith("_island"):
                yield name, array


def _fields(struct: Any) -> Iterator[tuple[str, Any]]:
    for name in dir(struct):
        if name.startswith("_") or name == _DRAWN:
            continue
        value = getattr(struct, name)
        if isinstance(value, np.ndarray):
            yield name, torch.from_numpy(value.copy())
        elif isinstance(value, bool | int | float):
            yield name, value


def _kind(value: Any) -> Any:
    return (value.dtype, value.shape) if isinstance(value, torch.Tensor) else type(value)
