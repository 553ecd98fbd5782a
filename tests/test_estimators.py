"""Every gradient estimator against the exact gradient, and what each of them claims for itself.

A new estimator adds one row to ESTIMATORS; the shared tests of the first half then run on it. A test of the second half
belongs to one estimator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from statistics import NormalDist
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from modes import Mode, in_every_mode
from quadrature import (
    Parameters,
    assert_mean,
    bounds,
    expectation_and_gradient,
    log_abs_det_jacobian,
    parameters,
    repeat,
    squash,
)
from torch import Tensor

from pmoe_lightning import estimators
from pmoe_lightning.estimators import (
    AbstractEstimator,
    Frequency,
    GumbelSoftmax,
    Implicit,
    Marginalized,
    ObjectiveValue,
    Pathwise,
    Surrogate,
    check_pair,
)
from pmoe_lightning.estimators import HalfReparameterized as Half
from pmoe_lightning.estimators import ScoreFunction as Score
from pmoe_lightning.estimators.implicit import _centred_distribution, implicit_rsample
from pmoe_lightning.modules.distributions import TanhGaussianMixture


class Row(NamedTuple):
    name: str
    estimator: AbstractEstimator
    components: tuple[int, ...]
    """Values of K to test with."""
    unbiased: bool
    """For every K above."""
    evaluations: Callable[[int], tuple[int, int]]
    """How many actions per state the objective sees, given K, and how many of them with a graph for the gradient."""
    draws: int = 20_000
    """Single estimates whose mean is compared with the exact gradient; more for those of high variance."""


EVERY_SWITCH = {"backpropagate": "all", "log_prob": "mixture", "reduction": "sum", "rank_by": "soft_q", "weight": 0.5}
ESTIMATORS = (
    Row("marginalized", Marginalized(), (1, 3), unbiased=True, evaluations=lambda K: (K, K)),
    Row("pathwise", Pathwise(), (1,), unbiased=True, evaluations=lambda K: (1, 1)),
    Row("implicit", Implicit(), (1, 3), unbiased=True, evaluations=lambda K: (1, 1)),
    Row("half", Half(num_samples=1, baseline="none"), (1, 3), True, lambda K: (1, 1), draws=60_000),
    Row("half_loo", Half(num_samples=2, baseline="leave_one_out"), (1, 3), True, lambda K: (2, 2)),
    Row("half_mean", Half(num_samples=3, baseline="mean"), (1, 3), unbiased=False, evaluations=lambda K: (3, 3)),
    Row("score", Score(num_samples=1, baseline="none"), (1, 3), True, lambda K: (1, 0), draws=100_000),
    Row("score_loo", Score(num_samples=4, baseline="leave_one_out"), (1, 3), True, lambda K: (4, 0)),
    Row("score_mean", Score(num_samples=4, baseline="mean"), (1, 3), unbiased=False, evaluations=lambda K: (4, 0)),
    Row("gumbel", GumbelSoftmax(), (1, 3), unbiased=False, evaluations=lambda K: (1, 1)),
    Row("gumbel_soft", GumbelSoftmax(temperature=0.3, straight_through=False), (1, 3), False, lambda K: (1, 1)),
    Row("frequency", Frequency(), (1, 3), False, lambda K: (K, K)),
    Row("frequency_all", Frequency(**EVERY_SWITCH), (1, 3), unbiased=False, evaluations=lambda K: (K, K)),
)
CASES = [pytest.param(row, K, id=f"{row.name}-{K}") for row in ESTIMATORS for K in row.components]
UNBIASED = [pytest.param(row, K, id=f"{row.name}-{K}") for row in ESTIMATORS if row.unbiased for K in row.components]


def gaussian_bump(a: Tensor, center: tuple[float, float], width: float) -> Tensor:
    center = torch.tensor(center, dtype=a.dtype)[: a.shape[-1]]
    return (-(a - center).square().sum(-1) / width).exp()


COSTS = {
    "constant": lambda a: torch.full_like(a[..., 0], 2.5),
    "linear": lambda a: a @ torch.tensor([1.0, -0.5], dtype=a.dtype)[: a.shape[-1]],
    "quadratic": lambda a: (a - 0.4).square().sum(-1),
    "bimodal": lambda a: -gaussian_bump(a, (1.0, 1.0), 0.3) - 0.8 * gaussian_bump(a, (-0.8, -0.8), 0.5),
    "sharp_bimodal": lambda a: -gaussian_bump(a, (-0.2, 1.0), 0.04) - 0.8 * gaussian_bump(a, (-1.2, 1.6), 0.06),
    "many_modal": lambda a: 0.3 * (5 * a).cos().sum(-1),
}


def soft_objective(mixture: TanhGaussianMixture, cost: Callable[[Tensor], Tensor], alpha: float):
    """cost(a) + alpha log pi(a), as SAC has it with cost = -Q."""

    def objective(u: Tensor, log_prob: Tensor) -> ObjectiveValue:
        log_prob = log_prob - mixture.log_abs_det_jacobian(u)
        qvalue = -cost(mixture.squash(u))
        return ObjectiveValue(alpha * log_prob - qvalue, log_prob, qvalue)

    return objective


def random_leaves(*batch: int, K: int, A: int = 2, dtype: torch.dtype = torch.float64) -> Parameters:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(*batch, K, generator=generator, dtype=dtype)
    loc = torch.randn(*batch, K, A, generator=generator, dtype=dtype)
    scale = 0.3 + torch.rand(*batch, K, A, generator=generator, dtype=dtype)
    return Parameters(*(value.requires_grad_() for value in (logits, loc, scale)))


EXACT = Mode(torch.float64)


def estimate(
    estimator: AbstractEstimator,
    leaves: Parameters,
    *,
    cost: str = "quadratic",
    alpha: float = 0.2,
    seed=0,
    mode: Mode = EXACT,
):
    """The surrogate and its gradient with respect to every leaf."""

    def surrogate_of(*leaves: Tensor) -> Surrogate:
        mixture = TanhGaussianMixture(*leaves, *(bound.to(leaves[1].dtype) for bound in bounds(leaves[1].shape[-1])))
        return estimator(mixture, soft_objective(mixture, COSTS[cost], alpha))

    torch.manual_seed(seed)
    surrogate = mode.run(surrogate_of)(*leaves)
    gradient = torch.autograd.grad(surrogate.loss.sum(), leaves, retain_graph=True, materialize_grads=True)
    return surrogate, Parameters(*gradient)


# --- shared: every row of the table ----------------------------------------------------------------------------------


def test_the_table_names_every_estimator():
    assert {type(row.estimator) for row in ESTIMATORS} == set(estimators.ESTIMATORS.values())


def test_an_estimator_is_named_by_its_file_as_by_its_choice():
    """So benchmarks that are about all of them find a new one."""
    choices = {path.stem for path in (ROOT / "conf" / "estimator").glob("*.yaml")}
    assert {*estimators.ESTIMATORS, "none"} == choices
    exported = [getattr(estimators, name) for name in estimators.__all__]
    concrete = {cls for cls in exported if isinstance(cls, type) and issubclass(cls, AbstractEstimator)}
    assert set(estimators.ESTIMATORS.values()) == concrete - {AbstractEstimator}


def test_a_name_of_before_is_the_same():
    assert estimators.Evaluation is ObjectiveValue


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("action_dim", [1, 2])
@pytest.mark.parametrize(("row", "num_components"), UNBIASED)
def test_unbiased(row, num_components, action_dim, cost, alpha):
    """Cost, entropy and the gradient of every parameter, against quadrature; thousands of single estimates."""
    low, high = bounds(action_dim)
    exact = parameters(num_components, action_dim)

    def function(u, log_prob):
        return COSTS[cost](squash(u, low, high)) + alpha * (log_prob - log_abs_det_jacobian(u, low, high))

    def squashed_log_prob(u, log_prob):
        return log_prob - log_abs_det_jacobian(u, low, high)

    value, gradient = expectation_and_gradient(exact, function, spacing=0.1)
    log_prob, _ = expectation_and_gradient(exact, squashed_log_prob)
    surrogate, estimates = estimate(row.estimator, repeat(exact, row.draws), cost=cost, alpha=alpha)
    assert_mean(surrogate.expected_cost.detach(), value, resolution=0.08)
    assert_mean(surrogate.log_prob, log_prob, resolution=0.08)
    for drawn, expected in zip(estimates, gradient, strict=True):
        assert_mean(drawn, expected, resolution=0.12)


REPARAMETERISED = [row for row in ESTIMATORS if not isinstance(row.estimator, Score)]


@pytest.mark.parametrize("row", REPARAMETERISED, ids=lambda row: row.name)
def test_all_agree_at_one_component(row):
    """Not only on average: the same noise gives the same estimate, that of plain reparameterisation.

    (The score function agrees in expectation, see ``test_unbiased``: it does not differentiate the cost.)
    """
    surrogate, gradient = estimate(row.estimator, random_leaves(32, K=1))
    draws = getattr(row.estimator, "num_samples", 1)
    repeated = Parameters(
        *(leaf.detach().expand(draws, *leaf.shape).requires_grad_() for leaf in random_leaves(32, K=1))
    )
    expected_surrogate, expected_gradient = estimate(Pathwise(), repeated)
    torch.testing.assert_close(surrogate.expected_cost, expected_surrogate.expected_cost.mean(0))
    torch.testing.assert_close(surrogate.log_prob, expected_surrogate.log_prob.mean(0))
    for mine, theirs in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(mine, theirs.mean(0))
    assert expected_gradient.loc.abs().min() > 0


@in_every_mode
@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
@pytest.mark.parametrize(("row", "num_components"), CASES)
def test_surrogate_keeps_the_contract(row, num_components, batch, mode):
    surrogate, gradient = estimate(row.estimator, random_leaves(*batch, K=num_components, dtype=mode.dtype), mode=mode)
    assert tuple(surrogate.auxiliary) == row.estimator.auxiliary_losses
    assert row.estimator.log_prob in ("component", "mixture")
    for value in (surrogate.expected_cost, surrogate.log_prob, surrogate.loss, *surrogate.auxiliary.values()):
        assert (value.shape, value.dtype) == (batch, mode.dtype)
    assert surrogate.expected_cost.requires_grad
    assert not surrogate.log_prob.requires_grad
    assert not any(value.requires_grad for value in surrogate.diagnostics.values())
    torch.testing.assert_close(surrogate.loss, surrogate.expected_cost + sum(surrogate.auxiliary.values()))
    assert all(value.isfinite().all() for value in gradient)
    check_pair(row.estimator, TanhGaussianMixture, num_components)


@pytest.mark.parametrize(("row", "num_components"), CASES)
def test_states_of_a_batch_do_not_mix(row, num_components):
    """The estimate for one state depends on its own parameters alone."""
    _, gradient = estimate(row.estimator, random_leaves(6, K=num_components))
    changed = random_leaves(6, K=num_components)
    with torch.no_grad():
        changed.loc[3:] += 1.0
    _, other = estimate(row.estimator, changed)
    for mine, theirs in zip(gradient, other, strict=True):
        torch.testing.assert_close(mine[:3], theirs[:3])


@pytest.mark.parametrize(("row", "num_components"), CASES)
def test_number_of_critic_evaluations(row, num_components):
    leaves = random_leaves(5, K=num_components)
    mixture, seen, differentiated = TanhGaussianMixture(*leaves), 0, 0

    def count(slope: Tensor) -> None:
        nonlocal differentiated
        differentiated += slope[..., 0].numel()

    def objective(u: Tensor, log_prob: Tensor) -> ObjectiveValue:
        nonlocal seen
        assert u.shape == (*log_prob.shape, 2)
        seen += log_prob.numel()
        u = u.clone()
        if u.requires_grad:
            u.register_hook(count)
        return ObjectiveValue(log_prob + u.sum(-1), log_prob, -log_prob)

    row.estimator(mixture, objective).loss.sum().backward()
    assert (seen / 5, differentiated / 5) == row.evaluations(num_components)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("row", "num_components"), CASES)
def test_gradients_stay_finite_on_extreme_parameters(row, num_components, dtype):
    """1e5 mixtures with weights down to 1e-30, scales from 1e-6 to 1e3, means to +-20, a third of them coincident.

    Most actions saturate. Coincident means with equal scales, and with unequal ones, are among them.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (100_000, num_components, 2)
    logits = math.log(1e-30) * torch.rand(shape[:-1], generator=generator)
    loc = 40 * torch.rand(shape, generator=generator) - 20
    scale = 10 ** (9 * torch.rand(shape, generator=generator) - 6)
    loc[:33_333], scale[:16_667] = loc[:33_333, :1], scale[:16_667, :1]
    leaves = Parameters(*(value.to(dtype).requires_grad_() for value in (logits, loc, scale)))
    surrogate, gradient = estimate(row.estimator, leaves, cost="bimodal")
    for values in (surrogate.loss, surrogate.log_prob, *gradient):
        assert values.isfinite().all()


def test_high_dimensions_and_many_components_stay_finite():
    """K = 16, A = 17, where densities of single components underflow; the same extremes."""
    generator = torch.Generator().manual_seed(0)
    shape = (1000, 16, 17)
    logits = math.log(1e-30) * torch.rand(shape[:-1], generator=generator)
    loc, scale = (
        40 * torch.rand(shape, generator=generator) - 20,
        10 ** (9 * torch.rand(shape, generator=generator) - 6),
    )
    for row in ESTIMATORS:
        if 3 not in row.components:
            continue
        leaves = Parameters(*(value.clone().requires_grad_() for value in (logits, loc, scale)))
        mixture = TanhGaussianMixture(*leaves)
        torch.manual_seed(0)
        surrogate = row.estimator(mixture, soft_objective(mixture, lambda a: a.square().sum(-1), 0.2))
        for values in (surrogate.loss, *torch.autograd.grad(surrogate.loss.sum(), leaves, materialize_grads=True)):
            assert values.isfinite().all(), row.name


# --- marginalized ----------------------------------------------------------------------------------------------------


def test_marginalized_is_the_weighted_sum_of_the_components():
    leaves = random_leaves(7, K=3)
    mixture = TanhGaussianMixture(*leaves)
    surrogate, _ = estimate(Marginalized(), leaves, cost="bimodal", alpha=0.3)
    torch.manual_seed(0)
    low, high = bounds(2)
    u = leaves.loc + leaves.scale * torch.randn_like(leaves.loc)
    log_prob = torch.stack([mixture.log_prob_unsquashed(u[:, k]) for k in range(3)], -1)
    log_prob = log_prob - log_abs_det_jacobian(u, low, high)
    cost = COSTS["bimodal"](squash(u, low, high)) + 0.3 * log_prob
    torch.testing.assert_close(surrogate.expected_cost, (mixture.weights * cost).sum(-1))
    torch.testing.assert_close(surrogate.log_prob, (mixture.weights * log_prob).sum(-1).detach())


# --- pathwise --------------------------------------------------------------------------------------------------------


def test_pathwise_refuses_several_components():
    refusals = (
        lambda: check_pair(Pathwise(), TanhGaussianMixture, 3),
        lambda: estimate(Pathwise(), random_leaves(4, K=3)),
    )
    for call in refusals:
        with pytest.raises(ValueError, match="Pathwise.*TanhGaussianMixture has 3 components.*actor=gaussian.*marg"):
            call()


# --- score function and half reparameterised: the mean baseline -------------------------------------------------------


@pytest.mark.parametrize("num_samples", [2, 4])
@pytest.mark.parametrize("estimator", [Half, Score])
def test_mean_baseline_shrinks_what_the_score_carries(estimator, num_samples):
    """E[(c_i - mean_j c_j) s_i] = (N-1)/N E[c s] for a score s of mean zero; the pathwise part is untouched."""
    mixture, (low, high) = parameters(3, 1), bounds(1)
    cost = COSTS["bimodal"]
    _, exact = expectation_and_gradient(mixture, lambda u, log_prob: cost(squash(u, low, high)))
    _, gradient = estimate(
        estimator(num_samples=num_samples, baseline="mean"), repeat(mixture, 40_000), cost="bimodal", alpha=0.0
    )
    shrink = (num_samples - 1) / num_samples
    assert_mean(gradient.mixture_logits, shrink * exact.mixture_logits, resolution=0.02)
    pathwise = 1.0 if estimator is Half else shrink
    assert_mean(gradient.loc, pathwise * exact.loc, resolution=0.05)
    assert_mean(gradient.scale, pathwise * exact.scale, resolution=0.05)


def test_leave_one_out_lowers_the_variance():
    """A constant added to the cost changes nothing about it; without a baseline it is pure noise."""
    mixture = repeat(parameters(3, 2), 2000)
    noise = []
    for baseline in ("none", "leave_one_out"):
        _, gradient = estimate(Score(num_samples=4, baseline=baseline), mixture, cost="constant", alpha=0.0)
        noise.append(gradient.loc.var(0).sum())
    assert noise[0] > 0.1
    assert noise[1] == 0.0


@pytest.mark.parametrize("name", ["half_reparameterized", "score_function"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "median"}, "baseline='median' must be one of none, mean, leave_one_out"),
        (
            {"baseline": "leave_one_out", "num_samples": 1},
            "baseline=leave_one_out needs num_samples of at least 2, not 1",
        ),
        ({"baseline": "none", "num_samples": 0}, "num_samples=0 must be a whole number >= 1"),
    ],
)
def test_baselines_that_cannot_be_formed_are_refused(monkeypatch, name, arguments, message):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    estimator = {"half_reparameterized": Half, "score_function": Score}[name]
    with pytest.raises(ValueError, match=f"{estimator.__name__}: {message}"):
        estimator(**arguments)


# --- implicit --------------------------------------------------------------------------------------------------------


def test_implicit_draws_keep_the_distribution_function_fixed():
    """F_d(u(theta); theta) is constant in theta: its total derivative vanishes, dimension by dimension."""
    mixture = parameters(3, 3)
    leaves = Parameters(*(value.clone().requires_grad_() for value in mixture))
    torch.manual_seed(0)
    u = implicit_rsample(TanhGaussianMixture(*leaves))
    log_weights = leaves.mixture_logits.log_softmax(-1)
    normal = torch.distributions.Normal(leaves.loc, leaves.scale)
    earlier = F.pad(normal.log_prob(u)[:, :-1].cumsum(-1), (1, 0))
    conditional = ((log_weights.unsqueeze(-1) + earlier).softmax(0) * normal.cdf(u)).sum(0)
    for value in conditional:
        for derivative in torch.autograd.grad(value, leaves, retain_graph=True):
            torch.testing.assert_close(derivative, torch.zeros_like(derivative), rtol=0, atol=1e-10)
    assert all(gradient.abs().min() > 0 for gradient in torch.autograd.grad(u.sum(), leaves))


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_distribution_function_keeps_its_digits_in_both_tails(side):
    """Six deviations out, Phi(z_k) - sum_j r_j Phi(z_j) is of order 1e-9 and must not be 1 - 1 in single precision."""
    z, weights = side * torch.tensor([[6.0], [6.5]], dtype=torch.float64), torch.full((2, 1), 0.5, dtype=torch.float64)
    exact = _centred_distribution(z, weights)
    assert 0 < exact.abs().max() < 1e-8
    torch.testing.assert_close(_centred_distribution(z.float(), weights.float()).double(), exact, rtol=1e-4, atol=0)


# --- gumbel_softmax --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("straight_through", [True, False])
def test_gumbel_softmax_bias_by_hand(straight_through):
    """Two equal weights, cost -u, temperature 1: y_1 = sigmoid(l + L) with L logistic and l = logit_1 - logit_2.

    d E[y_1] / dl = E[y_1 (1 - y_1)] = int_0^1 s (1 - s) ds = 1/6, where the exact weight has w_1 (1 - w_1) = 1/4: the
    gradient for the logits is two thirds of the exact one.
    """
    leaves = one_dimensional([1.0, -1.0], [0.5, 0.5], [0.5, 0.5], 40_000)
    torch.manual_seed(0)
    surrogate = GumbelSoftmax(straight_through=straight_through)(TanhGaussianMixture(*leaves), maximise_u)
    (gradient,) = torch.autograd.grad(surrogate.loss.sum(), leaves.mixture_logits)
    by_hand = torch.tensor([-2.0, 2.0], dtype=torch.float64) / 6
    assert_mean(gradient, by_hand, resolution=0.02)


def test_straight_through_takes_an_exact_draw():
    """The action is one component's own draw, to the last bit, chosen with the frequency of its weight."""
    leaves = one_dimensional([-1.0, 1.0], [1e-3, 1e-3], [0.2, 0.8], 40_000)
    seen = []

    def objective(u: Tensor, log_prob: Tensor) -> ObjectiveValue:
        seen.append(u.detach())
        return maximise_u(u, log_prob)

    torch.manual_seed(0)
    GumbelSoftmax(temperature=0.1)(TanhGaussianMixture(*leaves), objective)
    torch.manual_seed(0)
    draws = (leaves.loc + leaves.scale * torch.randn_like(leaves.loc)).detach()
    component = (seen[0] > 0).long()
    assert torch.equal(seen[0], draws.gather(-2, component.unsqueeze(-2)).squeeze(-2))
    assert_mean(component.double(), torch.tensor([0.8], dtype=torch.float64), resolution=0.02)


def test_gumbel_softmax_anneals_geometrically():
    estimator = GumbelSoftmax(temperature=1.0, final_temperature=0.01)
    temperatures = []
    for progress in (0.0, 0.5, 1.0, 0.5):
        estimator.anneal(progress)
        temperatures.append(float(estimator.temperature))
    assert temperatures == pytest.approx([1.0, 0.1, 0.01, 0.1])
    constant = GumbelSoftmax(temperature=0.7)
    constant.anneal(1.0)
    assert float(constant.temperature) == pytest.approx(0.7)


@pytest.mark.parametrize("name", ["temperature", "final_temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_impossible_temperatures_are_refused(name, value):
    with pytest.raises(ValueError, match=f"GumbelSoftmax: {name}={value} must be a finite number > 0"):
        GumbelSoftmax(**{name: value})


# --- frequency -------------------------------------------------------------------------------------------------------


def one_dimensional(loc: list[float], scale: list[float], weights: list[float], draws: int) -> Parameters:
    values = (torch.tensor(value, dtype=torch.float64) for value in (weights, loc, scale))
    weights, loc, scale = values
    return repeat(Parameters(weights.log(), loc.unsqueeze(-1), scale.unsqueeze(-1)), draws)


def maximise_u(u: Tensor, log_prob: Tensor) -> ObjectiveValue:
    """Score u, cost -u, entropy ignored: the winner is the component with the largest draw."""
    return ObjectiveValue(-u[..., 0], log_prob, u[..., 0])


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.9, 0.1], None], ids=["uniform", "far", "fixed_point"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_frequency_loss_regresses_the_weights_on_the_chance_to_win(weights, reduction):
    """P(u_1 > u_2) = Phi((mu_1 - mu_2) / sqrt(s_1^2 + s_2^2)), and d E[loss] / d w = 2 (w - P), over K for a mean.

    The fixed point is therefore w = P, where the mean gradient is zero.
    """
    chance = NormalDist().cdf((0.2 - 0.9) / math.hypot(1.0, 1.5))
    winning = torch.tensor([chance, 1 - chance], dtype=torch.float64)
    leaves = one_dimensional([0.2, 0.9], [1.0, 1.5], weights or winning.tolist(), 40_000)
    torch.manual_seed(0)
    estimator = Frequency(reduction=reduction, weight=3.0)
    surrogate = estimator(TanhGaussianMixture(*leaves), maximise_u)
    (gradient,) = torch.autograd.grad(surrogate.auxiliary["loss_frequency"].sum(), leaves.mixture_logits)
    w = leaves.mixture_logits[0].detach().exp()
    by_weight = 3.0 * 2 * (w - winning) / (2 if reduction == "mean" else 1)
    assert_mean(gradient, w * (by_weight - (w * by_weight).sum()), resolution=0.05)
    torch.testing.assert_close(surrogate.diagnostics["winner_frequency"].double(), winning, rtol=0, atol=0.015)


def test_frequency_bias_by_hand():
    """Two equal components N(0, 1) with weights (0.9, 0.1) and cost -u, for which everything is known.

    E[cost] = 0 with d/dmu_k = -w_k and d/dsigma_k = 0. The winner's cost is -max(u_1, u_2): its mean is -1 / sqrt(pi),
    its gradient -P(k wins) = -1/2 whatever the weights, and -E[eps_k; k wins] = -1 / (2 sqrt(pi)).
    """
    leaves = one_dimensional([0.0, 0.0], [1.0, 1.0], [0.9, 0.1], 40_000)
    torch.manual_seed(0)
    surrogate = Frequency()(TanhGaussianMixture(*leaves), maximise_u)
    gradient = Parameters(*torch.autograd.grad(surrogate.loss.sum(), leaves))
    value, exact = expectation_and_gradient(
        Parameters(*(leaf[0].detach() for leaf in leaves)), lambda u, log_prob: -u[..., 0]
    )
    torch.testing.assert_close(value.abs() + exact.scale.abs().max(), torch.zeros_like(value), rtol=0, atol=1e-9)
    torch.testing.assert_close(exact.loc, torch.tensor([[-0.9], [-0.1]], dtype=torch.float64))
    half = torch.full((2, 1), 0.5, dtype=torch.float64)
    assert_mean(surrogate.expected_cost.detach(), torch.tensor(-1 / math.sqrt(math.pi)), resolution=0.05)
    assert_mean(gradient.loc, -half, resolution=0.02)
    assert_mean(gradient.scale, -half / math.sqrt(math.pi), resolution=0.03)


SWITCHES = [
    dict(zip(("backpropagate", "log_prob", "reduction", "rank_by"), values, strict=True))
    for values in product(("max", "all"), ("component", "mixture"), ("mean", "sum"), ("q", "soft_q"))
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: "-".join(switches.values()))
def test_frequency_computes_what_its_switches_say(switches):
    """Loop over states and components, from the formulas; all sixteen combinations."""
    leaves, alpha, weight = random_leaves(6, K=3), 0.7, 0.25
    surrogate, gradient = estimate(Frequency(**switches, weight=weight), leaves, cost="bimodal", alpha=alpha)
    low, high = bounds(2)
    torch.manual_seed(0)
    u = leaves.loc + leaves.scale * torch.randn_like(leaves.loc)
    weights = leaves.mixture_logits.softmax(-1)
    winners, costs, log_probs, routing = [], [], [], []
    for b in range(6):
        density = torch.distributions.Normal(leaves.loc[b], leaves.scale[b]).log_prob(u[b].unsqueeze(1)).sum(-1)
        own, mixed = density.diagonal(), (weights[b].log() + density).logsumexp(-1)
        log_prob = (own if switches["log_prob"] == "component" else mixed) - log_abs_det_jacobian(u[b], low, high)
        qvalue = -COSTS["bimodal"](squash(u[b], low, high))
        cost = alpha * log_prob - qvalue
        winner = (qvalue if switches["rank_by"] == "q" else -cost).argmax()
        of_mean = 3 if switches["reduction"] == "mean" else 1
        error = (F.one_hot(winner, 3) - weights[b]).square().sum() / of_mean
        back = cost.sum() / of_mean if switches["backpropagate"] == "all" else cost[winner]
        scored = log_prob.mean() if switches["backpropagate"] == "all" else log_prob[winner]
        winners, costs = [*winners, winner], [*costs, back]
        log_probs, routing = [*log_probs, scored], [*routing, weight * error]
    assert len(set(map(int, winners))) > 1
    torch.testing.assert_close(surrogate.expected_cost, torch.stack(costs))
    torch.testing.assert_close(surrogate.log_prob, torch.stack(log_probs).detach())
    torch.testing.assert_close(surrogate.auxiliary["loss_frequency"], torch.stack(routing))
    counts = torch.bincount(torch.stack(winners), minlength=3)
    torch.testing.assert_close(surrogate.diagnostics["winner_frequency"], counts / 6, check_dtype=False)
    expected = torch.autograd.grad(sum(costs) + sum(routing), leaves)
    for mine, theirs in zip(gradient, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_frequency_defaults_are_those_of_the_published_code():
    estimator = Frequency()
    switches = (estimator.backpropagate, estimator.log_prob, estimator.reduction, estimator.rank_by, estimator.weight)
    assert switches == ("max", "component", "mean", "q", 1.0)
    leaves = random_leaves(6, K=3)
    torch.manual_seed(0)
    mixture = TanhGaussianMixture(*leaves)
    surrogate = estimator(mixture, maximise_u)
    torch.manual_seed(0)
    winner = (leaves.loc + leaves.scale * torch.randn_like(leaves.loc))[..., 0].argmax(-1)
    published = F.mse_loss(mixture.weights, F.one_hot(winner, 3).double())
    torch.testing.assert_close(surrogate.auxiliary["loss_frequency"].mean(), published)


def touched_components(estimator: Frequency) -> tuple[Tensor, Tensor, Tensor]:
    """Which means and scales receive a gradient [B, K], and which component won [B]."""
    leaves = random_leaves(20, K=4)
    torch.manual_seed(0)
    winner = (leaves.loc + leaves.scale * torch.randn_like(leaves.loc))[..., 0].argmax(-1)
    torch.manual_seed(0)
    mixture = TanhGaussianMixture(*leaves)

    def objective(u: Tensor, log_prob: Tensor) -> ObjectiveValue:
        return ObjectiveValue(0.3 * log_prob - u.sum(-1), log_prob, u[..., 0])

    surrogate = estimator(mixture, objective)
    gradient = Parameters(*torch.autograd.grad(surrogate.loss.sum(), leaves))
    return gradient.loc.ne(0).all(-1), gradient.scale.ne(0).all(-1), F.one_hot(winner, 4).bool()


def test_only_the_winner_learns_from_back_propagate_max():
    loc, scale, winner = touched_components(Frequency())
    assert torch.equal(loc, winner) and torch.equal(scale, winner)


@pytest.mark.parametrize("switches", [{"backpropagate": "all"}, {"log_prob": "mixture"}], ids=["all", "mixture"])
def test_every_component_learns_from_back_propagate_all_and_from_the_mixture_density(switches):
    loc, scale, _ = touched_components(Frequency(**switches))
    assert loc.all() and scale.all()


def test_frequency_never_sends_the_cost_to_the_weights():
    """With the component's own density the weights learn from the frequency loss alone."""
    leaves = random_leaves(20, K=4)
    surrogate = Frequency()(TanhGaussianMixture(*leaves), maximise_u)
    cost = torch.autograd.grad(
        surrogate.expected_cost.sum(), leaves.mixture_logits, allow_unused=True, retain_graph=True
    )
    assert cost[0] is None
    routing = torch.autograd.grad(surrogate.auxiliary["loss_frequency"].sum(), leaves, materialize_grads=True)
    assert routing[0].ne(0).all() and not routing[1].any() and not routing[2].any()


@pytest.mark.parametrize(("rank_by", "winner"), [("q", 0), ("soft_q", 1)])
def test_ranking_by_soft_q_counts_the_entropy(rank_by, winner):
    """Component 0 is a little better but nearly deterministic: at alpha = 1 its density costs it the first place."""
    loc, scale = torch.tensor([[0.6], [0.5]]), torch.tensor([[1e-3], [0.03]])
    mixture = TanhGaussianMixture(torch.zeros(2, 2), loc.expand(2, 2, 1), scale.expand(2, 2, 1))
    torch.manual_seed(0)
    objective = soft_objective(mixture, lambda a: -a.sum(-1), 1.0)
    surrogate = Frequency(rank_by=rank_by)(mixture, objective)
    assert surrogate.diagnostics["winner_frequency"].tolist() == [1.0 - winner, float(winner)]


def test_routing_loss_is_the_frequency_loss_alone():
    """What PPO uses: the same draws, winners and loss, without a cost."""
    leaves, estimator = random_leaves(3, 4, K=3), Frequency(reduction="sum", weight=2.0)
    mixture = TanhGaussianMixture(*leaves)
    torch.manual_seed(0)
    surrogate = estimator(mixture, maximise_u)
    torch.manual_seed(0)
    loss, diagnostics = estimator.routing_loss(mixture, lambda u: u[..., 0])
    torch.testing.assert_close(loss, surrogate.auxiliary["loss_frequency"])
    torch.testing.assert_close(diagnostics["winner_frequency"], surrogate.diagnostics["winner_frequency"])
    gradient = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
    assert gradient[0].ne(0).all() and not gradient[1].any() and not gradient[2].any()


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ({"backpropagate": "winner"}, "backpropagate='winner' must be one of max, all"),
        ({"log_prob": "joint"}, "log_prob='joint' must be one of component, mixture"),
        ({"reduction": "none"}, "reduction='none' must be one of mean, sum"),
        ({"rank_by": "advantage"}, "rank_by='advantage' must be one of q, soft_q"),
        ({"weight": -1.0}, "weight=-1.0 must be a finite number >= 0"),
        ({"weight": math.inf}, "weight=inf must be a finite number"),
        ({"weight": math.nan}, "weight=nan must be a finite number"),
    ],
    ids=str,
)
def test_unknown_switches_of_frequency_are_refused(monkeypatch, switch, message):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # users run without the shape checks of the tests
    with pytest.raises(ValueError, match=f"Frequency: {message}"):
        Frequency(**switch)
