"""Data modules: every number that is stored, owed, counted and yielded, against a scripted environment."""

import io
import warnings
from collections.abc import Callable
from fractions import Fraction
from itertools import islice

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from probe_envs import Transition, expected_transitions, make_scripted_env
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential

from pmoe_lightning.data.collector import RolloutCollector
from pmoe_lightning.data.off_policy import OffPolicyData
from pmoe_lightning.data.on_policy import OnPolicyData
from pmoe_lightning.errors import ConfigurationError
from pmoe_lightning.modules.actors import make_pmoe_actor
from pmoe_lightning.modules.normalization import ObservationNormalizer, RewardScaler

LOW, HIGH = torch.tensor([-0.5, -2.0]), torch.tensor([0.25, 3.0])


def make_policy(normalizer: ObservationNormalizer | None = None, **arguments) -> TensorDictModuleBase:
    torch.manual_seed(0)
    key = "observation" if normalizer is None else "observation_normalized"
    actor = make_pmoe_actor(3, LOW, HIGH, num_components=2, hidden_sizes=(8,), observation_key=key, **arguments)
    return actor if normalizer is None else TensorDictSequential(normalizer, actor)


def make_constant_policy(action: float) -> TensorDictModule:
    policy = TensorDictModule(torch.nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"])
    torch.nn.init.zeros_(policy.module.weight)
    torch.nn.init.constant_(policy.module.bias, action)
    return policy


def off_policy(policy: TensorDictModuleBase | None = None, **changes) -> OffPolicyData:
    arguments = {
        "total_frames": 64,
        "frames_per_epoch": 64,
        "frames_per_batch": 8,
        "init_random_frames": 0,
        "batch_size": 5,
    }
    return OffPolicyData(make_scripted_env, policy or make_policy(), **{**arguments, **changes})


def on_policy(policy: TensorDictModuleBase | None = None, **changes) -> OnPolicyData:
    arguments = {"total_frames": 64, "frames_per_epoch": 64, "frames_per_batch": 16, "num_envs": 1}
    policy = policy or make_policy(changes.get("normalizer"), return_log_prob=True)
    return OnPolicyData(make_scripted_env, policy, **{**arguments, **changes})


def stored(data: OffPolicyData) -> TensorDictBase:
    return data.buffer[: len(data.buffer)]


def assert_transition(actual: TensorDictBase, expected: Transition) -> None:
    assert actual["observation"].tolist() == expected.observation
    assert actual["next", "observation"].tolist() == expected.next_observation
    assert actual["next", "reward"].tolist() == [expected.reward]
    assert actual["next", "terminated"].tolist() == [expected.terminated]
    assert actual["next", "truncated"].tolist() == [expected.truncated]
    assert actual["next", "done"].tolist() == [expected.terminated or expected.truncated]


def expected_episodes(num_steps: int, num_envs: int) -> list[tuple[float, int]]:
    """(return, length) in the order in which episodes finish; environments of one step in their own order."""
    columns = [expected_transitions(num_steps, index=i) for i in range(num_envs)]
    steps = [transition for row in zip(*columns, strict=True) for transition in row]
    return [(s.episode_return, s.episode_length) for s in steps if s.terminated or s.truncated]


class Recorder(LightningModule):
    """Trains nothing and remembers what happened."""

    def __init__(self, policy: TensorDictModuleBase, events: list | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy, self.events, self.batches = policy, [] if events is None else events, []

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> None:
        self.events.append("train")
        self.batches.append(batch)

    def on_train_epoch_end(self) -> None:
        self.events.append(f"epoch ends at {self.trainer.datamodule.env_frames}")

    def configure_optimizers(self) -> None:
        return None


def fit(
    data: OffPolicyData | OnPolicyData, *, events: list | None = None, max_epochs: int = -1, ckpt_path=None
) -> Recorder:
    recorder = Recorder(data.policy, events)
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*configure_optimizers.*")
        trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder


# Collection


@pytest.mark.parametrize("num_envs", [1, 4])
def test_replay_holds_exactly_the_transitions_of_the_script(num_envs: int) -> None:
    data = off_policy(num_envs=num_envs, frames_per_batch=20, frames_per_epoch=60, total_frames=60)
    list(data.train_dataloader())
    transitions = stored(data).view(3, num_envs, 20 // num_envs)  # iterations, environments, steps
    for i in range(num_envs):
        column = transitions[:, i].reshape(-1)
        for actual, expected in zip(column, expected_transitions(60 // num_envs, index=i), strict=True):
            assert_transition(actual, expected)
    next_keys = {("next", key) for key in ("observation", "reward", "done", "terminated", "truncated")}
    assert set(stored(data).keys(True, True)) == {"observation", "action"} | next_keys


@pytest.mark.parametrize("num_envs", [1, 4])
def test_rollouts_hold_exactly_the_transitions_of_the_script(num_envs: int) -> None:
    data = on_policy(num_envs=num_envs)
    rollouts = list(data.train_dataloader())
    assert [rollout.shape for rollout in rollouts] == [(num_envs, 16 // num_envs)] * 4
    for i, column in enumerate(torch.cat(rollouts, 1)):
        for actual, expected in zip(column, expected_transitions(64 // num_envs, index=i), strict=True):
            assert_transition(actual, expected)
    rollout_keys = {"observation", "action", "action_unsquashed", "action_log_prob"}
    next_keys = {("next", key) for key in ("observation", "reward", "done", "terminated", "truncated")}
    assert set(rollouts[0].keys(True, True)) == rollout_keys | next_keys
    assert len({rollout["observation"].data_ptr() for rollout in rollouts}) == 4  # nothing is overwritten later


@pytest.mark.parametrize("num_envs", [1, 4])
def test_episode_totals(num_envs: int) -> None:
    data = off_policy(num_envs=num_envs)
    batches, seen = iter(data.train_dataloader()), []
    for _ in range(4):
        next(batches)
    seen += data.drain_episodes()
    assert data.drain_episodes() == []
    list(batches)
    seen += data.drain_episodes()
    assert seen == expected_episodes(64 // num_envs, num_envs)
    assert data.episodes == len(seen) > 10


def test_environments_get_consecutive_seeds() -> None:
    data = on_policy(num_envs=4, seed=30)
    rollout = next(iter(data.train_dataloader()))
    assert rollout["observation"][:, 0, 0].tolist() == [30.0, 31.0, 32.0, 33.0]


def test_the_live_policy_acts_with_its_newest_weights() -> None:
    policy = make_constant_policy(0.0)
    data = off_policy(policy)
    for value, _ in zip((0.1, 0.2, 0.05), data.train_dataloader(), strict=False):
        newest = stored(data)["action"][-8:]
        torch.nn.init.constant_(policy.module.bias, value)
        assert newest.eq(newest[0]).all()
    actions = stored(data)["action"].view(3, 8, 2)
    torch.testing.assert_close(actions[1:], torch.tensor([0.1, 0.2]).view(2, 1, 1).expand(2, 8, 2))


def test_exploration_is_random() -> None:
    policy = make_policy(return_log_prob=True)
    rollout = next(iter(on_policy(policy).train_dataloader()))
    assert (rollout["action"] - policy.get_dist(rollout).deterministic_sample).abs().mean() > 0.1


# Replay and the update ratio


@pytest.mark.parametrize("frames_per_batch", [1, 7, 16])
@pytest.mark.parametrize("utd_ratio", [0.1, 0.25, 1.0, 1.5, 2.0])
def test_updates_owed(utd_ratio: float, frames_per_batch: int) -> None:
    data = off_policy(
        utd_ratio=utd_ratio, frames_per_batch=frames_per_batch, total_frames=112, frames_per_epoch=112, batch_size=3
    )
    done = 0
    for batch in data.train_dataloader():
        done += len(batch)
        assert batch.shape == (len(batch), 3) and len(batch) >= 1
        assert done == int(Fraction(str(utd_ratio)) * data.env_frames)
    assert data.env_frames == 112
    assert done == int(Fraction(str(utd_ratio)) * 112)


def test_minibatches_are_drawn_from_the_whole_buffer() -> None:
    data = off_policy(total_frames=16, frames_per_epoch=16, batch_size=400)
    batch = list(data.train_dataloader())[-1]
    known = {tuple(row) for row in torch.cat([stored(data)["observation"], stored(data)["action"]], -1).tolist()}
    for minibatch in batch:
        rows = torch.cat([minibatch["observation"], minibatch["action"]], -1).tolist()
        assert {tuple(row) for row in rows} == known
    assert not batch[0]["action"].equal(batch[1]["action"])


def test_random_warm_up_is_counted_once_and_owes_no_updates() -> None:
    frames = {"total_frames": 480, "frames_per_epoch": 480}
    data = off_policy(make_constant_policy(0.125), init_random_frames=400, batch_size=2, **frames)
    batches = list(data.train_dataloader())
    assert data.env_frames == 480 == len(stored(data))
    assert sum(len(batch) for batch in batches) == 80
    warm_up, acted = stored(data)["action"][:400], stored(data)["action"][400:]
    assert acted.eq(0.125).all()
    spread = (warm_up - LOW) / (HIGH - LOW)  # uniform on [0, 1]: mean 1/2, standard error sqrt(1/12 / 400) = 0.0144
    assert ((spread >= 0) & (spread <= 1)).all()
    assert ((spread.mean(0) - 0.5).abs() < 5 * 0.0144).all() and ((spread.var(0) - 1 / 12).abs() < 0.02).all()
    assert data.drain_episodes() == expected_episodes(480, 1)


def test_warm_up_is_rounded_up_to_whole_iterations() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = off_policy(init_random_frames=20)
        first = next(iter(data.train_dataloader()))
    assert data.warm_up == 24
    assert data.env_frames == 32 and len(first) == 8


def test_policies_may_write_more_than_the_action() -> None:
    data = off_policy(make_policy(return_log_prob=True), init_random_frames=8)
    assert sum(len(batch) for batch in data.train_dataloader()) == 56
    assert "action_log_prob" not in stored(data)


def test_buffer_keeps_the_newest_transitions_and_is_no_larger_than_the_run() -> None:
    data = off_policy(buffer_size=16)
    list(data.train_dataloader())
    kept = sorted(stored(data)["observation"].tolist())
    assert kept == sorted(transition.observation for transition in expected_transitions(64)[-16:])
    assert off_policy(buffer_size=1_000_000, total_frames=60).capacity == 64


# Counting and Lightning


@pytest.mark.parametrize("make", [off_policy, on_policy])
def test_a_run_ends_at_total_frames_or_less_than_one_batch_later(make: Callable) -> None:
    exact, over = make(total_frames=48), make(total_frames=49)
    for data in (exact, over):
        assert len(list(data.train_dataloader())) > 0
        assert list(data.train_dataloader()) == []
    assert exact.env_frames == 48
    assert over.env_frames == 48 + over.frames_per_batch
    assert over.total_frames == 49


def test_epochs_end_at_multiples_of_frames_per_epoch() -> None:
    data = on_policy(frames_per_batch=16, frames_per_epoch=40, total_frames=130)
    loader, ends = data.train_dataloader(), []
    assert len(loader) == 3
    while data.env_frames < 130:
        # As Lightning does: never ask for more than len(loader), and drop the iterator.
        assert 1 <= len(list(islice(iter(loader), len(loader)))) <= 3
        ends.append(data.env_frames)
    assert ends == [48, 80, 128, 144]


def log_collection(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Events in order: each real collector iteration now also notes that it happened."""
    events, rollout = [], RolloutCollector.rollout
    monkeypatch.setattr(RolloutCollector, "rollout", lambda self: (events.append("collect"), rollout(self))[1])
    return events


@pytest.mark.parametrize("make", [off_policy, on_policy])
def test_nothing_is_collected_ahead_under_a_real_trainer(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    events = log_collection(monkeypatch)
    data = make(frames_per_batch=16, frames_per_epoch=32)
    fit(data, events=events)
    epoch = ["collect", "train"] * 2
    assert events == [*epoch, "epoch ends at 32", *epoch, "epoch ends at 64"]
    assert data.env_frames == 64
    assert data.collector is None  # closed with the run


def test_epochs_that_only_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    events = log_collection(monkeypatch)
    data = off_policy(init_random_frames=24, frames_per_epoch=16, total_frames=40)
    recorder = fit(data, events=events)
    collect_train = ["collect", "train"]
    assert events == [
        *("collect", "collect", "epoch ends at 16"),
        *("collect", *collect_train, "epoch ends at 32"),
        *(*collect_train, "epoch ends at 40"),
    ]
    assert [len(batch) for batch in recorder.batches] == [8, 8]


def test_the_run_can_be_extended() -> None:
    data = off_policy()
    fit(data)
    data.total_frames = 96
    recorder = fit(data)
    assert data.env_frames == 96 and sum(len(batch) for batch in recorder.batches) == 32


def test_max_epochs_stops_earlier() -> None:
    data = on_policy(frames_per_epoch=32)
    fit(data, max_epochs=1)
    assert data.env_frames == 32


def test_collecting_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(off_policy(frames_per_batch=8, num_envs=4, init_random_frames=20, total_frames=50).train_dataloader())
        list(on_policy(frames_per_batch=12, num_envs=4, total_frames=50).train_dataloader())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: off_policy(total_frames=0), "total_frames=0 must be at least 1"),
        (lambda: on_policy(num_envs=0), "OnPolicyData: num_envs=0 must be a whole number >= 1"),
        (lambda: on_policy(num_envs=5), "frames_per_batch=16 must be a multiple of data.num_envs=5: use 20"),
        (lambda: off_policy(frames_per_epoch=4), "frames_per_epoch=4 must not be smaller"),
        (lambda: off_policy(utd_ratio=0.0), "utd_ratio=0.0"),
        (lambda: off_policy(batch_size=0), "batch_size=0"),
        (lambda: off_policy(init_random_frames=64), "leaves nothing of total_frames=64"),
        (lambda: off_policy(init_random_frames=32, buffer_size=31), "buffer_size=31"),
        (lambda: on_policy(num_envs=2, reward_scaler=RewardScaler(1)), "RewardScaler"),
    ],
)
def test_what_cannot_work_is_one_clear_line(make: Callable, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# Normalisation


def test_next_observations_are_normalised_with_the_statistics_of_the_collection() -> None:
    normalizer = ObservationNormalizer(3)
    data = on_policy(normalizer=normalizer, num_envs=2)
    batches = iter(data.train_dataloader())
    seen = [expected_transitions(8, index=i) for i in range(2)]
    for number in (1, 2, 3):
        # All observations of the rollouts before this one, the unyielded first one included.
        past = torch.tensor([transition.observation for column in seen for transition in column])
        batch = next(batches)
        mean, std = past.mean(0), (past.var(0, unbiased=False) + 1e-8).sqrt()
        for root, normalized in ((batch, batch["observation_normalized"]), (batch["next"], None)):
            normalized = root["observation_normalized"] if normalized is None else normalized
            expected = ((root["observation"] - mean) / std).clamp(-10, 10)
            torch.testing.assert_close(normalized, expected, rtol=1e-4, atol=1e-4)
        seen = [expected_transitions(8 * (number + 1), index=i) for i in range(2)]
        assert normalizer.count.item() == 16 * (number + 1) == data.env_frames


def test_only_a_fresh_run_spends_a_rollout_on_the_statistics() -> None:
    data = on_policy(normalizer=ObservationNormalizer(3))
    assert len(list(data.train_dataloader())) == 3 and data.env_frames == 64
    resumed = on_policy(normalizer=ObservationNormalizer(3))
    resumed.load_state_dict({**data.state_dict(), "env_frames": 0})
    assert len(list(resumed.train_dataloader())) == 4
    assert len(list(on_policy(reward_scaler=RewardScaler(1)).train_dataloader())) == 4


def test_rewards_are_scaled_rollout_by_rollout_and_returns_are_not() -> None:
    scaler = RewardScaler(2, gamma=0.5)
    data = on_policy(num_envs=2, reward_scaler=RewardScaler(2, gamma=0.5))
    columns = [expected_transitions(32, index=i) for i in range(2)]
    reward = torch.tensor([[[transition.reward] for transition in column] for column in columns])
    done = torch.tensor([[[step.terminated or step.truncated] for step in column] for column in columns])
    for number, batch in enumerate(data.train_dataloader()):
        part = slice(8 * number, 8 * number + 8)
        torch.testing.assert_close(batch["next", "reward"], scaler(reward[:, part], done[:, part]))
    assert data.drain_episodes() == expected_episodes(32, 2)


# State


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_off_policy_state() -> None:
    data = off_policy(utd_ratio=0.3, total_frames=72, frames_per_epoch=72)
    list(data.train_dataloader())
    frames = {"total_frames": 128, "frames_per_epoch": 128}
    restored = off_policy(make_constant_policy(0.125), utd_ratio=0.3, init_random_frames=16, **frames)
    restored.load_state_dict(through_a_file(data.state_dict()))
    assert (restored.env_frames, restored.episodes) == (72, data.episodes)
    assert restored.updates_owed == data.updates_owed == Fraction(72 * 3, 10) - 21
    # The buffer starts empty: it is refilled before updates go on, by the policy rather than at random.
    batch = next(iter(restored.train_dataloader()))
    assert restored.env_frames == 72 + 24 and len(stored(restored)) == 24
    assert stored(restored)["action"].eq(0.125).all()
    assert len(batch) == int(Fraction(6, 10) + Fraction(24, 10))


def test_a_lightning_checkpoint_carries_the_counters(tmp_path) -> None:
    data, restored = (on_policy(normalizer=ObservationNormalizer(3), frames_per_epoch=32) for _ in range(2))
    recorder = fit(data, max_epochs=1)
    recorder.trainer.save_checkpoint(tmp_path / "last.ckpt")
    recorder = fit(restored, ckpt_path=tmp_path / "last.ckpt")
    assert restored.env_frames == 64 == restored.normalizer.count.item()
    assert restored.episodes > data.episodes
    assert len(recorder.batches) == 2


def test_on_policy_state() -> None:
    def fresh() -> OnPolicyData:
        return on_policy(normalizer=ObservationNormalizer(3), reward_scaler=RewardScaler(1))

    data, restored = fresh(), fresh()
    list(data.train_dataloader())
    restored.load_state_dict(through_a_file(data.state_dict()))
    assert (restored.env_frames, restored.episodes) == (data.env_frames, data.episodes)
    for module in ("normalizer", "reward_scaler"):
        before, after = getattr(data, module).state_dict(), getattr(restored, module).state_dict()
        assert all(after[name].equal(value) for name, value in before.items())
    assert restored.normalizer.count.item() == 64


def test_same_seed_same_data() -> None:
    def collected() -> TensorDict:
        data = on_policy(num_envs=2, normalizer=ObservationNormalizer(3))
        torch.manual_seed(4)
        return torch.stack(list(data.train_dataloader()))

    assert (collected() == collected()).all()
