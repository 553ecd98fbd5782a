"""Wrappers of a user's own around training, evaluation, films, exports and workers alike."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_resume import differing, state_of

from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.configuration.arguments import read_override, write_value
from pmoe_lightning.configuration.composition import compose_jobs
from pmoe_lightning.envs import make_env
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.evaluate import main as evaluate
from pmoe_lightning.export import main as export

SHIFTED = {"wrapper": "own_wrappers:Shifted", "by": 2.0}
WRAPPERS = "env.wrappers=[own_wrappers:Halved,{wrapper:own_wrappers:Shifted,noise:0.1},own_wrappers:OneMore]"
TINY = ["algo=sac", "env=Pendulum-v1", "+env.max_episode_steps=20", "algo.hidden_sizes=[8]", "data.batch_size=8"]
TINY += [
    "actor=gaussian",
    "estimator=pathwise",
    "data.init_random_frames=40",
    "data.frames_per_epoch=120",
    "logger=none",
    "compile=false",
]


def test_the_first_is_innermost_and_takes_its_arguments() -> None:
    plain, inner, outer = (
        make_env("Pendulum-v1", num_envs=2, seed=0, wrappers=wrappers)
        for wrappers in ((), ["own_wrappers:Halved", SHIFTED], [SHIFTED, "own_wrappers:Halved"])
    )
    reward, halved_first, shifted_first = (
        env.rollout(3, policy=lambda *observed: torch.ones(2, 1))["next", "reward"] for env in (plain, inner, outer)
    )
    torch.testing.assert_close(halved_first, reward / 2 + 2)
    torch.testing.assert_close(shifted_first, (reward + 2) / 2)


def test_spaces_that_a_wrapper_changes_are_those_of_everything() -> None:
    env = make_env("HalfCheetah-v5", seed=0, wrappers=["own_wrappers:OneMore", "own_wrappers:First"])
    rollout = env.rollout(3)
    assert rollout["observation"][0, :, -1].tolist() == [0, 1, 2]
    assert env.entries["observation"].shape == (18,) and env.action_spec.shape == (1, 1)
    assert env.action_spec.space.high.item() == 0.5


@pytest.mark.parametrize(
    ("wrappers", "message"),
    [
        (
            "own_wrappers:Halved",
            "env.wrappers='own_wrappers:Halved' is not a list: write env.wrappers=[module:Wrapper]",
        ),
        (["Halved"], "env.wrappers: 'Halved' names no wrapper: write env.wrappers=[module:Wrapper]"),
        (["own_wrappers:"], "names no wrapper"),
        ([3], "env.wrappers: 3 names no wrapper"),
        ([None], "names no wrapper"),
        ([{"by": 2.0}], "names no wrapper"),
        ([{"wrapper": ["a:B"]}], "names no wrapper"),
        (["no_such_module.part:Wrapper"], "no_such_module.part cannot be imported: No module named 'no_such_module'"),
        (["own_wrappers:Halfed"], "own_wrappers:Halfed does not exist in own_wrappers; did you mean Halved?"),
        (["own_wrappers:function"], "own_wrappers:function is a function, not of gymnasium.Wrapper"),
        (["builtins:dict"], "builtins:dict is a subclass of object, not of gymnasium.Wrapper"),
        (["gymnasium:Env"], "gymnasium:Env is a subclass of Generic, not of gymnasium.Wrapper"),
        (["own_wrappers:Forgetful"], "own_wrappers:Forgetful cannot be put around"),
        (["own_wrappers:Exits"], "SystemExit"),
        ([SHIFTED | {"speed": 1}], "with {'by': 2.0, 'speed': 1}: TypeError"),
        (["own_wrappers:Undeclared"], "observation of shape (2,), but its space declares (3,)"),
        (["gymnasium.wrappers:ClipReward", "gymnasium.wrappers:Clip"], "Clip does not exist in gymnasium.wrappers"),
    ],
)
def test_a_mistake_is_one_line(wrappers, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_env("Pendulum-v1", wrappers=wrappers).reset()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_module_that_fails_is_one_line(tmp_path, monkeypatch) -> None:
    (tmp_path / "failing_wrappers.py").write_text("raise RuntimeError('no licence\\nfound')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match="failing_wrappers cannot be imported: RuntimeError: no licence"):
        make_env("Pendulum-v1", wrappers=["failing_wrappers:Wrapper"])


def test_a_wrapper_is_captured_with_what_it_keeps(tmp_path) -> None:
    noisy = [SHIFTED | {"noise": 1.0}, "own_wrappers:OneMore"]
    first, second = (make_env("Pendulum-v1", num_envs=2, seed=seed, wrappers=noisy) for seed in (0, 1))
    for env in (first, second):
        env.rollout(5)
    torch.save(first.simulator_state(), tmp_path / "state")
    assert second.load_simulator_state(torch.load(tmp_path / "state", weights_only=True)) is None
    outcomes = [env.empty_outcome() for env in (first, second)]
    for env, outcome in zip((first, second), outcomes, strict=True):
        env.step_into(np.zeros((2, 1), np.float32), {}, outcome, env.empty_root())
    for key, value in outcomes[0].items():
        np.testing.assert_array_equal(value, outcomes[1][key])
    locked = make_env("Pendulum-v1", seed=0, wrappers=["own_wrappers:Locked"])
    assert "Locked.output is a" in second.load_simulator_state(locked.simulator_state())


def test_values_are_written_as_overrides_that_are_read_back() -> None:
    for value in (["a.b:C"], [{"wrapper": "a:B", "n": 3, "x": -0.5, "on": True, "of": None, "said": "it's"}], [["1"]]):
        assert read_override(f"env.wrappers={write_value(value)}") == ("env.wrappers", value)


def test_they_go_through_every_command_and_are_asked_for_again(train, tmp_path, monkeypatch, capfd) -> None:
    said = ["callbacks.evaluation.episodes=1", "callbacks.final_policy.export=onnx"]
    said = train(
        *TINY, *said, WRAPPERS, "callbacks.final_policy.video_frames=3", "total_frames=120", "hydra.run.dir=whole"
    )
    checkpoint = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    description = read_checkpoint(checkpoint)["policy"]["description"]
    assert description["observation_dim"] == 4 and len(description["env"]["kwargs"]["wrappers"]) == 3
    assert f"'{WRAPPERS}'" in said.splitlines()[-1], "the command for evaluating it"
    assert {".mp4", ".onnx"} <= {file.suffix for file in checkpoint.parent.iterdir()}

    capfd.readouterr()
    monkeypatch.delitem(sys.modules, "own_wrappers")
    assert evaluate([f"checkpoint={checkpoint}", "episodes=1"]) == 1
    refused = capfd.readouterr().err
    assert WRAPPERS in refused and "if you trust them" in refused and "own_wrappers" not in sys.modules
    returns = []
    for asked in (WRAPPERS, "env.wrappers=[own_wrappers:OneMore]"):
        assert evaluate([f"checkpoint={checkpoint}", "episodes=1", asked, "--json"]) == 0
        returns.append(json.loads(capfd.readouterr().out)["mean"])
    assert returns[0] == pytest.approx(returns[1] / 2 + 20, abs=3), "what is judged is the wrapped reward"
    assert evaluate([f"checkpoint={checkpoint}", "env.wrappers=[]"]) == 2
    assert "maps 4 observations" in capfd.readouterr().err

    assert export([f"checkpoint={checkpoint}", "output=drawn.onnx"]) == 0
    assert "if you trust them" in capfd.readouterr().out
    assert export([f"checkpoint={checkpoint}", "output=asked.onnx", WRAPPERS]) == 0
    assert "its episodes in Pendulum-v1" in capfd.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_longer(train) -> None:
    words = [*TINY, WRAPPERS, "callbacks=[checkpoint_last]"]
    train(*words, "total_frames=240", "hydra.run.dir=longer")
    train(*words, "total_frames=120", "hydra.run.dir=again")
    train(*words, "total_frames=240", "resume=again")
    assert differing(state_of(Path("longer")), state_of(Path("again"))) == []


@pytest.mark.slow
def test_worker_processes_wrap_too(train, tmp_path) -> None:
    words = ["data.num_workers=1", "data.frames_per_batch=40", "callbacks=[checkpoint_last]", "total_frames=120"]
    train(*TINY, *words, "env.wrappers=[own_wrappers:OneMore]", "hydra.run.dir=run")
    policy = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["policy"]
    assert policy["description"]["observation_dim"] == 4


def test_dm_control_has_none() -> None:
    with pytest.raises(ConfigurationError, match="env=dm_control has no wrappers, environments of Gymnasium have"):
        compose_jobs(["env=dm_control", "env.wrappers=[own_wrappers:Halved]"])
