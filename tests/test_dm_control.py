"""The DeepMind Control Suite through every command; its simulators go on bit for bit."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.configuration.composition import compose_jobs
from pmoe_lightning.configuration.validation import validate
from pmoe_lightning.envs import make_dm_control, make_env
from pmoe_lightning.envs.dm_control import DMControlEnv, control_suite
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.evaluate import main as evaluate

suite = control_suite()
TASKS = ["-".join(task) for task in suite.BENCHMARKING]
SHORT = 0.4  # seconds: 10 to 40 steps
TINY = ["algo=sac", "env=dm_control", "algo.hidden_sizes=[8]", "data.batch_size=8", "callbacks.evaluation.episodes=2"]
TINY += ["data.frames_per_epoch=96", "data.init_random_frames=32", "data.num_envs=2", "logger=none"]


def actions(env: DMControlEnv, steps: int, seed: int = 0) -> np.ndarray:
    shape = (steps, *env.batch_size, env.action_spec.shape[-1])
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def play(env: DMControlEnv, acts: np.ndarray) -> list[np.ndarray]:
    """What every step writes."""
    outcome, root, seen = env.empty_outcome(), env.empty_root(), []
    for act in acts:
        env.step_into(act, {}, outcome, root)
        seen += [value.copy() for value in (*outcome.values(), *root.values())]
    return seen


def saved_and_read(env: DMControlEnv) -> dict:
    file = io.BytesIO()
    torch.save(env.simulator_state(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_step_is_the_suites_own_repeated_until_the_episode_ends() -> None:
    env = make_dm_control("finger-turn_hard", num_envs=2, seed=5, action_repeat=3, time_limit=SHORT)
    theirs = suite.load("finger", "turn_hard", task_kwargs={"random": 6, "time_limit": SHORT})  # environment 1
    root = env.reset()
    vector = [np.ravel(value) for value in theirs.reset().observation.values()]  # position, velocity, touch, ...
    assert [entry.size for entry in vector] == [4, 3, 2, 2, 1]
    np.testing.assert_array_equal(root["observation"][1], np.concatenate(vector).astype(np.float32))
    for t, act in enumerate(actions(env, 7)):
        stepped, following = env.step_and_maybe_reset(root.set("action", torch.from_numpy(act)))
        reward = 0.0
        for _ in range(3):
            step = theirs.step(act[1])
            reward += step.reward
            if step.last():
                break
        after, is_last = stepped["next"][1], t == 6  # 20 steps are six times three, and two
        np.testing.assert_array_equal(
            after["observation"], np.concatenate([*map(np.ravel, step.observation.values())]).astype(np.float32)
        )
        assert after["reward"] == np.float32(reward) and step.last() is is_last
        assert bool(after["truncated"]) is is_last and not after["terminated"]
        root = following
    assert after["episode_length"] == 7 and env.seconds_per_step == pytest.approx(0.06)


def test_it_keeps_torchrls_contract() -> None:
    env = make_dm_control("manipulator-bring_ball", num_envs=2, seed=0, time_limit=SHORT)
    check_env_specs(env)
    assert env.entries["observation"].shape == (8 * 2 + 8 + 5 + 4 + 4 + 3 + 4,) and env.is_mujoco


class Ends(suite.cheetah.Cheetah):
    """A task whose episodes terminate, which none of the suite's does early."""

    def get_termination(self, physics):
        return 0.0 if physics.data.time > 0.045 else None


def test_a_discount_of_zero_terminates() -> None:
    def make():
        physics = suite.cheetah.Physics.from_xml_string(*suite.cheetah.get_model_and_assets())
        return suite.cheetah.control.Environment(physics, Ends(), time_limit=1)

    env = DMControlEnv(make, name="ends", seed=0)
    rollout = env.rollout(20)
    assert rollout["next", "terminated"].flatten().tolist() == [False] * 4 + [True]
    assert not rollout["next", "truncated"].any()


@pytest.mark.parametrize("task", TASKS)
def test_every_task_of_the_benchmark_goes_on_bit_for_bit(task: str) -> None:
    env = make_dm_control(task, num_envs=2, seed=3, time_limit=SHORT)
    env.reset()
    begun = saved_and_read(env)
    acts = actions(env, 60)
    first = play(env, acts[:7])
    state = saved_and_read(env)
    rest = play(env, acts[7:])  # with at least one reset

    other = make_dm_control(task, num_envs=2, seed=99, time_limit=SHORT)
    other.reset()
    play(other, acts[:3])
    assert other.load_simulator_state(state) is None
    for ours, again in zip(rest, play(other, acts[7:]), strict=True):
        np.testing.assert_array_equal(ours, again)
    assert other.load_simulator_state(begun) is None
    for ours, again in zip(first, play(other, acts[:7]), strict=True):
        np.testing.assert_array_equal(ours, again)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_goes_on_over_its_whole_episode(task: str) -> None:
    env, other = (make_dm_control(task, seed=seed) for seed in (3, 99))
    env.reset(), other.reset()
    acts = actions(env, 1200)
    play(env, acts[:137])
    state = saved_and_read(env)
    whole = play(env, acts[137:])
    assert other.load_simulator_state(state) is None
    for ours, again in zip(whole, play(other, acts[137:]), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_a_state_of_another_task_begins_a_new_episode() -> None:
    state = make_dm_control("walker-walk", seed=0)
    state.reset()
    env = make_dm_control("walker-run", seed=0)
    assert env.load_simulator_state(state.simulator_state()) is None  # the same walker, another reward
    cheetah = make_dm_control("cheetah-run", seed=0)
    cheetah.reset()
    reason = cheetah.load_simulator_state(state.simulator_state())
    assert reason.startswith("environment cheetah-run starts a new episode: its state is of another environment: is of")


def test_a_seed_makes_all_that_follows() -> None:
    one, two = (make_dm_control("reacher-easy", seed=seed, time_limit=SHORT) for seed in (4, 8))
    two.reset()
    play(two, actions(two, 30))
    for env in (one, two):
        env.set_seed(4)
        env.reset()
    for ours, again in zip(play(one, actions(one, 50)), play(two, actions(two, 50)), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_a_breakdown_truncates_the_episode(caplog) -> None:
    env = make_dm_control("cheetah-run", num_envs=2, seed=0, action_repeat=2)
    root = env.reset()
    env.envs[1].physics.data.qvel[:] = 1e30
    root.set("action", torch.zeros(2, 6))
    step, following = env.step_and_maybe_reset(root)
    assert step["next", "truncated"].squeeze(-1).tolist() == [False, True]
    assert step["next", "reward"][1].isnan() and step["next", "observation"].isfinite().all()
    assert following["observation"].isfinite().all() and "cheetah-run broke down after 1 steps" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_dm_control("walker-wlk"), "unknown task of dm_control 'walker-wlk': did you mean walker-walk"),
        (lambda: make_dm_control("cheetah_run"), "did you mean cheetah-run"),
        (lambda: make_dm_control("chess"), "named by its domain and its task, such as env.task=cheetah-run"),
        (
            lambda: make_dm_control("lqr-lqr_2_1"),
            "'lqr-lqr_2_1' of dm_control cannot be trained: dimension 0.*no bounds",
        ),
        (lambda: make_dm_control("cheetah-run", action_repeat=0), "action_repeat=0 must be a whole number >= 1"),
        (lambda: make_dm_control("cheetah-run", action_repeat=True), "action_repeat=True must be"),
        (lambda: make_dm_control("cheetah-run", time_limit=float("nan")), "time_limit=nan must be"),
        (lambda: make_dm_control("cheetah-run", num_envs=0), "num_envs >= 1"),
        (lambda: make_env("cheetah-run"), "unknown environment id.*env=dm_control env.task=cheetah-run"),
    ],
)
def test_a_mistake_is_one_line(make, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["env.action_repeat=3"], "data.num_envs=8 times env.action_repeat=3"),
        (["env.action_repeat=64"], r"algo.minibatch_size=64 times env.action_repeat=64 must not exceed"),
        (["safe=velocity"], "safe=velocity sets env.velocity_limit, which env=dm_control does not have"),
        (["env.tsk=walker-walk"], r"unknown key env.tsk; did you mean env.task\?$"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        validate(compose_jobs(["env=dm_control", *words])[0])


def test_without_dm_control_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "dm_control"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dm_control", None)  # so Python itself finds none
    with pytest.raises(ConfigurationError, match=r'pip install "pmoe-lightning\[dm_control\]"; a task is named'):
        make_dm_control("cheetah-run")


def last(folder: str) -> dict:
    return read_checkpoint(Path(folder, "checkpoints", "last.ckpt"))


def test_it_trains_is_judged_filmed_and_resumed_bit_for_bit(train, tmp_path, capfd) -> None:
    words = [*TINY, "env.task=ball_in_cup-catch", "env.time_limit=0.4", "env.action_repeat=4"]
    words += ["callbacks=[evaluation,metrics,checkpoint_last,final_policy]"]
    said = train(*words, "total_frames=320", "hydra.run.dir=whole")
    assert "no video" not in said
    film = imageio.get_reader(tmp_path / "whole" / "checkpoints" / "last.mp4")
    assert film.get_meta_data()["fps"] == pytest.approx(1 / 0.08, rel=0.01)  # 4 steps of 20 ms are one picture
    whole = last("whole")
    assert whole["policy"]["env_frames"] == 320  # 80 transitions
    replay = whole["experience"][0]["replay"]
    assert len(replay["transitions"]["action"]) == 80 and replay["given"] == 320
    assert whole["policy"]["description"]["env"]["backend"] == "dm_control"

    train(*words, "callbacks.final_policy.video=false", "total_frames=112", "hydra.run.dir=cut")  # within an episode
    said = train(*words, "callbacks.final_policy.video=false", "total_frames=320", "resume=cut")
    assert "new episode" not in said
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, last("cut")["state_dict"][name]), name

    capfd.readouterr()
    assert evaluate(["checkpoint=whole/checkpoints/last.ckpt", "episodes=2", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["env"] == "ball_in_cup-catch" and result["lengths"] == [5, 5]
    other = ["checkpoint=whole/checkpoints/last.ckpt", "episodes=1", "--json"]
    assert evaluate([*other, "+env.action_repeat=2"]) == 0
    assert json.loads(capfd.readouterr().out)["lengths"] == [10]
    assert evaluate([*other, "env=dm_control", "env.task=acrobot-swingup"]) == 2
    assert "maps 8 observations to 2 actions, but acrobot-swingup has 6 and 1" in capfd.readouterr().err


def test_its_pixels_go_on_bit_for_bit() -> None:
    seen = {"action_repeat": 8, "time_limit": SHORT, "pixels": {"size": 32, "look": "fast"}}
    env, other = (make_dm_control("cartpole-swingup", seed=seed, **seen) for seed in (3, 99))
    env.reset(), other.reset()
    acts = actions(env, 12)
    play(env, acts[:3])
    state = saved_and_read(env)
    whole = play(env, acts[3:])
    assert other.load_simulator_state(state) is None
    for ours, again in zip(whole, play(other, acts[3:]), strict=True):
        np.testing.assert_array_equal(ours, again)
    pictures = np.unique([value for value in whole if value.dtype == np.uint8], axis=0)
    assert len(pictures) > 9 and env.action_repeat == 8
    env.close(), other.close()


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["sac", "ppo"])
def test_it_trains_2000_frames_with_workers(algo: str, train, tmp_path) -> None:
    words = [f"algo={algo}", "env=dm_control", "logger=none", "total_frames=2000", "data.num_workers=2"]
    of_sac = ["data.init_random_frames=500", "data.frames_per_epoch=1000"]
    of_ppo = ["data.frames_per_batch=512", "data.frames_per_epoch=1024", "data.num_envs=2"]
    train(*words, *(of_sac if algo == "sac" else of_ppo), "callbacks.evaluation.episodes=1", "hydra.run.dir=run")
    assert last("run")["policy"]["env_frames"] >= 2000
