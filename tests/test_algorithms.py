"""The LightningModules under a real Trainer: counters, optimizer groups, metrics, the KL stop, checkpoints."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from tensordict import TensorDict

from pmoe_lightning.algorithms import make_ppo, make_sac
from pmoe_lightning.checkpoints import AtomicCheckpointIO
from pmoe_lightning.data.off_policy import OffPolicyData
from pmoe_lightning.data.on_policy import OnPolicyData
from pmoe_lightning.envs import make_env
from pmoe_lightning.estimators import (
    Frequency,
    GumbelSoftmax,
    HalfReparameterized,
    Implicit,
    Marginalized,
    Pathwise,
    ScoreFunction,
)
from pmoe_lightning.modules.actors import make_gaussian_actor, make_pmoe_actor
from pmoe_lightning.modules.normalization import ObservationNormalizer, RewardScaler
from pmoe_lightning.tracking.references import load_policy

OBSERVATION_DIM, A, LOW, HIGH = 3, 1, [-2.0], [2.0]
pendulum = partial(make_env, "Pendulum-v1")
MIXTURE_ESTIMATORS = [Frequency, GumbelSoftmax, HalfReparameterized, Implicit, Marginalized, ScoreFunction]
every_estimator = pytest.mark.parametrize("make_estimator", MIXTURE_ESTIMATORS)


def sac(estimator=None, **arguments):
    actor = make_pmoe_actor(OBSERVATION_DIM, LOW, HIGH, hidden_sizes=(16, 16))
    return make_sac(
        actor,
        estimator or Frequency(),
        observation_dim=OBSERVATION_DIM,
        action_dim=A,
        hidden_sizes=(16, 16),
        **arguments,
    )


def ppo(estimator=None, num_components=3, **arguments):
    normalizer = ObservationNormalizer(OBSERVATION_DIM)
    actor = make_pmoe_actor(
        OBSERVATION_DIM,
        LOW,
        HIGH,
        num_components=num_components,
        hidden_sizes=(16,),
        scale="state_independent",
        return_log_prob=True,
        observation_key="observation_normalized",
    )
    sizes = {"hidden_sizes": (16,), "minibatch_size": 32, "num_epochs": 2}
    return make_ppo(
        actor,
        estimator or Frequency(),
        observation_dim=OBSERVATION_DIM,
        action_dim=A,
        normalizer=normalizer,
        **(sizes | arguments),
    )


def fit(algorithm, data, ckpt_path=None) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(algorithm, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def off_policy(algorithm, total_frames=80):
    return OffPolicyData(
        pendulum,
        algorithm.policy,
        total_frames=total_frames,
        frames_per_epoch=40,
        frames_per_batch=8,
        init_random_frames=16,
        batch_size=32,
    )


def on_policy(algorithm, total_frames=384):
    return OnPolicyData(
        pendulum,
        algorithm.policy,
        total_frames=total_frames,
        frames_per_epoch=128,
        frames_per_batch=128,
        num_envs=2,
        normalizer=algorithm.policy[0],
        reward_scaler=RewardScaler(2),
    )


@every_estimator
def test_sac_counts_updates_moves_every_parameter_and_follows_with_the_targets(make_estimator):
    torch.manual_seed(0)
    estimator = make_estimator()
    algorithm = sac(estimator)
    before = {name: value.clone() for name, value in algorithm.loss.state_dict().items()}
    trainer = fit(algorithm, off_policy(algorithm))
    assert algorithm.updates == trainer.global_step == 64  # one per frame after 16 warm-up frames
    still = {"actor_network_params.module.1.low", "actor_network_params.module.1.high", "alpha_init", "_target_entropy"}
    if isinstance(estimator, Frequency):
        assert "loss_frequency" in algorithm.loss.out_keys
    for name, value in algorithm.loss.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved or any(name.endswith(end) for end in still) or "gamma" in name or name.startswith("__"), name


def test_the_acting_policy_is_the_trained_one():
    algorithm = sac()
    trained = {parameter.data_ptr() for parameter in algorithm.loss.actor_network_params.parameters()}
    acting = {parameter.data_ptr() for parameter in algorithm.policy.parameters()}
    assert acting == trained


def test_sac_optimizer_has_three_groups_with_their_own_rates():
    optimizer = sac(lr=1e-3, lr_alpha=5e-4).configure_optimizers()
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("actor", 1e-3),
        ("qvalue", 1e-3),
        ("alpha", 5e-4),
    ]


def test_one_summed_backward_equals_three_separate_ones():
    """The losses touch disjoint parameters, so one optimizer step on their sum is the step of three optimizers."""
    torch.manual_seed(0)
    algorithm = sac()
    data = off_policy(algorithm)
    fit(algorithm, data)
    batch = data.buffer.sample(32)
    grads = []
    for together in (True, False):
        loss = algorithm.loss
        loss.zero_grad()
        torch.manual_seed(1)
        losses = [value for name, value in loss(batch.clone()).items() if name.startswith("loss_")]
        for part in [sum(losses)] if together else losses:
            part.backward(retain_graph=True)
        grads.append({name: value.grad.clone() for name, value in loss.named_parameters() if value.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-5, atol=1e-7)


@every_estimator
def test_ppo_passes_over_the_rollout_and_moves_every_parameter(make_estimator):
    torch.manual_seed(0)
    estimator = make_estimator()
    algorithm = ppo(estimator, entropy_coeff=0.01)
    before = {name: value.clone() for name, value in algorithm.loss.named_parameters()}
    fit(algorithm, on_policy(algorithm))
    assert algorithm.updates == 2 * 2 * 4  # the first of three rollouts only initialises the normaliser
    for name, value in algorithm.loss.named_parameters():
        assert not torch.equal(value, before[name]), name
    assert ("qvalue_network_params" in dict(algorithm.loss.named_children())) == isinstance(estimator, Frequency)


@pytest.mark.parametrize("make, data", [(sac, off_policy), (ppo, on_policy)], ids=["sac", "ppo"])
def test_an_estimator_anneals_over_the_frames_of_the_run(make, data):
    estimator = GumbelSoftmax(temperature=1.0, final_temperature=0.01)
    algorithm = make(estimator, entropy_coeff=0.01) if make is ppo else make(estimator)
    trainer = fit(algorithm, data(algorithm))
    progress = trainer.datamodule.env_frames / trainer.datamodule.total_frames
    assert progress == 1.0 and estimator.temperature == pytest.approx(0.01)
    if make is sac:
        temperature = algorithm.drain_metrics()["train/gumbel_temperature"]
        assert 0.01 < temperature < 1.0  # the mean over the run


@pytest.mark.slow
def test_sac_compiled_learns_what_it_learns_uncompiled(tmp_path, caplog):
    """One program for the whole run, annealing included; Lightning's counters, metrics, and a resume without it."""
    caplog.set_level(logging.INFO, logger="pmoe_lightning.updates.compilation")
    runs = []
    for compile in (False, True):
        torch.manual_seed(0)
        algorithm = sac(GumbelSoftmax(final_temperature=0.1), compile=compile)
        trainer = fit(algorithm, off_policy(algorithm))
        assert trainer.global_step == algorithm.updates == 64
        runs.append((algorithm, algorithm.drain_metrics()))
    (plain, expected), (compiled, metrics) = runs
    assert metrics == pytest.approx(expected, rel=1e-2, abs=1e-3)
    for name, value in plain.loss.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(compiled.loss.state_dict()[name], value, rtol=1e-2, atol=1e-3)
    assert len([record for record in caplog.records if record.message.startswith("compiled the update")]) == 1

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = sac(GumbelSoftmax(final_temperature=0.1))
    data = off_policy(resumed, total_frames=120)
    trainer = fit(resumed, data, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.updates == trainer.global_step == 88  # 16 of its 40 frames refill the buffer
    steps = {float(state["step"]) for state in resumed.optimizers().state.values()}
    assert steps == {88.0}


def test_ppo_gradients_are_clipped_to_the_norm():
    algorithm = ppo(max_grad_norm=1e-12)
    before = {name: value.clone() for name, value in algorithm.loss.named_parameters()}
    fit(algorithm, on_policy(algorithm, total_frames=256))
    moved = max((value - before[name]).abs().max() for name, value in algorithm.loss.named_parameters())
    # Adam's eps is 1e-5: a gradient of norm 1e-12 moves a parameter by at most lr 1e-12 / 1e-5 per update.
    assert 0 <= moved < 1e-8
    assert algorithm.drain_metrics()["train/gradient_norm"] > 1e-3  # the norm that is logged is the one before clipping


def test_ppo_stops_its_epochs_when_the_policy_has_moved_too_far():
    algorithm = ppo(target_kl=1e-9, num_epochs=10, lr=0.01)
    fit(algorithm, on_policy(algorithm, total_frames=256))
    assert 4 <= algorithm.updates < 40


def test_a_compiled_run_of_ppo_is_the_readable_one():
    """128 frames are two minibatches of 48 and one of 32, which is left to the readable form."""
    parameters, trainers = [], []
    for compile in (True, False):
        torch.manual_seed(0)
        algorithm = ppo(Pathwise(), num_components=1, minibatch_size=48, target_kl=100.0, compile=compile)
        trainers.append(fit(algorithm, on_policy(algorithm)))
        assert algorithm.updates == trainers[-1].global_step == 2 * 2 * 3
        assert (algorithm.update is not None) == compile
        assert algorithm.drain_metrics()["train/gradient_norm"] > 0
        parameters.append([value.detach() for value in algorithm.loss.parameters()])
    for compiled, readable in zip(*parameters, strict=True):
        torch.testing.assert_close(compiled, readable, rtol=1e-3, atol=1e-5)
    states = [trainer.optimizers[0].state_dict()["state"].values() for trainer in trainers]
    for compiled, readable in zip(*states, strict=True):
        assert compiled["step"] == readable["step"] == 12
        torch.testing.assert_close(compiled["exp_avg"], readable["exp_avg"], rtol=1e-2, atol=1e-4)


def test_gae_bootstraps_truncation_but_not_termination():
    """delta_t = r + gamma (1 - terminated) V(s') - V(s); A_t = delta_t + gamma lmbda (1 - done) A_{t+1}, by hand."""
    torch.manual_seed(0)
    algorithm = ppo(gamma=0.9, lmbda=0.8)
    T = 5
    terminated = torch.tensor([0, 1, 0, 0, 0], dtype=torch.bool).view(1, T, 1)
    truncated = torch.tensor([0, 0, 0, 1, 0], dtype=torch.bool).view(1, T, 1)
    after = {"observation_normalized": torch.randn(1, T, OBSERVATION_DIM), "reward": torch.randn(1, T, 1)}
    after |= {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
    batch = TensorDict(
        {"observation_normalized": torch.randn(1, T, OBSERVATION_DIM), "next": TensorDict(after, batch_size=[1, T])},
        batch_size=[1, T],
    )
    with torch.no_grad():
        algorithm.advantage(batch)
        value, after_value = (
            algorithm.loss.critic_network(TensorDict(observation_normalized=x, batch_size=[1, T]))["state_value"]
            for x in (batch["observation_normalized"], after["observation_normalized"])
        )
    expected, following = [], 0.0
    for t in reversed(range(T)):
        bootstrap = 0.0 if terminated[0, t] else 0.9 * after_value[0, t].item()
        delta = after["reward"][0, t].item() + bootstrap - value[0, t].item()
        following = delta + (0.0 if after["done"][0, t] else 0.9 * 0.8 * following)
        expected.insert(0, following)
    assert batch["advantage"].flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_updates_are_planned_for_replay_and_for_rollouts():
    replay, rollouts = sac(), ppo()
    assert replay.planned_updates(off_policy(replay, total_frames=80)) == 64 and not replay.on_policy
    assert rollouts.planned_updates(on_policy(rollouts, total_frames=384)) == 384 * 2 / 32 and rollouts.on_policy


def test_without_a_fused_optimizer_too_a_gradient_that_is_not_finite_changes_nothing(monkeypatch):
    algorithm = sac()
    fused = algorithm.configure_optimizers
    monkeypatch.setattr(algorithm, "configure_optimizers", lambda: torch.optim.Adam(fused().param_groups, fused=False))
    fit(algorithm, off_policy(algorithm, total_frames=24))
    before = [parameter.detach().clone() for parameter in algorithm.loss.parameters()]
    algorithm.step(TensorDict(loss_actor=sum(p.sum() for p in algorithm.actor.parameters()) * float("nan")))
    assert algorithm.updates == 9
    for parameter, kept in zip(algorithm.loss.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)


def test_metrics_are_means_and_are_drained():
    algorithm = sac()
    algorithm.record({"train/table": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    assert algorithm.drain_metrics() == {f"train/table_{i}_{j}": 1.0 + 2 * i + j for i in (0, 1) for j in (0, 1)}
    for value in (1.0, 2.0):
        algorithm.record_loss(TensorDict(loss_actor=torch.tensor(value), winner_frequency=torch.tensor([value, 0.0])))
    drained = algorithm.drain_metrics()
    expected = {
        "train/loss_actor": 1.5,
        "train/mixture/winner_frequency_0": 1.5,
        "train/mixture/winner_frequency_1": 0.0,
    }
    assert drained == expected
    assert algorithm.drain_metrics() == {}


@pytest.mark.parametrize("make", [sac, ppo])
def test_pathwise_is_refused_for_a_mixture(make):
    with pytest.raises(ValueError, match="actor=gaussian"):
        make(Pathwise())


@pytest.mark.parametrize("make, data", [(sac, off_policy), (ppo, on_policy)], ids=["sac", "ppo"])
def test_checkpoint_restores_weights_optimizer_and_counters(make, data, tmp_path):
    torch.manual_seed(0)
    algorithm = make()
    trainer = fit(algorithm, data(algorithm))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["updates"] == checkpoint["policy"]["updates"] == algorithm.updates
    assert checkpoint["policy"]["env_frames"] == trainer.datamodule.env_frames
    other = make()
    other.load_state_dict(checkpoint["state_dict"])
    other.on_load_checkpoint(copy.deepcopy(checkpoint))
    assert other.updates == algorithm.updates
    observation = TensorDict(observation=torch.randn(4, OBSERVATION_DIM), batch_size=4)
    for key in ("action",):
        torch.manual_seed(2)
        mine = algorithm.policy(observation.clone())[key]
        torch.manual_seed(2)
        assert torch.equal(other.policy(observation.clone())[key], mine)


def test_one_component_runs_with_every_estimator():
    for make_estimator in (Pathwise, *MIXTURE_ESTIMATORS):
        estimator = make_estimator()
        actor = make_gaussian_actor(OBSERVATION_DIM, LOW, HIGH, hidden_sizes=(16,))
        algorithm = make_sac(actor, estimator, observation_dim=OBSERVATION_DIM, action_dim=A, hidden_sizes=(16,))
        fit(algorithm, off_policy(algorithm, total_frames=24))
        assert algorithm.updates == 8


@pytest.mark.parametrize("make, data", [(sac, off_policy), (ppo, on_policy)], ids=["sac", "ppo"])
def test_a_checkpoint_can_act_by_its_own_action_values(make, data, tmp_path):
    torch.manual_seed(0)
    algorithm = make()
    arguments = {"num_components": algorithm.actor[0].module.num_components, "hidden_sizes": [16, 16]}
    if make is ppo:
        arguments |= {"hidden_sizes": [16], "scale": "state_independent", "return_log_prob": True}
        arguments["observation_key"] = "observation_normalized"
    algorithm.policy_description = {
        "format": 1,
        "actor": "pmoe",
        "arguments": arguments,
        "observation_dim": OBSERVATION_DIM,
        "action_low": LOW,
        "action_high": HIGH,
        "normalize_observation": make is ppo,
        "critic": {"hidden_sizes": arguments["hidden_sizes"], "activation": "relu" if make is sac else "tanh"},
        "env": {"id": "Pendulum-v1", "kwargs": {}},
    }
    fit(algorithm, data(algorithm)).save_checkpoint(tmp_path / "a.ckpt")
    observation = TensorDict(observation=torch.randn(64, OBSERVATION_DIM), batch_size=64)
    action = load_policy(tmp_path / "a.ckpt", rule="best_value")(observation.clone())["action"]

    seen = algorithm.policy[0](observation.clone()) if make is ppo else observation.clone()
    modes = algorithm.actor.get_dist(seen).component_modes
    values = []
    for k in range(modes.shape[-2]):
        normalized = modes[:, k] / HIGH[0]
        inputs = TensorDict({algorithm.observation_key: seen[algorithm.observation_key], "action": normalized}, [64])
        values.append(qvalues_of(algorithm, inputs))
    best = torch.stack(values, -1).argmax(-1)
    torch.testing.assert_close(action, modes[torch.arange(64), best])
    assert best.unique().numel() > 1  # the components do differ, so that the choice is a choice


def qvalues_of(algorithm, inputs: TensorDict) -> torch.Tensor:
    loss = algorithm.loss
    if hasattr(loss, "qvalues"):
        return loss.qvalues(inputs, inputs["action"], loss.qvalue_network_params).min(0).values
    with loss.qvalue_network_params.to_module(loss.qvalue_network, preserve_module_state=False):
        return loss.qvalue_network(inputs)["state_action_value"].squeeze(-1)
