"""Running statistics against those of the concatenated data, and reward scaling against a hand-written loop."""

import io
import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from pmoe_lightning.modules.normalization import ObservationNormalizer, RewardScaler


def batches() -> list[torch.Tensor]:
    """Uneven batches of three very different components, the last one far from zero compared with its spread."""
    torch.manual_seed(0)
    scale, shift = torch.tensor([1.0, 50.0, 0.1]), torch.tensor([0.0, -300.0, 20.0])
    return [torch.randn(*shape, 3) * scale + shift for shape in ((1,), (2, 7), (64,), (3, 4, 5), (1,), (1000,))]


def test_merged_statistics_are_those_of_the_concatenated_data() -> None:
    normalizer = ObservationNormalizer(3)
    for batch in batches():
        normalizer.update(batch)
    data = torch.cat([batch.reshape(-1, 3) for batch in batches()]).double()
    assert normalizer.count.item() == len(data)
    torch.testing.assert_close(normalizer.mean.double(), data.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normalizer.var.double(), data.var(0, unbiased=False), rtol=1e-5, atol=0)


def test_statistics_do_not_drift_over_many_small_updates() -> None:
    torch.manual_seed(1)
    data = torch.randn(20_000, 2) * 3 + torch.tensor([100.0, 0.0])
    normalizer = ObservationNormalizer(2)
    for batch in data.split(5):
        normalizer.update(batch)
    torch.testing.assert_close(normalizer.mean.double(), data.double().mean(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(normalizer.var.double(), data.double().var(0, unbiased=False), rtol=1e-4, atol=0)


def test_forward_standardises_clips_and_leaves_the_statistics_alone() -> None:
    normalizer = ObservationNormalizer(3)
    for batch in batches():
        normalizer.update(batch)
    before = {name: value.clone() for name, value in normalizer.state_dict().items()}
    observation = torch.stack([normalizer.mean, normalizer.mean + 2 * normalizer.var.sqrt(), normalizer.mean + 1e6])
    out = normalizer(TensorDict(observation=observation, batch_size=3))
    expected = torch.tensor([[0.0] * 3, [2.0] * 3, [10.0] * 3])
    torch.testing.assert_close(out["observation_normalized"], expected, rtol=1e-4, atol=1e-4)
    assert out["observation"].equal(observation) and out["observation_normalized"].dtype == torch.float32
    assert all(normalizer.state_dict()[name].equal(value) for name, value in before.items())


def test_before_the_first_update_it_is_the_identity() -> None:
    observation = torch.tensor([[-9.5, 0.0, 9.5]])
    assert ObservationNormalizer(3).normalize(observation).equal(observation)


def test_a_component_that_never_changes_stays_finite() -> None:
    normalizer = ObservationNormalizer(2)
    normalizer.update(torch.tensor([[1.0, 5.0], [2.0, 5.0]]))
    assert normalizer.normalize(torch.tensor([[1.5, 5.0], [1.5, 6.0]])).tolist() == [[0.0, 0.0], [0.0, 10.0]]


def scaled_by_hand(rollouts: list[tuple[list, list]], gamma: float, clip: float) -> list[list[float]]:
    """One environment: every R so far after each rollout, as plain Python numbers."""
    seen, current, scaled = [], 0.0, []
    for rewards, dones in rollouts:
        for reward, done in zip(rewards, dones, strict=True):
            current = reward + gamma * current
            seen.append(current)
            if done:
                current = 0.0
        mean = sum(seen) / len(seen)
        std = math.sqrt(sum((value - mean) ** 2 for value in seen) / len(seen) + 1e-8)
        scaled.append([max(-clip, min(clip, reward / std)) for reward in rewards])
    return scaled


def test_reward_scaling_is_that_of_a_hand_written_loop() -> None:
    # The last episode of the first rollout goes on in the second.
    rollouts = [
        ([1.0, 2.0, -3.0, 0.5, 4.0], [False, False, True, False, False]),
        ([1.0, 1.0, 80.0, -1.0, 0.0], [False, True, False, False, True]),
        ([0.2, 0.1, -0.1, 0.3, 5.0], [False] * 5),
    ]
    scaler = RewardScaler(1, gamma=0.9, clip=2.5)
    expected = scaled_by_hand(rollouts, gamma=0.9, clip=2.5)
    for (rewards, dones), by_hand in zip(rollouts, expected, strict=True):
        out = scaler(torch.tensor(rewards).view(1, 5, 1), torch.tensor(dones).view(1, 5, 1))
        assert out.shape == (1, 5, 1) and out.dtype == torch.float32
        torch.testing.assert_close(out.flatten(), torch.tensor(by_hand), rtol=1e-5, atol=1e-6)
    assert max(max(row) for row in expected) == 2.5  # the clip took part


def test_environments_accumulate_separately_and_share_one_scale() -> None:
    torch.manual_seed(2)
    reward, done = torch.randn(3, 40, 1), torch.rand(3, 40, 1) < 0.2
    together, alone = RewardScaler(3), [RewardScaler(1) for _ in range(3)]
    for part in (slice(0, 25), slice(25, 40)):
        out = together(reward[:, part], done[:, part])
        for i, scaler in enumerate(alone):
            scaler(reward[i : i + 1, part], done[i : i + 1, part])
    assert together.discounted_return.equal(torch.cat([scaler.discounted_return for scaler in alone]))
    assert together.count.item() == 120
    ratio = out / reward[:, 25:]
    torch.testing.assert_close(ratio, ratio[0, 0, 0].expand_as(ratio))


def test_scaling_never_changes_a_sign() -> None:
    torch.manual_seed(3)
    reward = torch.randn(2, 50, 1) + 5
    reward[0, 7] = 0.0
    assert RewardScaler(2)(reward, torch.zeros(2, 50, 1, dtype=torch.bool)).sign().equal(reward.sign())


def used_normalizer() -> ObservationNormalizer:
    normalizer = ObservationNormalizer(3)
    normalizer.update(torch.randn(10, 3))
    return normalizer


def used_scaler() -> RewardScaler:
    scaler = RewardScaler(2)
    scaler(torch.randn(2, 6, 1), torch.zeros(2, 6, 1, dtype=torch.bool))
    return scaler


@pytest.mark.parametrize(
    ("used", "fresh"), [(used_normalizer, lambda: ObservationNormalizer(3)), (used_scaler, lambda: RewardScaler(2))]
)
def test_state_survives_a_weights_only_file(used, fresh) -> None:
    used, fresh, file = used(), fresh(), io.BytesIO()
    torch.save(used.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    restored = dict(fresh.named_buffers())
    assert all(restored[name].equal(value) for name, value in used.named_buffers())
    assert used.count.item() > 0


def test_statistics_are_no_parameters() -> None:
    assert not list(nn.ModuleList([ObservationNormalizer(3), RewardScaler(2)]).parameters())
