"""Callbacks in real, short training runs: what they log, what they keep, and that training does not notice them."""

import io
import math
import random
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure
from test_gradient_statistics import Reversed

from pmoe_lightning.algorithms import SAC, make_ppo, make_sac
from pmoe_lightning.callbacks import (
    ActionTrajectories,
    EstimatorVariance,
    Evaluation,
    FinalPolicy,
    FramesProgressBar,
    LastCheckpoint,
    LearningCurve,
    MetricsLogger,
    MixtureDiagnostics,
    ModeMeasures,
)
from pmoe_lightning.callbacks.mixture import mixture_metrics
from pmoe_lightning.checkpoints import AtomicCheckpointIO, read_checkpoint
from pmoe_lightning.data.off_policy import OffPolicyData
from pmoe_lightning.data.on_policy import OnPolicyData
from pmoe_lightning.envs import GymnasiumEnv, make_env
from pmoe_lightning.envs.multi_goal import MultiGoal
from pmoe_lightning.estimators import Frequency, Pathwise
from pmoe_lightning.evaluation import figures
from pmoe_lightning.evaluation.episodes import evaluate_policy, follow_episode
from pmoe_lightning.evaluation.mode_episodes import measure_modes
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.modules.actors import make_pmoe_actor
from pmoe_lightning.modules.distributions import TanhGaussianMixture
from pmoe_lightning.tracking.references import load_policy

EPISODE, EPOCH, TOTAL = 20, 100, 300
pendulum = partial(make_env, "Pendulum-v1", max_episode_steps=EPISODE)


class Recorder(Logger):
    """Keeps what the callbacks send."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.figures, self.artifacts, self.checkpoint_frames = [], [], [], {}

    def log_hyperparams(self, *args, **kwargs) -> None: ...

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append((step, metrics))

    def log_figure(self, name, figure, step=None) -> None:
        assert isinstance(figure, Figure)
        self.figures.append((name, step))

    def log_artifact(self, path, folder=None) -> None:
        self.artifacts.append(f"{folder}/{Path(path).name}")
        if Path(path).suffix == ".ckpt":
            frames = torch.load(path, weights_only=True)["policy"]["env_frames"]
            self.checkpoint_frames[Path(path).name] = frames

    def steps(self, name) -> list[int]:
        return [step for step, metrics in self.rows if name in metrics]

    def values(self, name) -> list[float]:
        return [metrics[name] for _, metrics in self.rows if name in metrics]


class StopAt(Callback):
    """Fails like a bug in training, or an interrupt, would."""

    def __init__(self, env_frames: int, error: BaseException) -> None:
        self.env_frames, self.error = env_frames, error

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.datamodule.env_frames >= self.env_frames:
            raise self.error


def make_run(callbacks, folder, *, num_components=3, logger=None, total_frames=TOTAL, **trainer_arguments):
    """A tiny SAC on a short pendulum: 20 frames a batch, one update per 10 frames, the first 40 frames random."""
    seed_everything(0, verbose=False)
    arguments = {"num_components": num_components, "hidden_sizes": [8]}
    actor = make_pmoe_actor(3, [-2.0], [2.0], **arguments)
    description = {"format": 1, "actor": "pmoe", "arguments": arguments, "observation_dim": 3, "action_low": [-2.0]}
    description |= {"action_high": [2.0], "normalize_observation": False}
    description["env"] = {"id": "Pendulum-v1", "kwargs": {"max_episode_steps": EPISODE}}
    estimator = Pathwise() if num_components == 1 else Frequency()
    sizes = {"observation_dim": 3, "action_dim": 1, "hidden_sizes": [8], "lr": 0.01}
    algorithm = make_sac(actor, estimator, policy_description=description, **sizes)
    data = OffPolicyData(
        pendulum, algorithm.policy, total_frames=total_frames, frames_per_epoch=EPOCH, frames_per_batch=20,
        init_random_frames=40, batch_size=8, utd_ratio=0.1, seed=0,
    )  # fmt: skip
    return make_trainer(callbacks, folder, logger, **trainer_arguments), algorithm, data


def make_trainer(callbacks, folder, logger, **arguments):
    savers = any(isinstance(callback, (ModelCheckpoint, FinalPolicy)) for callback in callbacks)
    bar = any(isinstance(callback, FramesProgressBar) for callback in callbacks)
    return Trainer(
        accelerator="cpu", max_epochs=-1, logger=logger or False, callbacks=callbacks, default_root_dir=folder,
        enable_checkpointing=savers, enable_progress_bar=bar, enable_model_summary=False,
        plugins=[AtomicCheckpointIO()], **arguments,
    )  # fmt: skip


def fit(callbacks, folder, *, ckpt_path=None, **arguments):
    trainer, algorithm, data = make_run(callbacks, folder, **arguments)
    trainer.fit(algorithm, datamodule=data, ckpt_path=ckpt_path)
    return trainer, algorithm, data


def savers(folder):
    """The pair of conf/callbacks/checkpoint_best.yaml and checkpoint_last.yaml."""
    best = ModelCheckpoint(
        dirpath=folder, filename="best", monitor="eval/episode_return", mode="max", enable_version_counter=False
    )
    return [
        best,
        LastCheckpoint(dirpath=folder, filename="last", save_on_exception=True, enable_version_counter=False),
    ]


class Unruly:
    """An environment maker that draws from every global random state, as user code may."""

    def __call__(self, **arguments):
        torch.rand(3), np.random.rand(3), random.random()
        return pendulum(**arguments)


def everything(folder):
    return [
        MetricsLogger(50),
        Evaluation(Unruly(), episodes=2, seed=1000),
        MixtureDiagnostics(50, 150),
        EstimatorVariance(50, num_samples=4),
        LearningCurve("Pendulum"),
        FramesProgressBar(),
        *savers(folder),
        FinalPolicy(video=False),
    ]


class Collected(Callback):
    """What the data module itself counts, looked at before anything is drained."""

    def __init__(self) -> None:
        self.finished = {}

    def on_train_batch_end(self, trainer, *_) -> None:
        self.finished[trainer.datamodule.env_frames] = list(trainer.datamodule._finished_episodes)


class Fingerprint(Callback):
    """Global random states and the modes of all modules at the end of training."""

    def on_train_end(self, trainer, pl_module) -> None:
        self.rng = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        self.modes = [module.training for module in pl_module.modules()]


@dataclass
class Run:
    """One run with every callback, which several tests look at."""

    folder: Path
    logger: Recorder
    collected: Collected
    fingerprint: Fingerprint
    callbacks: list[Callback]
    algorithm: SAC
    data: OffPolicyData

    def find(self, kind):
        return next(callback for callback in self.callbacks if isinstance(callback, kind))


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Run:
    folder, logger, collected, fingerprint = tmp_path_factory.mktemp("run"), Recorder(), Collected(), Fingerprint()
    callbacks = everything(folder)
    _, algorithm, data = fit([collected, *callbacks, fingerprint], folder, logger=logger)
    return Run(folder, logger, collected, fingerprint, callbacks, algorithm, data)


# --- MetricsLogger ----------------------------------------------------------------------------------------------------


def test_metrics_are_logged_where_a_multiple_of_the_interval_is_reached(complete):
    logger, metrics = complete.logger, complete.find(MetricsLogger)
    frames = [60, 100, 160, 200, 260, 300]  # batches of 20, the first one after 40 random frames
    for name in (
        "train/loss_actor",
        "train/loss_qvalue",
        "train/mixture/winner_frequency_0",
        "train/time/frames_per_second",
    ):
        assert logger.steps(name) == frames, name
    for step, mean, length in zip(
        frames, logger.values("train/episode_return"), logger.values("train/episode_length"), strict=True
    ):
        returns, lengths = zip(*complete.collected.finished[step], strict=True)
        assert mean == pytest.approx(np.mean(returns))
        assert length == np.mean(lengths) == EPISODE
    assert logger.values("train/updates") == [2, 6, 12, 16, 22, 26] and complete.algorithm.updates == 26
    assert logger.values("train/episodes") == [3, 5, 8, 10, 13, 15] and complete.data.episodes == 15
    assert all(math.isfinite(value) for _, row in logger.rows for value in row.values())
    assert metrics.latest["train/updates"] == 26
    assert [row[0] for row in metrics.episodes] == frames
    assert [row[2] for row in metrics.episodes] == [3, 2, 3, 2, 3, 2]


def test_speed_is_frames_over_wall_clock(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr("pmoe_lightning.callbacks.metrics.time.monotonic", lambda: next(clock))
    logger = Recorder()
    fit([MetricsLogger(100)], tmp_path, logger=logger)  # two readings an interval: 50 s to measure, 50 s until the next
    assert logger.values("train/time/frames_per_second") == [100 / 50] * 3
    assert logger.values("train/time/updates_per_second") == [6 / 50, 10 / 50, 10 / 50]


def test_the_rest_of_an_interval_is_logged_at_the_end(tmp_path):
    logger = Recorder()
    fit([MetricsLogger(250)], tmp_path, logger=logger)
    assert [step for step, _ in logger.rows] == [260, 300]
    assert logger.steps("train/time/frames_per_second") == [260]  # too short an interval to time
    assert logger.values("train/updates") == [22, 26]


def test_the_rest_of_an_interval_is_logged_after_an_error(tmp_path):
    logger = Recorder()
    with pytest.raises(ZeroDivisionError):
        fit([MetricsLogger(250), StopAt(180, ZeroDivisionError())], tmp_path, logger=logger)
    assert [step for step, _ in logger.rows] == [180]
    assert logger.values("train/episodes") == [9]


class FailIn(Callback):
    """Fails in the update of an iteration."""

    def __init__(self, env_frames: int) -> None:
        self.env_frames = env_frames

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.datamodule.env_frames >= self.env_frames:
            raise ZeroDivisionError


@pytest.mark.parametrize(("frames", "reported"), [(160, [100, 160]), (200, [100]), (TOTAL, [100, 200])])
def test_a_broken_off_iteration_leaves_the_points_at_its_end_to_the_run_that_goes_on(tmp_path, frames, reported):
    """With values of half an iteration they would be wrong, and there for good."""
    logger = Recorder()
    with pytest.raises(ZeroDivisionError):
        fit([MetricsLogger(100), MixtureDiagnostics(100, 1000), FailIn(frames)], tmp_path, logger=logger)
    assert logger.steps("train/updates") == logger.steps("train/mixture/weight_0") == reported


def test_a_logger_that_fails_does_not_hide_the_error_that_ended_the_run(tmp_path, caplog):
    class Broken(Recorder):
        def log_metrics(self, metrics, step=None):
            raise ConnectionError("no tracking server")

    with pytest.raises(ZeroDivisionError):
        fit([MetricsLogger(250), StopAt(180, ZeroDivisionError())], tmp_path, logger=Broken())
    assert "the last training metrics were not logged: no tracking server" in caplog.text


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_runs_before_training_and_after_every_epoch(complete):
    logger, evaluation = complete.logger, complete.find(Evaluation)
    names = ["eval/episode_return", "eval/episode_return_low", "eval/episode_return_high", "eval/episode_length"]
    assert all(logger.steps(name) == [0, 100, 200, 300] for name in names)
    direct = evaluate_policy(complete.algorithm.policy, pendulum(num_envs=2), episodes=2, seed=1000)
    assert logger.values("eval/episode_return")[-1] == direct.mean
    assert (logger.values(names[1])[-1], logger.values(names[2])[-1]) == direct.interval
    assert logger.values("eval/episode_length") == [EPISODE] * 4
    assert [row[0] for row in evaluation.history] == [0, 100, 200, 300]
    assert [row[1] for row in evaluation.history] == logger.values("eval/episode_return")
    # Drawn actions beside the rule: in the last evaluation as many episodes, before it a fifth of them.
    assert logger.steps("eval/episode_return_sampled") == [0, 100, 200, 300]
    drawn = evaluate_policy(complete.algorithm.policy, pendulum(num_envs=2), episodes=2, seed=1002, sample=True)
    assert logger.values("eval/episode_return_sampled")[-1] == drawn.mean != direct.mean


def test_the_last_epoch_is_always_evaluated(tmp_path):
    logger = Recorder()
    fit([Evaluation(pendulum, episodes=1, seed=0, every_epochs=2)], tmp_path, logger=logger)
    assert logger.steps("eval/episode_return") == [0, 200, 300]
    assert logger.steps("eval/episode_return_low") == []  # one episode has no interval


def test_what_is_judged_is_what_a_checkpoint_gives(tmp_path):
    """The description says best_value, the actor in training does not know the critics."""
    evaluation = Evaluation(pendulum, episodes=2, seed=1000)
    trainer, algorithm, data = make_run([evaluation, *savers(tmp_path)], tmp_path)
    algorithm.policy_description["arguments"]["deterministic"] = "best_value"
    algorithm.policy_description["critic"] = {"hidden_sizes": [8], "activation": "relu"}
    trainer.fit(algorithm, datamodule=data)

    def judge(rule):
        policy = load_policy(tmp_path / "last.ckpt", rule=rule)
        return evaluate_policy(policy, pendulum(num_envs=2), episodes=evaluation.episodes, seed=evaluation.seed).mean

    assert evaluation.history[-1][1] == judge(None) == judge("best_value") != judge("max_weight")


def test_callbacks_do_not_change_training_by_one_bit(complete, tmp_path):
    alone, watched = Fingerprint(), complete.fingerprint
    _, expected, _ = fit([alone], tmp_path)
    assert expected.updates == complete.algorithm.updates > 0
    for name, value in expected.state_dict().items():
        assert torch.equal(value, complete.algorithm.state_dict()[name]), name
    assert torch.equal(alone.rng[0], watched.rng[0]) and alone.rng[1:] == watched.rng[1:]
    assert alone.modes == watched.modes


def test_best_and_last_checkpoints_go_with_the_evaluation(tmp_path):
    evaluation = Evaluation(pendulum, episodes=2, seed=1000)
    # Training makes this policy worse after a good first epoch often enough that best and last differ.
    trainer, algorithm, _ = fit([evaluation, *savers(tmp_path)], tmp_path, total_frames=600)
    names = {"best.ckpt", "best.previous.ckpt", "last.ckpt", "last.previous.ckpt"}
    assert {path.name for path in tmp_path.glob("*.ckpt")} == names
    best = max(evaluation.history[1:], key=lambda row: row[1])
    assert trainer.checkpoint_callback.best_model_score.item() == pytest.approx(best[1])
    checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert checkpoint["policy"]["env_frames"] == best[0]
    policy = load_policy(tmp_path / "best.ckpt")
    assert evaluate_policy(policy, pendulum(num_envs=2), episodes=2, seed=1000).mean == pytest.approx(best[1])
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["policy"]["env_frames"] == 600 and last["global_step"] == algorithm.updates


def test_the_policy_before_training_is_never_the_best_checkpoint(tmp_path):
    evaluation = Evaluation(pendulum, episodes=1, seed=0, every_epochs=2)
    saver = savers(tmp_path)[0]
    saved = []
    original = saver._save_checkpoint
    saver._save_checkpoint = lambda trainer, path: (saved.append(trainer.current_epoch), original(trainer, path))
    fit([evaluation, saver], tmp_path)
    assert saved[0] == 1  # the first evaluated epoch, not epoch 0 with the value of the untrained policy


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_last_checkpoint_is_saved_when_a_run_is_cut_off(tmp_path, error):
    with pytest.raises((ZeroDivisionError, SystemExit)):
        fit([*savers(tmp_path), Evaluation(pendulum, episodes=1), StopAt(180, error)], tmp_path)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"best.ckpt", "last.ckpt", "last.previous.ckpt"}
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["policy"]["env_frames"] == 180
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["policy"]["env_frames"] == 100


def test_a_resumed_run_continues_its_curves(complete, tmp_path):
    logger, callbacks = Recorder(), everything(tmp_path)
    fit(callbacks, tmp_path, logger=logger, total_frames=500, ckpt_path=complete.folder / "last.ckpt")
    metrics, evaluation, mixture = callbacks[:3]
    assert logger.steps("eval/episode_return") == [400, 500]  # nothing is evaluated twice
    assert [row[0] for row in evaluation.history] == [0, 100, 200, 300, 400, 500]
    assert evaluation.history[:4] == complete.find(Evaluation).history
    assert metrics.episodes[:5] == complete.find(MetricsLogger).episodes[:5] and metrics.episodes[-1][0] == 500
    assert [row[0] for row in mixture.history] == [60, 100, 160, 200, 260, 300, 360, 400, 460, 500]


# --- FramesProgressBar ------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_log_file_is_a_few_plain_lines(tmp_path, capsys):
    evaluation = Evaluation(pendulum, episodes=1)
    fit([MetricsLogger(50), evaluation, FramesProgressBar()], tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "frames" in line]
    assert 5 <= len(lines) <= 21 and not any("\r" in line for line in lines)
    line = next(line for line in lines if "200/300" in line)
    assert re.fullmatch(r" 67%  200/300 frames, [\d,]+ frames/s, return -\S+, evaluation -\S+, \d\d:\d\d left", line)
    assert lines[-1].startswith("100%  300/300 frames") and "left" not in lines[-1]
    assert lines[-1].endswith(f"evaluation {evaluation.history[-1][1]:.4g}")


class Slow(Callback):
    """A clock by which an iteration takes a second, and a hundred until the first update is over."""

    def __init__(self) -> None:
        self.now = 0.0

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        self.now += 100.0 if pl_module.updates == 0 else 1.0


def test_the_time_left_does_not_count_what_happens_once(tmp_path, monkeypatch, capsys):
    clock = Slow()
    monkeypatch.setattr("pmoe_lightning.callbacks.progress.time.monotonic", lambda: clock.now)
    fit([clock, FramesProgressBar()], tmp_path)
    left = [
        int(minutes) * 60 + int(seconds)
        for minutes, seconds in re.findall(r"(\d+):(\d+) left", capsys.readouterr().out)
    ]
    assert left == sorted(range(1, len(left) + 1), reverse=True) and len(left) == 11  # 20 frames a second, from 60 on


def test_the_time_left_waits_until_everything_is_compiled():
    """The update in the first iteration that has one, the acting policy in the next at the latest."""
    bar = FramesProgressBar()
    bar._settling, bar._updates = 2, 0
    for frames, updates, now in [(40, 0, 1.0), (60, 2, 30.0), (80, 4, 60.0), (100, 6, 61.0)]:
        bar._settle(frames, updates, now)
    assert bar._settled == (80, 60.0)


@pytest.mark.parametrize("compiles", [True, False])
def test_compiling_is_announced(tmp_path, capsys, compiles):
    trainer, algorithm, data = make_run([FramesProgressBar(), StopAt(20, ZeroDivisionError())], tmp_path)
    algorithm.compiles = compiles
    with pytest.raises(ZeroDivisionError):  # before an update would be compiled
        trainer.fit(algorithm, datamodule=data)
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("compiling the acting policy and the update: about half a minute") == compiles


def test_progress_in_a_terminal_is_a_bar_that_is_drawn_seldom(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(FramesProgressBar, "REFRESH_SECONDS", 1e9)
    fit([MetricsLogger(50), FramesProgressBar()], tmp_path)
    assert "100%|" in screen.getvalue() and "300/300 frames" in screen.getvalue()
    assert "return -" in screen.getvalue()
    assert screen.getvalue().count("\r") <= 6  # at the start and at the end only


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_disabled_bar_is_silent(tmp_path, monkeypatch, stream):
    screen, bar = stream(), FramesProgressBar()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    bar.disable()
    fit([bar], tmp_path)
    assert "frames" not in screen.getvalue()


def test_the_bar_is_closed_after_an_error(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    bar = FramesProgressBar()
    with pytest.raises(ZeroDivisionError):
        fit([bar, StopAt(180, ZeroDivisionError())], tmp_path)
    assert "180/300" in screen.getvalue() and screen.getvalue().endswith("\n")


# --- MixtureDiagnostics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_components", [1, 3])
def test_the_estimator_is_measured_at_intervals(tmp_path, num_components):
    logger = Recorder()
    fit([EstimatorVariance(100, num_samples=100)], tmp_path, logger=logger, num_components=num_components)
    groups = ("router", "loc", "scale") if num_components > 1 else ("loc", "scale")
    for group in groups:
        assert logger.steps(f"train/estimator/variance_{group}") == [100, 200, 300]
        for value in logger.values(f"train/estimator/variance_{group}"):
            assert 0 <= value < math.inf
        for value in logger.values(f"train/estimator/cosine_{group}"):
            assert -1.001 <= value <= 1.001
    if num_components == 1:  # both are plain reparameterisation; only the noise differs
        assert min(logger.values("train/estimator/cosine_loc")) > 0.5
        assert not logger.steps("train/estimator/variance_router")


def two_dimensional(folder, callbacks, logger, transform, estimator=None) -> Trainer:
    seed_everything(0, verbose=False)
    sizes = {"observation_dim": 2, "action_dim": 2, "hidden_sizes": [8]}
    actor = make_pmoe_actor(2, [-1.0] * 2, [1.0] * 2, num_components=1, hidden_sizes=[8])
    algorithm = make_sac(actor, estimator or Pathwise(), action_transform=transform, **sizes)
    data = OffPolicyData(
        partial(make_env, "MultiGoal-v0"), algorithm.policy, total_frames=120, frames_per_epoch=60, frames_per_batch=20,
        init_random_frames=20, batch_size=8, utd_ratio=0.1, seed=0,
    )  # fmt: skip
    trainer = make_trainer(callbacks, folder, logger)
    trainer.fit(algorithm, datamodule=data)
    return trainer


def test_modes_are_measured_at_equal_distances_and_training_does_not_notice(tmp_path, caplog):
    caplog.set_level("INFO", "pmoe_lightning.callbacks.modes")
    logger, modes, ends = Recorder(), ModeMeasures(partial(make_env, "MultiGoal-v0"), points=3, episodes=5), []
    for callbacks in ([], [modes]):
        trainer = two_dimensional(tmp_path, callbacks, logger, None)
        ends.append([*(p.detach().clone() for p in trainer.lightning_module.parameters()), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    algorithm, due = trainer.lightning_module, [40, 80, 120]
    for name in ("kept", "score", "success", "removal_success", "price", "return_sampled", "alpha"):
        assert logger.steps(f"eval/modes/{name}") == due
    assert not logger.steps("eval/modes/gap") and not logger.steps("eval/modes/blocked_success")
    assert "without gap: the policy has no critics of actions" in caplog.text  # without a description, none are rebuilt
    assert caplog.text.count("modes are measured without") == 2
    make = partial(make_env, "MultiGoal-v0")
    direct = measure_modes(algorithm.policy, make, episodes=5, seed=2_000_000, alpha=algorithm.alpha)
    assert logger.values("eval/modes/return_sampled")[-1] == direct.measures["return_sampled"]
    assert [row[0] for row in modes.history] == due and modes.history[-1][1] == direct.measures["kept"]
    assert [name for name, _ in logger.figures] == ["modes_over_frames", "drawn_ways"]
    other = ModeMeasures(make)
    other.load_state_dict(modes.state_dict())
    np.testing.assert_array_equal(other.history, modes.history)


def test_what_cannot_be_measured_of_modes_is_a_line_and_the_run_goes_on(tmp_path, caplog):
    class Left(MultiGoal):
        def step(self, action):
            return *super().step(action)[:4], {"mode": "left"}

    def make(num_envs, seed, start_deviation=0.1):
        return GymnasiumEnv([TimeLimit(Left(), 10) for _ in range(num_envs)], seed=seed)

    logger, ends = Recorder(), []
    for callbacks in ([], [ModeMeasures(make, points=2, episodes=3)]):
        trainer = two_dimensional(tmp_path, callbacks, logger, None)
        ends.append([*(p.detach().clone() for p in trainer.lightning_module.parameters()), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    said = [record.getMessage() for record in caplog.records if "modes were not measured" in record.getMessage()]
    assert len(said) == 2 and all("info['mode']='left'" in line for line in said)


def test_an_environment_without_modes_is_left_alone(tmp_path):
    logger = Recorder()
    fit([ModeMeasures(pendulum, points=3)], tmp_path, logger=logger)
    assert not any(name.startswith("eval/") for _, metrics in logger.rows for name in metrics) and not logger.figures


def test_a_transform_has_its_gradient_compared_with_finite_differences(tmp_path):
    logger, ends = Recorder(), []
    for callbacks in ([], [EstimatorVariance(50, num_samples=4)]):
        made = make_hamiltonian_transform(2, 2, force="raw", step_size=0.2)
        trainer = two_dimensional(tmp_path, callbacks, logger, made)
        ends.append([*(p.detach().clone() for p in trainer.lightning_module.parameters()), torch.rand(3)])
    for name in ("wrong_signs", "wrong_signs_control"):
        assert logger.steps(f"train/hamiltonian/{name}") == [60, 100]
        assert all(0 <= value <= 1 for value in logger.values(f"train/hamiltonian/{name}"))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    plain = Recorder()
    two_dimensional(tmp_path, [EstimatorVariance(50, num_samples=4)], plain, None)
    assert plain.steps("train/estimator/variance_loc") and not plain.steps("train/hamiltonian/wrong_signs")


@pytest.mark.parametrize("estimator, lines", [(Pathwise(), 0), (Reversed(), 1)], ids=["right", "reversed"])
def test_a_gradient_that_cannot_be_trusted_is_said_once(estimator, lines, tmp_path, caplog):
    made, logger = make_hamiltonian_transform(2, 2, force="raw"), Recorder()
    two_dimensional(tmp_path, [EstimatorVariance(50, num_samples=4)], logger, made, estimator)
    said = [record.getMessage() for record in caplog.records if "wrong sign" in record.getMessage()]
    assert len(said) == lines and len(logger.values("train/hamiltonian/wrong_signs")) == 2
    assert all("lower action_transform.step_size" in line for line in said)


def test_trajectories_are_drawn_at_intervals_and_change_nothing(tmp_path):
    logger, ends = Recorder(), []
    for callbacks in ([], [ActionTrajectories(50, num_actions=3, resolution=8)]):
        made = make_hamiltonian_transform(2, 2, force="raw", step_size=0.2)
        trainer = two_dimensional(tmp_path, callbacks, logger, made)
        ends.append([*(p.detach().clone() for p in trainer.lightning_module.parameters()), torch.rand(3)])
    assert logger.figures == [("action_trajectories", frames) for frames in (60, 100, 120)]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    figure = callbacks[0].draw(trainer.lightning_module)
    path = figure.axes[0].lines[0].get_xydata()
    assert path.shape == (4, 2) and np.abs(path).max() <= 1 and np.abs(np.diff(path, axis=0)).min() > 0


def test_no_trajectories_without_a_transform(tmp_path):
    logger = Recorder()
    two_dimensional(tmp_path, [ActionTrajectories(50)], logger, None)
    assert logger.figures == []


def test_mixture_metrics_of_a_router_that_never_decides():
    modes = torch.tensor([[100.0, 100.0], [-100.0, -100.0]]).expand(5, 2, 2)  # opposite corners
    metrics = mixture_metrics(TanhGaussianMixture(torch.zeros(5, 2), modes, torch.full((5, 2, 2), 0.3), -2.0, 6.0))
    assert metrics["train/mixture/weight_0"] == metrics["train/mixture/weight_1"] == pytest.approx(0.5)
    assert metrics["train/mixture/router_entropy"] == pytest.approx(math.log(2))
    assert metrics["train/mixture/effective_components"] == pytest.approx(2.0)
    assert metrics["train/mixture/effective_components_per_state"] == pytest.approx(2.0)
    assert metrics["train/mixture/component_distance"] == pytest.approx(1.0)
    assert metrics["train/mixture/scale"] == pytest.approx(0.3)


def test_mixture_metrics_tell_division_of_labour_from_collapse():
    divided = torch.tensor([[1e4, 0.0], [0.0, 1e4]])  # each state is served by another component
    collapsed = torch.tensor([[1e4, 0.0], [1e4, 0.0]])
    loc, scale = torch.zeros(2, 2, 3), torch.ones(2, 2, 3)
    for logits, used in ((divided, 2.0), (collapsed, 1.0)):
        metrics = mixture_metrics(TanhGaussianMixture(logits, loc, scale))
        assert metrics["train/mixture/effective_components"] == pytest.approx(used)
        assert metrics["train/mixture/mutual_information"] == pytest.approx(math.log(used), abs=1e-6)
        assert [metrics[f"train/mixture/heaviest_{k}"] for k in range(2)] == [1 / used, 1 - 1 / used]
        assert metrics["train/mixture/effective_components_per_state"] == pytest.approx(1.0)
        assert metrics["train/mixture/router_entropy"] == pytest.approx(0.0, abs=1e-6)
        assert metrics["train/mixture/component_distance"] == 0.0


def test_component_distance_is_the_mean_over_pairs_in_units_of_the_range():
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([3.0, 10.0])
    modes = torch.tensor([[[0.0, 5.0], [1.0, 5.0], [0.0, 9.0]]])
    mixture = TanhGaussianMixture(torch.zeros(1, 3), torch.zeros(1, 3, 2), torch.ones(1, 3, 2), low, high)
    mixture.loc = mixture.unsquash(modes)
    a, b, c = (math.sqrt(((x / 4) ** 2 + (y / 10) ** 2) / 2) for x, y in ((1, 0), (0, 4), (1, 4)))
    assert mixture_metrics(mixture)["train/mixture/component_distance"] == pytest.approx((a + b + c) / 3, rel=1e-5)


@pytest.mark.parametrize("num_components", [1, 3])
def test_mixture_is_measured_and_drawn_at_intervals(tmp_path, num_components):
    logger, diagnostics = Recorder(), MixtureDiagnostics(100, 200)
    _, algorithm, _ = fit([diagnostics], tmp_path, logger=logger, num_components=num_components)
    assert logger.steps("train/mixture/router_entropy") == [100, 200, 300]
    for name in ("weight", "heaviest"):
        assert sum(logger.values(f"train/mixture/{name}_{k}")[-1] for k in range(num_components)) == pytest.approx(1.0)
    assert 0.0 <= logger.values("train/mixture/mutual_information")[-1] <= math.log(num_components) + 1e-6
    assert bool(logger.steps("train/mixture/component_distance")) == (num_components > 1)
    names = ("mixture_weights", "component_modes")
    assert logger.figures == [(name, step) for step in (200, 300) for name in names]
    assert [row[0] for row in diagnostics.history] == [100, 200, 300]


def test_mixture_figures_are_logged_after_an_error(tmp_path):
    logger = Recorder()
    with pytest.raises(ZeroDivisionError):
        fit([MixtureDiagnostics(1000, 1000), StopAt(180, ZeroDivisionError())], tmp_path, logger=logger)
    assert logger.steps("train/mixture/weight_0") == [180]
    assert [name for name, _ in logger.figures] == ["mixture_weights", "component_modes"]


def test_components_are_drawn_along_an_episode_of_the_judged_policy(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "component_modes", lambda *a, **k: drawn.append((a, k)) or Figure())
    _, algorithm, _ = fit([Evaluation(pendulum, episodes=1, seed=7), MixtureDiagnostics(100, 300)], tmp_path,
                          logger=Recorder())  # fmt: skip
    (modes, *_), arguments = drawn[-1]
    assert arguments["states"] == [f"step {step}" for step in (0, 2, 5, 8, 10, 13, 16, 19)]
    assert f"an episode of {EPISODE} steps" in arguments["title"]
    policy = load_policy({"policy": algorithm.policy_state()})
    episode = follow_episode(policy, pendulum(seed=7), seed=7)
    acted = modes[np.arange(8), arguments["acting"]]
    np.testing.assert_allclose(acted, episode["action"][[0, 2, 5, 8, 10, 13, 16, 19]], atol=1e-5)


def test_a_mixture_history_of_an_earlier_version_goes_on(tmp_path):
    diagnostics = MixtureDiagnostics(100, 300)
    diagnostics.load_state_dict({"history": torch.tensor([[50.0, 0.2, 0.3, 0.5]], dtype=torch.float64)})
    fit([diagnostics], tmp_path, logger=Recorder())
    kept = diagnostics.state_dict()
    assert kept["history"].shape == kept["specialisation"].shape == (4, 4)
    assert kept["specialisation"].isnan().all(1).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("num_components", "rule"), [(3, "max_weight"), (1, None)])
def test_the_learning_curve_names_the_rule_of_its_evaluations(tmp_path, monkeypatch, num_components, rule):
    drawn = []
    monkeypatch.setattr(figures, "learning_curve", lambda *a, **k: drawn.append(k) or Figure())
    callbacks = [MetricsLogger(50), LearningCurve("Pendulum")]
    fit(callbacks, tmp_path, logger=Recorder(), num_components=num_components)
    assert drawn == [{"rule": rule, "title": "Pendulum"}]


# --- the end of a run -------------------------------------------------------------------------------------------------


def test_everything_together_leaves_curves_and_checkpoints(complete):
    assert complete.logger.figures[-3:] == [
        ("mixture_weights", 300),
        ("component_modes", 300),
        ("learning_curve", None),
    ]
    assert complete.logger.artifacts == ["checkpoints/best.ckpt", "checkpoints/last.ckpt"]


@pytest.mark.parametrize(("stop", "frames"), [(180, {"best.ckpt": 100, "last.ckpt": 180}), (80, {"last.ckpt": 80})])
def test_an_interrupted_run_leaves_them_too(tmp_path, stop, frames):
    logger = Recorder()
    with pytest.raises(SystemExit):
        fit([*everything(tmp_path), StopAt(stop, KeyboardInterrupt())], tmp_path, logger=logger)
    assert ("learning_curve", None) in logger.figures
    assert logger.checkpoint_frames == frames  # the last one as it was saved on the interrupt


def test_everything_works_without_a_logger(tmp_path):
    callbacks = everything(tmp_path)
    fit(callbacks, tmp_path)
    assert len(callbacks[1].history) == 4


def test_the_best_policy_is_filmed(tmp_path):
    pytest.importorskip("pygame")
    logger = Recorder()
    fit([Evaluation(pendulum, episodes=1), *savers(tmp_path), FinalPolicy(video_frames=5)], tmp_path, logger=logger)
    assert logger.artifacts[-1] == "videos/best.mp4" and (tmp_path / "best.mp4").stat().st_size > 1000


def test_a_film_that_cannot_be_made_is_one_line(tmp_path, caplog):
    trainer, algorithm, data = make_run([*savers(tmp_path), FinalPolicy()], tmp_path, logger=Recorder())
    algorithm.policy_description["env"]["kwargs"]["g"] = 9.0
    (tmp_path / "last.mp4").mkdir()  # the film cannot be written here
    trainer.fit(algorithm, datamodule=data)
    warnings = [
        record.getMessage() for record in caplog.records if "no video of the best policy" in record.getMessage()
    ]
    assert len(warnings) == 1 and "\n" not in warnings[0]


def test_without_a_checkpoint_nothing_is_left(tmp_path):
    logger = Recorder()
    fit([FinalPolicy()], tmp_path, logger=logger)
    assert logger.artifacts == []


def test_callbacks_serve_on_policy_runs(tmp_path):
    seed_everything(0, verbose=False)
    arguments = {"num_components": 2, "hidden_sizes": [8], "scale": "state_independent", "return_log_prob": True}
    actor = make_pmoe_actor(3, [-2.0], [2.0], **arguments)
    algorithm = make_ppo(actor, Frequency(), observation_dim=3, action_dim=1, hidden_sizes=[8], num_epochs=1)
    frames = {"total_frames": 200, "frames_per_epoch": 100, "frames_per_batch": 50, "num_envs": 2}
    data = OnPolicyData(pendulum, algorithm.policy, **frames)
    logger = Recorder()
    callbacks = [callback for callback in everything(tmp_path) if not isinstance(callback, ModelCheckpoint)]
    make_trainer(callbacks, tmp_path, logger).fit(algorithm, datamodule=data)
    assert logger.steps("eval/episode_return") == [0, 100, 200]
    assert logger.steps("train/mixture/weight_1") == logger.steps("train/episode_return") == [50, 100, 150, 200]


def test_an_environment_that_fails_in_a_rollout_is_what_the_run_fails_with(tmp_path, monkeypatch, caplog):
    """And not with the attempt to save a rollout that has no end: the last checkpoint stays."""
    trainer, algorithm, data = make_run(savers(tmp_path)[1:], tmp_path)
    step = GymnasiumEnv.step_into

    def fail_in_the_second_epoch(self, *arguments):
        if data.env_frames > EPOCH:
            raise ConnectionError("the robot is gone")
        step(self, *arguments)

    monkeypatch.setattr(GymnasiumEnv, "step_into", fail_in_the_second_epoch)
    with pytest.raises(ConnectionError, match="the robot is gone"):
        trainer.fit(algorithm, datamodule=data)
    assert read_checkpoint(tmp_path / "last.ckpt")["policy"]["env_frames"] == EPOCH
    assert "the end of the run was not saved: a rollout was cut short" in caplog.text
