"""Learning is the proof: every algorithm solves Pendulum-v1, from the command a user types, with every seed."""

from __future__ import annotations

import pytest

from pmoe_lightning.envs import make_env, with_memory
from pmoe_lightning.evaluation.episodes import evaluate_policy
from pmoe_lightning.tracking.references import load_policy

pytestmark = pytest.mark.slow

# The words of the command and the evaluation return to reach: an untrained policy has about -1200, a perfect one -150.
MIXTURE = ["actor=pmoe", "estimator=frequency"]
SOLVED = {
    "sac": (["experiment=pendulum_sac", *MIXTURE], -200.0),
    "ppo": (["experiment=pendulum_ppo", *MIXTURE], -300.0),
    "dac": (["experiment=pendulum_ppo", "algo=dac"], -300.0),
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("algo", SOLVED)
def test_pendulum_is_solved(algo, seed, run_module, tmp_path):
    """The best checkpoint of the run, judged anew by twenty episodes that had no part in choosing it."""
    chosen, enough = SOLVED[algo]
    words = [*chosen, f"seed={seed}", "logger=none"]
    words += ["callbacks=[metrics,evaluation,checkpoint_best]", "callbacks.evaluation.episodes=20", "hydra.run.dir=run"]
    done = run_module("pmoe_lightning.train", *words)
    assert done.returncode == 0, done.stderr
    policy = load_policy(tmp_path / "run" / "checkpoints" / "best.ckpt")
    env = with_memory(make_env, policy)("Pendulum-v1", num_envs=20)
    result = evaluate_policy(policy, env, episodes=20, seed=1000)
    assert result.mean > enough, result.returns
