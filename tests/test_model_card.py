"""The card of a packaged policy: what a run says of it, and that its code runs where only the folder is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import PPO, QUIET
from waiting import HANG_SECONDS

from pmoe_lightning import __version__
from pmoe_lightning.callbacks.final_policy import _named
from pmoe_lightning.evaluation.statistics import student_t_interval
from pmoe_lightning.tracking.model_card import model_card

FACTS = {
    "env": "Hopper-v5",
    "observation_dim": 11,
    "action_dim": 3,
    "actor": "pmoe",
    "num_components": 4,
    "deterministic": True,
    "rule": "best_value",
    "env_frames": 20_000,
    "updates": 1_000,
}
ORIGIN = {"git_commit": "abc", "git_dirty": True, "packages": {"torch": "2.9", "mujoco": "3.11", "hydra-core": "1.3"}}


def test_the_card_says_what_is_known_and_nothing_else():
    returns = [1.0, 2.0, 4.0]
    told = {"algorithm": "SAC", "estimator": "Frequency", "seed": 3, "returns": returns, "first_seed": 7}
    card = model_card(FACTS, ".", training=told | {"evaluations": 5, "origin": ORIGIN})
    low, high = student_t_interval(returns)
    for row in (
        "| task | Hopper-v5 |",
        "| algorithm | SAC |",
        "| actor | pmoe, 4 components |",
        "| estimator | Frequency |",
        "| rule | best_value |",
        "| training | 20,000 environment frames, 1,000 updates, seed 3 |",
        f"| return | 2.3, 95 % interval {low:.1f} to {high:.1f}, of 3 episodes (seeds 7 to 9) |",
        "| software | torch 2.9, mujoco 3.11, commit abc with changes |",
        "It is the best of 5 evaluations on the same seeds",
    ):
        assert row in card, row
    assert "mixture.png" not in card and "mixture.png" in model_card(FACTS, ".", training={"picture": True})
    bare = model_card(FACTS | {"env_frames": None, "updates": None, "deterministic": False}, "models:/m-1")
    assert "None" not in bare and "| return" not in bare and "no evaluation of it" in bare and "no guarantee" in bare
    one = model_card(FACTS, ".", training={"returns": [5.0], "first_seed": 0})
    assert "| return | 5.0, without an interval, of 1 episode (seed 0) |" in one and "nan" not in one


def test_the_card_names_no_place_on_this_machine():
    assert _named("/home/someone/runs/best.ckpt") == "best.ckpt"
    assert [_named(reference) for reference in ("models:/hopper@best", "runs/best.ckpt")] == [
        "models:/hopper@best",
        "runs/best.ckpt",
    ]


@pytest.fixture
def packaged(train, store: Path, tmp_path: Path) -> Path:
    """The folder of a run with a packaged policy."""
    words = [word for word in [*PPO, *QUIET] if word not in ("logger=none", "callbacks=minimal")]
    train(
        *words,
        "env=Pendulum-v1",
        "total_frames=256",
        "callbacks=default",
        "callbacks.evaluation.episodes=2",
        "callbacks.final_policy.video=false",
        "callbacks.final_policy.register_as=swing",
        "hydra.run.dir=run",
    )
    return tmp_path / "run" / "checkpoints" / "best.model"


@pytest.mark.slow
def test_a_run_writes_the_card_of_its_policy_and_its_code_runs(packaged: Path, store: Path, tmp_path: Path):
    import mlflow

    card = (packaged / "README.md").read_text()
    assert re.search(r"\| return \| -[\d.]+, 95 % interval .* of 2 episodes \(seeds 1000000 to 1000001\) \|", card), (
        card
    )
    assert "| algorithm | PPO |" in card and "| estimator | Marginalized |" in card and "seed 0" in card
    assert f"pmoe_lightning {__version__}, torch " in card
    assert "![What each component" in card and (packaged / "mixture.png").read_bytes().startswith(b"\x89PNG")
    assert len((packaged / "mixture.png").read_bytes()) < 100_000
    assert str(tmp_path) not in card and str(Path.home()) not in card, "a path of this machine"
    client = mlflow.MlflowClient(f"sqlite:///{store}")
    (model,) = client.search_logged_models([client.get_experiment_by_name("pmoe_lightning").experiment_id])
    assert model.tags["mlflow.note.content"] == card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (of_folder,) = re.findall(r"```python\n(.*?)```", model_card(FACTS | {"observation_dim": 3}, "."), re.DOTALL)
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}"
    for text, folder in ((code, tmp_path), (of_folder, packaged)):
        command = [sys.executable, "-c", text + "\nprint(actions.shape)"]
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=HANG_SECONDS)
        assert done.returncode == 0 and done.stdout.strip() == "(1, 1)", done.stderr
