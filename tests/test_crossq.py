"""CrossQ's critics: the folded forms against normalisation as a layer, and what may and may not move the statistics."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from tensordict import TensorDict, from_modules
from test_sac_update import OBSERVATION_DIM, TAU, A, B, make, minibatches
from torch import nn
from torch.utils.data import DataLoader

from pmoe_lightning.algorithms import make_sac
from pmoe_lightning.estimators import Marginalized
from pmoe_lightning.modules.actors import make_pmoe_actor
from pmoe_lightning.modules.critics import (
    LayerNormNetwork,
    QValueNetwork,
    make_layer_norm_network,
    stacked_qvalue,
    stacked_qvalue_at,
)
from pmoe_lightning.modules.crossq import CrossQNetwork, make_crossq_network
from pmoe_lightning.updates import SACUpdate

SIZES = (12, 8)


def critics(seed: int = 0, **arguments) -> tuple[list[CrossQNetwork], TensorDict]:
    """Two critics with statistics, gains and offsets of all kinds, and their parameters, stacked."""
    torch.manual_seed(seed)
    networks = [CrossQNetwork(OBSERVATION_DIM, A, SIZES, **arguments).double() for _ in range(2)]
    for network in networks:
        for norm in network.norms:
            for value in (norm.weight, norm.running_var):
                value.data.uniform_(0.5, 2.0)
            for value in (norm.bias, norm.running_mean):
                value.data.normal_()
    return networks, from_modules(*networks, as_module=True)


def inputs(rows: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    observation = 3 * torch.randn(rows, OBSERVATION_DIM, generator=generator, dtype=torch.float64) + 2
    return observation, torch.rand(rows, A, generator=generator, dtype=torch.float64) * 2 - 1


def as_layers(network: CrossQNetwork, make_norm) -> nn.Sequential:
    """The same critic with layers between its layers."""
    linears = [layer for layer in network.layers if isinstance(layer, nn.Linear)]
    layers: list[nn.Module] = []
    for k, (norm, linear) in enumerate(zip(network.norms, linears, strict=True)):
        layers += [*([copy.copy(network.activation)] if k else []), make_norm(norm), linear]
    return nn.Sequential(*layers)


def batch_norm(norm: nn.Module) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(len(norm.weight), eps=1e-3).double()
    layer.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
    return layer


class Renormalization(nn.Module):
    """Ioffe (2017), algorithm 1, as it stands there."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mu, sigma = self.norm.running_mean, (self.norm.running_var + 1e-3).sqrt()
        batch_mu, batch_sigma = x.mean(0), (((x - x.mean(0)) ** 2).mean(0) + 1e-3).sqrt()
        r = torch.maximum(torch.minimum(batch_sigma / sigma, torch.tensor(3.0)), torch.tensor(1 / 3)).detach()
        d = torch.maximum(torch.minimum((batch_mu - mu) / sigma, torch.tensor(5.0)), torch.tensor(-5.0)).detach()
        return ((x - batch_mu) / batch_sigma * r + d) * self.norm.weight + self.norm.bias


def test_the_frozen_form_is_batch_normalisation_in_eval_mode():
    """In single precision, by every way that critics are asked."""
    networks, _ = critics()
    networks = [network.float() for network in networks]
    parameters = from_modules(*networks, as_module=True)
    observation, action = (value.float() for value in inputs())
    x = torch.cat([observation, action], -1)
    expected = torch.stack([as_layers(n, lambda norm: batch_norm(norm).float()).eval()(x) for n in networks])[..., 0]
    alone = torch.stack([network(observation, action) for network in networks])[..., 0]
    layers = networks[0].stacked_layers(parameters)
    together = stacked_qvalue(*layers, networks[0].activation, observation, action)
    known, pullback = stacked_qvalue_at(networks[0], parameters, observation)(action)
    for found in (alone, together, known):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    action.requires_grad_()
    slope = torch.autograd.grad(sum(network(observation, action).sum() for network in networks), action)[0]
    torch.testing.assert_close(pullback(torch.ones_like(known)), slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(
    ("warm_up", "make_norm"), [(10, lambda norm: batch_norm(norm)), (0, Renormalization)], ids=["plain", "renormalised"]
)
def test_the_training_form_is_that_normalisation_as_a_layer(warm_up, make_norm, activation):
    """Values and every gradient, those through the statistics of the batch too; some of r and d are cut off."""
    networks, parameters = critics(warm_up=warm_up, activation=activation)
    observation, action = inputs()
    values, _ = networks[0].training_values(parameters, observation, action)
    weights = torch.randn_like(values)
    leaves = {name: leaf for name, leaf in parameters.flatten_keys(".").items() if leaf.requires_grad}
    slopes = dict(zip(leaves, torch.autograd.grad((weights * values).sum(), list(leaves.values())), strict=True))
    for critic, network in enumerate(networks):
        layers = as_layers(network, make_norm)
        expected = layers(torch.cat([observation, action], -1)).squeeze(-1)
        torch.testing.assert_close(values[critic], expected)
        (weights[critic] * expected).sum().backward()
        for k in range(3):
            norm, linear = layers[3 * k], layers[3 * k + 1]
            norm = getattr(norm, "norm", norm)
            for kind in ("weight", "bias"):
                torch.testing.assert_close(slopes[f"norms.{k}.{kind}"][critic], getattr(norm, kind).grad)
                torch.testing.assert_close(slopes[f"layers.{2 * k}.{kind}"][critic], getattr(linear, kind).grad)


def test_running_statistics_follow_the_batch():
    networks, parameters = critics(momentum=0.75)
    observation, action = inputs()
    before = parameters.clone()
    _, after = networks[0].training_values(parameters, observation, action)
    assert set(after) == set(networks[0].statistics)
    x = torch.cat([observation, action], -1)
    for name, of_batch in (("running_mean", x.mean(0)), ("running_var", x.var(0, unbiased=False))):
        expected = 0.75 * before["norms", "0", name] + 0.25 * of_batch
        torch.testing.assert_close(after["norms", "0", name], expected)
    hidden = nn.Sequential(*as_layers(networks[1], batch_norm)[:3])(x)
    expected = 0.75 * before["norms", "1", "running_var"][1] + 0.25 * hidden.var(0, unbiased=False)
    torch.testing.assert_close(after["norms", "1", "running_var"][1], expected)
    assert after["num_updates"].tolist() == [1, 1]
    assert all(bool((parameters[key] == before[key]).all()) for key in networks[0].statistics), "nothing is changed yet"


def test_observations_far_from_zero_do_not_cancel():
    """As positions along a track are: a mean a hundred thousand times the deviation, in single precision."""
    networks, parameters = critics()
    observation, action = inputs()
    far = observation + 1e5
    exact, _ = networks[0].training_values(parameters, far, action)
    single = from_modules(*(network.float() for network in networks), as_module=True)
    found, _ = networks[0].training_values(single, far.float(), action.float())
    assert (found - exact).abs().max() < 0.05 * exact.std()


def test_weights_start_as_lecun_normal():
    torch.manual_seed(0)
    network = CrossQNetwork(300, 100, (400,))
    weight = network.layers[0].weight * 400**0.5
    assert abs(weight.std().item() - 1) < 5 / (2 * weight.numel()) ** 0.5  # five standard errors of a deviation
    assert weight.abs().max() <= 2 / 0.8796 + 1e-4 and not network.layers[0].bias.any()


# -- in the loss -------------------------------------------------------------------------------------------------------
@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_each_loss_reaches_its_own_parameters_and_the_actor_moves_no_statistic(double_precision):
    loss, _ = make(critic="crossq")
    loss.take_statistics(loss(minibatches(1)[0])["statistics"])
    before = {name: value.clone() for name, value in loss.statistics().items()}
    out = loss(minibatches(2)[1])
    assert not [name for name, _ in loss.named_children() if name.startswith("target_")]
    reached = {"loss_actor": "actor_network_params", "loss_qvalue": "qvalue_network_params", "loss_alpha": "log_alpha"}
    for name, owner in reached.items():
        loss.zero_grad()
        out[name].backward(retain_graph=True)
        touched = {key.split(".")[0] for key, p in loss.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched == {owner}
    loss.actor_loss(minibatches(2)[1])
    for name, value in loss.statistics().items():
        assert torch.equal(value, before[name]) and not torch.equal(value, out["statistics"][name])


def test_the_target_is_what_the_joint_pass_says_of_the_next_action(double_precision):
    loss, _ = make(critic="crossq")
    batch = minibatches(1)[0]
    torch.manual_seed(4)
    out = loss.critic_losses(batch.clone())
    torch.manual_seed(4)
    following = loss._next_action(batch["next"])
    observation = torch.cat([batch["observation"], batch["next", "observation"]])
    action = torch.cat([loss.normalize_action(batch["action"]), following.action])
    network, parameters = loss.qvalue_network.module, loss.qvalue_network_params["module"]
    here, after = network.training_values(parameters, observation, action)[0].split(B, 1)
    value = after.min(0).values - loss.log_alpha.exp() * following.log_prob
    target = batch["next", "reward"][:, 0] + 0.9 * ~batch["next", "terminated"][:, 0] * value
    torch.testing.assert_close(out["loss_qvalue"], ((here - target.detach()) ** 2).sum(0).mean())


def test_the_actor_has_its_turn_in_every_third_update(double_precision):
    loss, optimizer = make(critic="crossq")
    update = SACUpdate(loss, optimizer, tau=TAU, policy_delay=3, compile=False)
    names, moved = ("actor_network_params", "log_alpha", "qvalue_network_params"), []
    for i in range(6):
        before = {key: value.clone() for key, value in loss.named_parameters()}
        out = update(minibatches(6)[i : i + 1], i)
        changed = {key for key, value in loss.named_parameters() if not torch.equal(value, before[key])}
        moved.append([any(key.startswith(name) for key in changed) for name in names])
        assert ("loss_actor" in out) is (i in (2, 5)) and out["loss_qvalue"].shape == (1,)
    assert moved == [[i in (2, 5), i in (2, 5), True] for i in range(6)]
    whole = SACUpdate(*make(critic="crossq"), tau=TAU, policy_delay=3, compile=False)(minibatches(6))
    assert (len(whole["loss_actor"]), len(whole["loss_qvalue"])) == (2, 6)


def by_lightning(batches: list[TensorDict], **arguments):
    torch.manual_seed(0)
    actor = make_pmoe_actor(OBSERVATION_DIM, [-1.0] * A, [1.0] * A, num_components=2, hidden_sizes=SIZES)
    settings = {"lr": 1e-3, "make_critic": partial(make_crossq_network, hidden_sizes=SIZES)}
    sizes = {"observation_dim": OBSERVATION_DIM, "action_dim": A, "hidden_sizes": SIZES}
    algorithm = make_sac(actor, Marginalized(), **sizes, **settings, **arguments)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = Trainer(accelerator="cpu", max_epochs=1, **quiet)
    loader = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    trainer.fit(algorithm, loader)
    return algorithm


@pytest.mark.parametrize("where", ["observation", ("next", "observation")])
def test_an_observation_that_is_not_a_number_changes_no_weight_and_no_statistic(where, double_precision):
    sick = minibatches(2)
    sick.get(where)[1, 3, 2] = torch.nan
    runs = [by_lightning([batch], policy_delay=3) for batch in (minibatches(2)[:1], sick)]
    first, second = (run.loss.state_dict() for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    loss, optimizer = make(critic="crossq")
    update = SACUpdate(loss, optimizer, tau=TAU, policy_delay=3, compile=False)
    update(sick[:1])
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    assert not update(sick[1:], 1)["gradient_norm"].isfinite()
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_statistics_that_overflow_are_not_taken(double_precision):
    """With a variance beyond the largest number the critics are constants, whose gradient is finite."""
    loss, optimizer = make(critic="crossq")
    batch = minibatches(1)
    batch["observation"][0, 0, 0] = 1e200
    SACUpdate(loss, optimizer, tau=TAU, compile=False)(batch)
    assert all(value.isfinite().all() for value in loss.state_dict().values())


def test_lightning_takes_the_updates_of_the_graph_in_the_same_turns(double_precision):
    """The phase of the delay runs on across Lightning's batches."""
    arguments = {"policy_delay": 3, "betas": (0.5, 0.999)}
    readable = by_lightning(list(minibatches(8).split(4)), **arguments)
    compiled = by_lightning([], **arguments)
    update = SACUpdate(compiled.loss, compiled.configure_optimizers(), tau=0.005, policy_delay=3, compile=False)
    for start in (0, 4):
        update(minibatches(8)[start : start + 4], start)
    assert readable.updates == 8
    for name, value in compiled.loss.state_dict().items():
        torch.testing.assert_close(readable.loss.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("stop", [7, 8])
def test_a_run_that_stops_between_two_turns_goes_on_to_the_last_bit(stop, double_precision):
    """Seven or eight of twelve updates, then a state dict of the loss and of the optimizer, and their number."""

    def begin():
        loss, optimizer = make(critic="crossq")
        return loss, optimizer, SACUpdate(loss, optimizer, tau=TAU, policy_delay=3, compile=False)

    first, optimizer, update = begin()
    torch.manual_seed(0)
    update(minibatches(12)[:stop])
    drawn = torch.get_rng_state()
    resumed, its_optimizer, update = begin()
    resumed.load_state_dict(first.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.set_rng_state(drawn)
    update(minibatches(12)[stop:], stop)
    torch.manual_seed(0)
    whole, _, update = begin()
    update(minibatches(12))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# -- layer normalisation -----------------------------------------------------------------------------------------------
def test_layer_normalised_critics_are_asked_alike_in_every_way():
    """And the force that a transform is given at a point is the slope of Q there: between kinks it changes."""
    torch.manual_seed(0)
    networks = [LayerNormNetwork(OBSERVATION_DIM, A, SIZES).double() for _ in range(2)]
    for network in networks:
        for norm in network.norms:
            norm.weight.data.uniform_(0.5, 2.0)
            norm.bias.data.normal_()
    parameters = from_modules(*networks, as_module=True)
    observation, action = inputs()
    actions = torch.stack([action, action / 2, -action]).requires_grad_()
    states = observation.expand(3, *observation.shape)
    expected = torch.stack([network(states, actions) for network in networks])[..., 0]
    layers, norms = networks[0].stacked_layers(parameters), networks[0].layer_norms(parameters)
    found = stacked_qvalue(*layers, networks[0].activation, observation, actions, None, norms)
    known, pullback = stacked_qvalue_at(networks[0], parameters, observation)(actions.detach())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(known, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(pullback(weights), torch.autograd.grad((weights * expected).sum(), actions)[0])
    small = actions.detach() + 1e-7
    moved = stacked_qvalue_at(networks[0], parameters, observation)(small)[1](weights) - pullback(weights)
    assert (moved.abs() > 0).double().mean() > 0.9


def test_the_factories_name_what_they_read_and_write():
    for make_network, kind in ((make_crossq_network, CrossQNetwork), (make_layer_norm_network, LayerNormNetwork)):
        network = make_network(OBSERVATION_DIM, A, hidden_sizes=SIZES, observation_key="seen")
        assert network.in_keys == ["seen", "action"] and isinstance(network.module, kind)
        assert isinstance(network.module, QValueNetwork)
        data = TensorDict(seen=torch.zeros(3, OBSERVATION_DIM), action=torch.zeros(3, A), batch_size=3)
        assert network(data)["state_action_value"].shape == (3, 1)
    with pytest.raises(ValueError, match="momentum=1.0 must be"):
        make_crossq_network(OBSERVATION_DIM, A, momentum=1.0)


@pytest.mark.parametrize("betas", [(0, 0), [0.0, 0.5]], ids=str)
def test_an_optimizer_without_memory_takes_its_step(betas):
    algorithm = by_lightning([minibatches(1)], betas=betas, policy_delay=1000)
    assert algorithm.updates == 1 and algorithm.betas == tuple(betas)


@pytest.mark.parametrize("betas", [(0.5,), (0.5, 0.9, 0.9)], ids=str)
def test_other_than_two_betas_are_refused(betas):
    with pytest.raises(ValueError, match="SAC: betas=.* must be two numbers, such as"):
        by_lightning([], betas=betas)


def test_a_minibatch_of_one_row_has_the_statistics_of_two(double_precision):
    """s and s' in one pass."""
    loss, optimizer = make(critic="crossq")
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    SACUpdate(loss, optimizer, tau=TAU, compile=False)(minibatches(2)[:, :1])
    after = loss.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(*(found["qvalue_network_params.module.norms.1.running_var"] for found in (before, after)))


def test_critics_that_learn_from_a_batch_need_a_reduction(double_precision):
    loss, _ = make(critic="crossq")
    with pytest.raises(ValueError, match="use reduction='mean'"):
        type(loss)(loss.actor_network, [make_crossq_network(OBSERVATION_DIM, A)] * 2, reduction="none")
