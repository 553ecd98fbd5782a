"""The Hamiltonian transform as mathematics: volume, reversibility, energy, stationarity, and its entropy bound.

Except where single precision is the point, in float64 with a tanh critic, which has curvature everywhere.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from modes import in_every_mode
from quadrature import TEST_FAILURE_RATE
from scipy.stats import kstest
from torch import Tensor

from pmoe_lightning.hamiltonian import HamiltonianTransform, Normalized, Raw, differentiable, make_hamiltonian_transform
from pmoe_lightning.hamiltonian.leapfrog import leapfrog
from pmoe_lightning.modules.critics import QValueNetwork, stacked_qvalue, stacked_qvalue_at
from pmoe_lightning.modules.distributions import TanhBounds, TanhGaussianMixture

OBSERVATION_DIM, A, ALPHA = 3, 2, 0.3
FORCES = ["raw", "normalized", "gated"]
every_force = pytest.mark.parametrize("force", FORCES)


def transform(force: str, action_dim: int = A, **arguments) -> HamiltonianTransform:
    """A transform whose gate, if it has one, is neither open nor closed and varies from state to state."""
    torch.manual_seed(0)
    strength = {} if force == "raw" else {"magnitude": 3.0}
    made = make_hamiltonian_transform(OBSERVATION_DIM, action_dim, force=force, **strength, **arguments).double()
    if force == "gated":
        for layer in (made.force.gate, made.force.direction):
            torch.nn.init.normal_(layer.weight)
            torch.nn.init.normal_(layer.bias)
    return made


def critics(action_dim: int = A, activation: str = "tanh") -> tuple[QValueNetwork, dict]:
    """Two critics of one architecture, as it and their stacked parameters."""
    networks = [QValueNetwork(OBSERVATION_DIM, action_dim, (16, 16), activation).double() for _ in range(2)]
    stacked = {
        name: torch.stack([dict(n.named_parameters())[name] for n in networks])
        for name, _ in networks[0].named_parameters()
    }
    parameters = {tuple(name.split(".")): value.detach() for name, value in stacked.items()}
    return networks[0], parameters


def states(batch: int = 64, action_dim: int = A, activation: str = "tanh") -> dict:
    """What a transform needs to know of some states, beside the actions there."""
    torch.manual_seed(1)
    network, parameters = critics(action_dim, activation)
    observation = torch.randn(batch, OBSERVATION_DIM, dtype=torch.float64)
    bounds = TanhBounds(torch.tensor([-2.0, 0.5]).double()[:action_dim], torch.tensor([1.0, 2.0]).double()[:action_dim])
    qvalue = stacked_qvalue_at(network, parameters, observation)
    return {"observation": observation, "qvalue": qvalue, "bounds": bounds, "alpha": ALPHA}


def starts(batch: int = 64, action_dim: int = A) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return tuple(torch.randn(batch, action_dim, dtype=torch.float64) for _ in range(2))


# -- critics and their derivative --------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("samples", [(), (4,), (2, 3)])
def test_the_critics_derivative_is_that_of_automatic_differentiation(activation, samples):
    torch.manual_seed(0)
    network, parameters = critics(activation=activation)
    observation, action = torch.randn(5, OBSERVATION_DIM).double(), torch.rand(*samples, 5, A).double()
    values, pullback = stacked_qvalue_at(network, parameters, observation)(action)

    def reference(at: Tensor) -> Tensor:
        return stacked_qvalue(*network.stacked_layers(parameters), network.layers[1], observation, at)

    expected, expected_pullback = differentiable(reference)(action)
    torch.testing.assert_close(values, expected)
    weights = torch.randn_like(values)
    torch.testing.assert_close(pullback(weights), expected_pullback(weights))


# -- the dynamics ------------------------------------------------------------------------------------------------------
@every_force
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_map_preserves_volume(force, temperature):
    """log|det| of (u, rho) -> (u_L, rho_L) by central differences: 0, and -(A/2) log T_0 where tempering cools."""
    evolve, at = transform(force, temperature=temperature, step_size=0.2), states(8)
    start = torch.cat(starts(8), -1)

    def end(point: Tensor) -> Tensor:
        positions, momentum, *_ = evolve.trajectory(*point.split(A, -1), **at)
        return torch.cat([positions[-1], momentum], -1).detach()

    h = 1e-5
    shifts = h * torch.eye(2 * A, dtype=torch.float64)
    columns = [(end(start + shift) - end(start - shift)) / (2 * h) for shift in shifts]
    log_det = torch.stack(columns, -1).det().abs().log()
    expected = torch.full_like(log_det, -A / 2 * math.log(temperature))
    torch.testing.assert_close(log_det, expected, atol=1e-7, rtol=0)
    assert (end(start) - start).abs().mean() > 0.1


@every_force
@in_every_mode
def test_the_map_is_undone_with_the_momentum_turned_round(force, mode):
    dtype, tolerance = mode.dtype, {torch.float64: 1e-12, torch.float32: 1e-5}[mode.dtype]
    evolve, at = transform(force, num_leapfrog_steps=5).to(dtype), states()
    network, parameters = critics()
    at["observation"] = at["observation"].to(dtype)
    parameters = {name: value.to(dtype) for name, value in parameters.items()}
    at["qvalue"] = stacked_qvalue_at(network, parameters, at["observation"])
    at["bounds"] = TanhBounds(at["bounds"].low.to(dtype), at["bounds"].high.to(dtype))
    u, momentum = (value.to(dtype) for value in starts())
    trajectory = mode.run(partial(evolve.trajectory, **at))
    positions, end_momentum, *_ = trajectory(u, momentum)
    end = positions[-1]
    back, back_momentum, *_ = trajectory(end, -end_momentum)
    for there, here in zip(positions, reversed(back), strict=True):
        torch.testing.assert_close(here, there, atol=tolerance, rtol=0)
    torch.testing.assert_close(-back_momentum, momentum, atol=tolerance, rtol=0)
    assert (end - u).abs().mean() > 0.1 and end.dtype is dtype


def test_the_energy_error_is_of_second_order():
    """Over a fixed time, |H_L - H_0| falls as eps^2: the slope fitted over a factor of 16.

    For the mean of the critics, which is smooth; the minimum has a kink where the critics cross.
    """
    at, (u, momentum) = states(), starts()
    numbers = [8, 16, 32, 64, 128]
    errors = []
    for number in numbers:
        evolve = transform("raw", num_leapfrog_steps=number, step_size=1.0 / number, critic_reduction="mean")
        errors.append(evolve(u, torch.zeros(len(u)), momentum, **at).energy_error.abs().mean().item())
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in ([1 / n for n in numbers], errors))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert slope.item() == pytest.approx(2.0, abs=0.1)
    assert errors[-1] < 1e-3


def test_a_force_is_evaluated_once_more_than_there_are_steps():
    calls = []
    leapfrog(torch.zeros(1, 1), torch.ones(1, 1), lambda u: calls.append(u) or -u, 0.1, 5)
    assert len(calls) == 6


def test_leapfrog_by_hand():
    """Two steps of eps = 1/2 on the harmonic oscillator, f = -u, from u = 1 at rest."""
    u, momentum = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for _ in range(2):
        momentum = momentum - 0.25 * u
        u = u + 0.5 * momentum
        momentum = momentum - 0.25 * u
    end, end_momentum = leapfrog(torch.ones(1).double(), torch.zeros(1).double(), lambda u: -u, 0.5, 2)
    torch.testing.assert_close((end, end_momentum), (u, momentum))


# -- Metropolis --------------------------------------------------------------------------------------------------------
def bimodal(action: Tensor) -> Tensor:
    """log of an equal mixture of N(-0.5, 0.25^2) and N(0.6, 0.15^2), as the value of two equal critics."""
    modes = [(-0.5, 0.25), (0.6, 0.15)]
    density = sum(torch.exp(-0.5 * ((action - m) / s) ** 2) / s for m, s in modes)
    return density.log().sum(-1).expand(2, *action.shape[:-1])


def draws_of_the_target(number: int) -> tuple[Tensor, Tensor]:
    """Exact draws of a ~ exp(Q(a) / alpha) on [-1, 1] by inversion, unsquashed, and the distribution on a grid."""
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    cumulative = (bimodal(grid.unsqueeze(-1))[0] / ALPHA).exp().cumsum(0)
    cumulative = (cumulative - cumulative[0]) / (cumulative[-1] - cumulative[0])
    uniform = torch.rand(number, dtype=torch.float64)
    position = torch.searchsorted(cumulative, uniform).clamp(1, len(grid) - 1)
    left, right = cumulative[position - 1], cumulative[position]
    action = grid[position - 1] + (grid[1] - grid[0]) * (uniform - left) / (right - left)
    return action.atanh().unsqueeze(-1), torch.stack([grid, cumulative])


def distance_after(force: str, metropolis: bool, number: int = 40_000):
    """The goodness of fit of actions that were drawn from the target and evolved once."""
    torch.manual_seed(3)
    evolve = transform(force, action_dim=1, step_size=0.25, num_leapfrog_steps=4)
    u, (grid, cumulative) = draws_of_the_target(number)
    bounds = TanhBounds(torch.tensor([-1.0]).double(), torch.tensor([1.0]).double())
    evolution = evolve(
        u,
        torch.zeros(number),
        evolve.sample_momentum(u),
        observation=torch.zeros(number, OBSERVATION_DIM).double(),
        qvalue=differentiable(bimodal),
        bounds=bounds,
        alpha=ALPHA,
        metropolis=metropolis,
    )
    assert (evolution.u != u).double().mean() > 0.05
    action = bounds.squash(evolution.u).squeeze(-1)

    def distribution(x):
        position = torch.searchsorted(grid, torch.as_tensor(x)).clamp(1, len(grid) - 1)
        share = (torch.as_tensor(x) - grid[position - 1]) / (grid[1] - grid[0])
        return (cumulative[position - 1] + share * (cumulative[position] - cumulative[position - 1])).numpy()

    return kstest(action.detach().numpy(), distribution)


@every_force
def test_the_target_is_stationary_with_metropolis_and_with_any_force(force):
    """Kolmogorov-Smirnov on 40,000 actions that start in the target. Fails for correct code with a chance of 1e-5."""
    assert distance_after(force, metropolis=True).pvalue > TEST_FAILURE_RATE


@every_force
def test_without_metropolis_it_is_not(force):
    """So that the test above has something to tell apart: the same steps are coarse enough to leave the target."""
    assert distance_after(force, metropolis=False).pvalue < TEST_FAILURE_RATE


# -- what scores the evolved action ------------------------------------------------------------------------------------
@every_force
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_the_cost_changes_by_alpha_times_the_energy_error(force, temperature):
    """alpha log pi_hat - Q at the end minus the same at the start is alpha (H_L - H_0), element by element."""
    evolve, at = transform(force, temperature=temperature, momentum_scale=0.7), states()
    (u, momentum), log_prob = starts(), torch.randn(64, dtype=torch.float64)
    evolution = evolve(u, log_prob, momentum, **at)

    def cost(u: Tensor, log_prob: Tensor) -> Tensor:
        value = at["qvalue"](at["bounds"].squash(u))[0].min(0).values
        return ALPHA * (log_prob - at["bounds"].log_abs_det_jacobian(u)) - value

    end_momentum = evolve.trajectory(u, momentum, **at).momentum
    heat = (end_momentum.square() - momentum.square() / temperature).sum(-1) / (2 * 0.7**2)
    torch.testing.assert_close(evolution.log_prob, log_prob + heat)
    change = cost(evolution.u, evolution.log_prob) - cost(u, log_prob)
    torch.testing.assert_close(change, ALPHA * evolution.energy_error)
    assert change.abs().mean() > 0.01


def entropies_after(force: str, temperature: float = 1.0) -> dict[str, float]:
    """What ``joint`` and ``base`` say of the entropy of an evolved action in A = 1, and what it is: ``exact``.

    A regular grid of starts (u_0, rho_0) carries the mass of the policy to its ends. The density of u_L is their
    histogram in cells of 0.02, whose error of about 1e-3 (found by halving the cells) is far below the gaps asserted.
    """
    evolve = transform(force, action_dim=1, temperature=temperature, step_size=0.15)
    policy = TanhGaussianMixture(
        torch.zeros(1).double(), torch.tensor([[0.3]]).double(), torch.tensor([[0.8]]).double()
    )
    hot = temperature**0.5
    axes = [torch.linspace(-6, 6, 501, dtype=torch.float64) * scale for scale in (0.8, hot)]
    u, momentum = (axis.reshape(-1, 1) for axis in torch.meshgrid(axes[0] + 0.3, axes[1], indexing="ij"))
    log_prob = policy.log_prob_unsquashed(u)
    mass = (log_prob - momentum.squeeze(-1).square() / (2 * temperature)).softmax(0)
    found = {}
    for scoring in ("joint", "base"):
        evolve.log_prob = scoring
        with torch.no_grad():
            evolution = evolve(
                u,
                log_prob,
                momentum,
                observation=torch.zeros(len(u), OBSERVATION_DIM).double(),
                qvalue=differentiable(lambda action: -2 * (action - 0.2).square().sum(-1).expand(2, len(u))),
                bounds=policy,
                alpha=ALPHA,
            )
        jacobian = policy.log_abs_det_jacobian(evolution.u)
        found[scoring] = (mass * (jacobian - evolution.log_prob)).sum().item()
    assert not evolution.stays.any()
    end, width = evolution.u.squeeze(-1), 0.02
    cells = ((end - end.min()) / width).long()
    probability = torch.zeros(int(cells.max()) + 1, dtype=torch.float64).index_add_(0, cells, mass)
    entropy = -torch.special.xlogy(probability, probability / width).sum() + (mass * jacobian).sum()
    return found | {"exact": entropy.item()}


@every_force
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_joint_is_a_lower_bound_on_the_entropy(force, temperature):
    found = entropies_after(force, temperature)
    assert found["joint"] < found["exact"] - 0.02


def test_base_overstates_the_entropy_where_the_dynamics_draw_actions_together():
    found = entropies_after("raw")
    assert found["base"] > found["exact"] + 0.1


def test_rejected_elements_keep_draw_and_density_and_send_finite_gradients():
    """Critics that are steep, huge, infinite or no number: in single precision, nothing of it comes out."""
    steepness = torch.tensor([1e-3, 1e6, 1e20, 1e38, float("inf"), float("nan")])

    def stiff(action: Tensor) -> Tensor:
        return -(steepness * (action.square().sum(-1) - 1).square() / 0.3).expand(2, *action.shape[:-1])

    for force in FORCES:
        evolve = transform(force, num_leapfrog_steps=5, step_size=0.2, learn_step_size=True).float()
        u = torch.randn(7, 6, A)
        log_prob = torch.randn(7, 6)
        evolution = evolve(
            u,
            log_prob,
            torch.randn(6, A),
            observation=torch.zeros(6, OBSERVATION_DIM),
            qvalue=differentiable(stiff),
            bounds=TanhBounds(-torch.ones(A), torch.ones(A)),
            alpha=torch.tensor(1e-3),
        )
        stays = evolution.stays
        assert stays[:, 4:].all() and not stays[:, 0].all()
        assert torch.equal(evolution.u[stays], u[stays]) and torch.equal(evolution.log_prob[stays], log_prob[stays])
        assert evolution.u.isfinite().all() and evolution.log_prob.isfinite().all()
        report = evolve.diagnose(u, evolution, TanhBounds(-torch.ones(A), torch.ones(A)))
        assert all(value.isfinite() for value in report.values())
        assert report["hamiltonian_nonfinite"] >= 2 / 6
        (evolution.u.sum() + evolution.log_prob.sum()).backward()
        gradients = [parameter.grad for parameter in evolve.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_the_gradient_of_the_step_size_is_exact_for_a_critic_that_is_linear_in_the_action():
    """Against central differences, for every force."""
    slope = torch.tensor([1.5, -2.0], dtype=torch.float64)
    for force in FORCES:
        evolve, at = transform(force, step_size=0.2, learn_step_size=True), states(5)
        at["qvalue"] = differentiable(lambda action: (action @ slope).expand(2, *action.shape[:-1]))
        u, momentum = starts(5)

        def cost(logit: Tensor, evolve=evolve, at=at, u=u, momentum=momentum) -> Tensor:
            evolve.step_size_logit.data = logit
            evolution = evolve(u, torch.zeros(5).double(), momentum, **at)
            return (evolution.log_prob - evolution.u.sum(-1)).sum()

        h, logit = 1e-6, evolve.step_size_logit.data.clone()
        expected = (cost(logit + h) - cost(logit - h)) / (2 * h)
        cost(logit).backward()
        assert evolve.step_size_logit.grad.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)


@every_force
def test_no_derivative_leads_from_the_evolved_action_to_the_drawn_one(force):
    """It would lack the curvature of the critics. The value of the draw has the derivative that autograd finds."""
    evolve, at = transform(force), states()
    u, momentum = starts()
    u.requires_grad_()
    evolution = evolve(u, torch.zeros(64).double(), momentum, **at)
    assert (evolution.u != u).all()
    reached = (evolution.u.sum() + evolution.log_prob.sum() + evolution.qvalue.sum()).requires_grad
    assert reached == any(parameter.requires_grad for parameter in evolve.parameters())
    outcomes = evolution.u.sum() + evolution.log_prob.sum() + evolution.qvalue.sum() + 0 * u.sum()
    assert not torch.autograd.grad(outcomes, u, retain_graph=True)[0].any()
    expected = at["qvalue"](at["bounds"].squash(u))[0].min(0).values
    torch.testing.assert_close(evolution.drawn_qvalue, expected)
    found, expected = (torch.autograd.grad(value.sum(), u)[0] for value in (evolution.drawn_qvalue, expected))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["min", "mean"])
def test_the_gradient_is_that_of_the_reduced_critics(reduction):
    evolve, at = transform("raw", critic_reduction=reduction), states()
    action = torch.rand(64, A, dtype=torch.float64)
    value, gradient = evolve._value_and_gradient(at["qvalue"], action)
    leaf = action.requires_grad_()
    values = at["qvalue"](leaf)[0]
    expected = values.min(0).values if reduction == "min" else values.mean(0)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


# -- switches ----------------------------------------------------------------------------------------------------------
def test_a_normalized_force_has_its_magnitude_whatever_the_gradient():
    force = Normalized(magnitude=3.0)
    gradient = torch.tensor([[3e2, 4e2], [3e18, 4e18], [0.0, 0.0], [3e-3, 4e-3]])
    expected = torch.tensor([[1.8, 2.4], [1.8, 2.4], [0.0, 0.0], [9e-3, 12e-3]])
    torch.testing.assert_close(
        force(torch.zeros(4, OBSERVATION_DIM), gradient, gradient), expected, rtol=1e-3, atol=1e-6
    )


def test_a_gated_force_starts_near_the_normalized_one():
    torch.manual_seed(0)
    evolve = make_hamiltonian_transform(OBSERVATION_DIM, A, force="gated", magnitude=2.0)
    observation, u, gradient = torch.randn(100, OBSERVATION_DIM), torch.randn(100, A), torch.randn(100, A)
    gated, plain = evolve.force(observation, u, gradient), Normalized(magnitude=2.0)(observation, u, gradient)
    assert (gated - 0.95 * plain).norm(dim=-1).max() < 0.05 * 2.0 * A**0.5
    assert not torch.equal(gated, 0.95 * plain)


@pytest.mark.parametrize("learned", [False, True])
def test_the_step_size_is_what_was_asked_for_and_stays_bounded(learned):
    evolve = HamiltonianTransform(Raw(), step_size=0.05, learn_step_size=learned)
    assert evolve.step_size.item() == pytest.approx(0.05)
    assert len(list(evolve.parameters())) == learned
    for logit, bound in ((-1e3, 0.0), (1e3, 0.2)):
        evolve.step_size_logit.data.fill_(logit)
        assert evolve.step_size.item() == pytest.approx(bound)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_leapfrog_steps": -1}, "num_leapfrog_steps=-1 must be a whole number >= 0 and <= 1000"),
        ({"step_size": 0.0}, "step_size=0.0 must be a finite number > 0"),
        ({"step_size": float("nan")}, "step_size=nan must be a finite number > 0"),
        ({"momentum_scale": -1.0}, "momentum_scale=-1.0 must be a finite number > 0"),
        ({"temperature": 0.5}, "temperature=0.5 must be a finite number >= 1"),
        ({"temperature": 2.0, "metropolis": True}, "metropolis needs temperature=1"),
        ({"log_prob": "exact"}, "log_prob='exact' must be one of joint, base"),
        ({"critic_reduction": "max"}, "critic_reduction='max' must be one of min, mean"),
        ({"used_in": ["evaluation"]}, "used_in=.* must be a list, each element one of acting"),
        ({"used_in": ["acting"]}, "learns from the actor loss"),
        ({"magnitude": 0.0}, "magnitude=0.0 must be a finite number > 0"),
        ({"force": "strong"}, "force='strong' must be one of raw, normalized, gated"),
    ],
)
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_hamiltonian_transform(OBSERVATION_DIM, A, **arguments)
