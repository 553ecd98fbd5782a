"""The whole state of a Gymnasium environment as plain values and tensors, so that a resumed run steps on exactly.

Gymnasium has no such call, and pickling is no substitute: its MuJoCo environments pickle as fresh ones. Captured are

* the plain attributes of the environment and of every wrapper around it (step counters, goals, a pendulum's angle);
* the state of its random generator;
* for MuJoCo the integration state, and every other floating-point array of ``MjData``: after a step the poses and
  forces still belong to the instant before the integration, and Ant and Humanoid read them when they are next stepped.

An environment that holds anything else (a Box2D world, a socket) is not captured: :func:`capture` returns None.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import torch

State = dict[str, Any]

# What never changes after an environment is made, or has no influence on its steps.
_IGNORED = (gymnasium.Space, gymnasium.envs.registration.EnvSpec, gymnasium.Env, np.random.Generator)
_IGNORED_NAMES = ("_ezpickle_args", "_ezpickle_kwargs", "_saved_kwargs", "_cached_spec", "metadata", "_metadata")
_IGNORED_NAMES += ("model", "data", "mujoco_renderer", "observation_structure", "screen", "clock", "surf", "viewer")
# Scratch of the constraint solver, which every step computes anew: its shapes depend on the contacts, or it is of the
# islands of bodies in contact, and what lies behind their last entry is whatever was in that memory.
_SOLVER_PREFIXES = ("efc_", "iefc_", "efm_", "iacc", "ifrc_")


def capture(env: gymnasium.Env) -> State | None:
    """The state of an environment as dictionaries, lists, numbers, text and tensors; None if it has other parts."""
    layers = [_plain_attributes(layer) for layer in _layers(env)]
    if any(layer is None for layer in layers):
        return None
    state: State = {"layers": layers, "random": _to_plain(env.unwrapped.np_random.bit_generator.state)}
    if is_mujoco(env):
        state["mujoco"] = _capture_mujoco(env)
    return state


def restore(env: gymnasium.Env, state: State) -> None:
    """Bring an environment made with the same arguments into a captured state.

    Raises:
        ValueError: the state is of another kind of environment.
    """
    layers = list(_layers(env))
    if len(layers) != len(state["layers"]) or is_mujoco(env) != ("mujoco" in state):
        raise ValueError("the simulator state is of another environment")
    for layer, attributes in zip(layers, state["layers"], strict=True):
        vars(layer).update({name: _from_plain(value) for name, value in attributes.items()})
    env.unwrapped.np_random.bit_generator.state = _from_plain(state["random"])
    if is_mujoco(env):
        _restore_mujoco(env, state["mujoco"])


def _layers(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def _plain_attributes(layer: gymnasium.Env) -> dict[str, Any] | None:
    attributes = {}
    for name, value in vars(layer).items():
        if name in _IGNORED_NAMES or isinstance(value, _IGNORED):
            continue
        if not _is_plain(value):
            return None
        attributes[name] = _to_plain(value)
    return attributes


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(element) for key, element in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return value is None or isinstance(value, bool | int | float | str | np.bool_ | np.number)


def _to_plain(value: Any) -> Any:
    """Arrays as tensors and NumPy scalars as arrays: both types survive, and loading needs no unpickling of objects."""
    if isinstance(value, dict):
        return {key: _to_plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_to_plain, value))
    if isinstance(value, np.bool_ | np.number):
        return {"scalar": torch.from_numpy(np.array([value]))}
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"scalar"}:
            return value["scalar"].numpy()[0]
        return {key: _from_plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_from_plain, value))
    return value.numpy().copy() if isinstance(value, torch.Tensor) else value


def is_mujoco(env: gymnasium.Env) -> bool:
    """Whether MuJoCo simulates this environment, the way Gymnasium's own tasks use it."""
    return type(getattr(env.unwrapped, "data", None)).__name__ == "MjData"


def _capture_mujoco(env: gymnasium.Env) -> State:
    import mujoco

    model, data = env.unwrapped.model, env.unwrapped.data
    integration = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(model, data, integration, mujoco.mjtState.mjSTATE_INTEGRATION)
    arrays = {name: torch.from_numpy(array.copy()) for name, array in _float_arrays(data)}
    return {"integration": torch.from_numpy(integration), "arrays": arrays}


def _restore_mujoco(env: gymnasium.Env, state: State) -> None:
    import mujoco

    model, data = env.unwrapped.model, env.unwrapped.data
    integration = state["integration"].numpy()
    if len(integration) != mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION):
        raise ValueError("the simulator state is of another MuJoCo model")
    mujoco.mj_setState(model, data, integration, mujoco.mjtState.mjSTATE_INTEGRATION)
    # Makes the contacts, which are not copied; the arrays that it brings up to date are then put back.
    mujoco.mj_forward(model, data)
    mujoco.mj_setState(model, data, integration, mujoco.mjtState.mjSTATE_INTEGRATION)
    for name, array in _float_arrays(data):
        saved = state["arrays"].get(name)
        if saved is not None and saved.shape == array.shape:
            array[...] = saved.numpy()


def _float_arrays(data: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name in dir(data):
        if not name.startswith(("_", *_SOLVER_PREFIXES)):
            array = getattr(data, name)
            if isinstance(array, np.ndarray) and array.dtype == np.float64 and array.size:
                yield name, array
