"""The constraint on cost: what a step costs, who is told of it, what the actor pays, which candidates are dropped."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path

import gymnasium
import mlflow
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from pmoe_lightning.algorithms import make_sac
from pmoe_lightning.data.off_policy import OffPolicyData
from pmoe_lightning.envs import make_env
from pmoe_lightning.envs.velocity import PUBLISHED_LIMITS, VelocityCost
from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.estimators import Marginalized
from pmoe_lightning.evaluation.episodes import evaluate_policy
from pmoe_lightning.hamiltonian import differentiable, make_hamiltonian_transform
from pmoe_lightning.losses import SafeSACLoss
from pmoe_lightning.modules.actors import make_pmoe_actor
from pmoe_lightning.safe.candidates import choose_safe
from pmoe_lightning.safe.constraint import CostConstraint, constrained_value
from pmoe_lightning.tracking import MLflowLogger, log_policy_model
from pmoe_lightning.tracking.references import load_policy

OBSERVATION_DIM, A, LOW, HIGH, SIZES = 11, 3, [-1.0] * 3, [1.0] * 3, (16, 16)
hopper = partial(make_env, "Hopper-v5", velocity_limit=0.1)  # which falling forwards exceeds


def sac(force: str | None = None, **constraint):
    """SAC on Hopper-v5's spaces, limited in its cost."""
    torch.manual_seed(0)
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, num_components=2, hidden_sizes=SIZES)
    transform = None if force is None else make_hamiltonian_transform(OBSERVATION_DIM, A, force=force, step_size=0.3)
    description = {
        "format": 1,
        "actor": "pmoe",
        "arguments": {"num_components": 2, "hidden_sizes": list(SIZES)},
        "observation_dim": OBSERVATION_DIM,
        "action_low": LOW,
        "action_high": HIGH,
        "normalize_observation": False,
        "action_transform": None if force is None else {"force": force, "used_in": ["acting"]},
        "safe": constraint,
        "critic": {"hidden_sizes": list(SIZES), "activation": "relu"},
        "env": {"id": "Hopper-v5", "kwargs": {"velocity_limit": "published"}},
    }
    return make_sac(
        actor,
        Marginalized(),
        observation_dim=OBSERVATION_DIM,
        action_dim=A,
        hidden_sizes=SIZES,
        action_transform=transform,
        constraint=CostConstraint(**constraint),
        policy_description=description,
    )


def observations(batch: int = 8) -> TensorDict:
    return TensorDict({"observation": torch.randn(batch, OBSERVATION_DIM)}, [batch])


def transitions(batch: int = 32, cost: float | None = None) -> TensorDict:
    flags = {key: torch.rand(batch, 1) < 0.2 for key in ("terminated", "truncated")}
    after = {"observation": torch.randn(batch, OBSERVATION_DIM), "reward": torch.randn(batch, 1), **flags}
    after["done"] = flags["terminated"] | flags["truncated"]
    after["cost"] = (torch.rand(batch, 1) < 0.5).float() if cost is None else torch.full((batch, 1), cost)
    root = {"observation": torch.randn(batch, OBSERVATION_DIM), "action": torch.rand(batch, A)}
    return TensorDict({**root, "next": after}, [batch])


# -- what a step costs -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("env_id", "info", "cost"),
    [
        ("HalfCheetah-v5", {"x_velocity": 3.2}, 0.0),
        ("HalfCheetah-v5", {"x_velocity": 3.22}, 1.0),
        ("HalfCheetah-v5", {"x_velocity": -5.0}, 0.0),
        ("Ant-v5", {"x_velocity": 2.0, "y_velocity": -2.0}, 1.0),
        ("Ant-v5", {"x_velocity": 2.0, "y_velocity": 1.0}, 0.0),
        ("Swimmer-v5", {"x_velocity": 0.2, "y_velocity": 5.0}, 0.0),
        ("Swimmer-v4", {"x_velocity": 0.3, "y_velocity": 0.0}, 1.0),
        ("Hopper-v5", {"x_velocity": math.nan}, 0.0),
    ],
)
def test_a_step_costs_one_where_it_is_too_fast(env_id, info, cost):
    assert VelocityCost(env_id, "published")(info) == cost


@pytest.mark.parametrize("task", PUBLISHED_LIMITS)
def test_every_published_task_reports_its_velocity(task):
    """Costs and running totals are those of Gymnasium's own environment; nothing else of a rollout changes."""
    limit = 0.03  # so that random actions exceed it now and then
    env, plain = (make_env(f"{task}-v5", seed=3, velocity_limit=v) for v in (limit, None))
    theirs = gymnasium.make(f"{task}-v5")
    theirs.reset(seed=3)
    cost_of, total, paid = VelocityCost(f"{task}-v5", limit), 0.0, 0.0
    root, other = env.reset(), plain.reset()
    generator = np.random.default_rng(0)
    for _ in range(40):
        action = torch.as_tensor(generator.uniform(-0.4, 0.4, env.action_spec.shape), dtype=torch.float32)
        step, root = env.step_and_maybe_reset(root.set("action", action))
        reference, other = plain.step_and_maybe_reset(other.set("action", action))
        *_, terminated, truncated, info = theirs.step(action[0].numpy())
        expected = cost_of(info)
        total, paid = total + expected, paid + expected
        assert step["next", "cost"].item() == expected and step["next", "episode_cost"].item() == total
        assert torch.equal(step["next", "observation"], reference["next", "observation"])
        assert ("next", "cost") not in reference.keys(True)
        if terminated or truncated:
            theirs.reset()
            total = 0.0
    assert paid > 0
    for each in (env, plain, theirs):
        each.close()


@pytest.mark.parametrize(
    ("env_id", "limit", "message"),
    [
        ("Pendulum-v1", "published", "no velocity limit is published for Pendulum-v1, only for Ant"),
        ("Pendulum-v1", 1.0, "Pendulum-v1 does not report x_velocity.*use a MuJoCo locomotion task, or safe=none"),
        ("Hopper-v5", -1.0, "env.velocity_limit=-1.0 must be a positive number"),
        ("Hopper-v5", "fast", "env.velocity_limit=fast must be a positive number, in m/s, or 'published'"),
    ],
)
def test_an_environment_without_what_is_needed_is_one_clear_error(env_id, limit, message):
    with pytest.raises(ConfigurationError, match=message):
        make_env(env_id, velocity_limit=limit)


def test_costs_reach_replay_counters_and_evaluation():
    algorithm = sac()
    data = OffPolicyData(
        hopper, algorithm.policy, total_frames=600, frames_per_epoch=600, frames_per_batch=50, init_random_frames=500
    )
    rollouts = [data.collect() for _ in range(8)]
    for rollout in rollouts:
        data.make_batch(rollout)
    costs = torch.cat([rollout["next", "cost"].flatten() for rollout in rollouts])
    assert torch.equal(data.buffer[:]["next", "cost"].flatten(), costs) and 0 < costs.mean() < 1
    assert data.violations == int(costs.sum())
    episodes = data.drain_episodes()
    assert sum(cost for *_, cost in episodes) <= costs.sum() and max(cost for *_, cost in episodes) > 0
    assert data.state_dict()["violations"] == data.violations
    data.teardown("fit")
    env = hopper(num_envs=2)
    result = evaluate_policy(algorithm.policy, env, episodes=3, seed=5)
    assert len(result.costs) == 3 and result.costs == tuple(float(n) for n in result.violations)
    assert all(cost <= length for cost, length in zip(result.costs, result.lengths, strict=True))
    assert result == evaluate_policy(algorithm.policy, env, episodes=3, seed=5), "candidates are seeded"
    env.close()


# -- the loss ----------------------------------------------------------------------------------------------------------
def test_no_next_action_is_left_in_the_minibatch_of_the_caller():
    loss, batch = sac().loss, transitions(4)
    batch["next", "cost"] = torch.ones(4, 1)
    loss(batch)
    assert ("next", "action") not in batch.keys(True)


def test_the_cost_target_by_hand():
    """The cost of the step, and what the higher of two target critics says of a next state that is not terminal."""
    loss, batch = sac(gamma=0.5).loss, transitions(4)
    batch["next", "cost"] = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    batch["next", "terminated"] = torch.tensor([[False], [False], [True], [True]])
    for parameters in (loss.target_cost_network_params, loss.cost_network_params):
        parameters.data.apply_(lambda x: x.zero_())
    loss.target_cost_network_params.data["module", "layers", "4", "bias"].copy_(torch.tensor([[2.0], [6.0]]))
    values = loss.critic_values(batch, torch.zeros(4, A), "cost_network")
    assert loss.cost_target(batch, values.next).tolist() == [1 + 0.5 * 6, 0.5 * 6, 1, 0]
    several = batch.clone().set("steps_to_next_obs", torch.tensor([[1], [2], [2], [1]]))
    assert loss.cost_target(several, values.next).tolist() == [1 + 0.5 * 6, 0.25 * 6, 1, 0]
    # Predictions are zero: two critics, each off by the target of its draw.
    out = loss(batch)
    assert out["loss_cost"].item() == 2 * (16 + 9 + 1 + 0) / 4
    assert out["predicted_cost"].item() == pytest.approx(0.5 * (4 + 3 + 1 + 0) / 4)


@pytest.mark.parametrize("force", [None, "gated"])
def test_each_loss_reaches_only_its_own_parameters(force):
    loss = sac(force, multiplier_init=2.0).loss
    out = loss(transitions())
    owners = {
        "loss_actor": {"actor_network_params"} | ({"action_transform"} if force else set()),
        "loss_qvalue": {"qvalue_network_params"},
        "loss_alpha": {"log_alpha"},
        "loss_cost": {"cost_network_params"},
        "loss_multiplier": {"multiplier"},
    }
    assert {name for name in out.keys() if name.startswith("loss_")} == owners.keys()  # noqa: SIM118
    for name, expected in owners.items():
        loss.zero_grad()
        out[name].backward(retain_graph=True)
        touched = {n.split(".")[0] for n, p in loss.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched == expected, name


def test_the_actor_pays_the_multiplier_for_cost():
    batch, losses = transitions(), []
    for price in (0.0, 1.0, 3.0):
        algorithm = sac(multiplier_init=price)
        torch.manual_seed(1)
        losses.append(algorithm.loss.actor_loss(batch)[0].item())
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)
    assert losses[1] != losses[0]


def test_one_sample_pays_what_it_pays_alone():
    """The cost critics too give again what they gave for all samples."""
    loss, states = sac(multiplier_init=2.0).loss, transitions()
    distribution = loss.actor_network.get_dist(states)
    objective = loss.objective(states, distribution)
    u = distribution.rsample_components().detach().requires_grad_()
    evaluation = objective(u, torch.zeros(u.shape[:-1]))
    second = torch.ones(len(states), dtype=torch.int64)
    told, alone = evaluation.of(second), objective(u[1], torch.zeros(len(states)))
    torch.testing.assert_close(told.cost, alone.cost)
    torch.testing.assert_close(*(torch.autograd.grad(found.cost.sum(), u)[0] for found in (told, alone)))


def test_the_multiplier_rises_above_the_limit_and_falls_to_zero_below():
    """With critics that predict c / (1 - gamma_c) everywhere, the constraint compares c with the limit."""
    algorithm = sac(gamma=0.5, cost_limit=0.4, multiplier_init=0.02, lr_multiplier=1e-2)
    loss, history = algorithm.loss, []
    (*_, group) = algorithm.configure_optimizers().param_groups
    assert group["name"] == "multiplier" and group["lr"] == 1e-2 and group["params"] == [loss.multiplier]
    optimizer = torch.optim.Adam([loss.multiplier], lr=1e-2)
    for cost, steps in ((0.39, 20), (0.41, 20), (0.0, 20), (1.0, 20)):
        loss.target_cost_network_params.data.apply_(lambda x: x.zero_())
        loss.target_cost_network_params.data["module", "layers", "4", "bias"].fill_(cost / 0.5)
        for _ in range(steps):
            batch = transitions(16, cost)
            batch["next", "terminated"].fill_(False)
            out = loss(batch)
            assert out["predicted_cost"].item() == pytest.approx(cost, abs=1e-6)
            optimizer.zero_grad()
            out["loss_multiplier"].backward()
            optimizer.step()
        history.append(loss.nu.item())
    assert history[0] == 0 and history[1] > 0.1 and history[2] == 0 and history[3] > 0.1, history


def test_a_loss_without_a_mean_cannot_be_constrained():
    algorithm = sac()
    with pytest.raises(ValueError, match="use reduction='mean'"):
        SafeSACLoss(algorithm.actor, [], [], CostConstraint(), reduction="none")


def test_what_a_transform_climbs_is_reward_minus_priced_cost():
    torch.manual_seed(0)
    weights = torch.randn(2, A, dtype=torch.float64), torch.randn(3, A, dtype=torch.float64)

    def critics(w):
        return lambda action: (torch.einsum("...a,qa->q...", action, w)).sin()

    nu = torch.tensor(1.7, dtype=torch.float64)
    action = torch.randn(20, A, dtype=torch.float64, requires_grad=True)
    values, pullback = constrained_value(*(differentiable(critics(w)) for w in weights), nu)(action.detach())
    expected = critics(weights[0])(action) - nu * critics(weights[1])(action).max(0).values
    torch.testing.assert_close(values, expected.detach())
    cotangent = torch.rand(2, 20, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((expected * cotangent).sum(), action)
    torch.testing.assert_close(pullback(cotangent), gradient)


# -- acting ------------------------------------------------------------------------------------------------------------
def test_the_candidate_rule_on_a_case_by_hand():
    """Of the safe ones the best; without any, the least costly, however good another is."""
    reward = torch.tensor([[5.0, 1.0, 9.0], [4.0, 2.0, 1.0], [3.0, 8.0, 2.0]])
    cost = torch.tensor([[2.0, 0.5, 3.0], [1.0, 0.9, 2.0], [0.0, 1.1, 2.5]])
    assert choose_safe(reward, cost, 1.0).tolist() == [1, 1, 1]
    assert choose_safe(reward, cost, 0.0).tolist() == [2, 0, 1]
    assert choose_safe(reward, cost, 9.0).tolist() == [0, 2, 0]


@pytest.mark.parametrize("force", [None, "gated"])
@pytest.mark.parametrize("kind", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
def test_it_acts_by_the_candidate_that_the_rule_takes(force, kind):
    algorithm = sac(force, num_candidates=5)
    loss, policy, states = algorithm.loss, algorithm.policy, observations(64)
    with torch.no_grad():  # half of what is proposed is to be too costly
        drawn = policy.policy(states.clone())["action"]
        cost = loss.qvalues(states, drawn, loss.cost_network_params).max(0).values
        loss.cost_network_params.data["module", "layers", "4", "bias"].add_(loss.constraint.limit - cost.median())
    seen, propose = [], policy._propose

    def watch(*arguments):
        seen.append(propose(*arguments))
        return seen[-1]

    policy._propose = watch
    with torch.no_grad(), set_exploration_type(kind):
        torch.manual_seed(1)
        action = policy(states.clone())["action"]
        own = policy.policy(states.clone())["action"]
    candidates = torch.cat(seen)
    assert candidates.shape == (5, 64, A)
    if kind is ExplorationType.DETERMINISTIC:
        torch.testing.assert_close(candidates[0], own)
    cost = loss.qvalues(states, candidates, loss.cost_network_params).max(0).values
    reward = loss.qvalues(states, candidates, loss.qvalue_network_params).min(0).values
    chosen = choose_safe(reward, cost, loss.constraint.limit)
    torch.testing.assert_close(action, candidates[chosen, torch.arange(64)])
    assert len(chosen.unique()) == 5
    safe = cost <= loss.constraint.limit
    assert safe.any() and not safe.any(0).all() and not safe.all(0).all()


def test_one_candidate_is_the_policy_itself():
    policy, states = sac(num_candidates=1).policy, observations()
    for kind in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
        actions = []
        with torch.no_grad(), set_exploration_type(kind):
            for each in (policy, policy.policy):
                torch.manual_seed(2)
                actions.append(each(states.clone())["action"])
        torch.testing.assert_close(*actions)


def test_candidates_are_judged_by_the_live_critics():
    algorithm = sac("gated", num_candidates=8)
    own = {p.data_ptr() for p in algorithm.policy.parameters()}
    loss = algorithm.loss
    for parameters in (loss.qvalue_network_params, loss.cost_network_params):
        assert {p.data_ptr() for p in parameters.parameters()} <= own
    assert loss.multiplier.data_ptr() in own
    # One place for each tensor, also in a copy.
    names = list(dict(copy.deepcopy(algorithm.policy).named_parameters(remove_duplicate=False)))
    assert len(names) == len(own)


# -- checkpoints -------------------------------------------------------------------------------------------------------
def checkpoint_of(algorithm, **constraint) -> dict:
    description = copy.deepcopy(algorithm.policy_description)
    description["safe"] |= constraint
    if description["action_transform"]:
        description["action_transform"]["step_size"] = 0.3
    entry = {"description": description, "state_dict": dict(algorithm.policy.state_dict())}
    return {"policy": entry | {"action_values": algorithm.action_values()}}


@pytest.mark.slow
def test_the_packaged_policy_draws_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    logger = MLflowLogger(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    logger.start()
    uri = log_policy_model(logger, checkpoint_of(sac("raw", num_candidates=6)))
    logger.finish("FINISHED")
    assert mlflow.models.get_model_info(uri).metadata["deterministic"] is False
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path)))
    assert "the same observation can get" in next(folder.rglob("README.md")).read_text()
    policy, actions = mlflow.pyfunc.load_model(uri), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        actions.append(policy.predict(np.ones((16, OBSERVATION_DIM), np.float32)))
    assert (actions[0] == actions[2]).all() and (actions[0] != actions[1]).any()


@pytest.mark.parametrize("rule", [None, "best_value"])
@pytest.mark.parametrize("force", [None, "raw"])
def test_a_loaded_policy_is_the_safe_one(force, rule):
    algorithm = sac(force, num_candidates=6, multiplier_init=0.5)
    loaded, states = load_policy(checkpoint_of(algorithm), rule=rule), observations(32)
    with torch.no_grad():
        torch.manual_seed(3)
        action = loaded(states.clone())["action"]
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            torch.manual_seed(3)
            expected = algorithm.policy(states.clone())["action"]
            drawn = algorithm.actor(states.clone())["action"]
    assert not torch.allclose(expected, drawn)
    if rule is None:
        torch.testing.assert_close(action, expected)
    else:
        assert action.isfinite().all() and not torch.allclose(action, expected)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"num_candidates": 10**9}, "num_candidates=1000000000 must be a whole number >= 1 and <= 1000"),
        ({"num_candidates": 2.5}, "num_candidates=2.5 must be a whole number"),
        ({"num_candidates": 0}, "num_candidates=0 must be"),
        ({"gamma": 1.0}, "gamma=1.0 must be a finite number >= 0 and < 1"),
        ({"cost_limit": "none"}, "cost_limit='none' must be a finite number >= 0"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_description_that_cannot_be_built_is_refused(constraint, message):
    with pytest.raises(RunError, match=message):
        load_policy(checkpoint_of(sac(), **constraint))
