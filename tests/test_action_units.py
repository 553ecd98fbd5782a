"""Everything that learns sees actions normalised to [-1, 1], whatever the bounds of the environment."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from pmoe_lightning import (
    CostConstraint,
    Frequency,
    Marginalized,
    PMOEPPOLoss,
    PMOESACLoss,
    SafeSACLoss,
    make_hamiltonian_transform,
    make_pmoe_actor,
    make_qvalue_network,
    make_value_network,
)
from pmoe_lightning.checkpoints import read_checkpoint
from pmoe_lightning.train import main

A, OBSERVATION = 2, 3
UNIT = ([-1.0] * A, [1.0] * A)
POWERS_OF_TWO = [([-8.0, -(2.0**-7)], [8.0, 2.0**-7]), ([-(2.0**20)] * A, [2.0**20] * A)]
OTHERS = [([-0.01] * A, [0.01] * A), ([0.0, -1.0], [1e-3, 3.0]), ([-1e6, 2.0], [3e6, 2.5]), ([-7.0, -2e5], [-3.0, 1e6])]
KINDS = ["frequency", "marginalized", "transform", "safe"]


def make_loss(bounds, kind="marginalized"):
    actor = make_pmoe_actor(OBSERVATION, *bounds, num_components=3, hidden_sizes=(16, 16))
    critics = [[make_qvalue_network(OBSERVATION, A, hidden_sizes=(16, 16)) for _ in range(2)] for _ in range(2)]
    arguments = {"estimator": Frequency() if kind == "frequency" else Marginalized()}
    if kind == "transform":
        arguments["action_transform"] = make_hamiltonian_transform(OBSERVATION, A, magnitude=5.0)
    if kind == "safe":
        loss = SafeSACLoss(actor, *critics, CostConstraint(multiplier_init=0.1), **arguments)
    else:
        loss = PMOESACLoss(actor, critics[0], **arguments)
    loss.make_value_estimator(gamma=0.9)
    return loss


def minibatch(bounds, size=64):
    """Actions n in [-1, 1] in units of these bounds; what they earn depends on n alone."""
    low, high = (torch.tensor(bound) for bound in bounds)
    n = 2 * torch.rand(size, A) - 1
    ends = torch.rand(size, 1) < 0.5
    following = TensorDict(
        observation=torch.randn(size, OBSERVATION),
        reward=-(n - 0.5).square().sum(-1, keepdim=True),
        cost=(n > 0.5).any(-1, keepdim=True).float(),
        done=ends,
        terminated=ends,
        batch_size=size,
    )
    action = (high + low) / 2 + (high - low) / 2 * n
    return TensorDict(observation=torch.randn(size, OBSERVATION), action=action, next=following, batch_size=size)


def train(bounds, updates, kind="marginalized", seed=0, lr=3e-4):
    torch.manual_seed(seed)
    loss = make_loss(bounds, kind)
    optimizer, targets = torch.optim.Adam(loss.parameters(), lr=lr), SoftUpdate(loss, tau=0.005)
    for _ in range(updates):
        out = loss(minibatch(bounds))
        optimizer.zero_grad()
        sum(value for name, value in out.items() if name.startswith("loss_")).backward()
        optimizer.step()
        targets.step()
    return loss


def weights(loss):
    return torch.cat([parameter.detach().flatten() for parameter in loss.parameters()])


def modes(loss, bounds):
    """The normalised actions of the policy at fixed states."""
    states = TensorDict(observation=torch.linspace(-1, 1, 8 * OBSERVATION).view(8, OBSERVATION), batch_size=8)
    distribution = loss._distribution(states)
    low, high = (torch.tensor(bound) for bound in bounds)
    return (distribution.component_modes.detach() - (high + low) / 2) / ((high - low) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_that_are_powers_of_two_change_no_bit(kind):
    """Scaling by a power of two rounds nothing, so the same tensors are computed."""
    unit = weights(train(UNIT, 200, kind))
    assert torch.equal(weights(train(POWERS_OF_TWO[0], 200, kind)), unit)


@pytest.mark.parametrize("kind", KINDS)
def test_other_bounds_change_what_rounding_changes(kind):
    reference = train(UNIT, 20, kind)
    for bounds in OTHERS:
        loss = train(bounds, 20, kind)
        difference = (weights(loss) - weights(reference)).norm() / weights(reference).norm()
        assert difference < 1e-3, bounds
        torch.testing.assert_close(modes(loss, bounds), modes(reference, UNIT), rtol=0, atol=1e-5)


def test_a_task_of_other_bounds_is_learned_as_well():
    """Five seeds come as near to n = 0.5 as with bounds of +-1."""
    errors = []
    for bounds in (UNIT, OTHERS[2]):
        losses = [train(bounds, 80, seed=seed, lr=1e-2) for seed in range(5)]
        errors.append(sum(float((modes(loss, bounds) - 0.5).abs().mean()) for loss in losses) / 5)
        assert all(float(loss.log_alpha.detach()) < 0 for loss in losses)
    assert all(error < 0.2 and abs(error - errors[0]) < 0.03 for error in errors), errors


def test_the_entropy_is_of_the_normalised_action_and_the_policys_density_of_its_own():
    torch.manual_seed(0)
    bounds = OTHERS[1]
    loss, unit = make_loss(bounds), make_loss(UNIT)
    unit.load_state_dict(
        {k: unit.state_dict()[k] if k.endswith(("low", "high")) else v for k, v in loss.state_dict().items()}
    )
    states = minibatch(UNIT)
    torch.manual_seed(1)
    entropy = -loss.estimate(states).log_prob
    torch.manual_seed(1)
    torch.testing.assert_close(entropy, -unit.estimate(states).log_prob)
    half_ranges = [(high - low) / 2 for low, high in zip(*bounds, strict=True)]
    u = torch.randn(64, A)
    of_unit, own = unit._distribution(states), loss._distribution(states)
    difference = of_unit.log_prob(of_unit.squash(u)) - own.log_prob(own.squash(u))
    torch.testing.assert_close(difference, torch.full((64,), sum(map(math.log, half_ranges))), rtol=1e-3, atol=1e-3)


def test_an_action_spec_given_to_the_loss_states_the_bounds():
    actor = make_pmoe_actor(OBSERVATION, *OTHERS[1], hidden_sizes=(8,))
    spec = actor.spec["action"].expand(5, A)
    loss = PMOESACLoss(actor, [make_qvalue_network(OBSERVATION, A, hidden_sizes=(8,))], action_spec=spec)
    assert torch.equal(loss.normalize_action(torch.tensor(OTHERS[1])), torch.tensor([[-1.0] * A, [1.0] * A]))


def test_an_action_of_any_key_is_normalised():
    key = ("agent", "force")
    actor = make_pmoe_actor(OBSERVATION, *OTHERS[1], hidden_sizes=(8,), action_key=key)
    loss = PMOESACLoss(actor, [make_qvalue_network(OBSERVATION, A, hidden_sizes=(8,), action_key=key)])
    loss.set_keys(action=key)
    assert torch.equal(loss.normalize_action(torch.tensor(OTHERS[1])), torch.tensor([[-1.0] * A, [1.0] * A]))


@pytest.mark.parametrize("bounds", POWERS_OF_TWO)
def test_ppo_with_routing_ranks_normalised_actions(bounds):
    """With bounds that are powers of two the losses and the gradients of Q and router are the same to the last bit."""
    outs = []
    for b in (UNIT, bounds):
        torch.manual_seed(0)
        actor = make_pmoe_actor(OBSERVATION, *b, num_components=3, hidden_sizes=(16,), return_log_prob=True)
        critic, qvalue = (
            make_value_network(OBSERVATION, hidden_sizes=(16,)),
            make_qvalue_network(OBSERVATION, A, hidden_sizes=(16,)),
        )
        loss = PMOEPPOLoss(actor, critic, qvalue, routing=Frequency(), entropy_coeff=0.01)
        states = TensorDict(observation=torch.randn(32, OBSERVATION), batch_size=32)
        with torch.no_grad():
            actor(states)
        states["advantage"], states["value_target"] = torch.randn(2, 32, 1)
        out = loss(states)
        sum(out[key] for key in ("loss_qvalue", "loss_frequency", "loss_entropy")).backward()
        gradients = [parameter.grad for parameter in loss.parameters() if parameter.grad is not None]
        outs.append((out["loss_qvalue"], out["loss_frequency"], out["entropy"], *gradients))
    for unit, other in zip(*outs, strict=True):
        assert torch.equal(unit, other)


class NormalizedTask(gymnasium.Env):
    """One step an episode; what an action earns depends on where it lies between the bounds."""

    observation_space = Box(-1.0, 1.0, (OBSERVATION,), np.float32)

    def __init__(self, low: float = -1.0, high: float = 1.0) -> None:
        self.action_space = Box(np.float32(low), np.float32(high), (A,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, OBSERVATION).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        low, high = self.action_space.low.astype(float), self.action_space.high.astype(float)
        n = (action - (high + low) / 2) / ((high - low) / 2)
        return np.zeros(OBSERVATION, np.float32), -float(np.square(n - 0.5).sum()), True, False, {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """The checkpoint of a short run of the train command with these bounds."""
    gymnasium.register("NormalizedTask-v0", NormalizedTask)

    def train_command(low: float, high: float) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("run")
        words = ["algo=sac", "env.id=NormalizedTask-v0", f"+env.low={low}", f"+env.high={high}", "total_frames=264"]
        words += ["data.init_random_frames=64", "data.frames_per_epoch=264", "algo.hidden_sizes=[16]"]
        words += ["data.batch_size=32", "data.frames_per_batch=8", "logger=none", "callbacks=minimal", "compile=false"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train", *words, f"hydra.run.dir={folder}"])
            main()
        return read_checkpoint(folder / "checkpoints" / "last.ckpt")

    yield train_command
    del gymnasium.registry["NormalizedTask-v0"]


def test_the_train_command_learns_the_same_weights_with_every_power_of_two(trained):
    """Two hundred updates, with random actions, replay and evaluation of the real command."""
    unit, small = trained(-1.0, 1.0), trained(-(2.0**-7), 2.0**-7)
    assert unit["updates"] == small["updates"] == 200
    for name, tensor in unit["state_dict"].items():
        if not name.endswith((".low", ".high")):
            assert torch.equal(tensor, small["state_dict"][name]), name
    actions = (run["experience"][0]["replay"]["transitions"]["action"] for run in (unit, small))
    assert torch.equal(next(actions), next(actions) * 2.0**7)
    assert small["policy"]["description"]["action_units"] == "normalized"
