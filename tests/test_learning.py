"""Learning is the proof: both algorithms solve Pendulum-v1, from the command a user types, with every seed."""

from __future__ import annotations

from functools import partial

import pytest

from pmoe_lightning.checkpoints import load_policy
from pmoe_lightning.envs import make_env
from pmoe_lightning.evaluation import evaluate_policy

pytestmark = pytest.mark.slow

# (experiment, evaluation return that counts as solved): torque noise alone costs about -150 per episode.
SOLVED = {"pendulum_sac": -200.0, "pendulum_ppo": -300.0}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("experiment", SOLVED)
def test_pendulum_is_solved(experiment, seed, run_module, tmp_path):
    words = [f"experiment={experiment}", "actor=pmoe", "estimator=frequency", f"seed={seed}", "callbacks=minimal"]
    done = run_module("pmoe_lightning.train", *words, "logger=none", "hydra.run.dir=run", timeout=1500)
    assert done.returncode == 0, done.stderr
    policy = load_policy(tmp_path / "run" / "checkpoints" / "last.ckpt")
    env = partial(make_env, "Pendulum-v1")(num_envs=10, seed=0)
    result = evaluate_policy(policy, env, episodes=10, seed=1000)
    assert result.mean > SOLVED[experiment], result.returns
