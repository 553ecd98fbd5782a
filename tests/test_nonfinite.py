"""NaN and infinity, put in everywhere: they reach neither replay nor weights, and the run says what it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tensordict import TensorDictBase
from torchrl.collectors import Collector

from pmoe_lightning.algorithms import make_ppo, make_sac
from pmoe_lightning.algorithms.base import AbstractAlgorithm
from pmoe_lightning.callbacks import NonFiniteGuard
from pmoe_lightning.checkpoints import AtomicCheckpointIO, read_checkpoint
from pmoe_lightning.data.collector import RolloutCollector
from pmoe_lightning.data.off_policy import OffPolicyData
from pmoe_lightning.data.on_policy import OnPolicyData
from pmoe_lightning.envs import GymnasiumEnv, make_env
from pmoe_lightning.errors import NonFiniteError
from pmoe_lightning.estimators import Frequency
from pmoe_lightning.modules.actors import make_pmoe_actor

VALUES = (float("nan"), float("inf"), float("-inf"))
SIZES = {"observation_dim": 3, "action_dim": 1, "hidden_sizes": (16,)}


class Sick(gymnasium.Wrapper):
    """Returns a value in the observation or as the reward at the 13th step of every episode."""

    def __init__(self, env: gymnasium.Env, where: str, value: float) -> None:
        super().__init__(env)
        self.where, self.value, self.elapsed = where, value, 0

    def reset(self, **arguments: Any) -> tuple:
        self.elapsed = 0
        return super().reset(**arguments)

    def step(self, action: np.ndarray) -> tuple:
        observation, reward, *rest = super().step(action)
        self.elapsed += 1
        if self.elapsed == 13:
            observation = np.array([*observation[:-1], self.value]) if self.where == "observation" else observation
            reward = self.value if self.where == "reward" else reward
        return observation, reward, *rest


def sick_env(where: str, value: float, *, num_envs: int = 1, seed: int = 0) -> GymnasiumEnv:
    envs = [gymnasium.make("Pendulum-v1") for _ in range(num_envs)]
    return GymnasiumEnv([Sick(envs[0], where, value), *envs[1:]], seed=seed)


def make_pendulum(*, num_envs: int = 1, seed: int = 0) -> GymnasiumEnv:
    return GymnasiumEnv([gymnasium.make("Pendulum-v1") for _ in range(num_envs)], seed=seed)


def unstable_env(*, num_envs: int = 1, seed: int = 0) -> GymnasiumEnv:
    """HalfCheetah whose first copy is thrown out of MuJoCo's range before the 13th step."""

    class Thrown(gymnasium.Wrapper):
        elapsed = 0

        def step(self, action: np.ndarray) -> tuple:
            self.elapsed += 1
            if self.elapsed == 13:
                self.unwrapped.data.qvel[:] = 1e12
            return super().step(action)

    env = make_env("HalfCheetah-v5", num_envs=num_envs, seed=seed)
    env.envs[0] = Thrown(env.envs[0])
    return env


def sac(**arguments: Any) -> AbstractAlgorithm:
    torch.manual_seed(0)
    return make_sac(make_pmoe_actor(3, [-2.0], [2.0], hidden_sizes=(16,)), Frequency(), **(SIZES | arguments))


def ppo(**arguments: Any) -> AbstractAlgorithm:
    torch.manual_seed(0)
    actor = make_pmoe_actor(3, [-2.0], [2.0], hidden_sizes=(16,), scale="state_independent", return_log_prob=True)
    return make_ppo(actor, Frequency(), num_epochs=2, minibatch_size=16, **(SIZES | arguments))


def data_for(algorithm: AbstractAlgorithm, make: Callable[..., GymnasiumEnv], **changes: Any) -> Any:
    arguments = {"total_frames": 96, "frames_per_epoch": 96, "frames_per_batch": 32, "num_envs": 2} | changes
    if hasattr(algorithm, "target_updater"):
        return OffPolicyData(make, algorithm.policy, init_random_frames=0, batch_size=8, **arguments)
    return OnPolicyData(make, algorithm.policy, **arguments)


def fit(algorithm: AbstractAlgorithm, data: Any, *callbacks: Callback) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=-1, callbacks=list(callbacks), enable_model_summary=False, **quiet)
    trainer.fit(algorithm, datamodule=data)


def is_finite(tensordict: TensorDictBase) -> bool:
    return all(value.isfinite().all() for value in tensordict.values(True, True) if value.is_floating_point())


def tensors_of(algorithm: AbstractAlgorithm) -> dict[str, torch.Tensor]:
    state = algorithm.optimizers().optimizer.state_dict()["state"]
    moments = {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}
    return {name: value.clone() for name, value in (dict(algorithm.loss.named_parameters()) | moments).items()}


# ------------------------------------------------------------------ what comes from the environment


MAKERS = [partial(sick_env, "observation", np.nan), partial(sick_env, "reward", np.inf), unstable_env]


@pytest.mark.parametrize("collector_class", [Collector, RolloutCollector])
@pytest.mark.parametrize("make", MAKERS, ids=["observation", "reward", "mujoco"])
def test_a_broken_simulator_truncates_its_episode_and_no_other(make, collector_class, caplog):
    env = make(num_envs=2)
    collector = collector_class(env, frames_per_batch=40, total_frames=40, use_buffers=False)
    (rollout,) = collector
    following = rollout["next"]
    assert following["truncated"][0, :, 0].nonzero().flatten().tolist() == [12]
    assert not following["terminated"][0, 12] and not following["truncated"][1].any()
    assert following["reward"].isnan().nonzero()[:, :2].tolist() == [[0, 12]]
    assert following["observation"].isfinite().all() and rollout["observation"].isfinite().all()
    assert following["episode_length"][0, 13] == 1, "a new episode"
    assert caplog.text.count("broke down after 13 steps") == 1
    collector.shutdown()


@pytest.mark.parametrize("make_algorithm", [sac, ppo])
def test_broken_transitions_reach_neither_replay_nor_an_update(make_algorithm):
    algorithm = make_algorithm()
    data = data_for(algorithm, partial(sick_env, "observation", np.nan), total_frames=192)

    class Watch(Callback):
        seen = 0

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: TensorDictBase, batch_idx: int) -> None:
            assert is_finite(batch)
            Watch.seen += batch.get("unusable", torch.zeros(1)).sum()

    fit(algorithm, data, NonFiniteGuard("skip"), Watch())
    # The first environment plays 96 steps and breaks down at every 13th.
    assert data.breakdowns == 96 // 13
    if make_algorithm is sac:
        assert len(data.buffer) == 192 - data.breakdowns
        assert is_finite(data.buffer[:])
    else:
        assert Watch.seen == data.breakdowns
        assert algorithm.updates == sum(2 * -(-(32 - k) // 16) for k in _breakdowns_per_rollout())


def _breakdowns_per_rollout() -> list[int]:
    return [sum(1 for t in range(12, 96, 13) if t // 16 == i) for i in range(6)]


@pytest.mark.parametrize("usable", [0, 1], ids="{} usable".format)
def test_a_rollout_of_hardly_any_usable_transition_is_finite_and_counted(usable):
    """One has no variance and no deviation, none has no mean: neither is reported as a loss that is not finite."""

    class Breaks(gymnasium.Wrapper):
        steps = 0

        def step(self, action: np.ndarray) -> tuple:
            observation, reward, *rest = super().step(action)
            Breaks.steps += 1
            return observation, reward if Breaks.steps > 32 or Breaks.steps <= usable else np.nan, *rest

    class Watch(Callback):
        metrics: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            Watch.metrics.append(pl_module.drain_metrics())

    def make(*, num_envs: int = 1, seed: int = 0) -> GymnasiumEnv:
        return GymnasiumEnv([Breaks(gymnasium.make("Pendulum-v1"))], seed=seed)

    algorithm = ppo(target_kl=1.0)
    data = data_for(algorithm, make, num_envs=1, total_frames=64)
    fit(algorithm, data, guard := NonFiniteGuard("skip"), Watch())
    assert data.breakdowns == 32 - usable and guard._skipped == 0
    first, second = Watch.metrics
    assert ("train/loss_critic" in first) == bool(usable) and "train/explained_variance" not in first
    assert "train/explained_variance" in second
    assert algorithm.updates == 2 * usable + 4, "two passes over the usable one, two over two minibatches of 16"


def test_the_learning_rate_is_blamed_only_where_it_can_be_the_cause():
    class Poison(Callback):
        """Makes a target infinite, whatever the weights are."""

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: TensorDictBase, batch_idx: int) -> None:
            batch["next", "reward"].fill_(torch.inf)

    with pytest.raises(NonFiniteError, match="look at the observations and rewards") as caught:
        fit(algorithm := sac(), data_for(algorithm, make_pendulum), NonFiniteGuard(), Poison())
    assert "algo.lr" not in str(caught.value) and "callbacks.nonfinite=skip" in str(caught.value)
    with pytest.raises(NonFiniteError, match=r"weights have grown to .*: lower algo\.lr"):
        fit(algorithm := sac(lr=1e12), data_for(algorithm, make_pendulum), NonFiniteGuard())


def test_the_run_stops_for_an_environment_but_not_for_mujoco():
    with pytest.raises(NonFiniteError, match="the environment returned numbers that are not finite, before frame 32"):
        fit(algorithm := sac(), data_for(algorithm, partial(sick_env, "reward", np.nan)), NonFiniteGuard())
    torch.manual_seed(0)
    actor = make_pmoe_actor(17, [-1.0] * 6, [1.0] * 6, hidden_sizes=(16,))
    algorithm = make_sac(actor, Frequency(), **(SIZES | {"observation_dim": 17, "action_dim": 6}))
    data = data_for(algorithm, unstable_env)
    fit(algorithm, data, NonFiniteGuard())
    assert data.breakdowns == 1 and data.env_frames == 96


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_an_environment_of_which_nothing_is_finite_is_one_line(mode):
    class Sick(gymnasium.Wrapper):
        def step(self, action: np.ndarray) -> tuple:
            observation, _, *rest = super().step(action)
            return observation, np.nan, *rest

    def make(*, num_envs: int = 1, seed: int = 0) -> GymnasiumEnv:
        return GymnasiumEnv([Sick(gymnasium.make("Pendulum-v1")) for _ in range(num_envs)], seed=seed)

    with pytest.raises(NonFiniteError, match="none of the 32 transitions so far is finite"):
        fit(algorithm := sac(), data_for(algorithm, make), NonFiniteGuard(mode))


class SickAtReset(gymnasium.Wrapper):
    """Returns a value in the observation of some of its resets."""

    def __init__(self, env: gymnasium.Env, value: float, is_sick: Callable[[int], bool]) -> None:
        super().__init__(env)
        self.value, self.is_sick, self.resets = value, is_sick, 0

    def reset(self, **arguments: Any) -> tuple:
        observation, info = super().reset(**arguments)
        self.resets += 1
        return (np.array([0, self.value, 0]) if self.is_sick(self.resets) else observation), info


def sick_at_reset(value: float, is_sick: Callable[[int], bool], *, num_envs: int = 1, seed: int = 0) -> GymnasiumEnv:
    envs = [gymnasium.make("Pendulum-v1", max_episode_steps=5) for _ in range(num_envs)]
    return GymnasiumEnv([SickAtReset(envs[0], value, is_sick), *envs[1:]], seed=seed)


@pytest.mark.parametrize("value", [*VALUES, 1e39])
@pytest.mark.parametrize("make_algorithm", [sac, ppo])
def test_a_reset_that_is_not_finite_is_repeated(make_algorithm, value, caplog):
    algorithm = make_algorithm()
    data = data_for(algorithm, partial(sick_at_reset, value, lambda reset: reset % 3 != 2))

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: TensorDictBase, batch_idx: int) -> None:
            assert is_finite(batch)

    fit(algorithm, data, NonFiniteGuard("skip"), Watch())
    assert data.env_frames == 96 and data.breakdowns == 0
    assert caplog.text.count("until its observation was finite") == 10  # one environment, 48 steps of 5 in an episode


def test_an_environment_that_no_reset_makes_finite_is_named():
    algorithm = sac()
    data = data_for(algorithm, partial(sick_at_reset, np.nan, lambda reset: reset > 1))
    message = "environment 'Pendulum-v1': entry 1 of the observation is nan after each of 10 resets"
    with pytest.raises(NonFiniteError, match=message) as error:
        fit(algorithm, data, NonFiniteGuard("skip"))
    assert "\n" not in str(error.value) and "policy" not in str(error.value)


@pytest.mark.parametrize("value", VALUES)
def test_an_action_that_is_not_finite_is_never_taken(value):
    """Nor brought within the bounds: replay would remember it as it was."""
    env = make_env("Pendulum-v1", num_envs=3, seed=0)
    root = env.reset()
    with pytest.raises(NonFiniteError, match=rf"the policy's action for environment 1 is not finite: \[{value}\]"):
        env.step(root.set("action", torch.tensor([[0.0], [value], [0.0]])))


# ------------------------------------------------------------------ what comes from the update


def iterations(trainer: Trainer) -> int:
    """Those before the one under way, in all epochs."""
    return trainer.fit_loop.epoch_loop.total_batch_idx


class Poison(Callback):
    """Spoils an iteration: an entry of its batch, a gradient, or a loss."""

    def __init__(self, target: str, value: float, iteration: int = 2) -> None:
        self.target, self.value, self.iteration, self.before = target, value, iteration, {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: TensorDictBase, batch_idx: int) -> None:
        if iterations(trainer) != self.iteration:
            return
        self.before = tensors_of(pl_module)
        kind, _, name = self.target.partition(" ")
        if kind == "batch":
            batch.get(tuple(name.split(".")))[:] = self.value
        elif kind == "gradient":
            parameter = dict(pl_module.loss.named_parameters())[name]
            parameter.register_hook(lambda gradient: torch.full_like(gradient, self.value))
        else:
            forward = pl_module.loss.forward
            pl_module.loss.forward = lambda batch: _spoil(forward(batch), name, self.value)


def _spoil(out: TensorDictBase, name: str, value: float) -> TensorDictBase:
    return out.set(name, out.get(name) * value)


TARGETS = {
    sac: [f"batch {name}" for name in ("observation", "action", "next.observation", "next.reward")]
    + [f"loss loss_{name}" for name in ("actor", "qvalue", "frequency")],
    ppo: [f"batch {name}" for name in ("observation", "next.reward", "action_unsquashed", "action_log_prob")]
    + [f"loss loss_{name}" for name in ("objective", "critic", "qvalue", "frequency")],
}
# An infinite stored log-density makes a ratio of zero, which is no reason not to take the step.
STEPPED = ("batch action_log_prob", float("inf"))


@pytest.mark.parametrize("make_algorithm", TARGETS)
def test_weights_and_moments_stay_as_they_were(make_algorithm):
    """Everything that enters an update, with every value, and the gradient of every parameter."""
    parameters = [name for name, parameter in make_algorithm().loss.named_parameters() if parameter.requires_grad]
    cases = list(itertools.product(TARGETS[make_algorithm], VALUES))
    cases += [(f"gradient {name}", VALUES[i % 3]) for i, name in enumerate(parameters)]
    for target, value in cases:
        algorithm, poison = make_algorithm(), Poison(target, value, iteration=1)
        with pytest.raises(NonFiniteError, match=r"train/\w+ is not finite by update"):
            fit(algorithm, data_for(algorithm, pendulum, frames_per_batch=16), NonFiniteGuard(), poison)
        after = tensors_of(algorithm)
        assert all(value.isfinite().all() for value in after.values()), (target, value)
        moved = [name for name, before in poison.before.items() if not torch.equal(after[name], before)]
        assert not [name for name in moved if "target" not in name] or (target, value) == STEPPED, (
            target,
            value,
            moved,
        )


pendulum = partial(make_env, "Pendulum-v1")


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_never_replaces_a_checkpoint(where, tmp_path):
    """However it came about: a flipped bit of the memory, an update of somebody's own."""

    class Spoil(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                tensors = [*pl_module.loss.parameters()]
                if where == "moment":
                    tensors = [state["exp_avg"] for state in pl_module.optimizers().optimizer.state.values()]
                with torch.no_grad():
                    tensors[0].view(-1)[0] = np.nan

    algorithm = sac()
    data = data_for(algorithm, pendulum, total_frames=192, frames_per_epoch=64)
    saver = ModelCheckpoint(tmp_path, filename="last", save_on_exception=True, enable_version_counter=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=-1, callbacks=[Spoil(), saver], plugins=[AtomicCheckpointIO()], **quiet)
    with pytest.raises(NonFiniteError, match=r"(loss\.\S+|optimizer\.0\.exp_avg) is not finite: not saved"):
        trainer.fit(algorithm, datamodule=data)
    kept = read_checkpoint(tmp_path / "last.ckpt")
    assert kept["policy"]["env_frames"] == 64
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_skipping_goes_on_and_gives_up_in_the_end():
    algorithm = sac()
    poison = Poison("batch next.reward", float("nan"))
    fit(algorithm, data := data_for(algorithm, pendulum, total_frames=160), NonFiniteGuard("skip"), poison)
    assert data.env_frames == 160 and all(value.isfinite().all() for value in tensors_of(algorithm).values())
    assert all(np.isfinite(value) for value in algorithm.drain_metrics().values())
    learned = tensors_of(algorithm)
    assert any(not torch.equal(learned[name], before) for name, before in poison.before.items()), "and learned on"

    algorithm = sac()
    with pytest.raises(NonFiniteError, match="4 in a row"):
        fit(
            algorithm,
            data_for(algorithm, pendulum, total_frames=900),
            NonFiniteGuard("skip", 4),
            Poison("loss loss_qvalue", np.nan),
        )


def test_what_was_left_out_is_counted_on_by_a_resumed_run():
    algorithm, guard = sac(), NonFiniteGuard("skip")
    data = data_for(algorithm, partial(sick_env, "reward", np.inf), total_frames=192)
    fit(algorithm, data, guard, Poison("loss loss_qvalue", np.nan))
    assert data.breakdowns and guard.state_dict()["skipped"] and guard.state_dict()["in_a_row"]
    data_again, guard_again = data_for(sac(), pendulum), NonFiniteGuard("skip")
    data_again.load_state_dict(data.state_dict())
    guard_again.load_state_dict(guard.state_dict())
    assert data_again.breakdowns == data.breakdowns and guard_again.state_dict() == guard.state_dict()


def test_the_first_culprit_is_named():
    algorithm = sac()
    with pytest.raises(NonFiniteError, match=r"train/loss_qvalue is not finite by update 96 \(frame 96\)"):
        fit(algorithm, data_for(algorithm, pendulum), NonFiniteGuard(), Poison("batch next.reward", np.nan))
