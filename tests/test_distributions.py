"""The squashed Gaussian mixture against quadrature, against PyTorch and TorchRL, and at the edges of its arithmetic."""

from __future__ import annotations

import copy
import math

import jaxtyping
import numpy
import pytest
import torch
from modes import in_every_mode
from quadrature import (
    TEST_FAILURE_RATE,
    Parameters,
    assert_mean,
    bounds,
    component_log_density,
    expectation,
    expectation_and_gradient,
    log_abs_det_jacobian,
    log_density,
    parameters,
    repeat,
    squash,
)
from scipy import stats
from torch import Tensor, distributions
from torchrl.modules import TanhNormal

from pmoe_lightning.modules.distributions import TanhGaussianMixture

DTYPES = (torch.float32, torch.float64)


def exact_and_tested(num_components: int, action_dim: int) -> tuple[Parameters, TanhGaussianMixture]:
    """The same mixture for the quadrature and as the class under test, in float64 with bounds other than +-1."""
    exact = parameters(num_components, action_dim)
    return exact, TanhGaussianMixture(*exact, *bounds(action_dim))


def random_mixture(*batch: int, K: int = 3, A: int = 2, dtype: torch.dtype = torch.float32, **kwargs):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*batch, K, generator=generator, dtype=dtype)
    loc = torch.randn(*batch, K, A, generator=generator, dtype=dtype)
    scale = 0.2 + torch.rand(*batch, K, A, generator=generator, dtype=dtype)
    low, high = (bound.to(dtype) for bound in bounds(A))
    return TanhGaussianMixture(logits, loc, scale, low, high, **kwargs)


def gauss_legendre(low: Tensor, high: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Nodes [points^A, A] and weights [points^A] on the box [low, high]."""
    x, w = (torch.from_numpy(values) for values in numpy.polynomial.legendre.leggauss(points))
    axes = [(a + b) / 2 + (b - a) / 2 * x for a, b in zip(low, high, strict=True)]
    weights = [(b - a) / 2 * w for a, b in zip(low, high, strict=True)]
    grid = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], -1)
    return grid, torch.stack([w.flatten() for w in torch.meshgrid(*weights, indexing="ij")]).prod(0)


# --- the density -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action_dim", [1, 2])
def test_the_quadrature_itself(action_dim):
    """Moments known in closed form, and a cost with all the structure of the estimator tests at half the spacing."""
    exact = parameters(3, action_dim)
    weights = exact.mixture_logits.softmax(-1)
    mean = (weights @ exact.loc)[0]
    square = (weights @ (exact.loc.square() + exact.scale.square()))[0]
    for power, expected in enumerate((torch.ones_like(mean), mean, square)):
        value = expectation(exact, lambda u, _, power=power: u[:, 0] ** power)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)

    def cost(u, log_prob):
        return squash(u, *bounds(action_dim)).sin().sum(-1) + log_prob - log_abs_det_jacobian(u, *bounds(action_dim))

    torch.testing.assert_close(expectation(exact, cost), expectation(exact, cost, spacing=0.125), rtol=0, atol=1e-8)


@pytest.mark.parametrize("num_components", [1, 3])
@pytest.mark.parametrize(("action_dim", "points"), [(1, 500), (2, 300)])
def test_density_integrates_to_one(num_components, action_dim, points):
    """Over the action box itself, so that the Jacobian and the bounds take part."""
    _, mixture = exact_and_tested(num_components, action_dim)
    actions, weights = gauss_legendre(*bounds(action_dim), points)
    total = (weights * mixture.log_prob(actions).exp()).sum()
    components = (weights.unsqueeze(-1) * mixture.component_log_prob(actions).exp()).sum(0)
    assert total.item() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(components, torch.ones_like(components), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sample_shape", [(), (7,), (3, 2)])
def test_unsquashed_density_equals_mixture_same_family(sample_shape):
    mixture = random_mixture(4, dtype=torch.float64)
    normals = distributions.Independent(distributions.Normal(mixture.loc, mixture.scale), 1)
    categorical = distributions.Categorical(logits=mixture.log_weights)
    oracle = distributions.MixtureSameFamily(categorical, normals)
    u = oracle.sample(sample_shape)
    torch.testing.assert_close(mixture.log_prob_unsquashed(u), oracle.log_prob(u), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.component_log_prob_unsquashed(u), normals.log_prob(u.unsqueeze(-2)))
    torch.testing.assert_close(mixture.weights, categorical.probs)

    scaling = distributions.AffineTransform((mixture.low + mixture.high) / 2, (mixture.high - mixture.low) / 2)
    squashed = distributions.TransformedDistribution(oracle, [distributions.TanhTransform(), scaling])
    action = mixture.squash(u)
    torch.testing.assert_close(mixture.log_prob(action), squashed.log_prob(action), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (-3.0, 1.0), (torch.tensor([-2.0, 0.5]), torch.tensor([1.0, 2.0]))]
)
def test_one_component_equals_tanh_normal(low, high):
    loc, scale = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)), torch.full((6, 2), 0.4)
    mixture = TanhGaussianMixture(torch.zeros(6, 1), loc.unsqueeze(-2), scale.unsqueeze(-2), low, high)
    oracle = TanhNormal(loc, scale, low=low, high=high)
    torch.testing.assert_close(mixture.deterministic_sample, oracle.deterministic_sample)
    torch.testing.assert_close(mixture.mode, oracle.deterministic_sample)
    for method in ("rsample_and_log_prob", "sample_and_log_prob"):
        drawn = []
        for distribution in (mixture, oracle):
            torch.manual_seed(3)
            drawn.append(getattr(distribution, method)((5,)))
        torch.testing.assert_close(drawn[0][0], drawn[1][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(drawn[0][1], drawn[1][1], rtol=1e-5, atol=1e-5)
    action = oracle.sample((5,))
    torch.testing.assert_close(mixture.log_prob(action), oracle.log_prob(action), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("action_dim", [1, 2])
def test_component_log_prob_and_posterior_are_bayes(action_dim):
    exact, mixture = exact_and_tested(3, action_dim)
    u = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(-1).expand(9, action_dim)
    own = component_log_density(exact, u)
    jacobian = log_abs_det_jacobian(u, *bounds(action_dim))
    action = mixture.squash(u)
    torch.testing.assert_close(mixture.component_log_prob(action), own - jacobian.unsqueeze(-1))
    torch.testing.assert_close(mixture.log_prob(action), log_density(exact, u) - jacobian)
    posterior = mixture.component_posterior(action)
    bayes = exact.mixture_logits.softmax(-1) * own.exp() / log_density(exact, u).exp().unsqueeze(-1)
    torch.testing.assert_close(posterior, bayes)
    torch.testing.assert_close(posterior.sum(-1), torch.ones(9, dtype=torch.float64))


def test_stratum_log_prob_scores_each_draw_under_its_own_component():
    mixture = random_mixture(5, dtype=torch.float64)
    u = mixture.rsample_components()
    expected = torch.stack([mixture.component_log_prob_unsquashed(u[k])[..., k] for k in range(3)])
    torch.testing.assert_close(mixture.stratum_log_prob_unsquashed(u), expected)


# --- goodness of fit between samples and density ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sample", "rsample", "sample_and_log_prob", "rsample_and_log_prob"])
def test_samples_follow_the_density_in_one_dimension(method):
    """Kolmogorov-Smirnov on the probability-integral transform; two unlike mixtures in one batch."""
    both = [parameters(3, 1, seed) for seed in (0, 1)]
    mixture = TanhGaussianMixture(*(torch.stack(values) for values in zip(*both, strict=True)), *bounds(1))
    torch.manual_seed(0)
    drawn = getattr(mixture, method)((20_000,))
    actions = drawn if isinstance(drawn, Tensor) else drawn[0]
    for row, exact in enumerate(both):
        edges = torch.linspace(-2, 1, 3001, dtype=torch.float64).unsqueeze(-1)
        middles = (edges[1:] + edges[:-1]) / 2
        density = TanhGaussianMixture(*exact, *bounds(1)).log_prob(middles).exp()
        cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), density.cumsum(0)]) * 3 / 3000
        transformed = torch.from_numpy(
            numpy.interp(actions[:, row, 0].numpy(), edges[:, 0].numpy(), cumulative.numpy())
        )
        assert stats.kstest(transformed, "uniform").pvalue > TEST_FAILURE_RATE / 2


def test_samples_follow_the_density_in_two_dimensions():
    """Chi-square over cells of the action box, each with the integral of the density as its expectation."""
    _, mixture = exact_and_tested(3, 2)
    low, high = bounds(2)
    side, points, draws = 12, 8, 50_000
    torch.manual_seed(0)
    cell = ((mixture.sample((draws,)) - low) / (high - low) * side).long().clamp(max=side - 1)
    observed = torch.bincount(cell[:, 0] * side + cell[:, 1], minlength=side**2)
    corner = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double() / side * (high - low) + low
    offset, weight = gauss_legendre(torch.zeros(2).double(), (high - low) / side, points)
    density = mixture.log_prob(corner.unsqueeze(1) + offset).exp()
    assert_chi_square(observed, draws * (density * weight).sum(-1))


def assert_chi_square(observed: Tensor, expected: Tensor) -> None:
    """Cells with fewer than ten expected draws are pooled, because there the statistic is not chi-square."""
    assert expected.sum().item() == pytest.approx(observed.sum().item(), rel=1e-4)
    small = expected < 10
    assert (~small).sum() > 2
    if small.any():
        observed = torch.cat([observed[~small], observed[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None].clamp(min=1e-3)])
    statistic = ((observed - expected).square() / expected).sum().item()
    assert stats.chi2.sf(statistic, len(observed) - 1) > TEST_FAILURE_RATE


def test_a_stratified_sample_has_one_draw_of_every_component():
    mixture = random_mixture(20_000, K=3, A=2, dtype=torch.float64)
    one = Parameters(*(value[0] for value in (mixture.log_weights, mixture.loc, mixture.scale)))
    torch.manual_seed(0)
    u = TanhGaussianMixture(*repeat(one, 20_000)).rsample_components().detach()
    assert u.shape == (3, 20_000, 2)
    z = (u - one.loc.unsqueeze(1)) / one.scale.unsqueeze(1)
    for k in range(3):
        for d in range(2):
            assert stats.kstest(z[k, :, d].numpy(), "norm").pvalue > TEST_FAILURE_RATE / 6
    correlation = torch.corrcoef(z.movedim(0, 1).flatten(1).T) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)  # independent between components and dimensions


@pytest.mark.parametrize("dtype", DTYPES)
def test_component_frequencies_match_the_weights(dtype):
    weights = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.01, 0.01, 0.97, 0.01]], dtype=dtype)
    mixture = TanhGaussianMixture(
        weights.log() + 3, torch.zeros(2, 4, 1, dtype=dtype), torch.ones(2, 4, 1, dtype=dtype)
    )
    torch.manual_seed(0)
    component = mixture.sample_component((50_000,))
    assert component.shape == (50_000, 2)
    for row in range(2):
        assert_chi_square(torch.bincount(component[:, row], minlength=4), 50_000 * weights[row].double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_weight", [math.log(1e-30), -200.0])
def test_components_of_vanishing_weight_are_never_drawn_and_never_nan(dtype, log_weight):
    logits = torch.tensor([log_weight, 0.0, log_weight], dtype=dtype)
    mixture = TanhGaussianMixture(
        logits, torch.tensor([[-2.0], [0.0], [2.0]], dtype=dtype), torch.ones(3, 1, dtype=dtype)
    )
    torch.manual_seed(0)
    assert (mixture.sample_component((100_000,)) == 1).all()
    action, log_prob = mixture.rsample_and_log_prob((100,))
    for values in (action, log_prob, mixture.component_posterior(action), mixture.component_log_prob(action)):
        assert values.isfinite().all()
    assert mixture.entropy().isfinite()


# --- saturation ------------------------------------------------------------------------------------------------------


@in_every_mode
@pytest.mark.parametrize("center", [-20.0, -8.0, 0.0, 8.0, 20.0])
def test_values_and_gradients_stay_finite_under_saturation(mode, center):
    dtype = mode.dtype

    def values_of(*leaves: Tensor) -> tuple[Tensor, ...]:
        mixture = TanhGaussianMixture(*leaves, *(bound.to(dtype) for bound in bounds(2)))
        action, log_prob = mixture.rsample_and_log_prob((50,))
        fixed = action.detach()
        return action, log_prob, mixture.log_prob(fixed), mixture.component_log_prob(fixed), mixture.entropy()

    leaves = [
        torch.tensor([0.3, -0.3], dtype=dtype),
        torch.tensor([[center, center], [center + 0.5, -center]], dtype=dtype),
        torch.full((2, 2), 0.7, dtype=dtype),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    torch.manual_seed(0)
    values = mode.run(values_of)(*leaves)
    assert TanhGaussianMixture(*leaves, *(bound.to(dtype) for bound in bounds(2))).support.check(values[0]).all()
    for value in values:
        assert value.isfinite().all()
        gradients = torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True)
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_jacobian_is_exact_far_into_saturation(dtype):
    u = torch.tensor([-1e4, -20.0, -3.0, 0.0, 3.0, 20.0, 1e4], dtype=dtype).unsqueeze(-1)
    mixture = random_mixture(K=1, A=1, dtype=dtype)
    exact = log_abs_det_jacobian(u.double(), *bounds(1))
    torch.testing.assert_close(mixture.log_abs_det_jacobian(u).double(), exact, rtol=1e-6, atol=2e-6)


def test_actions_never_leave_the_bounds():
    """In float32 ``center + half_range`` overshoots by one unit in the last place for about one box in ten."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(1000, generator=generator)
    high = low + torch.rand(1000, generator=generator) + 0.1
    assert ((high + low) / 2 + (high - low) / 2 > high).any()
    for center in (-20.0, 20.0):
        mixture = TanhGaussianMixture(torch.zeros(2), torch.full((2, 1000), center), torch.ones(2, 1000), low, high)
        for action in (mixture.sample((5,)), mixture.mode, mixture.deterministic_sample, mixture.component_modes):
            assert ((action >= low) & (action <= high)).all()


@pytest.mark.parametrize("loc", [0.0, 8.0])
def test_sample_and_score_pairs_stay_exact_where_log_prob_does_not(loc):
    """Against float64: at loc 8 most float32 actions are exactly 1 and the score through atanh is wrong by nats."""
    shape = (3, 6)
    mixture = TanhGaussianMixture(torch.zeros(3), torch.full(shape, loc), torch.ones(shape))
    torch.manual_seed(0)
    u = mixture.rsample_unsquashed((500,)).double()
    exact_mixture = Parameters(torch.zeros(3).double(), torch.full(shape, loc).double(), torch.ones(shape).double())
    exact = log_density(exact_mixture, u) - log_abs_det_jacobian(u, torch.tensor(-1.0), torch.tensor(1.0))
    for method in (mixture.rsample_and_log_prob, mixture.sample_and_log_prob):
        torch.manual_seed(0)
        action, log_prob = method((500,))
        torch.testing.assert_close(action, u.tanh().float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(log_prob.double(), exact, rtol=1e-5, atol=1e-4)
    error = (mixture.log_prob(action).double() - exact).abs().max()
    assert error < 1e-2 if loc == 0.0 else error > 1.0


def test_detached_samples_keep_a_differentiable_score():
    loc = torch.zeros(2, 1).requires_grad_()
    mixture = TanhGaussianMixture(torch.zeros(2), loc, torch.ones(2, 1))
    assert not mixture.sample((3,)).requires_grad
    action, log_prob = mixture.sample_and_log_prob((3,))
    assert not action.requires_grad and log_prob.requires_grad
    (score,) = torch.autograd.grad(log_prob.sum(), loc)
    (expected,) = torch.autograd.grad(mixture.log_prob(action).sum(), loc)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


# --- entropy ---------------------------------------------------------------------------------------------------------


def exact_entropy(exact: Parameters, action_dim: int) -> tuple[Tensor, Parameters]:
    def surprise(u, log_prob):
        return log_abs_det_jacobian(u, *bounds(action_dim)) - log_prob

    return expectation_and_gradient(exact, surprise)


@pytest.mark.parametrize("num_components", [1, 3])
@pytest.mark.parametrize("action_dim", [1, 2])
def test_entropy_and_its_gradient_are_unbiased(num_components, action_dim):
    exact = parameters(num_components, action_dim)
    value, gradient = exact_entropy(exact, action_dim)
    draws = repeat(exact, 40_000)
    torch.manual_seed(0)
    entropy = TanhGaussianMixture(*draws, *bounds(action_dim)).entropy()
    entropy.sum().backward()
    assert_mean(entropy.detach(), value, resolution=0.05)
    for estimates, expected in zip(draws, gradient, strict=True):
        assert_mean(estimates.grad, expected, resolution=0.1)


def test_plain_monte_carlo_entropy_misses_the_gradient_of_the_weights():
    """The negative control: -log pi(u) with u ~ pi pathwise, which TorchRL falls back on, averages to zero there."""
    exact = parameters(3, 1)
    _, gradient = exact_entropy(exact, 1)
    draws = repeat(exact, 40_000)
    torch.manual_seed(0)
    TanhGaussianMixture(*draws, *bounds(1)).rsample_and_log_prob()[1].neg().sum().backward()
    assert_mean(draws.mixture_logits.grad, torch.zeros(3, dtype=torch.float64), resolution=0.04)
    assert gradient.mixture_logits.abs().max() > 2 * 0.04
    with pytest.raises(AssertionError, match="is not"):
        assert_mean(draws.mixture_logits.grad, gradient.mixture_logits, resolution=0.04)


# --- deterministic rules ---------------------------------------------------------------------------------------------


def test_max_weight_takes_the_mean_of_the_heaviest_component():
    mixture = random_mixture(50)
    heaviest = mixture.weights.argmax(-1)
    expected = mixture.squash(mixture.loc)[torch.arange(50), heaviest]
    for action in (mixture.deterministic_sample, mixture.mode):
        torch.testing.assert_close(action, expected)  # the tanh of another position in memory
    torch.testing.assert_close(mixture.component_modes, mixture.squash(mixture.loc), rtol=0, atol=0)


def test_mean_takes_the_mean_of_the_squashed_means_by_weight():
    mixture = random_mixture(50, deterministic="mean")
    expected = (mixture.weights.unsqueeze(-1) * mixture.component_modes).sum(-2)
    torch.testing.assert_close(mixture.deterministic_sample, expected)
    far = TanhGaussianMixture(torch.zeros(1, 2), torch.full((1, 2, 1), 30.0), torch.ones(1, 2, 1), deterministic="mean")
    assert far.deterministic_unsquashed().isfinite().all()  # both means at the bound
    torch.testing.assert_close(far.deterministic_sample, torch.ones(1, 1))
    single = TanhGaussianMixture(
        torch.zeros(1, 1), torch.full((1, 1, 1), 30.0), torch.ones(1, 1, 1), deterministic="mean"
    )
    assert single.deterministic_unsquashed().item() == 30.0  # of one component it is the mode itself


def test_sample_component_takes_the_means_as_often_as_their_weights():
    weights = torch.tensor([0.6, 0.3, 0.1])
    loc = torch.tensor([[-1.0], [0.0], [1.0]])
    draws = 20_000
    mixture = TanhGaussianMixture(
        *(value.expand(draws, *value.shape) for value in (weights.log(), loc, torch.ones(3, 1))),
        deterministic="sample_component",
    )
    torch.manual_seed(0)
    actions = mixture.deterministic_sample
    chosen = (actions.unsqueeze(-2) == mixture.component_modes).squeeze(-1)
    assert (chosen.sum(-1) == 1).all()
    assert_chi_square(chosen.sum(0), draws * weights.double())
    torch.testing.assert_close(mixture.mode, loc[0].tanh().expand(draws, 1))  # the mode does not depend on the rule


# --- shapes, types, errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
@pytest.mark.parametrize("K", [1, 2, 5, 16])
def test_shapes_and_types(K, batch, dtype):
    mixture = random_mixture(*batch, K=K, dtype=dtype)
    assert (mixture.num_components, mixture.batch_shape, mixture.event_shape) == (K, batch, (2,))
    for sample_shape in ((), (7,), (2, 7)):
        lead = (*sample_shape, *batch)
        action, log_prob = mixture.rsample_and_log_prob(sample_shape)
        of_action = (action, mixture.sample(sample_shape), mixture.rsample_unsquashed(sample_shape))
        assert {(*value.shape, value.dtype) for value in of_action} == {(*lead, 2, dtype)}
        of_density = (log_prob, mixture.log_prob(action), mixture.log_prob_unsquashed(action))
        assert {(*value.shape, value.dtype) for value in of_density} == {(*lead, dtype)}
        of_component = (mixture.component_log_prob(action), mixture.component_posterior(action))
        assert {(*value.shape, value.dtype) for value in of_component} == {(*lead, K, dtype)}
        assert mixture.sample_component(sample_shape).shape == lead
    assert {mixture.entropy().shape, mixture.weights.shape[:-1]} == {batch}
    assert {mixture.mode.shape, mixture.deterministic_sample.shape} == {(*batch, 2)}
    assert mixture.component_modes.shape == (*batch, K, 2)
    assert mixture.rsample_components().shape == (K, *batch, 2)
    assert mixture.entropy().dtype == mixture.weights.dtype == mixture.mode.dtype == dtype


@pytest.mark.parametrize("batch", [(4,), (3, 4)])
def test_every_state_of_a_batch_is_scored_and_drawn_by_itself(batch):
    mixture = random_mixture(*batch, dtype=torch.float64)
    action = mixture.sample()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in batch)).view(-1, len(batch)).tolist():
        at = tuple(index)
        values = (mixture.log_weights[at], mixture.loc[at], mixture.scale[at])
        alone = TanhGaussianMixture(*values, mixture.low, mixture.high)
        torch.testing.assert_close(mixture.log_prob(action)[at], alone.log_prob(action[at]))
        torch.testing.assert_close(mixture.mode[at], alone.mode)
        torch.testing.assert_close(mixture.component_posterior(action)[at], alone.component_posterior(action[at]))


def test_gradient_of_a_sample_is_that_of_the_chosen_component():
    loc, scale = torch.randn(6, 3, 2).requires_grad_(), torch.ones(6, 3, 2).requires_grad_()
    logits = torch.zeros(6, 3).requires_grad_()
    mixture = TanhGaussianMixture(logits, loc, scale)
    torch.manual_seed(0)
    component = mixture.sample_component()
    torch.manual_seed(0)
    gradients = torch.autograd.grad(mixture.rsample_unsquashed().sum(), (loc, scale, logits), allow_unused=True)
    chosen = torch.nn.functional.one_hot(component, 3).unsqueeze(-1).expand(6, 3, 2)
    torch.testing.assert_close(gradients[0], chosen.float())
    assert ((gradients[1] != 0) == chosen.bool()).all()
    assert gradients[2] is None


def test_squash_and_unsquash_are_inverse():
    mixture = random_mixture(dtype=torch.float64)
    u = torch.linspace(-5, 5, 21, dtype=torch.float64).unsqueeze(-1).expand(21, 2)
    torch.testing.assert_close(mixture.unsquash(mixture.squash(u)), u, rtol=1e-9, atol=1e-9)
    for bound in bounds(2):
        assert mixture.unsquash(bound).isfinite().all()


def test_deepcopy_is_independent():
    mixture = random_mixture(4)
    twin = copy.deepcopy(mixture)
    action = mixture.sample()
    expected = mixture.log_prob(action)
    torch.testing.assert_close(twin.log_prob(action), expected, rtol=0, atol=0)
    twin.loc.add_(1.0)
    torch.testing.assert_close(mixture.log_prob(action), expected, rtol=0, atol=0)


def test_sampling_and_scoring_run_under_vmap():
    mixture = random_mixture(5, K=3)

    def draw(*values):
        return TanhGaussianMixture(*values).rsample_and_log_prob((4,))

    values = (mixture.log_weights, mixture.loc, mixture.scale)
    action, log_prob = torch.vmap(draw, randomness="different", out_dims=1)(*values)
    expected = TanhGaussianMixture(*values).log_prob(action)
    torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("logits", "loc", "scale"),
    [
        ((4, 3), (4, 3, 2), (4, 3, 1)),
        ((4, 2), (4, 3, 2), (4, 3, 2)),
        ((3,), (4, 3, 2), (4, 3, 2)),
        ((3, 2), (3, 2), (3, 2)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(monkeypatch, logits, loc, scale):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without the shape checks of the tests
    with pytest.raises(ValueError, match="do not fit together"):
        TanhGaussianMixture(torch.zeros(logits), torch.zeros(loc), torch.ones(scale))


def test_unknown_deterministic_rule_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="best_value.*max_weight.*mean.*sample_component"):
        random_mixture(deterministic="best_value")


# --- moments, probabilities and the rest of what torch.distributions have ---------------------------------------------


@pytest.mark.parametrize("num_components", [1, 3])
@pytest.mark.parametrize("action_dim", [1, 2])
def test_mean_and_variance_equal_quadrature(num_components, action_dim):
    exact, mixture = exact_and_tested(num_components, action_dim)
    for d in range(action_dim):

        def action(u, d=d):
            return squash(u, *bounds(action_dim))[:, d]

        mean = expectation(exact, lambda u, _, of=action: of(u), spacing=0.125)
        variance = expectation(exact, lambda u, _, of=action, m=mean: (of(u) - m).square(), spacing=0.125)
        torch.testing.assert_close(mixture.mean[d], mean, rtol=0, atol=1e-7)
        torch.testing.assert_close(mixture.variance[d], variance, rtol=0, atol=1e-7)
    torch.testing.assert_close(mixture.stddev, mixture.variance.sqrt())


@pytest.mark.parametrize("scale", [1e-4, 0.05, 1.0, 1.001, 7.4, 300.0])
@pytest.mark.parametrize("loc", [-20.0, -1.0, 0.0, 3.0])
def test_mean_and_variance_where_tanh_is_narrow_or_wide(loc, scale):
    """Against a sum over two million nodes, at every ratio of the two widths."""
    u = torch.linspace(loc - 10 * scale, loc + 10 * scale, 2_000_001, dtype=torch.float64)
    weights = torch.distributions.Normal(loc, scale).log_prob(u).softmax(0)
    mean = (weights * u.tanh()).sum()
    variance = (weights * (u.tanh() - mean).square()).sum()
    one = torch.ones(1, 1, dtype=torch.float64)
    mixture = TanhGaussianMixture(one[0], loc * one, scale * one)
    torch.testing.assert_close(mixture.mean[0], mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(mixture.variance[0], variance, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_and_standard_deviation_of_samples(dtype):
    mixture = random_mixture(4, dtype=dtype)
    torch.manual_seed(0)
    draws = mixture.sample((40_000,)).double()
    mean, variance = mixture.mean, mixture.variance
    assert mean.dtype == variance.dtype == dtype and mean.shape == variance.shape == (4, 2)
    assert_mean(draws, mean.double(), resolution=0.05)
    assert_mean((draws - mean.double()).square(), variance.double(), resolution=0.05)


def test_the_mean_is_differentiable():
    exact, _ = exact_and_tested(3, 1)
    leaves = Parameters(*(value.clone().requires_grad_() for value in exact))
    found = torch.autograd.grad(TanhGaussianMixture(*leaves, *bounds(1)).mean.sum(), leaves)
    _, expected = expectation_and_gradient(exact, lambda u, _: squash(u, *bounds(1))[:, 0], spacing=0.125)
    torch.testing.assert_close(found, tuple(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_components", [1, 4])
def test_cdf_is_the_integral_of_the_density(num_components):
    _, mixture = exact_and_tested(num_components, 1)
    low, high = bounds(1)
    for upper in torch.linspace(low.item() + 0.1, high.item() - 0.1, 7, dtype=torch.float64):
        actions, weights = gauss_legendre(low, upper.view(1), 400)
        expected = (weights * mixture.log_prob(actions).exp()).sum()
        torch.testing.assert_close(mixture.cdf(upper.view(1)), expected, rtol=0, atol=1e-6)
    assert mixture.cdf(low) == 0 and mixture.cdf(high) == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_icdf_is_the_inverse(dtype, tolerance):
    mixture = random_mixture(6, K=4, A=1, dtype=dtype)
    probability = torch.linspace(0.001, 0.999, 50, dtype=dtype).unsqueeze(-1).expand(50, 6)
    action = mixture.icdf(probability)
    assert action.shape == (50, 6, 1) and (action.diff(dim=0) > 0).all()
    torch.testing.assert_close(mixture.cdf(action), probability, rtol=0, atol=tolerance)
    torch.testing.assert_close(mixture.icdf(torch.full((6,), 0.5, dtype=dtype)), mixture.median)
    edges = mixture.icdf(torch.tensor([[0.0], [1.0]], dtype=dtype).expand(2, 6)).squeeze(-1)
    assert (edges[0] == mixture.low).all() and (edges[1] == mixture.high).all()


def test_the_median_halves_every_dimension():
    mixture = random_mixture(3)
    torch.manual_seed(0)
    below = (mixture.sample((20_000,)) < mixture.median).double()
    assert_mean(below, torch.full((3, 2), 0.5, dtype=torch.float64), resolution=0.05)


@pytest.mark.parametrize("method", ["cdf", "icdf"])
def test_probabilities_of_several_dimensions_are_refused(method):
    with pytest.raises(NotImplementedError, match=f"{method} needs an action of one dimension, not of 2"):
        getattr(random_mixture(4), method)(torch.zeros(4, 2))


@pytest.mark.parametrize("rule", ["max_weight", "sample_component"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("validate_args", [False, True])
def test_expand_repeats_the_distribution(rule, dtype, validate_args):
    mixture = random_mixture(4, dtype=dtype, deterministic=rule, validate_args=validate_args)
    expanded = mixture.expand((3, 4))
    assert isinstance(expanded, TanhGaussianMixture)
    assert expanded.batch_shape == (3, 4) and expanded.event_shape == mixture.event_shape
    assert expanded.deterministic == rule and expanded._validate_args == validate_args
    assert torch.equal(expanded.low, mixture.low) and torch.equal(expanded.high, mixture.high)
    assert expanded.loc.data_ptr() == mixture.loc.data_ptr()
    action = expanded.sample((2,))
    assert action.shape == (2, 3, 4, 2) and action.dtype == dtype
    torch.testing.assert_close(expanded.log_prob(action), mixture.log_prob(action))
    for name in ("mean", "variance", "median", "mode", "weights", "component_modes"):
        value = getattr(mixture, name)
        torch.testing.assert_close(getattr(expanded, name), value.expand(3, *value.shape))
    assert expanded.entropy().shape == expanded.deterministic_sample.shape[:-1] == (3, 4)
    assert mixture.expand([4]).batch_shape == (4,)


def test_a_subclass_with_its_own_arguments_says_that_it_needs_its_own_expand():
    class Other(TanhGaussianMixture):
        def __init__(self, loc):
            super().__init__(loc.new_zeros(loc.shape[:-1]), loc, loc.exp())

    with pytest.raises(NotImplementedError, match="expand"):
        Other(torch.zeros(4, 3, 2)).expand((2, 4))


def test_kl_of_single_gaussians():
    """That of the Gaussians, since squashing is one to one; and the mean of log p - log q over samples of p."""
    p, q = random_mixture(4, K=1, dtype=torch.float64), random_mixture(4, K=1, dtype=torch.float64)
    q = TanhGaussianMixture(q.mixture_logits, q.loc + 0.2, 1.3 * q.scale, *bounds(2))
    normals = [distributions.Independent(distributions.Normal(d.loc[:, 0], d.scale[:, 0]), 1) for d in (p, q)]
    kl = distributions.kl_divergence(p, q)
    torch.testing.assert_close(kl, distributions.kl_divergence(*normals))
    torch.manual_seed(0)
    u = p.rsample_unsquashed((40_000,))
    assert_mean(p.log_prob_unsquashed(u) - q.log_prob_unsquashed(u), kl, resolution=0.05)
    assert (distributions.kl_divergence(p, p) == 0).all()


@pytest.mark.parametrize("components", [(3, 1), (1, 3), (3, 3)])
def test_kl_of_mixtures_is_refused(components):
    with pytest.raises(NotImplementedError, match="mixtures has no closed form"):
        distributions.kl_divergence(*(random_mixture(4, K=k) for k in components))


def test_kl_between_different_bounds_is_refused():
    p = random_mixture(4, K=1)
    with pytest.raises(NotImplementedError, match="different bounds"):
        distributions.kl_divergence(p, TanhGaussianMixture(p.mixture_logits, p.loc, p.scale))


def test_repr_shows_shapes_bounds_and_rule():
    mixture = TanhGaussianMixture(torch.zeros(8, 4), torch.zeros(8, 4, 2), torch.ones(8, 4, 2), -1.0, 2.0)
    assert repr(mixture) == (
        "TanhGaussianMixture(mixture_logits: (8, 4), loc: (8, 4, 2), scale: (8, 4, 2), low: -1.0, high: 2.0, "
        "deterministic: 'max_weight')"
    )


INVALID = {
    "mixture_logits": (math.nan, 0.0, 1.0),
    "loc": (0.0, math.nan, 1.0),
    "scale zero": (0.0, 0.0, 0.0),
    "scale negative": (0.0, 0.0, -1.0),
    "scale": (0.0, 0.0, math.nan),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_parameters_are_refused_where_it_is_asked_for(name):
    logits, loc, scale = INVALID[name]
    numbers = torch.full((8, 4), logits), torch.full((8, 4, 2), loc), torch.full((8, 4, 2), scale)
    with pytest.raises(ValueError, match=f"parameter {name.split()[0]}"):
        TanhGaussianMixture(*numbers, validate_args=True)
    for unchecked in (None, False):
        TanhGaussianMixture(*numbers, validate_args=unchecked)


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (0.0, 0.0), (math.nan, 1.0)])
def test_bounds_that_are_not_ordered_are_refused_where_it_is_asked_for(low, high):
    numbers = torch.zeros(4), torch.zeros(4, 2), torch.ones(4, 2)
    with pytest.raises(ValueError, match="low < high"):
        TanhGaussianMixture(*numbers, low, high, validate_args=True)


@pytest.mark.parametrize("method", ["log_prob", "component_log_prob", "component_posterior", "cdf"])
def test_actions_out_of_bounds_are_refused_where_it_is_asked_for(method):
    checked, unchecked = (random_mixture(4, A=1, validate_args=flag) for flag in (True, None))
    for value in (5.0, math.nan):
        action = torch.full((4, 1), value)
        with pytest.raises(ValueError, match="support"):
            getattr(checked, method)(action)
        getattr(unchecked, method)(action)
    inside = checked.sample()
    torch.testing.assert_close(getattr(checked, method)(inside), getattr(unchecked, method)(inside))
