"""A captured and restored environment steps on as if nothing had happened, to the last bit, or is not captured."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
import zoo
from gymnasium.spaces.utils import flatten
from test_resume import differing

import pmoe_lightning.envs  # noqa: F401  (registers the tasks of many ways)
from pmoe_lightning.checkpoints.random_states import capture_random_states, restore_random_states
from pmoe_lightning.envs import GymnasiumEnv
from pmoe_lightning.envs.object_parts import NotCaptured
from pmoe_lightning.envs.simulator_state import capture, restore

MUJOCO = ["Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum"]
MUJOCO += ["Pusher", "Reacher", "Swimmer", "Walker2d"]
IDS = [f"{name}-v5" for name in MUJOCO] + ["Pendulum-v1", "MountainCarContinuous-v0", "MultiGoal-v0"]
IDS += ["MultiGoalMaze-v0", "TwoRoutes-v0"]
IDS += [f"{kind.__name__}-v0" for kind in zoo.EXACT]


def _batch(id: str, seed: int) -> GymnasiumEnv:
    """Two environments, which may share what their classes and modules keep."""
    return GymnasiumEnv([gymnasium.make(id, disable_env_checker=True) for _ in range(2)], seed=seed)


def _steps(envs: list[gymnasium.Env], rng: np.random.Generator, number: int) -> list[tuple]:
    taken = []
    for env in envs * number:
        action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            observation, _ = env.reset()
        observed = flatten(env.observation_space, observation)
        taken.append((np.asarray(observed).tobytes(), float(reward), terminated, truncated))
    return taken


@pytest.mark.parametrize("id", IDS)
def test_a_restored_environment_steps_on_exactly(id, tmp_path):
    batch, rng = _batch(id, 3), np.random.default_rng(0)
    batch.reset()
    _steps(batch.envs, rng, 46)
    state = {"envs": capture(batch.envs), "random": capture_random_states()}
    torch.save(state, tmp_path / "state.pt")
    actions_from_here = rng.bit_generator.state
    expected = _steps(batch.envs, rng, 200)

    other = _batch(id, 4)
    other.reset()
    _steps(other.envs, rng, 1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    restore(other.envs, state["envs"])
    restore_random_states(state["random"])
    again = capture(other.envs)
    rng.bit_generator.state = actions_from_here
    assert _steps(other.envs, rng, 200) == expected
    assert differing(state["envs"], again) == [], "something else than state was captured"


class _Later(zoo.Stranger):
    """Keeps what a new process has not: it comes into being with the first step."""

    def moved(self, action):
        global LATE
        LATE = globals().get("LATE", 0) + 1
        type(self).late = getattr(type(self), "late", 0) + 1
        _draw.calls = getattr(_draw, "calls", 0) + 1
        return LATE + self.late + _draw.calls


def _draw():
    pass


def test_what_a_new_process_has_not_yet_is_put_back_too():
    env, rng = _Later(), np.random.default_rng(0)
    env.reset(seed=3)
    _steps([env], rng, 20)
    state, actions_from_here = capture([env]), rng.bit_generator.state
    expected = _steps([env], rng, 5)
    del globals()["LATE"], _Later.late, _draw.calls
    fresh = _Later()
    fresh.reset(seed=4)
    restore([fresh], state)
    rng.bit_generator.state = actions_from_here
    assert _steps([fresh], rng, 5) == expected


@pytest.mark.parametrize(("kind", "part"), zoo.REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_not_surely_captured_is_refused_by_name(kind, part):
    env = gymnasium.make(f"{kind.__name__}-v0", disable_env_checker=True)
    env.reset(seed=0)
    with pytest.raises(NotCaptured) as refusal:
        capture([env])
    assert part in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_part_that_is_named_is_the_innermost_one():
    env = GymnasiumEnv([gymnasium.make("InADict-v0")], seed=0)
    env.reset()
    with pytest.raises(NotCaptured, match=r"^InADict\.kept\['a'\]\[1\]\['b'\] is a zoo\.Mode$"):
        capture(env.envs)


@pytest.mark.parametrize(
    ("id", "other", "message"),
    [
        ("Hopper-v5", "Ant-v5", "HopperEnv and is a .*AntEnv"),
        ("Hopper-v5", "Pendulum-v1", "HopperEnv and is a .*PendulumEnv"),
        ("Pendulum-v1", "Generator-v0", "TimeLimit and is a .*OrderEnforcing"),
        ("Offers-v0", "Generator-v0", "zoo.Offers and is a zoo.Generator"),
    ],
)
def test_the_state_of_another_environment_is_refused(id, other, message):
    captured, env = gymnasium.make(id), gymnasium.make(other)
    for made in (captured, env):
        made.reset(seed=0)
    before = capture([env])
    with pytest.raises(NotCaptured, match=message):
        restore([env], capture([captured]))
    assert differing(before, capture([env])) == [], "it was changed all the same"


def test_the_state_of_another_model_is_refused():
    heavy, light = (zoo.OwnMujoco() for _ in range(2))
    model = zoo.mujoco.MjModel.from_xml_string(zoo.CART.replace('mass="1"/>', 'mass="1"/><geom size="0.2"/>'))
    light.physics["sim"] = zoo.mujoco.MjData(model)
    for env in (heavy, light):
        env.reset(seed=0)
    with pytest.raises(NotCaptured, match="another MuJoCo model"):
        restore([light], capture([heavy]))


def test_an_environment_that_cannot_be_told_from_another_is_refused():
    """What stands in a fresh environment's place decides which is which."""
    first, fresh = zoo.InnerEnvironments(), zoo.InnerEnvironments()
    for env in (first, fresh):
        env.reset(seed=0)
        env.worlds = [zoo.Generator(), zoo.Generator()]
    vars(first)["worlds"].reverse()
    first.current, fresh.current = first.worlds[1], fresh.worlds[0]
    for env in (first, fresh):  # so that it is met before the list
        worlds = vars(env).pop("worlds")
        env.worlds = worlds
        for world in worlds:
            world.reset(seed=0)
    with pytest.raises(NotCaptured, match="was two of zoo.Generator and is one"):
        restore([fresh], capture([first]))


def test_the_set_state_of_gymnasium_is_no_offer():
    """It takes positions and velocities, and knows nothing of the rest."""

    class Planning(zoo.HopperEnv):
        def get_state(self):
            return self.data.qpos.copy(), self.data.qvel.copy()

    env = Planning()
    env.reset(seed=0)
    assert capture([env])["nodes"][0][0] == "object"


VERSIONS = {
    "another": ("Hopper-v5", {"mujoco": "3.17.0"}, "its state is of MuJoCo 3.17.0, and this is MuJoCo 3.11.0"),
    "unknown": ("Hopper-v5", None, "its state is of MuJoCo of an unknown version, and this is MuJoCo 3.11.0"),
    "without": ("Pendulum-v1", None, "its state is of a checkpoint written by an earlier version of this program"),
}


@pytest.mark.parametrize(("id", "changed", "message"), VERSIONS.values(), ids=VERSIONS)
def test_the_state_of_another_mujoco_starts_a_new_episode(id, changed, message, monkeypatch):
    monkeypatch.setattr("mujoco.__version__", "3.11.0")
    env, other = _batch(id, 0), _batch(id, 5)
    env.reset()
    env.rand_step()
    state = env.simulator_state()
    state["simulators"] |= changed or {}
    if changed is None:
        state["envs"] = [state.pop("simulators")["nodes"]] * 2
    assert other.load_simulator_state(state) == f"environment {id} starts a new episode: {message}"
    torch.manual_seed(0)
    other.load_simulator_state(state)
    first = other.reset()["observation"]
    torch.manual_seed(0)
    other.load_simulator_state(state)
    assert torch.equal(other.reset()["observation"], first), "another episode each time"
    assert not torch.equal(_batch(id, 5).reset()["observation"], first), "the first episode again"
