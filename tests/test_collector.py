"""Our collector against TorchRL's: the same rollouts, key by key and draw by draw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from probe_envs import make_forgetful_env, make_scripted_env
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.transforms import StepCounter
from torchrl.envs.utils import ExplorationType

from pmoe_lightning.algorithms import make_sac
from pmoe_lightning.data.collector import RolloutCollector
from pmoe_lightning.envs import make_env, with_memory
from pmoe_lightning.estimators import Frequency
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.modules.actors import make_gaussian_actor, make_pmoe_actor
from pmoe_lightning.modules.normalization import ObservationNormalizer
from pmoe_lightning.modules.option_policies import make_option_actor
from pmoe_lightning.safe.constraint import CostConstraint

OBSERVATION_DIM, LOW, HIGH = 11, [-1.0] * 3, [1.0] * 3
SIZES: dict[str, Any] = {"hidden_sizes": (16,), "activation": "tanh"}

SETTINGS: dict[str, Any] = {
    "frames_per_batch": 48,
    "exploration_type": ExplorationType.RANDOM,
    "track_traj_ids": False,
    "use_buffers": False,
    "auto_register_policy_transforms": False,
}


def normalized(make: Callable, **arguments: Any) -> TensorDictModuleBase:
    normalizer = ObservationNormalizer(OBSERVATION_DIM)
    normalizer.update(torch.randn(100, OBSERVATION_DIM) * 3 + 1)
    actor = make(
        OBSERVATION_DIM, LOW, HIGH, observation_key="observation_normalized", return_log_prob=True, **SIZES, **arguments
    )
    return TensorDictSequential(normalizer, actor)


def acting(force: str, constraint: CostConstraint | None = None) -> TensorDictModuleBase:
    """SAC's policy with an action transform, choosing among candidates where it is safe."""
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=3, **SIZES)
    transform = make_hamiltonian_transform(OBSERVATION_DIM, len(LOW), force=force, step_size=0.3)
    sizes = {"observation_dim": OBSERVATION_DIM, "action_dim": len(LOW), "hidden_sizes": (16,)}
    return make_sac(actor, Frequency(), action_transform=transform, constraint=constraint, **sizes).policy


POLICIES: dict[str, Callable[[], TensorDictModuleBase]] = {
    "sac": lambda: make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=3, **SIZES),
    "ppo-gaussian": lambda: normalized(make_gaussian_actor, scale="state_independent"),
    "ppo-pmoe": lambda: normalized(make_pmoe_actor, scale="state_independent", num_components=4),
    "dac": lambda: normalized(make_option_actor),
    "sac-raw": lambda: acting("raw"),
    "sac-gated-safe": lambda: acting("gated", CostConstraint()),
}


def hopper(policy: TensorDictModuleBase, num_envs: int) -> EnvBase:
    return with_memory(make_env, policy)(id="Hopper-v5", num_envs=num_envs, seed=4)


def collect(
    cls: type[Collector], policy: TensorDictModuleBase, env: EnvBase, rollouts: int = 4, **arguments: Any
) -> list[TensorDictBase]:
    collector = cls(env, policy, **(SETTINGS | arguments))
    torch.manual_seed(1)
    collected = [rollout for rollout, _ in zip(collector, range(rollouts), strict=False)]
    collector.shutdown()
    return collected


def forgetful(policy: TensorDictModuleBase, num_envs: int) -> EnvBase:
    return with_memory(make_forgetful_env, policy)(num_envs=num_envs, seed=4)


#: Two collectors hand the policy the same numbers at different places of memory, and a product may depend on that
#: (tests/alignment.py). A layer here adds up to 16 numbers, so it is off by 16 roundings of 6e-8 at most; what a policy
#: makes of them (a logarithm, a normalised observation, the force of a critic) and what a contracting environment
#: accumulates is a hundred times that.
ROUNDING = 1e-4


def assert_same(ours: list[TensorDictBase], theirs: list[TensorDictBase], tolerance: float = 0.0) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert set(mine.keys(True, True)) == set(other.keys(True, True))
        for key, value in other.items(True, True):
            assert mine[key].dtype == value.dtype and mine[key].shape == value.shape, key
            torch.testing.assert_close(mine[key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("name", POLICIES)
def test_rollouts_are_those_of_torchrl(name: str, num_envs: int) -> None:
    """The third of four rollouts is the first that the policy plays; many episodes end in 192 frames."""
    torch.manual_seed(0)
    policy, arguments = POLICIES[name](), {"init_random_frames": 96}
    ours, theirs = (
        collect(cls, policy, forgetful(policy, num_envs), **arguments) for cls in (RolloutCollector, Collector)
    )
    assert_same(ours, theirs, tolerance=ROUNDING)
    assert sum(int(rollout["next", "done"].sum()) for rollout in ours) >= 3
    assert "action_log_prob" not in ours[1] and ("action_log_prob" in ours[2]) == (not name.startswith("sac"))


@pytest.mark.parametrize("num_envs", [1, 3])
def test_rollouts_of_a_simulator_are_those_of_torchrl(num_envs: int) -> None:
    """To the last bit, for a policy without arithmetic; Hopper falls many times in 192 frames."""

    def draw(observation: torch.Tensor) -> torch.Tensor:
        return torch.rand(*observation.shape[:-1], len(LOW)) * 2 - 1

    policy = TensorDictModule(draw, in_keys=["observation"], out_keys=["action"])
    ours, theirs = (collect(cls, policy, hopper(policy, num_envs)) for cls in (RolloutCollector, Collector))
    assert_same(ours, theirs)
    assert sum(int(rollout["next", "done"].sum()) for rollout in ours) >= 3


@pytest.mark.parametrize(
    "name", ["ppo-pmoe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dac", "sac-raw", "sac-gated-safe"))]
)
def test_a_compiled_policy_draws_the_same_actions(name: str) -> None:
    torch.manual_seed(0)
    policy = POLICIES[name]()
    ours = collect(RolloutCollector, policy, forgetful(policy, 1), compile=True)
    theirs = collect(Collector, policy, forgetful(policy, 1))
    assert_same(ours, theirs, tolerance=ROUNDING)


def test_a_compiled_policy_acts_with_its_newest_weights_and_statistics() -> None:
    torch.manual_seed(0)
    policy = POLICIES["ppo-gaussian"]()
    collector = RolloutCollector(hopper(policy, 2), policy, **SETTINGS, compile=True)
    rollouts = iter(collector)
    next(rollouts)
    with torch.no_grad():
        policy[1][0].module.loc.bias.fill_(3.0)
    policy[0].update(torch.randn(1000, OBSERVATION_DIM) * 50)
    rollout = next(rollouts)
    torch.testing.assert_close(rollout["observation_normalized"], policy[0].normalize(rollout["observation"]))
    assert rollout["action_unsquashed"].mean() > 2.0
    collector.shutdown()


def test_a_compiled_policy_follows_the_exploration_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program belongs to the exploration type under which it was traced; the trace stands for the program here."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, examples, options: graph)
    torch.manual_seed(0)
    policy = POLICIES["ppo-gaussian"]()
    collector = RolloutCollector(hopper(policy, 2), policy, **SETTINGS, compile=True)
    for explores in (True, False, True):
        collector.exploration_type = ExplorationType.RANDOM if explores else ExplorationType.DETERMINISTIC
        rollout = collector.rollout()
        mode = policy[1].get_dist(rollout.select("observation_normalized")).mode
        assert torch.allclose(rollout["action"], mode, atol=1e-5) != explores
    collector.shutdown()


@pytest.mark.parametrize("arguments", [{"track_traj_ids": True}, {"use_buffers": True}, {"set_truncated": True}])
def test_what_concerns_single_steps_is_left_to_torchrl(arguments: dict) -> None:
    torch.manual_seed(0)
    policy = POLICIES["ppo-pmoe"]()
    ours, theirs = (collect(cls, policy, hopper(policy, 2), **arguments) for cls in (RolloutCollector, Collector))
    assert_same(ours, theirs)


def test_any_environment_and_any_policy_will_do() -> None:
    torch.manual_seed(0)
    policy = POLICIES["sac"]()
    ours, theirs = (
        collect(cls, policy, TransformedEnv(hopper(policy, 2), StepCounter())) for cls in (RolloutCollector, Collector)
    )
    assert_same(ours, theirs)
    assert "step_count" in set(ours[0].keys())

    def constant(tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set("action", torch.full((2, 2), 0.125))

    ours = collect(RolloutCollector, constant, make_scripted_env(num_envs=2))
    assert ours[0]["action"].eq(0.125).all()


def test_state_seed_and_weights_are_those_of_a_torchrl_collector() -> None:
    policy = POLICIES["sac"]()
    collector = RolloutCollector(hopper(policy, 2), policy, **SETTINGS)
    next(iter(collector))
    state = copy.deepcopy(collector.state_dict())
    assert state["frames"] == 48 and set(state["policy_state_dict"]) == set(policy.state_dict())
    assert collector.set_seed(9) == hopper(policy, 2).set_seed(9)
    torch.nn.init.zeros_(policy[0].module.loc.weight)
    collector.update_policy_weights_()
    collector.load_state_dict(state)
    assert policy[0].module.loc.weight.abs().sum() > 0
    collector.shutdown()
    assert collector.closed
