"""Runs in the environments of the zoo are stopped and resumed: exactly, or with one line that says why not."""

from __future__ import annotations

import importlib
import warnings

import pytest
import zoo
from test_resume import LAST, PPO, QUIET, differing, state_of

from pmoe_lightning.checkpoints import read_checkpoint

SHORT = [zoo.InnerEnvironments, zoo.RandomisedCheetah]
REFUSED = [kind for kind, _ in zoo.REFUSED if kind is not zoo.ModuleLock]
slow = pytest.mark.slow


@pytest.fixture
def run(train):
    """The train command as a new process would run it: with nothing left of another run in the module of the zoo."""

    def run(*words: str) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its environments are registered again
            importlib.reload(zoo)
        return train(*PPO, *QUIET, *words)

    return run


@pytest.mark.parametrize("kind", [*SHORT, *(pytest.param(k, marks=slow) for k in zoo.EXACT if k not in SHORT)])
def test_a_run_in_it_is_resumed_exactly(kind, run, tmp_path):
    env = f"env=zoo:{kind.__name__}-v0"
    run(env, "total_frames=256", "hydra.run.dir=whole")
    run(env, "total_frames=128", "hydra.run.dir=extended")
    assert "new episode" not in run(env, "total_frames=256", "resume=extended")
    assert differing(state_of(tmp_path / "whole"), state_of(tmp_path / "extended")) == []


@pytest.mark.parametrize("kind", [zoo.KEEPERS["IntEnum"], *(pytest.param(kind, marks=slow) for kind in REFUSED[1:])])
def test_a_run_in_it_is_resumed_with_a_new_episode_and_says_so(kind, run, tmp_path):
    words = [f"env=zoo:{kind.__name__}-v0", "hydra.run.dir=run"]
    run(*words, "total_frames=64")
    assert "experience" in read_checkpoint(tmp_path / "run" / LAST)
    said = run(*words, "total_frames=128", "resume=run").splitlines()
    (line,) = [line for line in said if "new episode" in line]
    assert kind.__name__ in line and "cannot be captured" in line
