"""Evaluation: the episodes are the right ones, the interval is honest, the video plays, the command is polite."""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import imageio_ffmpeg
import mujoco  # noqa: F401 - rendering must work although it was imported before MUJOCO_GL was chosen
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv
from matplotlib.colors import to_rgb
from policies import make_policy, make_sac_policy
from tensordict import TensorDict
from waiting import HANG_SECONDS

import pmoe_lightning
from pmoe_lightning.checkpoints.files import write_checkpoint
from pmoe_lightning.checkpoints.policy import build_critics
from pmoe_lightning.envs import GymnasiumEnv, make_env
from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.evaluate import Request, _environment, main, parse
from pmoe_lightning.evaluation.episodes import MAX_EPISODE_STEPS, EvaluationStopped, evaluate_policy, follow_episode
from pmoe_lightning.evaluation.figures import PALETTE
from pmoe_lightning.evaluation.film import record_video
from pmoe_lightning.evaluation.film_frames import film_frame, steps_between_pictures
from pmoe_lightning.evaluation.statistics import student_t_interval
from pmoe_lightning.modules.acting import acting_component, mixture_at
from pmoe_lightning.modules.distributions import TanhGaussianMixture
from pmoe_lightning.tracking.references import load_policy


def test_student_t_interval_matches_a_textbook_value() -> None:
    # n = 5, mean 3, s = sqrt(2.5), t_{0.975, 4} = 2.776445
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert student_t_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3 - half, 3 + half), abs=1e-6)
    assert all(math.isnan(bound) for bound in student_t_interval([1.0]))


def test_student_t_interval_covers_the_mean_as_often_as_it_says() -> None:
    # 4000 samples of n = 4: the share that covers has standard error 0.0034; 4.5 of them fail once in 150 000 runs.
    samples = np.random.default_rng(0).normal(7.0, 3.0, (4000, 4))
    covered = np.mean([low <= 7.0 <= high for low, high in map(student_t_interval, samples)])
    assert abs(covered - 0.95) < 4.5 * math.sqrt(0.95 * 0.05 / 4000)


def plain_loop(policy: Any, env_id: str, seed: int) -> tuple[float, int]:
    """One episode the way the Gymnasium manual does it."""
    env = gymnasium.make(env_id, max_episode_steps=60)
    observation, _ = env.reset(seed=seed)
    total, length, done = 0.0, 0, False
    while not done:
        tensordict = TensorDict(observation=torch.as_tensor(observation, dtype=torch.float32)[None], batch_size=1)
        action = policy(tensordict)["action"][0].detach().numpy()
        observation, reward, terminated, truncated, _ = env.step(action)
        total, length, done = total + float(reward), length + 1, terminated or truncated
    env.close()
    return total, length


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "probe_envs:Forgetful-v0"])
def test_episodes_are_those_of_a_plain_loop(env_id: str) -> None:
    policy = load_policy(make_policy(env_id)[1])
    # Two rounds, the second one not full; the forgetful environment ends after a different time in each episode.
    result = evaluate_policy(policy, make_env(env_id, num_envs=3, max_episode_steps=60), episodes=5, seed=40)
    expected = [plain_loop(policy, env_id, 40 + i) for i in range(5)]
    assert result.lengths == tuple(length for _, length in expected)
    assert env_id == "Pendulum-v1" or len(set(result.lengths)) > 1
    np.testing.assert_allclose(result.returns, [total for total, _ in expected], rtol=1e-5)
    assert result.mean == pytest.approx(np.mean(result.returns))
    assert result.interval == student_t_interval(result.returns)


def test_result_does_not_depend_on_the_number_of_environments() -> None:
    policy = load_policy(make_policy("HalfCheetah-v5")[1])
    envs = {n: make_env("HalfCheetah-v5", num_envs=n, max_episode_steps=100) for n in (1, 3, 4)}
    results = {n: evaluate_policy(policy, env, episodes=4, seed=3) for n, env in envs.items()}
    assert len(set(results.values())) == 1, results
    # A second time in environments that have been used: the seed decides, not the history.
    assert evaluate_policy(policy, envs[3], episodes=4, seed=3) == results[3]
    assert evaluate_policy(policy, envs[3], episodes=1, seed=5).returns == results[3].returns[2:3]


def test_sampling_repeats_itself_and_differs_from_the_deterministic_policy() -> None:
    policy = load_policy(make_policy()[1])
    env = make_env("Pendulum-v1", num_envs=2, max_episode_steps=20)
    sampled = evaluate_policy(policy, env, episodes=2, seed=0, sample=True)
    torch.rand(1)
    assert evaluate_policy(policy, env, episodes=2, seed=0, sample=True) == sampled
    assert sampled != evaluate_policy(policy, env, episodes=2, seed=0)


def test_evaluation_leaves_no_trace() -> None:
    policy = load_policy(make_policy()[1], rule="sample_component").train()
    policy.policy[0].eval()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    evaluate_policy(policy, make_env("Pendulum-v1", max_episode_steps=20), episodes=1, seed=9)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    normalizer, actor = policy.policy
    assert policy.training and actor.training and not normalizer.training


def test_no_episode_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="episodes must be at least 1, not 0"):
        evaluate_policy(make_policy()[0], make_env("Pendulum-v1"), episodes=0, seed=0)


def endless(**kwargs: Any) -> gymnasium.Env:
    return PendulumEnv(**kwargs)  # which only Gymnasium's time limit ends


@pytest.fixture
def endless_id() -> Iterator[str]:
    gymnasium.register("Endless-v0", entry_point=endless)
    yield "Endless-v0"
    del gymnasium.registry["Endless-v0"]


def test_an_episode_that_does_not_end_is_cut_short_and_said(endless_id: str, caplog) -> None:
    policy = load_policy(make_policy()[1])
    env = make_env(endless_id, num_envs=2)
    result = evaluate_policy(policy, env, episodes=3, seed=0, max_episode_steps=25)
    assert result.lengths == (25,) * 3 and result.cut_short == 3
    assert [record.message for record in caplog.records] == [
        "3 of 3 evaluation episodes did not end within 25 steps and were cut short there (max_episode_steps)"
    ]
    caplog.clear()
    limited = make_env("Pendulum-v1", num_envs=2, max_episode_steps=25)
    whole = evaluate_policy(policy, limited, episodes=3, seed=0, max_episode_steps=25)
    assert whole.returns == result.returns and whole.cut_short == 0 and not caplog.records
    assert inspect.signature(evaluate_policy).parameters["max_episode_steps"].default == MAX_EPISODE_STEPS == 10_000


def test_only_what_did_not_end_counts_as_cut_short() -> None:
    policy = load_policy(make_policy("Hopper-v5")[1])
    whole = evaluate_policy(policy, make_env("Hopper-v5", num_envs=3), episodes=5, seed=40)
    limit = sorted(whole.lengths)[2]
    result = evaluate_policy(policy, make_env("Hopper-v5", num_envs=3), episodes=5, seed=40, max_episode_steps=limit)
    assert result.lengths == tuple(min(length, limit) for length in whole.lengths)
    assert result.cut_short == sum(length > limit for length in whole.lengths) > 0


def test_an_evaluation_stops_when_asked(endless_id: str) -> None:
    asked = iter([False] * 7 + [True])
    with pytest.raises(EvaluationStopped):
        env = make_env(endless_id)
        evaluate_policy(make_policy()[0], env, episodes=1, seed=0, should_stop=lambda: next(asked))
    assert env._lengths == [7]


def test_the_command_says_what_was_cut_short(
    endless_id: str, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"checkpoint={checkpoint}", f"env={endless_id}", "episodes=2", "max_episode_steps=9"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["cut_short"], result["lengths"]) == (2, [9, 9])
    assert main(words) == 0
    assert "cut short" in capfd.readouterr().out


# ------------------------------------------------------------------ video


def test_video_is_what_browsers_play(tmp_path: Path) -> None:
    policy = load_policy(make_policy()[1])
    path = record_video(policy, "Pendulum-v1", tmp_path / "new" / "film.mp4", seed=1, max_frames=21)
    reader = imageio_ffmpeg.read_frames(path)
    about = next(reader)
    assert about["codec"] == "h264"
    assert about["pix_fmt"].startswith("yuv420p")
    assert about["fps"] == 2.0  # 200 steps of 0.05 s at every 10th
    frames = [np.frombuffer(frame, np.uint8) for frame in reader]
    assert len(frames) == 21
    assert frames[0].std() > 5, "an empty picture"
    assert (frames[0] != frames[-1]).any(), "nothing moves"


def test_a_film_shows_the_whole_episode_its_return_and_the_acting_component(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Any, ...]] = []

    def keep(*arguments: Any) -> np.ndarray:
        drawn.append((*arguments[:2], list(arguments[2]), *arguments[3:]))
        return film_frame(*arguments)

    monkeypatch.setattr("pmoe_lightning.evaluation.film.film_frame", keep)
    policy = load_policy(make_policy()[1])
    kwargs = {"max_episode_steps": 9}
    path = record_video(policy, "Pendulum-v1", tmp_path / "film.mp4", seed=3, max_frames=4, env_kwargs=kwargs)
    assert imageio_ffmpeg.count_frames_and_secs(path)[0] == 4
    env = make_env("Pendulum-v1", seed=3, **kwargs)
    outcome = evaluate_policy(policy, env, episodes=1, seed=3).returns[0]
    captions = [arguments[1] for arguments in drawn]
    assert [caption.split("    ")[0] for caption in captions] == [f"step {step} of 9" for step in (0, 3, 6, 9)]
    assert captions[-1].endswith(f"0.5 s    return {outcome:,.1f}")
    episode = follow_episode(policy, env, seed=3)
    mixture = mixture_at(policy, episode)
    acted = mixture.weights.argmax(-1).tolist()  # by the rule max_weight
    assert [arguments[2] for arguments in drawn] == [acted[:n] for n in (1, 4, 7, 9)]
    assert {arguments[3:] for arguments in drawn} == {(mixture.num_components, 9)}


@pytest.mark.parametrize(
    ("length", "max_frames", "seconds", "every"),
    [(1000, 250, 0.05, 5), (1000, 250, 0.008, 5), (100, 250, 0.008, 4), (200, 250, 0.05, 1), (5, 1, 0.05, 5)],
)
def test_a_film_has_as_many_pictures_as_are_worth_it(length: int, max_frames: int, seconds: float, every: int) -> None:
    assert steps_between_pictures(length, max_frames, seconds) == every


def test_a_picture_wears_the_colours_of_the_components() -> None:
    picture = film_frame(np.full((61, 101, 3), 7, np.uint8), "step 2", [0, 0, 2], 3, 4)
    height, width = picture.shape[:2]
    assert height % 2 == width % 2 == 0 and width >= 400 and (picture[:100] == 7).all()
    blue, green = ([round(255 * part) for part in to_rgb(color)] for color in (PALETTE[0], PALETTE[2]))
    band = [picture[-1, int(width * place)] for place in (0.1, 0.3, 0.6, 0.9)]
    np.testing.assert_allclose(band, [blue, blue, green, [225] * 3], atol=1)
    assert (np.abs(picture[-40:-20].astype(int) - green).max(-1) <= 1).sum() > 100  # beside the component's name


def test_a_drawn_action_is_of_its_likeliest_component() -> None:
    mixture = TanhGaussianMixture(torch.zeros(1, 2), torch.tensor([[[-1.0], [1.0]]]), torch.full((1, 2, 1), 0.3))
    for u, component in ((-0.8, 0), (1.3, 1)):
        states = TensorDict(action=mixture.squash(torch.tensor([[u]])), batch_size=1)
        assert acting_component(mixture, states).tolist() == [component]
    states = TensorDict(action=torch.zeros(1, 1), option=torch.ones(1, 1, dtype=torch.int64), batch_size=1)
    assert acting_component(mixture, states).tolist() == [1]


@pytest.mark.parametrize(("env_kwargs", "follows"), [({}, True), ({"camera_id": -1}, False)])
def test_a_film_follows_the_body_with_coarser_shadows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env_kwargs: dict[str, int], follows: bool
) -> None:
    seen: set[tuple[bool, int]] = set()

    def picture(env: gymnasium.Env, name: str) -> np.ndarray:  # no machine need be able to render
        task = env.unwrapped
        seen.add((task.mujoco_renderer.camera_id >= 0, task.model.vis.quality.shadowsize))
        return np.zeros((480, 480, 3), np.uint8)

    monkeypatch.setattr("pmoe_lightning.envs.rendering.render", picture)
    policy = load_policy(make_policy("HalfCheetah-v5")[1])
    record_video(policy, "HalfCheetah-v5", tmp_path / "film.mp4", max_frames=2, env_kwargs=env_kwargs)
    assert seen == {(follows, 1024)}


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda step: np.zeros((64, 64, 3)), "draws an array of float64, not a picture"),
        (lambda step: np.zeros((64, 64, 4), np.uint8), r"draws an array of shape \(64, 64, 4\), not a picture"),
        (lambda step: [np.zeros((64, 64, 3), np.uint8)], "draws a list, not a picture"),
        (lambda step: np.zeros((64 + 2 * step, 64, 3), np.uint8), "pictures of several sizes"),
    ],
)
def test_what_is_no_picture_is_one_line(draw: Callable, said: str, tmp_path: Path) -> None:
    class Drawing(gymnasium.Wrapper):
        def step(self, action: np.ndarray) -> tuple:
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(action)

        def render(self) -> Any:
            return draw(getattr(self, "steps", 0))

    def make(id: str, num_envs: int, seed: int, render_mode: str) -> GymnasiumEnv:
        env = Drawing(gymnasium.make(id, max_episode_steps=3))
        env.metadata = {"render_fps": "fast"}
        return GymnasiumEnv([env], seed=seed)

    with pytest.raises(RunError, match=said):
        record_video(make_policy()[0], "Pendulum-v1", tmp_path / "film.mp4", make=make)
    assert not any(tmp_path.iterdir())


def test_a_machine_that_cannot_render_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    afterthoughts: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", afterthoughts.append)
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    policy, _ = make_policy("InvertedPendulum-v5")
    with pytest.raises(RunError, match="cannot render InvertedPendulum-v5.*MUJOCO_GL=egl.*MUJOCO_GL=osmesa") as caught:
        record_video(policy, "InvertedPendulum-v5", tmp_path / "film.mp4")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "film.mp4").exists()
    del caught
    gc.collect()
    assert not afterthoughts, "the failed renderer printed a traceback when it was destroyed"


# ------------------------------------------------------------------ the command


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    _, content = make_policy()
    content["policy"]["description"]["env"]["kwargs"] = {"max_episode_steps": 20}
    write_checkpoint(content, tmp_path / "best.ckpt")
    return tmp_path / "best.ckpt"


def test_every_form_of_an_argument_is_understood() -> None:
    expected = Request(checkpoint="a=b.ckpt", episodes=3, rule="sample", video=True, json=True)
    assert parse(["checkpoint=a=b.ckpt", "episodes=3", "rule=sample", "video=true", "--json"]) == expected
    assert parse(["--checkpoint", "a=b.ckpt", "--episodes=3", "--rule", "sample", "--video", "--json"]) == expected
    # MLflow passes the default "" of a parameter as an empty word, and a parameter it does not know as two words.
    assert parse(
        ["", "--json", "true", "checkpoint=a=b.ckpt", "seed=", "--video", "yes", "rule=sample", "episodes=3"]
    ) == (expected)


def test_words_are_read_as_by_the_train_command() -> None:
    # An empty value, which a script passes for what nobody gave, does not swallow the next word.
    request = parse(["--seed", "", "checkpoint='my run/a.ckpt'", "--config-dir", "mine", "episodes=1_000", "--json"])
    assert request == Request("my run/a.ckpt", episodes=1000, config_dir="mine", json=True)
    request = parse(['checkpoint="a, b=c.ckpt"', "--video", "--rule", "sample", "--json", "false"])
    assert request == Request("a, b=c.ckpt", video=True, rule="sample")


def test_json_is_the_only_output(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([f"checkpoint={checkpoint}", "episodes=3", "seed=7", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    env = make_env("Pendulum-v1", num_envs=2, max_episode_steps=20)
    reference = evaluate_policy(load_policy(checkpoint), env, episodes=3, seed=7)
    assert result == {
        "checkpoint": str(checkpoint),
        "env": "Pendulum-v1",
        "episodes": 3,
        "seed": 7,
        "rule": "max_weight",
        "mean": reference.mean,
        "interval": list(reference.interval),
        "returns": list(reference.returns),
        "lengths": [20] * 3,
        "cut_short": 0,
        "video": None,
    }


class Talkative(gymnasium.Wrapper):
    """Prints as Python, as a C library and as a child process do."""

    def reset(self, **arguments: Any) -> Any:
        print("reset")
        ctypes.CDLL(None).puts(b"reset in C")
        subprocess.run(["echo", "reset in a child"], check=True)
        return self.env.reset(**arguments)

    def close(self) -> None:
        print("closed")


gymnasium.register("Talkative-v0", lambda **arguments: Talkative(gymnasium.make("Pendulum-v1", **arguments)))


def test_what_the_environment_prints_is_not_among_the_json(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"checkpoint={checkpoint}", "env=Talkative-v0", "+env.max_episode_steps=5", "episodes=1"]
    assert main([*words, "video=true", f"output={tmp_path}", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["lengths"] == [5]
    for piece in ("reset\n", "reset in C\n", "reset in a child\n", "closed\n"):
        assert captured.err.count(piece) >= 2  # in the evaluation and in the film
    print("and afterwards standard output is itself")
    ctypes.CDLL(None).puts(b"in C, too")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "and afterwards standard output is itself\nin C, too\n"
    assert main(words) == 0
    assert "reset in a child" in capfd.readouterr().out  # a person reads both


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["+env.max_episode_steps=7"], 7),
        (["env.max_episode_steps=7"], 7),
        (["++env.max_episode_steps=7"], 7),
        (["--env.max_episode_steps", "7"], 7),
        (["--+env.max_episode_steps=7"], 7),
        (["+env.max_episode_steps=int(7.0)"], 7),
        (["+env.max_episode_steps="], 20),
        (["env.id=Pendulum-v1", "+env.max_episode_steps=7"], 7),
        (["+env.g=0.5", "env=Pendulum-v1"], 20),
        (["++env.id=Pendulum-v1"], 20),
    ],
)
def test_arguments_of_the_environment_are_read_as_in_training(
    checkpoint: Path, words: list[str], steps: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([f"checkpoint={checkpoint}", "episodes=1", *words, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["lengths"] == [steps]


def test_an_argument_of_the_environment_reaches_it(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([f"checkpoint={checkpoint}", "episodes=2", "+env.g=2.5", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    env = make_env("Pendulum-v1", num_envs=2, max_episode_steps=20, g=2.5)
    assert result["returns"] == list(evaluate_policy(load_policy(checkpoint), env, episodes=2, seed=0).returns)
    assert result["env_arguments"] == {"g": 2.5}
    assert main([f"checkpoint={checkpoint}", "episodes=2", "+env.g=2.5"]) == 0
    assert "environment Pendulum-v1 g=2.5\n" in capfd.readouterr().out


def test_arguments_of_the_environment_may_be_of_any_kind() -> None:
    words = [
        "+env.a=[1, 2.5]",
        "env.b={c: true}",
        "+env.d.e=x",
        "+env.my_env.id=2",
        "+env.d.f='1'",
        "+env.g=null",
        "++env.h=1e-3",
    ]
    request = parse(["checkpoint=x", *words])
    assert request.env_arguments == {
        "a": [1, 2.5], "b": {"c": True}, "d.e": "x", "my_env.id": 2, "d.f": "1", "g": None, "h": 1e-3
    }  # fmt: skip
    trained = {"id": "Pendulum-v1", "kwargs": {"a": 3, "d": {"e": "y", "z": 0}, "kept": 1}}
    assert _environment(request, {"env": trained}, {}) == (
        make_env,
        "Pendulum-v1",
        {"a": [1, 2.5], "b": {"c": True}, "d": {"e": "x", "f": "1", "z": 0}, "g": None, "h": 1e-3, "kept": 1}
        | {"my_env": {"id": 2}},
    )


def test_the_version_and_the_completion_are_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint=x", "--version"])
    assert ended.value.code is None
    assert capfd.readouterr().out == f"pmoe_lightning {pmoe_lightning.__version__}\n"
    with pytest.raises(SystemExit):
        main(["-sc", "install=bash"])
    script = capfd.readouterr().out + "complete -p pmoe-evaluate; compgen -W 'checkpoint= episodes=' -- che"
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True)
    assert done.returncode == 0 and "checkpoint= episodes=" in done.stdout, done.stderr
    assert main(["--shell-completion", "install=zsh"]) == 2
    assert "completion is for bash" in capfd.readouterr().err


def test_one_episode_has_no_interval(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([f"checkpoint={checkpoint}", "episodes=1", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["interval"] == [None, None]


def test_rules_act_differently(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    means = set()
    for rule in ("max_weight", "mean", "sample_component", "sample"):
        assert main([f"checkpoint={checkpoint}", "episodes=2", f"rule={rule}", "--json"]) == 0
        means.add(json.loads(capfd.readouterr().out)["mean"])
    assert len(means) == 4


@pytest.mark.parametrize("safe", [False, True])
def test_sampling_a_policy_that_follows_the_best_value_is_to_draw_from_its_mixture(
    tmp_path: Path, safe: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    algorithm, content = make_sac_policy(safe=safe)
    write_checkpoint(content, tmp_path / "best.ckpt")
    env = make_env("Hopper-v5", num_envs=2, max_episode_steps=20)
    expected = evaluate_policy(algorithm.policy, env, episodes=2, seed=0, sample=True)
    returns = {}
    for rule in ("sample", "best_value"):
        assert main([f"checkpoint={tmp_path / 'best.ckpt'}", "episodes=2", f"rule={rule}", "--json"]) == 0
        returns[rule] = json.loads(capfd.readouterr().out)["returns"]
    assert returns["sample"] == list(expected.returns) and returns["sample"] != returns["best_value"]
    monkeypatch.setattr("pmoe_lightning.envs.rendering.render", lambda env, name: np.zeros((16, 16, 3), np.uint8))
    taken: list[torch.Tensor] = []
    policy = load_policy(content)
    policy.register_forward_hook(lambda module, inputs, out: taken.append(out["action"][0].clone()))
    first = []
    for sample in (True, False):
        taken.clear()
        record_video(policy, "Hopper-v5", tmp_path / "film.mp4", max_frames=1, sample=sample)
        first.append(taken[0])
    assert (first[0] - first[1]).abs().max() > 1e-3


def test_table_and_video(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([f"checkpoint={checkpoint}", "episodes=2", "video=true", f"output={tmp_path}"]) == 0
    out = capfd.readouterr().out
    video = tmp_path / "Pendulum-v1-seed0.mp4"
    assert video.is_file()
    for piece in ("Pendulum-v1", "2 (seeds 0 to 1), rule max_weight", "95 % interval", "mean 20.0", str(video)):
        assert piece in out


def test_a_failing_video_is_a_warning(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("a file where the folder should be")
    assert main([f"checkpoint={checkpoint}", "episodes=1", "video=true", f"output={tmp_path / 'file'}", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["video"] is None
    assert "warning: no video: cannot write the video" in captured.err


class Unfilmable(gymnasium.Wrapper):
    """Breaks in its third picture, as a renderer may."""

    render_mode = "rgb_array"

    def __init__(self, env: gymnasium.Env, error: type[BaseException] = IndexError) -> None:
        super().__init__(env)
        self.error, self.pictures = error, 0

    def step(self, action: Any) -> Any:
        if self.pictures == 3:
            raise self.error("in the middle\nof a film")
        return self.env.step(action)

    def render(self) -> np.ndarray:
        self.pictures += 1
        return np.zeros((16, 16, 3), np.uint8)


for _error in (IndexError, KeyboardInterrupt):
    gymnasium.register(
        f"Unfilmable{_error.__name__}-v0",
        lambda error=_error, **arguments: Unfilmable(gymnasium.make("Pendulum-v1", **arguments), error),
    )


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("error", ["IndexError", "KeyboardInterrupt"])
def test_the_result_is_there_however_the_film_ends(
    checkpoint: Path, tmp_path: Path, error: str, form: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"checkpoint={checkpoint}", f"env=Unfilmable{error}-v0", "+env.max_episode_steps=6", "episodes=1"]
    assert main([*words, "video=true", f"output={tmp_path}", *form]) == (0 if error == "IndexError" else 130)
    captured = capfd.readouterr()
    if form:
        result = json.loads(captured.out)
        assert result["lengths"] == [6] and result["video"] is None
    else:
        assert "mean 6.0, min 6, max 6" in captured.out and "video" not in captured.out
    warned = [line for line in captured.err.splitlines() if line == "warning: no video: in the middle of a film"]
    assert len(warned) == (error == "IndexError")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "checkpoint is missing"),
        (["chekpoint=x"], 2, "did you mean checkpoint?"),
        (["checkpoint={}", "--epsiodes", "3"], 2, "did you mean episodes?"),
        (["checkpoint={}", "episodes=0"], 2, "episodes must be a whole number of at least 1, not '0'"),
        (
            ["checkpoint={}", "max_episode_steps=0"],
            2,
            "max_episode_steps must be a whole number of at least 1",
        ),
        (["checkpoint={}", "episodes=many"], 2, "episodes must be a whole number"),
        (["checkpoint={}", "seed=-1"], 2, "seed must be a whole number of at least 0"),
        (["checkpoint={}", "rule=max_wait"], 2, "did you mean max_weight?"),
        (["checkpoint={}", "video=maybe"], 2, "video must be true or false"),
        (["checkpoint={}", "--seed"], 2, "--seed needs a value"),
        (["checkpoint={}", "json"], 2, "json needs a value"),
        (["checkpoint={}", "--jsn"], 2, "unknown argument '--jsn'; did you mean json?"),
        (["checkpoint={}", "seed=1,2"], 2, "seed has several values, 1,2: give one, or a list in brackets"),
        (["checkpoint='{}"], 2, "write checkpoint=value"),
        (["checkpoint={}", "+env.gravity=1"], 2, "unexpected keyword argument 'gravity'"),
        (["checkpoint={}", "env.gravity=1"], 2, "unexpected keyword argument 'gravity'"),
        (["checkpoint={}", "+env.g=1,2"], 2, "+env.g has several values, 1,2: give one, or a list in brackets"),
        (["checkpoint={}", "+env.g=nan"], 2, "env.g=nan must be a finite number"),
        (["checkpoint={}", "+env.g=[1"], 2, "cannot read '+env.g=[1': write +env.key=value"),
        (["checkpoint={}", "+env.=1"], 2, "cannot read '+env.=1'"),
        (["checkpoint={}", "+env.seed=1"], 2, "+env.seed is not an argument of the environment"),
        (["checkpoint={}", "env.num_envs=1"], 2, "env.num_envs is not an argument of the environment"),
        (["checkpoint={}", "+envs.g=1"], 2, "unknown argument '+envs.g=1'"),
        (["checkpoint={}", "~env.g"], 2, "unknown argument '~env.g'"),
        (["checkpoint={}", "+env.g"], 2, "+env.g needs a value"),
        (["checkpoint={}", "env=Pendulum-v7"], 2, "Pendulum-v1"),
        (["checkpoint={}", "modes=true"], 2, "an environment that names its modes, and Pendulum-v1 does not"),
        (["checkpoint={}", "env=InvertedPendulum-v5"], 2, "3 observations to 1 actions, but InvertedPendulum-v5 has 4"),
        (["checkpoint=nowhere.ckpt"], 1, "nowhere.ckpt does not exist"),
        (["checkpoint=" + __file__], 1, "is not a checkpoint"),
    ],
)
def test_mistakes_end_in_one_line(
    checkpoint: Path, arguments: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(checkpoint) for argument in arguments]) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert message in captured.err


def test_a_checkpoint_cannot_choose_what_is_imported(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chosen_by_file.py").write_text("import pathlib; pathlib.Path(__file__).with_name('mark').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    _, content = make_policy()
    content["policy"]["description"]["env"]["id"] = "chosen_by_file:Pendulum-v1"
    write_checkpoint(content, checkpoint)
    assert main([f"checkpoint={checkpoint}"]) == 1
    assert "if you trust it, say env=chosen_by_file:Pendulum-v1" in capfd.readouterr().err
    assert not (tmp_path / "mark").exists()
    assert main([f"checkpoint={checkpoint}", "env=chosen_by_file:Pendulum-v1", "episodes=1"]) == 0
    assert (tmp_path / "mark").exists()


def test_the_modes_of_a_checkpoint_are_counted_and_drawn(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    algorithm, content = make_sac_policy("pmoe", env_id="TwoRoutes-v0")
    content["policy"]["description"]["env"]["kwargs"] = {"frame_skip": 50}
    write_checkpoint(content, tmp_path / "last.ckpt")
    words = [f"checkpoint={tmp_path / 'last.ckpt'}", "modes=true", "episodes=2", "mode_episodes=8"]
    words += [f"output={tmp_path / 'out'}"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)["modes"]
    assert result["episodes"] == 8 and sum(result["counts"]) / 8 == result["success"] and len(result["counts"]) == 2
    assert result["alpha"] == algorithm.alpha and result["left_out"] == {}
    policy = load_policy(content)
    start = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(2, 4)
    north_south = TensorDict(observation=start, action=torch.tensor([[0.0, 1.0], [0.0, -1.0]]), batch_size=2)
    values = [critic(north_south.copy())["state_action_value"] for critic in build_critics(content["policy"])]
    gap = torch.stack(values).min(0).values.flatten().diff().abs().item()
    assert result["gap"] == pytest.approx(gap, rel=1e-5) and result["gap_over_alpha"] == gap / algorithm.alpha
    env = make_env("TwoRoutes-v0", num_envs=8, seed=0, frame_skip=50)
    drawn, ruled = (evaluate_policy(policy, env, episodes=8, seed=0, sample=sample) for sample in (True, False))
    assert (result["return_sampled"], result["price"]) == (drawn.mean, drawn.mean - ruled.mean)
    assert main(words) == 0
    said = capfd.readouterr().out
    path = tmp_path / "out" / "TwoRoutes-v0-seed0-ways.png"
    for piece in (
        f"of 2, 8 drawn episodes: {result['counts'][0]}",
        "price",
        "removal success",
        "gap over alpha",
        str(path),
    ):
        assert piece in said
    assert path.read_bytes()[1:4] == b"PNG"


def test_help_comes_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pmoe_lightning.evaluate", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert all(key in done.stdout for key in ("checkpoint", "episodes", "rule", "video"))
    assert "torch" not in done.stderr and "gymnasium" not in done.stderr and "mlflow" not in done.stderr


def test_a_mujoco_policy_from_the_shell_without_a_display(tmp_path: Path) -> None:
    _, content = make_policy("HalfCheetah-v5", normalize=False)
    content["policy"]["description"]["env"]["kwargs"] = {"max_episode_steps": 3}
    write_checkpoint(content, tmp_path / "best.ckpt")
    command = [sys.executable, "-m", "pmoe_lightning.evaluate", "--checkpoint", "best.ckpt", "episodes=2", "video=true"]
    env = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["lengths"] == [3, 3]
    if result["video"] is None:
        # No EGL on this machine: the evaluation goes on, and the user learns what is missing.
        assert "warning: no video: cannot render HalfCheetah-v5 (MUJOCO_GL=egl)" in done.stderr
    else:
        assert imageio_ffmpeg.count_frames_and_secs(tmp_path / result["video"])[0] == 4  # and where it ended
