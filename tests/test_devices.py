"""Two training processes (gloo, on the CPU): one result, and the frames are shared."""

from __future__ import annotations

import pytest
import torch


# 640 frames each. SAC: one update per frame after a warm-up of 500, rounded up to eight iterations of 64. PPO: ten
# epochs of one minibatch for each of ten rollouts but the first, which only initialises the statistics.
@pytest.mark.parametrize("algo, updates", [("sac", 640 - 8 * 64), ("ppo", 9 * 10)])
def test_two_processes_share_the_frames(algo, updates, run_module, tmp_path):
    words = ["debug=default", f"algo={algo}", "trainer.devices=2", "callbacks=minimal", "logger=none"]
    words += ["data.init_random_frames=1000"] if algo == "sac" else []
    done = run_module("pmoe_lightning.train", *words, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results ") == 1  # the first process alone reports
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["policy"]["env_frames"] == 1280
    assert checkpoint["policy"]["updates"] == updates
    assert all(value.isfinite().all() for value in checkpoint["policy"]["state_dict"].values())
