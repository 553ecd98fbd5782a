"""Where environments come from that Gymnasium does not bring: what to install, and how to name them."""

from __future__ import annotations

import difflib
import re
from importlib.metadata import version

import gymnasium

__all__ = ["closest", "mend", "package"]

_ROBOTICS = r"Fetch|Hand(Reach|Manipulate)|AdroitHand|(Point|Ant)Maze|FrankaKitchen"
#: Pattern of an id, what pip installs, and the module whose import registers it.
_PACKAGES = (
    (r"dm_control/", '"shimmy[dm-control]"', "shimmy"),
    (r"\w+BulletEnv-", '"pmoe-lightning[pybullet]"', "pybullet_envs_gymnasium"),
    (_ROBOTICS, '"pmoe-lightning[robotics]"', "gymnasium_robotics"),
    (r"Panda(Reach|Push|Slide|PickAndPlace|Stack|Flip)", "panda-gym", "panda_gym"),
    (r"Meta-World/", "--no-deps metaworld==3.1.1", "metaworld"),
)
#: MetaWorld's tasks are not ids but an argument of one.
_META_WORLD = r"([a-z]+(?:-[a-z]+)*-v[23])$|Meta-World/"
#: Pattern of an id, and the first MuJoCo with which its environments fail.
_TOO_NEW = ((r"Fetch|Hand(Reach|Manipulate)|FrankaKitchen", (3, 12)), (r"Meta-World/", (3, 17)))
_DM_CONTROL = (
    r"((?:acrobot|ball_in_cup|cartpole|cheetah|dog|finger|fish|hopper|humanoid|humanoid_CMU|manipulator|"
    r"pendulum|point_mass|quadruped|reacher|stacker|swimmer|walker)-[a-z]\w*)$"
)
#: Ids of packages whose actions are discrete.
_DISCRETE = r"ALE/|MinAtar/|MiniGrid-|BabyAI-|bsuite/"


def package(id: str) -> str:
    """What to install for an id, and how to name it, to follow it in a message; empty if that is not known."""
    plain = id.rpartition(":")[2]
    if any(known.startswith(plain.rpartition("-v")[0] + "-v") for known in gymnasium.registry):
        return ""  # it is installed and imported: something else is wrong
    if re.match(_DISCRETE, plain, re.IGNORECASE):
        return ": it is in a package of its own, and its actions are discrete: only continuous ones are supported"
    if task := re.match(_META_WORLD, plain):
        return _written_for_meta_world(task[1])
    if task := re.match(_DM_CONTROL, plain):
        return f": a task of the DeepMind Control Suite is named env=dm_control env.task={task[1]}"
    for pattern, name, module in _PACKAGES:
        if re.match(pattern, plain, re.IGNORECASE):
            return f": it is in a package of its own, pip install {name}, and is named env.id={module}:{plain}"
    return ""


def mend(id: str) -> str:
    """What may mend an environment that is there and fails, to follow a message; empty if that is not known."""
    plain = id.rpartition(":")[2]
    for pattern, first in _TOO_NEW:
        if re.match(pattern, plain) and _mujoco_release() >= first:
            below, ours = ".".join(map(str, first)), version("mujoco")
            return f'; it works with MuJoCo below {below}, not with {ours}: pip install "mujoco==3.11.0"'
    return _written_for_meta_world(None) if plain.startswith("Meta-World/") else ""


def _written_for_meta_world(task: str | None) -> str:
    return (
        ": MetaWorld is in a package of its own, pip install --no-deps metaworld==3.1.1, and its task is an argument, "
        f"env.id=metaworld:Meta-World/MT1 +env.env_name={task or 'reach-v3'}"
    )


def _mujoco_release() -> tuple[int, ...]:
    return tuple(int(part) for part in version("mujoco").split(".")[:2])


def closest(id: str) -> str:
    """The registered ids that are most like one that is not, to follow it in a message."""
    known = {known_id.lower(): known_id for known_id in gymnasium.registry}
    matches = difflib.get_close_matches(id.lower(), known, n=3, cutoff=0.6)
    if not matches:
        return ": list the known ones with gymnasium.pprint_registry(); one of another module is named module:Name-v0"
    return f": did you mean {', '.join(known[match] for match in matches)}?"
