"""The whole state of Gymnasium environments as plain values and tensors, so that a resumed run steps on exactly.

Gymnasium has no such call, and pickling is no substitute: its MuJoCo environments pickle as fresh ones. What is
captured is in :mod:`.object_graph`. An environment that holds anything else (a Box2D world, a socket) is not, unless it
offers its state itself:

* ``get_state()`` returns everything that its next steps depend on, made of plain values, NumPy arrays and generators;
  ``np_random`` is kept without it;
* ``set_state(state)`` brings a fresh environment, made with the same arguments, into that state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium

from pmoe_lightning.envs import mujoco_state
from pmoe_lightning.envs.object_graph import Decoder, Encoder
from pmoe_lightning.envs.object_parts import NotCaptured
from pmoe_lightning.errors import error_line

__all__ = ["NotCaptured", "State", "capture", "is_mujoco", "restore"]

State = dict[str, Any]


def capture(envs: Sequence[gymnasium.Env]) -> State:
    """The state of environments, which may share objects, as dictionaries, lists, tuples, numbers, text and tensors.

    Raises:
        NotCaptured: naming the part that cannot be captured.
    """
    encoder = Encoder()
    state: State = {"envs": [encoder.encode(env) for env in envs], "nodes": encoder.nodes}
    if encoder.has_met_mujoco:
        state["mujoco"] = mujoco_state.version()
    return state


def restore(envs: Sequence[gymnasium.Env], state: State) -> None:
    """Bring environments made with the same arguments into a captured state.

    Raises:
        NotCaptured: the state is of other environments or of another MuJoCo. The environments are to be reset then.
    """
    if "nodes" not in state and not any(map(is_mujoco, envs)):
        raise NotCaptured("is of a checkpoint written by an earlier version of this program", "its state")
    captured_by = state.get("mujoco", None if "nodes" in state else "of an unknown version")
    if captured_by is not None and captured_by != mujoco_state.version():
        raise NotCaptured(f"is of MuJoCo {captured_by}, and this is MuJoCo {mujoco_state.version()}", "its state")
    decoder = Decoder(state["nodes"])
    try:
        for env, encoded in zip(envs, state["envs"], strict=True):
            decoder.decode(encoded, env)
        decoder.write()
    except NotCaptured:
        raise
    except Exception as error:
        raise NotCaptured(f"is of another environment: {error_line(error)}", "its state") from error


def is_mujoco(env: gymnasium.Env) -> bool:
    """Whether MuJoCo simulates this environment, the way Gymnasium's own tasks use it."""
    return mujoco_state.is_data(getattr(env.unwrapped, "data", None))
