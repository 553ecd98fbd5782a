"""Environments that other packages register train, are filmed and resumed, with the line that says what is lost."""

from __future__ import annotations

from pathlib import Path

import imageio.v2 as imageio
import pytest

from pmoe_lightning.checkpoints import read_checkpoint

pytestmark = pytest.mark.environments
IDS = ["pybullet_envs_gymnasium:HopperBulletEnv-v0", "gymnasium_robotics:PointMaze_UMaze-v3"]


@pytest.mark.parametrize("id", IDS)
def test_it_trains_2000_frames_is_filmed_and_resumed(id: str, train, tmp_path) -> None:
    words = ["algo=sac", f"env={id}", "algo.hidden_sizes=[8]", "data.batch_size=8", "data.init_random_frames=500"]
    words += ["data.frames_per_epoch=1008", "logger=none", "callbacks=[metrics,checkpoint_last,final_policy]"]
    words += ["callbacks.final_policy.video_frames=4"]
    said = train(*words, "total_frames=1008", "hydra.run.dir=run")
    assert "no video" not in said
    assert len(imageio.mimread(tmp_path / "run" / "checkpoints" / "last.mp4", memtest=False)) >= 2
    said = train(*words, "callbacks.final_policy.video=false", "total_frames=2000", "resume=run")
    assert "starts a new episode" in said and "cannot be captured" in said
    assert read_checkpoint(Path("run", "checkpoints", "last.ckpt"))["policy"]["env_frames"] == 2000
