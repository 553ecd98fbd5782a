"""The batched Gymnasium environment against plain Gymnasium loops and a scripted environment."""

import logging
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Sequence, Tuple
from probe_envs import ScriptedEnv, expected_transitions, make_scripted_env
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, FrameSkipTransform, RewardSum, TransformedEnv
from torchrl.envs.utils import check_env_specs

from pmoe_lightning.envs import GymnasiumEnv, make_env
from pmoe_lightning.errors import ConfigurationError, RunError


def play(env: GymnasiumEnv, actions: torch.Tensor, step=GymnasiumEnv.step_and_maybe_reset) -> TensorDictBase:
    """Step ``env`` through ``actions`` [N, T, A] and stack what a collector would store, [N, T]."""
    root, steps = env.reset(), []
    for action in actions.unbind(1):
        root.set("action", action)
        stepped, root = step(env, root)
        steps.append(stepped.clone())
    return torch.stack(steps, 1)


def random_actions(env: GymnasiumEnv, num_steps: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.stack([env.action_spec.rand() for _ in range(num_steps)], 1)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("id", ["Pendulum-v1", "HalfCheetah-v5", "Hopper-v5"])
def test_specs_describe_what_the_environment_returns(id: str, num_envs: int) -> None:
    check_env_specs(make_env(id, num_envs=num_envs, seed=0))


def test_keys_dtypes_and_shapes() -> None:
    env = make_env("Hopper-v5", num_envs=2, seed=0)
    stored = play(env, random_actions(env, 5))
    flags = {"done": torch.bool, "terminated": torch.bool, "truncated": torch.bool}
    root = {"observation": torch.float32, "action": torch.float32, **flags}
    root |= {"episode_return": torch.float32, "episode_length": torch.int64}
    following = {key: dtype for key, dtype in root.items() if key != "action"} | {"reward": torch.float32}
    assert {key: value.dtype for key, value in stored.exclude("next").items()} == root
    assert {key: value.dtype for key, value in stored["next"].items()} == following
    sizes = {"observation": 11, "action": 3}
    for key, value in stored.items(include_nested=True, leaves_only=True):
        assert value.shape == (2, 5, sizes.get(key[-1] if isinstance(key, tuple) else key, 1))
    assert env.device is None and env.batch_size == (2,)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_transitions_are_exactly_those_of_the_script(num_envs: int) -> None:
    env = make_scripted_env(num_envs=num_envs, seed=7)
    stored = play(env, random_actions(env, 40))
    for i in range(num_envs):
        for t, expected in enumerate(expected_transitions(40, seed=7, index=i)):
            step = stored[i, t]
            assert step["observation"].tolist() == expected.observation
            assert step["next", "observation"].tolist() == expected.next_observation
            assert step["next", "reward"].item() == expected.reward
            assert step["next", "terminated"].item() == expected.terminated
            assert step["next", "truncated"].item() == expected.truncated
            assert step["next", "done"].item() == (expected.terminated or expected.truncated)
            assert step["next", "episode_return"].item() == expected.episode_return
            assert step["next", "episode_length"].item() == expected.episode_length
            began = expected.episode_length == 1
            assert step["episode_length"].item() == expected.episode_length - 1
            assert step["episode_return"].item() == (0 if began else expected.episode_return - expected.reward)
            assert not step["done"].item() and not step["terminated"].item() and not step["truncated"].item()


def test_same_trajectories_as_a_plain_gymnasium_loop() -> None:
    env = make_env("Hopper-v5", num_envs=2, seed=11)
    actions = random_actions(env, 120)
    stored = play(env, actions)
    assert stored["next", "done"].sum() >= 4
    for i in range(2):
        plain = gymnasium.make("Hopper-v5")
        observation, _ = plain.reset(seed=11 + i)
        for t in range(120):
            step = stored[i, t]
            assert np.array_equal(step["observation"], observation.astype(np.float32))
            observation, reward, terminated, truncated, _ = plain.step(actions[i, t].numpy())
            assert np.array_equal(step["next", "observation"], observation.astype(np.float32))
            assert step["next", "reward"].item() == np.float32(reward)
            assert (step["next", "terminated"].item(), step["next", "truncated"].item()) == (terminated, truncated)
            if terminated or truncated:
                observation, _ = plain.reset()


def test_fast_step_equals_the_generic_one() -> None:
    envs = [make_env("Hopper-v5", num_envs=3, seed=5) for _ in range(2)]
    actions = random_actions(envs[0], 120)
    fast, generic = play(envs[0], actions), play(envs[1], actions, EnvBase.step_and_maybe_reset)
    assert fast["next", "done"].sum() >= 6
    assert set(fast.keys(True, True)) == set(generic.keys(True, True))
    assert (fast == generic).all()


def test_time_limit_truncates_without_terminating() -> None:
    env = make_env("Pendulum-v1", seed=0, max_episode_steps=4)
    stored = play(env, random_actions(env, 8))["next"]
    assert stored["truncated"].flatten().tolist() == [False, False, False, True] * 2
    assert stored["done"].equal(stored["truncated"]) and not stored["terminated"].any()
    assert stored["episode_length"].flatten().tolist() == [1, 2, 3, 4] * 2


def test_environment_i_starts_from_seed_plus_i_and_later_episodes_go_on_from_there() -> None:
    env = make_env("Pendulum-v1", num_envs=2, seed=3, max_episode_steps=2)
    first = env.reset()["observation"]
    second = env.reset()["observation"]
    for i in range(2):
        plain = gymnasium.make("Pendulum-v1")
        assert np.array_equal(first[i], plain.reset(seed=3 + i)[0])
        assert np.array_equal(second[i], plain.reset()[0])
    env.set_seed(3)
    assert env.reset()["observation"].equal(first)
    assert not make_env("Pendulum-v1").reset()["observation"].equal(make_env("Pendulum-v1").reset()["observation"])


def test_action_spaces_are_seeded() -> None:
    samples = [[e.action_space.sample() for e in make_env("Hopper-v5", num_envs=2, seed=s).envs] for s in (0, 0, 1)]
    assert np.array_equal(samples[0], samples[1])
    assert not np.array_equal(samples[0], samples[2])


def test_partial_reset_leaves_the_other_environments_alone() -> None:
    env = make_scripted_env(num_envs=3)
    stepped = env.step(env.rand_action(env.reset()))["next"].select("observation", "done", "terminated", "truncated")
    stepped.set("_reset", torch.tensor([[False], [True], [False]]))
    root = env.reset(stepped)
    assert root["observation"].tolist() == [[0, 0, 1], [1, 1, 0], [2, 0, 1]]
    stepped = env.step(env.rand_action(root))["next"]
    assert stepped["episode_length"].flatten().tolist() == [2, 1, 2]
    assert stepped["episode_return"].flatten().tolist() == [-2.0 - 1.0, 8.0, -2.0 - 1.0]


@pytest.mark.parametrize(
    ("id", "bound"), [("InvertedPendulum-v5", 3.0), ("Pendulum-v1", 2.0), ("Humanoid-v5", 0.4), ("Hopper-v5", 1.0)]
)
def test_action_bounds_come_from_the_environment(id: str, bound: float) -> None:
    spec = make_env(id, num_envs=2).action_spec
    assert spec.shape[0] == 2 and spec.dtype == torch.float32
    assert torch.allclose(spec.space.high, torch.tensor(bound)) and torch.allclose(spec.space.low, torch.tensor(-bound))


def test_actions_are_clipped_for_the_environment_and_stored_as_they_are() -> None:
    env = make_scripted_env()
    actions = torch.tensor([[[0.1, 0.2], [-9.0, 9.0], [9.0, -9.0]]])
    stored = play(env, actions)
    assert stored["action"].equal(actions)
    assert np.allclose(env.envs[0].actions, [[0.1, 0.2], [-0.5, 3.0], [0.25, -2.0]])
    assert all(env.envs[0].action_space.contains(action) for action in env.envs[0].actions)


def test_actions_that_need_gradients_and_float64_action_spaces() -> None:
    probe = ScriptedEnv()
    probe.action_space = Box(-np.ones(2), np.ones(2), dtype=np.float64)
    env = GymnasiumEnv([probe])
    root = env.reset().set("action", torch.full((1, 2), 0.5, requires_grad=True))
    env.step(root)
    assert env.action_spec.dtype == torch.float32
    assert probe.actions[0].dtype == np.float64 and probe.actions[0].tolist() == [0.5, 0.5]


class DictEnv(ScriptedEnv):
    observation_space = Dict({"position": Box(-1, 1, (2, 2), np.float32), "mode": Discrete(3)})

    def _observation(self) -> dict:
        return {"position": np.full((2, 2), 0.5, np.float32), "mode": self.elapsed % 3}


class MatrixEnv(ScriptedEnv):
    observation_space = Box(0, 255, (2, 3), np.uint8)

    def _observation(self) -> np.ndarray:
        return np.arange(6, dtype=np.uint8).reshape(2, 3) + self.elapsed


def test_observations_that_are_not_vectors_are_flattened() -> None:
    env = GymnasiumEnv([DictEnv(), DictEnv()])
    assert play(env, random_actions(env, 2))["next", "observation"][0].tolist() == [
        [0.0, 1.0, 0.0, 0.5, 0.5, 0.5, 0.5],
        [0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5],
    ]
    check_env_specs(env)
    env = GymnasiumEnv([MatrixEnv()])
    assert play(env, random_actions(env, 1))["next", "observation"][0].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert env.observation_spec["observation"].dtype == torch.float32


def box(low: list[float], high: list[float], dtype: str = "f4") -> Box:
    return Box(np.array(low, dtype), np.array(high, dtype), dtype=np.dtype(dtype).type)


def with_nan(space: Box) -> Box:
    space.low[0] = np.nan
    return space


def probe_with(**attributes) -> ScriptedEnv:
    probe = ScriptedEnv()
    for name, value in attributes.items():
        setattr(probe, name, value)
    return probe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_env("HalfCheeta-v5"), "did you mean HalfCheetah-v5"),
        (lambda: make_env("halfcheetah-v5"), "did you mean HalfCheetah-v5"),
        (lambda: make_env("Hopper-v99"), "did you mean Hopper-v5"),
        (lambda: make_env("qqqqqqqq"), "pprint_registry"),
        (lambda: make_env("nosuchmodule:Hopper-v5"), "nosuchmodule"),
        (lambda: make_env("Hopper-v3"), "'Hopper-v3' cannot be"),
        (lambda: make_env("ant maze, large"), "unknown environment id|cannot be made"),
        (
            lambda: make_env("dm_control/cheetah-run-v0"),
            r"shimmy\[dm-control\].*env.id=shimmy:dm_control/cheetah-run-v0",
        ),
        (lambda: make_env("shimmy:dm_control/cheetah-run-v0"), r"No module named 'shimmy'.*shimmy\[dm-control\]"),
        (
            lambda: make_env("HopperBulletEnv-v0"),
            "pmoe-lightning.pybullet..*pybullet_envs_gymnasium:HopperBulletEnv-v0",
        ),
        (lambda: make_env("FetchReach-v4"), "pmoe-lightning.robotics..*gymnasium_robotics:FetchReach-v4"),
        (lambda: make_env("AntMaze_UMaze-v5"), "gymnasium_robotics:AntMaze_UMaze-v5"),
        (lambda: make_env("PandaReach-v3"), "panda-gym.*panda_gym:PandaReach-v3"),
        (lambda: make_env("Meta-World/MT1"), "metaworld:Meta-World/MT1"),
        (lambda: make_env("ALE/Pong-v5"), "its actions are discrete"),
        (lambda: make_env("Hopper-v5", nonsense=1), "nonsense"),
        (lambda: make_env("CartPole-v1"), "only continuous vectors"),
        (lambda: make_env("Hopper-v5", num_envs=0), "num_envs >= 1"),
        (lambda: GymnasiumEnv([probe_with(action_space=Box(-np.inf, np.inf, (2,)))]), "unbounded"),
        (lambda: GymnasiumEnv([probe_with(action_space=Box(-1, 1, (2, 2)))]), "only continuous vectors"),
        (lambda: GymnasiumEnv([probe_with(action_space=Box(-1, 1, ()))]), "only continuous vectors"),
        (lambda: GymnasiumEnv([probe_with(action_space=Box(-1, 1, (0,)))]), "no dimension"),
        (lambda: GymnasiumEnv([probe_with(action_space=None)]), "only continuous vectors"),
        (lambda: GymnasiumEnv([probe_with(action_space=box([-1, 2, -1], [1, 2, 1]))]), "dimension 1.*not below"),
        (lambda: GymnasiumEnv([probe_with(action_space=box([-1, -1], [1, np.inf]))]), "dimension 1.*unbounded"),
        (lambda: GymnasiumEnv([probe_with(action_space=with_nan(box([-1, -1], [1, 1])))]), "dimension 0.*NaN"),
        (lambda: GymnasiumEnv([probe_with(action_space=box([-1, -1e39], [1, 1e39], "f8"))]), "dimension 1.*too large"),
        (lambda: GymnasiumEnv([probe_with(action_space=box([-3e38] * 2, [3e38] * 2))]), "dimension 0.*too large"),
        (lambda: GymnasiumEnv([probe_with(action_space=box([1e9] * 2, [1e9 + 1] * 2, "f8"))]), "one number in float32"),
        (
            lambda: GymnasiumEnv([probe_with(observation_space=Box(0, 255, (84, 84, 3), np.uint8))]),
            "of which no vector is made",
        ),
        (
            lambda: GymnasiumEnv([probe_with(observation_space=Box(0, 255, (84, 84), np.uint8))]),
            "of which no vector is made",
        ),
        (lambda: GymnasiumEnv([probe_with(observation_space=Box(0, 1, (3, 64, 64)))]), "of which no vector is made"),
        (
            lambda: GymnasiumEnv([probe_with(observation_space=Dict(a=Tuple([Box(0, 9, (5, 5, 3), np.uint8)])))]),
            r"images as observation\['a'\]\[0\].*flat vector of features",
        ),
        (lambda: GymnasiumEnv([probe_with(observation_space=Box(0, 1, (0,)))]), "empty"),
        (lambda: GymnasiumEnv([probe_with(observation_space=Dict())]), "empty"),
        (lambda: GymnasiumEnv([probe_with(observation_space=Tuple([Dict(), Tuple([])]))]), "empty"),
        (lambda: GymnasiumEnv([probe_with(observation_space=None)]), "cannot be flattened"),
        (lambda: GymnasiumEnv([probe_with(action_space=Box(0, 9, (2,), np.int64))]), "only continuous vectors"),
        (lambda: GymnasiumEnv([probe_with(observation_space=Sequence(Discrete(2)))]), "cannot be flattened"),
        (lambda: GymnasiumEnv([ScriptedEnv(), probe_with(action_space=Box(-1, 1, (2,)))]), "same spaces"),
    ],
)
def test_what_cannot_work_is_one_clear_line(make, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


class Strange(ScriptedEnv):
    """Returns what it is told to, from its first reset or from a step."""

    def __init__(self, *, reset: object = None, step: object = None, at: int = 1, space: object = None) -> None:
        super().__init__()
        self.observation_space = space or self.observation_space
        self.given, self.at = {"reset": reset, "step": step}, at

    def _say(self, call: str, usual: tuple) -> object:
        given = self.given[call]
        if isinstance(given, BaseException):
            raise given
        if isinstance(given, dict):  # some parts of the tuple, by their places
            return tuple(given.get(i, part) for i, part in enumerate(usual))
        return usual if given is None else given

    def reset(self, **arguments):
        return self._say("reset", super().reset(**arguments))

    def step(self, action):
        usual = super().step(action)
        return self._say("step", usual) if len(self.actions) == self.at else usual


VECTOR = np.zeros(3)
STRANGE = [
    ({"reset": VECTOR}, r"returned a ndarray from reset, which must return \(observation, info\)"),
    ({"reset": (VECTOR,)}, "a tuple of 1 from reset"),
    ({"reset": {1: None}}, "a NoneType as the info of its reset"),
    ({"reset": {0: np.zeros(1)}}, r"of shape \(1,\), but its space declares \(3,\)"),
    ({"reset": {0: np.zeros((1, 3))}}, r"of shape \(1, 3\)"),
    ({"reset": {0: 0.5}}, r"of shape \(\)"),
    ({"reset": {0: {"a": VECTOR}}}, r"of shape \(\)"),
    ({"reset": {0: [[1, 2], [3]]}}, r"of shape \(2,\)"),
    ({"reset": {0: np.array(["1", "2", "3"])}}, "of <U1, but its space declares float64"),
    ({"reset": {0: np.zeros(3, complex)}}, "of complex128"),
    ({"reset": {0: np.array([1.0, None, 2.0])}}, "of object"),
    ({"reset": {0: np.full(3, 0.5)}, "space": Box(0, 9, (3,), np.int64)}, "of float64, but its space declares int64"),
    ({"reset": RuntimeError("no\nlicence")}, "failed in its first reset.*RuntimeError: no licence"),
    ({"reset": {0: np.zeros((3, 2))}, "space": Box(0, 1, (2, 3))}, r"of shape \(3, 2\)"),
    ({"reset": {0: {"b": VECTOR}}, "space": Dict(a=Box(0, 1, (3,)))}, r"keys \['b'\].*declares \['a'\]"),
    ({"reset": {0: {"a": VECTOR[:1]}}, "space": Dict(a=Box(0, 1, (3,)))}, r"observation\['a'\] of shape \(1,\)"),
    ({"reset": {0: (VECTOR,)}, "space": Tuple([Discrete(2), Discrete(2)])}, "1 parts as observation.*tuple of 2"),
    ({"reset": {0: 7}, "space": Discrete(3)}, r"observation=7, not in Discrete\(3\)"),
    ({"step": (VECTOR, 0.0, False, {})}, r"a tuple of 4 from step, which must return \(observation, reward, term"),
    ({"step": {0: np.zeros(1)}}, r"of shape \(1,\)"),
    ({"step": {1: None}}, "the reward None: it must be one number"),
    ({"step": {1: np.zeros(2)}}, r"the reward array\(\[0., 0.\]\): it must be one number"),
    ({"step": {1: "1.0"}}, "the reward '1.0'"),
    ({"step": {1: 1j}}, "the reward 1j"),
    ({"step": {2: None}}, "terminated=None: it must be True or False"),
    ({"step": {3: "no"}}, "truncated='no'"),
    ({"step": {3: np.zeros(2, bool)}}, "truncated=array"),
    ({"step": {4: [1]}}, "a list as the info of its step"),
    ({"step": KeyError("gone")}, "failed in its first step.*KeyError: 'gone'"),
    ({"step": {0: np.zeros(1)}, "at": 4}, r"of shape \(1,\)"),
    ({"step": {0: np.zeros((3, 1))}, "at": 4}, r"of shape \(3, 1\)"),
    ({"step": {1: np.zeros(2)}, "at": 4}, "the reward"),
    ({"step": {2: None}, "at": 4}, "terminated=None"),
    ({"step": {3: np.zeros(2, bool)}, "at": 4}, "truncated=array"),
    ({"reset": SystemExit(0)}, "failed in its first reset.*SystemExit: 0"),
    ({"step": SystemExit()}, "failed in its first step.*SystemExit"),
]


@pytest.mark.parametrize(("said", "message"), STRANGE)
def test_what_an_environment_must_not_return_is_one_clear_line(said: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        play(env := GymnasiumEnv([Strange(**said)]), random_actions(env, 4))
    assert "\n" not in str(error.value) and "Strange" in str(error.value)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize(
    "said",
    [{1: np.ones((1,))}, {1: np.ones((1, 1), np.float32)}, {1: np.float32(1)}, {1: 1}, {1: torch.ones(1)}]
    + [{0: [1.0, 2.0, 3.0], 1: 1.0}, {0: np.arange(3, dtype=np.int32), 1: 1.0}, {0: np.ones(3, np.float32), 1: 1.0}]
    + [{1: 1.0, 2: np.array([False]), 3: np.False_}, {1: 1.0, 2: 0, 3: np.zeros(1, bool)}],
)
def test_what_is_as_good_as_the_declared_is_taken(said: dict, at: int) -> None:
    env = GymnasiumEnv([Strange(step=said, at=at)])
    last = play(env, random_actions(env, at))[0, -1]["next"]
    assert last["reward"].item() == 1.0 and not last["terminated"]
    if 0 in said:
        assert last["observation"].tolist() == np.asarray(said[0]).tolist()


@pytest.mark.parametrize("error", [ValueError("two\nlines"), SystemExit("two lines")])
def test_whatever_a_constructor_raises_is_one_clear_line(error: BaseException) -> None:
    def make_failing(**kwargs) -> gymnasium.Env:
        raise error

    gymnasium.register("Failing-v0", entry_point=make_failing)
    message = f"'Failing-v0' cannot be made with {{}}: {type(error).__name__}: two lines"
    try:
        with pytest.raises(ConfigurationError, match=message):
            make_env("Failing-v0")
    finally:
        del gymnasium.registry["Failing-v0"]


def test_an_exit_in_the_middle_of_a_run_is_an_error() -> None:
    with pytest.raises(RunError, match=r"Strange.* called sys.exit\(0\)"):
        play(env := GymnasiumEnv([Strange(step=SystemExit(0), at=4)]), random_actions(env, 4))


def test_an_environment_that_cannot_be_closed_leaves_the_others_to_be_closed(caplog) -> None:
    env = GymnasiumEnv([probe_with(close=lambda: 1 / 0), last := ScriptedEnv()])
    env.close()
    assert last.closed and caplog.messages == [
        f"environment {env.name!r} failed to close: ZeroDivisionError: division by zero"
    ]


@pytest.mark.parametrize(
    ("space", "observation", "entry"),
    [
        (Box(-np.inf, np.inf, (3,), np.float64), np.array([0.0, 1e9 + 0.3, 0.0]), "entry 1 of its observation"),
        (Box(0, 2**40, (3,), np.int64), np.array([0, 0, 2**30 + 1]), "entry 2 of its observation"),
        (Dict(a=Discrete(2), t=Box(0, np.inf, (1,), np.float64)), {"a": 0, "t": np.array([1.7e9 + 1])}, "'t'"),
    ],
)
def test_numbers_that_float32_loses_are_said_in_one_line(space, observation, entry, caplog) -> None:
    for _ in range(2):
        strange = [Strange(reset={0: observation}, space=space) for _ in range(2)]
        for env in strange:
            env.spec = gymnasium.envs.registration.EnvSpec(f"Large{entry[6:7]}-v0")
        GymnasiumEnv(strange).reset()
    assert len(caplog.records) == 1 and entry in caplog.text and "float32" in caplog.text


def test_numbers_that_float32_holds_are_not_warned_of(caplog) -> None:
    GymnasiumEnv([Strange(reset={0: np.array([2.0**24, 0.1, 2.0**40])})]).reset()
    assert not caplog.records


@pytest.mark.parametrize("carry", [[], ["option"]])
def test_transforms_of_torchrl_know_the_reward(carry: list[str]) -> None:
    make = partial(make_env, "Hopper-v5", num_envs=2, seed=0, carry=carry, velocity_limit=0.1)
    env = make()
    assert env.reward_key == "reward" and env.reward_keys == ["reward"]
    check_env_specs(env)
    summed = TransformedEnv(make(), RewardSum())
    check_env_specs(summed)
    rollout = summed.rollout(60, break_when_any_done=False)["next"]
    assert rollout["done"].any()
    assert torch.allclose(rollout["episode_reward"], rollout["episode_return"], atol=1e-4)
    skipping = TransformedEnv(make(), FrameSkipTransform(3))
    check_env_specs(skipping)
    step = skipping.rollout(1)["next"]
    assert (step["episode_length"] == 3).all() and torch.allclose(step["reward"], step["episode_return"])


def test_missing_dependency_is_named() -> None:
    def needs_package(**kwargs) -> gymnasium.Env:
        raise gymnasium.error.DependencyNotInstalled("Box2D is missing,\nrun `pip install swig`")

    gymnasium.register("NeedsPackage-v0", entry_point=needs_package)
    try:
        with pytest.raises(ConfigurationError, match="'NeedsPackage-v0' needs a package.*Box2D is missing, run"):
            make_env("NeedsPackage-v0")
    finally:
        del gymnasium.registry["NeedsPackage-v0"]


def test_moved_to_a_device_everything_is_on_it() -> None:
    envs = [make_scripted_env(num_envs=2), make_scripted_env(num_envs=2).to("cpu")]
    actions = random_actions(envs[0], 12)
    without, moved = (play(env, actions) for env in envs)
    assert moved.device == moved["next"].device == torch.device("cpu")
    assert (without == moved).all()
    check_env_specs(envs[1])


def test_rendering_and_closing() -> None:
    env = make_env("Pendulum-v1", num_envs=2, max_episode_steps=7)
    assert [e.spec.max_episode_steps for e in env.envs] == [7, 7]
    probe = make_scripted_env(num_envs=2)
    probe.close()
    assert probe.is_closed and all(e.closed for e in probe.envs)


def test_warnings_of_the_simulator_go_to_logging(tmp_path, caplog, capfd, monkeypatch):
    """MuJoCo's own way is stderr, and a MUJOCO_LOG.TXT in the current folder."""
    import mujoco

    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.DEBUG, "pmoe_lightning"):
        make_env("HalfCheetah-v5", num_envs=2).close()
        mujoco.get_mju_user_warning()("the simulation is unstable")
    assert [(record.levelno, record.message) for record in caplog.records][-1] == (
        logging.WARNING,
        "MuJoCo: the simulation is unstable",
    )
    assert not any(record.levelno > logging.DEBUG for record in caplog.records[:-1])
    assert capfd.readouterr().err == "" and not list(tmp_path.iterdir())


# --- memory -----------------------------------------------------------------------------------------------------------


def generic_step(env: GymnasiumEnv, root: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
    return EnvBase.step_and_maybe_reset(env, root)


@pytest.mark.parametrize("step", [GymnasiumEnv.step_and_maybe_reset, generic_step])
def test_what_the_policy_writes_comes_back_one_step_later_and_never_across_episodes(step) -> None:
    env = make_scripted_env(num_envs=3, carry=["option"])
    root, before = env.reset(), torch.full((3, 1), -1)
    first = torch.ones(3, 1, dtype=torch.bool)
    for t in range(30):
        assert root["option_previous"].dtype == torch.int64
        assert root["option_previous"].equal(before.masked_fill(first, -1))
        root.set("action", env.action_spec.rand()).set("option", torch.tensor([[t], [100 + t], [200 + t]]))
        before = root["option"].clone()
        stepped, root = step(env, root)
        assert stepped["next", "option_previous"].equal(before)  # true for a last step too, like its observation
        first = stepped["next", "done"].clone()
    assert env.batch_size == (3,)


def test_an_environment_that_carries_describes_what_it_returns() -> None:
    env = make_env("Pendulum-v1", num_envs=2, seed=0, carry=["option"])
    check_env_specs(env)
    assert env.observation_spec["option_previous"].shape == (2, 1)
    assert env.rollout(3)["option_previous"].eq(-1).all()  # random actions come without options


def test_nothing_is_carried_unless_asked_for() -> None:
    env = make_env("Pendulum-v1")
    totals = {"episode_return", "episode_length"}
    assert set(env.observation_spec.keys()) == {"observation", *totals}
    assert set(env.reset().keys()) == {"observation", "done", "terminated", "truncated", *totals}


@pytest.mark.parametrize("where", ["__init__", "reset", "step"])
def test_an_environment_that_sets_the_default_type_of_tensors_is_refused(where):
    """The policy's networks would be made in it, and what the environments return would not fit them."""

    class Doubles(ScriptedEnv):
        """Sets it at the start, in its first reset or in its first step."""

    def doubling(self, *arguments, **options):
        torch.set_default_dtype(torch.float64)
        return getattr(super(Doubles, self), where)(*arguments, **options)

    setattr(Doubles, where, doubling)
    gymnasium.register("Doubles-v0", Doubles)
    try:
        with pytest.raises(ConfigurationError, match="'Doubles-v0' sets PyTorch's default type to torch.float64"):
            make_env("Doubles-v0").rollout(1)
        assert torch.get_default_dtype() is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
        del gymnasium.registry["Doubles-v0"]
