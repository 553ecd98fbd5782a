"""A folder has one writer, a run one end: what is refused, by whom it is held, and what is left to be done."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import LAST, SMALL, TINY, fork, wait, warm_up
from forked import train as command
from mlflow import MlflowClient
from test_resume import differing, state_of
from waiting import wait_until

from pmoe_lightning.callbacks import Evaluation, MetricsLogger
from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.processes import run_folder
from pmoe_lightning.tracking.spool import Spool

PENDULUM = [*TINY["sac"], *SMALL, "env=Pendulum-v1"]
QUIET = [*PENDULUM, "logger=none", "callbacks=minimal", "data.frames_per_epoch=128"]
ENDLESS = [*QUIET, "total_frames=1_000_000"]


@pytest.fixture
def start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., int]]:
    """Starts the train command in a fork of this process, whose words go to a file; what still runs is killed."""
    started: list[int] = []
    warm_up()
    capfd.readouterr()

    def start(*words: str, log: str = "log.txt", **options: Any) -> int:
        started.append(fork(command(list(words), tmp_path, **options), tmp_path / log))
        return started[-1]

    yield start
    for child in started:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            continue


def ended(child: int) -> bool:
    """Whether a child has ended, without waiting for it; its end is still there to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def test_a_run_that_runs_is_left_alone_by_every_command(start, train, tmp_path):
    child = start(*ENDLESS, "hydra.run.dir=outputs/run")
    folder = tmp_path / "outputs" / "run"
    wait_until((folder / LAST).exists)
    before = (folder / ".hydra" / "overrides.yaml").read_text()
    for words in (
        ["resume=outputs/run"],
        [f"resume=outputs/run/{LAST}"],
        ["resume=auto"],
        ["resume=auto", "hydra.run.dir=outputs/run"],
        ["hydra.run.dir=outputs/run", "seed=3"],
        [f"resume=outputs/run/{LAST}", "hydra.run.dir=elsewhere"],
    ):
        said = train(*ENDLESS, *words, code=2)
        assert said.count("\n") == 1 and f"in use by process {child} on" in said, said
    assert (folder / ".hydra" / "overrides.yaml").read_text() == before
    assert not ended(child) and not (tmp_path / "elsewhere" / ".hydra").exists()
    os.kill(child, signal.SIGKILL)
    wait(child)
    frames = read_checkpoint(folder / LAST)["policy"]["env_frames"]
    train(*QUIET, f"total_frames={frames + 64}", "resume=auto")
    assert read_checkpoint(folder / LAST)["policy"]["env_frames"] >= frames + 64


def test_a_new_run_does_not_go_into_the_folder_of_another(train, tmp_path):
    train(*QUIET, "total_frames=128", "hydra.run.dir=run")
    content = (tmp_path / "run" / LAST).read_bytes()
    said = train(*QUIET, "total_frames=128", "seed=1", "hydra.run.dir=run", code=2)
    assert "run holds a run: go on with it by resume=auto hydra.run.dir=run, or give another hydra.run.dir" in said
    train(*QUIET, "total_frames=128", "seed=1", "hydra.run.dir=other")
    said = train(*QUIET, "total_frames=256", "resume=run", "hydra.run.dir=other", code=2)
    assert "other holds another run than" in said
    assert (tmp_path / "run" / LAST).read_bytes() == content
    # One that was killed before it had a checkpoint is a run too.
    (tmp_path / "run" / LAST).unlink()
    said = train(*QUIET, "total_frames=128", "hydra.run.dir=run", code=2)
    assert "run holds a run: start it anew by resume=auto hydra.run.dir=run" in said
    assert "starting a new one" in train(*QUIET, "total_frames=128", "hydra.run.dir=run", "resume=auto")
    assert (tmp_path / "run" / LAST).read_bytes()[:4] == content[:4]


def test_a_sweep_does_not_go_into_the_folder_of_another_or_of_a_run(train, tmp_path):
    words = ["-m", *QUIET, "total_frames=128", "seed=1,2", "hydra.sweep.dir=sweep"]
    train(*words)
    assert "sweep holds a sweep or a run: give another hydra.sweep.dir" in train(*words, code=2)
    (job, other) = sorted((tmp_path / "sweep").glob("*/.hydra"))
    assert run_folder.read_record(job.parent)["status"] == run_folder.read_record(other.parent)["status"] == "FINISHED"
    # A job is a run, with which one goes on.
    train(*QUIET, "total_frames=192", "seed=1", f"resume={job.parent}")
    assert read_checkpoint(job.parent / LAST)["policy"]["env_frames"] >= 192


@pytest.mark.parametrize(("number", "how"), [(2, "new"), (3, "resume"), (3, "auto")])
def test_of_several_starts_at_once_one_works_and_the_others_say_why(number, how, start, train, tmp_path):
    words = [*ENDLESS, "hydra.run.dir=run"]
    if how != "new":
        train(*QUIET, "hydra.run.dir=run", "total_frames=128")
    words += {"new": [], "resume": ["resume=run"], "auto": ["resume=auto"]}[how]
    children = [start(*words, log=f"log{i}.txt") for i in range(number)]
    wait_until(lambda: sum(map(ended, children)) >= number - 1)
    ends = {child: wait(child) for child in children if ended(child)}
    assert list(ends.values()) == [2] * (number - 1)
    (working,) = set(children) - ends.keys()
    for i, child in enumerate(children):
        said = (tmp_path / f"log{i}.txt").read_text()
        if child != working:
            assert said.count("\n") == 1 and f"in use by process {working} on" in said, said
    before = read_checkpoint(tmp_path / "run" / LAST)["policy"]["env_frames"] if how != "new" else 0
    wait_until(
        lambda: (
            (tmp_path / "run" / LAST).exists()
            and read_checkpoint(tmp_path / "run" / LAST)["policy"]["env_frames"] > before
        )
    )


def kill_at_the_end() -> None:
    """In a child: SIGKILL to itself after the last checkpoint, before anything that follows training."""
    MetricsLogger.on_train_end = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


WHOLE = [*PENDULUM, "callbacks.evaluation.episodes=1", "+env.max_episode_steps=30", "data.frames_per_epoch=160"]
WHOLE += ["callbacks.metrics.every_frames=100", "callbacks.mixture.every_frames=100", "total_frames=480"]
WHOLE += ["callbacks.final_policy.video_frames=5", "~callbacks.estimator_variance"]


def curves(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    names = [name for name in client.get_run(run_id).data.metrics if "time/" not in name]
    return {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name)) for name in names
    }


def artifacts(client: MlflowClient, run_id: str) -> set[str]:
    folders = ("", "figures", "videos", "checkpoints")
    return {item.path for folder in folders for item in client.list_artifacts(run_id, folder)}


def models(client: MlflowClient, run_id: str) -> list[str]:
    return [model.name for model in client.search_logged_models(["1"], f"source_run_id = '{run_id}'")]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("resume=run", marks=pytest.mark.slow),
        "resume=auto",
        pytest.param("resume={run_id}", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_after_its_last_checkpoint_is_finished(how, start, train, tmp_path, store):
    assert wait(start(*WHOLE, "hydra.run.dir=run", prepare=kill_at_the_end)) == -signal.SIGKILL
    client = MlflowClient(f"sqlite:///{store}")
    (killed,) = client.search_runs(["1"])
    assert killed.info.status == "RUNNING" and run_folder.read_record(tmp_path / "run")["status"] == "RUNNING"
    before = state_of(tmp_path / "run")
    words = [how.format(run_id=killed.info.run_id)] + ["hydra.run.dir=run"] * (how == "resume=auto")
    said = train(*WHOLE, *words)
    assert differing(before, state_of(tmp_path / "run")) == [], "trained"
    assert "results " in said and (tmp_path / "run" / "checkpoints" / "best.mp4").stat().st_size
    finished = client.get_run(killed.info.run_id)
    assert finished.info.status == "FINISHED" and len(client.search_runs(["1"])) == 1
    if how == "resume=run":
        train(*WHOLE, "hydra.run.dir=whole")
        (whole,) = (run for run in client.search_runs(["1"]) if run.info.run_id != killed.info.run_id)
        for ask in (curves, artifacts, models):
            assert ask(client, whole.info.run_id) == ask(client, killed.info.run_id)
    # Now there is nothing left to do.
    said = train(*WHOLE, *words)
    assert said.count("\n") == 1 and "run is finished, with all of its 480 frames and MLflow run" in said
    train(*WHOLE, *words, "total_frames=640")
    assert read_checkpoint(tmp_path / "run" / LAST)["policy"]["env_frames"] == 640


def test_what_mlflow_has_not_taken_of_a_finished_run_is_sent_by_resume(train, tmp_path, store):
    words = [*PENDULUM, "callbacks=[metrics,checkpoint_last]", "total_frames=128"]
    train(*words, "hydra.run.dir=run")
    client = MlflowClient(f"sqlite:///{store}")
    (run,) = client.search_runs(["1"])

    def leave(run_id: str) -> None:
        spool = Spool(tmp_path / "run" / "mlflow-spool")
        spool.identify(f"sqlite:///{store}", run_id)
        spool.put("points", {"points": [["late", 1.0, 1, 128]]})
        spool.put("status", {"status": "FINISHED", "ended": 1})

    leave("0" * 32)  # a run that the store does not have
    said = train(*words, "resume=run", code=1)
    assert "run is finished, but not all of it is in MLflow" in said and "tracking.resend" in said
    shutil.rmtree(tmp_path / "run" / "mlflow-spool")
    leave(run.info.run_id)
    said = train(*words, "resume=run")
    assert "2 entries sent to run" in said and "run is finished, with all of its 128 frames" in said
    assert client.get_run(run.info.run_id).data.metrics["late"] == 1.0
    assert "entries sent" not in train(*words, "resume=run")


def test_a_damaged_best_checkpoint_is_found_again_or_declared_lost(train, tmp_path, monkeypatch):
    words = [*PENDULUM, "logger=none", "callbacks=[evaluation,checkpoint_best,checkpoint_last]"]
    words += ["callbacks.evaluation.episodes=1", "+env.max_episode_steps=30", "data.frames_per_epoch=160"]
    # Pendulum's returns are what chance makes them: these grow with every evaluation, or fall.
    evaluate = Evaluation._run_episodes
    sign = [1]

    def evaluated(self: Evaluation, trainer: Any, pl_module: Any) -> float | None:
        mean = evaluate(self, trainer, pl_module)
        self.history[-1][1] = sign[0] * float(trainer.datamodule.env_frames)
        return None if mean is None else self.history[-1][1]

    monkeypatch.setattr(Evaluation, "_run_episodes", evaluated)
    best, last = (tmp_path / "run" / "checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
    train(*words, "total_frames=480", "hydra.run.dir=run")
    intact = read_checkpoint(best)
    assert intact["policy"]["env_frames"] == 480
    # The last one is the best, too.
    best.write_bytes(best.read_bytes()[:-1])
    sign[0] = -1
    said = train(*words, "total_frames=640", "resume=run")
    assert f"{best} is damaged" in said and "eval/episode_return 480.0, and is found again in" in said
    assert differing(intact, read_checkpoint(best)) == []
    # A run whose folder has another name by now knows its best.
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    assert "best policy" not in train(*words, "total_frames=800", "resume=moved")
    assert read_checkpoint(tmp_path / "moved" / "checkpoints" / "best.ckpt")["policy"]["env_frames"] == 480
    # The last one is not the best now, the one before it is.
    best.write_bytes(best.read_bytes()[:-1])
    said = train(*words, "total_frames=800", "resume=run")
    assert "eval/episode_return 480.0, and is found again in" in said and "last.previous.ckpt" in said
    last.with_name("last.previous.ckpt").unlink()
    best.unlink()
    best.with_name("best.previous.ckpt").unlink(missing_ok=True)
    said = train(*words, "total_frames=960", "resume=run")
    assert f"{best} does not exist" in said and "is lost, and the best of the rest, with -800.0, taken from" in said
    assert read_checkpoint(best)["policy"]["env_frames"] == 800
    for path in best.parent.glob("*.ckpt"):
        if path != last:
            path.unlink()
    monkeypatch.setattr("pmoe_lightning.callbacks.best_checkpoint._best_beside", lambda *_: None)
    said = train(*words, "total_frames=1120", "resume=run")
    assert "and is lost: the next evaluation chooses" in said
    assert read_checkpoint(best)["policy"]["env_frames"] == 1120
