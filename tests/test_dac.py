"""DAC: the advantages of both decision processes by hand, what each loss reaches, and a run from the command line."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from policies import make_policy
from tensordict import TensorDict

from pmoe_lightning.algorithms import make_dac
from pmoe_lightning.callbacks import EstimatorVariance
from pmoe_lightning.data.on_policy import OnPolicyData
from pmoe_lightning.envs import make_env
from pmoe_lightning.errors import RunError
from pmoe_lightning.estimators import Frequency
from pmoe_lightning.losses import DACLoss
from pmoe_lightning.modules.critics import make_option_value_network
from pmoe_lightning.modules.normalization import ObservationNormalizer, RewardScaler
from pmoe_lightning.modules.option_policies import make_option_actor
from pmoe_lightning.tracking import MLflowLogger, log_policy_model
from pmoe_lightning.tracking.references import load_policy

OBSERVATION, K, N, T = 3, 3, 1, 5
LOW, HIGH = [-2.0], [2.0]
LOSSES = ["loss_objective_high", "loss_objective_low", "loss_critic", "loss_entropy"]


def make_loss(**arguments) -> DACLoss:
    torch.manual_seed(0)
    sizes = {"hidden_sizes": (8,), "initialization": "default"}
    actor = make_option_actor(OBSERVATION, LOW, HIGH, num_options=K, return_log_prob=True, **sizes)
    return DACLoss(actor, make_option_value_network(OBSERVATION, K, **sizes), **arguments)


def rollout(loss: DACLoss, shape: tuple[int, ...] = (N, T), seed: int = 1) -> TensorDict:
    """Random states in which the policy has acted; a termination at t = 1, a truncation at t = 3."""
    torch.manual_seed(seed)
    terminated, truncated = torch.zeros(2, *shape, 1, dtype=torch.bool)
    terminated[:, 1], truncated[:, 3] = True, True
    after = {"observation": torch.randn(*shape, OBSERVATION), "reward": torch.randn(*shape, 1)}
    after |= {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
    data = TensorDict(observation=torch.randn(*shape, OBSERVATION), batch_size=shape)
    data["option_previous"] = torch.randint(-1, K, (*shape, 1))
    with torch.no_grad():
        loss.actor_network(data)
    return data.set("next", TensorDict(after, batch_size=shape))


def transitions(loss: DACLoss) -> TensorDict:
    """64 of them, with the advantages that the loss reads."""
    data = rollout(loss, (8, 8))
    loss.estimate_advantages(data, gamma=0.9, lmbda=0.8)
    return data.reshape(-1).exclude("next")


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_advantages_of_both_processes_by_hand():
    """delta = r + gamma (1 - terminated) v_H(s', o) - v;  A_t = delta_t + gamma lmbda (1 - done) A_{t+1}."""
    loss, gamma, lmbda = make_loss(), 0.9, 0.8
    data = rollout(loss)
    data["option_previous"][0, 2] = -1  # the first step after the termination
    loss.estimate_advantages(data, gamma=gamma, lmbda=lmbda)

    def values(observation):
        return loss.critic_network(TensorDict(observation=observation, batch_size=[]))["option_value"].tolist()

    def high_value(observation, previous):
        policies = loss.actor_network.get_dist(TensorDict(observation=observation, batch_size=[]))
        master, beta = policies.mixture.weights.tolist(), policies.termination_logits.sigmoid().tolist()
        if previous < 0:
            return sum(w * q for w, q in zip(master, values(observation), strict=True))
        mixed = sum(w * q for w, q in zip(master, values(observation), strict=True))
        return (1 - beta[previous]) * values(observation)[previous] + beta[previous] * mixed

    steps = [data[0, t] for t in range(T)]
    for name in ("high", "low"):
        expected, following = [], 0.0
        for step in reversed(steps):
            option, previous = step["option"].item(), step["option_previous"].item()
            value = values(step["observation"])[option] if name == "low" else high_value(step["observation"], previous)
            after = 0.0 if step["next", "terminated"] else high_value(step["next", "observation"], option)
            delta = step["next", "reward"].item() + gamma * after - value
            following = delta + (0.0 if step["next", "done"] else gamma * lmbda * following)
            expected.insert(0, following)
        assert data[f"advantage_{name}"].flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    q = [values(step["observation"])[step["option"].item()] for step in steps]
    assert data["state_value"].flatten().tolist() == pytest.approx(q, rel=1e-5)
    torch.testing.assert_close(data["value_target"], data["advantage_low"] + data["state_value"])


def test_a_minibatch_of_one_row_has_finite_losses_and_gradients():
    """The last minibatch of a pass may hold one transition: there is no deviation to normalise its advantage by."""
    loss = make_loss()
    one = transitions(loss)[:1]
    out = loss(one)
    assert all(out[name].isfinite() for name in LOSSES)
    ratio_of_one = -one["advantage_high"].item(), -one["advantage_low"].item()
    assert (out["loss_objective_high"].item(), out["loss_objective_low"].item()) == pytest.approx(ratio_of_one)
    sum(out[name] for name in LOSSES).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())


def test_before_the_first_update_both_ratios_are_one():
    """Also for actions whose tanh has saturated. The objectives are then minus the mean of a normalised advantage."""
    loss = make_loss()
    with torch.no_grad():
        loss.actor_network.network.mixture.loc.bias += 9.0
    out = loss(transitions(loss))
    assert abs(out["kl_approx"]) < 1e-6
    assert abs(out["loss_objective_high"]) < 1e-5 and abs(out["loss_objective_low"]) < 1e-5


def test_the_objectives_are_the_clipped_ones():
    loss = make_loss(clip_epsilon=0.1)
    data = transitions(loss)
    with torch.no_grad():
        for parameter in loss.actor_network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    out, policies = loss(data), loss.actor_network.get_dist(data)
    option, previous = data["option"].squeeze(-1), data["option_previous"].squeeze(-1)
    new = {
        "high": policies.option_log_probs(previous)[torch.arange(64), option],
        "low": policies.action_log_prob(data["action_unsquashed"], option),
    }
    for name, old in (("high", "option_log_prob"), ("low", "action_log_prob")):
        advantage = data[f"advantage_{name}"].squeeze(-1)
        advantage = ((advantage - advantage.mean()) / advantage.std()).tolist()
        ratios = (new[name] - data[old]).exp().tolist()
        assert max(ratios) > 1.1 and min(ratios) < 0.9
        terms = [min(r * a, min(max(r, 0.9), 1.1) * a) for r, a in zip(ratios, advantage, strict=True)]
        assert out[f"loss_objective_{name}"].item() == pytest.approx(-sum(terms) / 64, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("loss_objective_high", {"trunk", "router", "termination"}),
        ("loss_objective_low", {"trunk", "loc", "log_scale"}),
        ("loss_critic", {"critic"}),
        ("loss_entropy", {"trunk", "router", "termination", "loc", "log_scale"}),
    ],
)
def test_each_loss_reaches_its_own_parameters(name, reached):
    loss = make_loss(entropy_coeff=0.1)
    loss(transitions(loss))[name].backward()
    network = loss.actor_network.network
    parts = {key: getattr(network.mixture, key) for key in ("trunk", "router", "loc", "log_scale")}
    parts |= {"termination": network.termination, "critic": loss.critic_network}
    touched = set()
    for part, module in parts.items():
        parameters = [module] if isinstance(module, torch.Tensor) else module.parameters()
        if any(parameter.grad is not None and parameter.grad.any() for parameter in parameters):
            touched.add(part)
    assert touched == reached


def test_the_critic_learns_the_value_of_the_option_taken():
    loss = make_loss(critic_coeff=0.25)
    data = transitions(loss)
    q = loss.critic_network(data.select("observation"))["option_value"].gather(-1, data["option"])
    expected = 0.25 * (q - data["value_target"]).square().mean()
    torch.testing.assert_close(loss(data)["loss_critic"], expected)
    assert loss(data)["loss_entropy"] == 0
    assert set(loss(data).keys()) == set(loss.out_keys) and all(name in loss.out_keys for name in LOSSES)


# --- the algorithm ----------------------------------------------------------------------------------------------------


def fit(algorithm, total_frames: int = 384) -> Trainer:
    data = OnPolicyData(
        partial(make_env, "Pendulum-v1", max_episode_steps=20),
        algorithm.policy,
        total_frames=total_frames,
        frames_per_epoch=128,
        frames_per_batch=128,
        num_envs=2,
        normalizer=algorithm.policy[0],
        reward_scaler=RewardScaler(2),
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=-1, enable_model_summary=False, **quiet)
    trainer.fit(algorithm, datamodule=data)
    return trainer


def dac(**arguments):
    key = "observation_normalized"
    actor = make_option_actor(
        OBSERVATION, LOW, HIGH, num_options=K, hidden_sizes=(16,), return_log_prob=True, observation_key=key
    )
    arguments = {"hidden_sizes": (16,), "minibatch_size": 32, "num_epochs": 2, "entropy_coeff": 0.01} | arguments
    return make_dac(
        actor,
        Frequency(),
        observation_dim=OBSERVATION,
        action_dim=1,
        normalizer=ObservationNormalizer(OBSERVATION),
        **arguments,
    )


def test_it_passes_over_the_rollout_and_moves_every_parameter():
    torch.manual_seed(0)
    algorithm = dac()
    before = {name: value.clone() for name, value in algorithm.loss.named_parameters()}
    fit(algorithm)
    assert algorithm.updates == 2 * 2 * 4  # the first of three rollouts only initialises the normaliser
    for name, value in algorithm.loss.named_parameters():
        assert not torch.equal(value, before[name]), name
    metrics = algorithm.drain_metrics()
    assert {f"train/{name}" for name in (*LOSSES, "termination", "kl_approx", "explained_variance")} <= set(metrics)
    assert 0 < metrics["train/termination"] < 1
    assert EstimatorVariance(10).measure(algorithm) == {}  # there is no estimator to measure


def test_the_rollout_remembers_the_option_within_an_episode_and_forgets_it_after():
    algorithm = dac()
    batches = []
    algorithm.training_step = lambda batch, *_: batches.append(batch.clone())
    fit(algorithm)
    for batch in batches:
        option, previous, done = batch["option"], batch["option_previous"], batch["next", "done"]
        assert previous[:, 1:].equal(option[:, :-1].masked_fill(done[:, :-1], -1))
        assert done.sum() > 0 and option.unique().numel() == K


def test_it_stops_its_epochs_when_the_policy_has_moved_too_far():
    algorithm = dac(target_kl=1e-9, num_epochs=10, lr=0.01)
    fit(algorithm, total_frames=256)
    assert 4 <= algorithm.updates < 40


# --- the commands -----------------------------------------------------------------------------------------------------


def test_a_run_from_the_command_line(run_module, tmp_path):
    words = ["debug=default", "algo=dac", "actor.num_options=3", "logger=none", "hydra.run.dir=run"]
    done = run_module("pmoe_lightning.train", *words, "callbacks.final_policy.video_frames=3")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "warning" not in done.stderr.lower(), done.stderr
    for name in ("best.ckpt", "last.ckpt"):
        policy = load_policy(tmp_path / "run" / "checkpoints" / name)
        assert policy.in_keys == ["observation", "option_previous"]
    found = []
    for rule in ("max_weight", "sample"):
        words = ["checkpoint=run/checkpoints/best.ckpt", "episodes=2", f"rule={rule}", "--json"]
        done = run_module("pmoe_lightning.evaluate", *words)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)["returns"])
    assert len(found[0]) == 2 and found[0] != found[1]


@pytest.mark.parametrize("words", [["algo=dac", "actor=pmoe"], ["algo=ppo", "actor=options"]])
def test_the_wrong_actor_is_one_line(words, run_module, tmp_path):
    done = run_module("pmoe_lightning.train", *words)
    assert done.returncode == 2 and "actor=options" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_policy_with_memory_is_not_made_an_mlflow_model(tmp_path):
    logger = MLflowLogger(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(RunError, match="maps observations alone, but the policy also reads option_previous"):
        log_policy_model(logger, make_policy(actor="options")[1])
