"""A simulator that is not Gymnasium's, one file and one yaml of a user's own, goes through every command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.envs import AbstractEnvironment
from pmoe_lightning.errors import RunError
from pmoe_lightning.evaluate import main as evaluate

BACKEND = '''
"""A point that is pushed about a plane, N of them in one NumPy array."""
import numpy as np
from pmoe_lightning.envs import AbstractEnvironment

STEPS = 25


class PointMass(AbstractEnvironment):
    seconds_per_step = 0.1

    def __init__(self, num_envs, **settings):
        low = np.array([-3.0, -2.0], np.float32)
        super().__init__(num_envs=num_envs, observation_dim=4, low=low, high=-low, **settings)
        self.state, self.steps = np.zeros((num_envs, 4)), np.zeros(num_envs, np.int64)
        self.random = [np.random.default_rng() for _ in range(num_envs)]

    def _begin(self, i, seed, observation):
        if seed is not None:
            self.random[i] = np.random.default_rng(seed)
        self.state[i], self.steps[i] = self.random[i].normal(size=4) * [1, 1, 0, 0], 0
        observation[:] = self.state[i]

    def _simulate(self, action, outcome):
        assert (np.abs(action) <= [3, 2]).all()
        self.state[:, 2:] += self.seconds_per_step * action
        self.state[:, :2] += self.seconds_per_step * self.state[:, 2:]
        self.steps += 1
        distance = np.linalg.norm(self.state[:, :2], axis=1)
        outcome["observation"][:], outcome["reward"][:, 0] = self.state, -distance
        outcome["terminated"][:, 0], outcome["truncated"][:, 0] = distance > 6, self.steps >= STEPS
        return self._count(outcome)

    def _capture(self):
        random = [generator.bit_generator.state for generator in self.random]
        return {"state": self.state.tolist(), "steps": self.steps.tolist(), "random": random}

    def _restore(self, state):
        self.state[:], self.steps[:] = state["state"], state["steps"]
        for generator, saved in zip(self.random, state["random"]):
            generator.bit_generator.state = saved

    def picture(self):
        frame = np.full((96, 96, 3), 255, np.uint8)
        x, y = np.clip(48 + 8 * self.state[0, :2], 4, 91).astype(int)
        frame[y - 4 : y + 4, x - 4 : x + 4] = (200, 30, 30)
        return frame


def make_point_mass(id, render_mode=None, **settings):
    return PointMass(name=id, **settings)
'''
YAML = "_target_: point_mass.make_point_mass\n_partial_: true\nid: PointMass\n"
WORDS = ["algo=sac", "env=point_mass", "algo.hidden_sizes=[8]", "data.batch_size=8", "data.init_random_frames=64"]
WORDS += ["data.frames_per_epoch=112", "data.num_envs=2", "callbacks.evaluation.episodes=2", "logger=none"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ``--config-dir`` of a user with a simulator of their own."""
    file = tmp_path / "mine" / "env" / "point_mass.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(YAML)
    (tmp_path / "point_mass.py").write_text(BACKEND)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "point_mass", raising=False)
    return str(tmp_path / "mine")


def last(folder: str) -> dict:
    return read_checkpoint(Path(folder, "checkpoints", "last.ckpt"))


def test_it_trains_is_judged_filmed_and_resumed_bit_for_bit(mine, train, tmp_path, capfd) -> None:
    words = ["--config-dir", mine, *WORDS, "callbacks=[evaluation,metrics,checkpoint_last,final_policy]"]
    said = train(*words, "total_frames=320", "hydra.run.dir=whole")
    assert "no video" not in said
    assert len(imageio.mimread(tmp_path / "whole" / "checkpoints" / "last.mp4", memtest=False)) >= 5

    train(*words, "callbacks.final_policy.video=false", "total_frames=112", "hydra.run.dir=cut")  # within two episodes
    said = train(*words, "callbacks.final_policy.video=false", "total_frames=320", "resume=cut")
    assert "new episode" not in said
    whole, resumed = last("whole"), last("cut")
    assert whole["policy"]["env_frames"] == resumed["policy"]["env_frames"] == 320
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    assert whole["experience"][0]["simulators"] == resumed["experience"][0]["simulators"]

    capfd.readouterr()
    asked = ["--config-dir", mine, "checkpoint=whole/checkpoints/last.ckpt", "episodes=3", "--video", "--json"]
    assert evaluate(asked) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["env"] == "PointMass" and max(result["lengths"]) <= 25
    film = imageio.mimread(result["video"], memtest=False)
    assert len(film) >= result["lengths"][0] // 2 and np.ptp(film[0]) > 100
    assert evaluate([asked[2], "episodes=1"]) == 2  # without the folder it is not Gymnasium's either
    assert "env=point_mass, which is not of this package" in capfd.readouterr().err


def test_it_keeps_torchrls_contract(mine) -> None:
    from point_mass import make_point_mass

    env = make_point_mass("PointMass", num_envs=3, seed=0)
    check_env_specs(env)
    assert {key: entry.shape for key, entry in env.entries.items()}["observation"] == (4,)
    env.set_seed(0)
    rollout = env.rollout(60, break_when_any_done=False)
    done = rollout["next", "done"].squeeze(-1)
    assert done.any() and rollout["next", "episode_length"].max() == 25
    assert (rollout["observation"][:, 1:][done[:, :-1]][:, 2:] == 0).all()  # a new episode begins at rest
    total = rollout["next", "reward"].squeeze(-1)[:, :25].sum(-1)
    torch.testing.assert_close(rollout["next", "episode_return"][:, 24, 0][done[:, 24]], total[done[:, 24]])


class Bare(AbstractEnvironment):
    """Only what there must be."""

    def _begin(self, i, seed, observation) -> None:
        observation[:] = 0.0

    def _simulate(self, action, outcome) -> list[int]:
        outcome["observation"][:], outcome["reward"][:] = action, np.inf if action[0, 0] > 0.5 else 1.0
        outcome["terminated"][:], outcome["truncated"][:] = False, False
        return self._count(outcome)


def make_bare(id: str, num_envs: int, render_mode: str | None = None, **settings) -> Bare:
    low = np.array([-1.0], np.float32)
    return Bare(num_envs=num_envs, observation_dim=1, low=low, high=-low, name=id, **settings)


def test_what_a_simulator_does_not_say_is_one_line(tmp_path: Path) -> None:
    env = make_bare("Bare", num_envs=1)
    reason = env.load_simulator_state(env.simulator_state())
    assert reason == "environment Bare starts a new episode: Bare does not say its state, which cannot be captured"
    with pytest.raises(RunError, match="^environment Bare cannot render to arrays$"):
        env.picture()


def test_a_breakdown_is_contained_whatever_simulates(caplog) -> None:
    env = make_bare("Bare", num_envs=2, seed=0)
    root = env.reset().set("action", torch.tensor([[0.9], [0.1]]))
    step, following = env.step_and_maybe_reset(root)
    assert step["next", "truncated"].all() and step["next", "reward"].isnan().all()
    assert following["episode_length"].sum() == 0
    assert "the simulator of Bare broke down after 1 steps" in caplog.text
