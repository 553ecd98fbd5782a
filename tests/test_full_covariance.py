"""The contract of a distribution, tried with one that is not the package's own: a mixture with full covariance.

It trains with every estimator that it can serve, and every other pair is refused in one line before anything runs.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from full_covariance import FullCovarianceMixture, make_full_covariance_actor
from tensordict import TensorDict
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torchrl.modules import ProbabilisticActor, TanhNormal

from pmoe_lightning import make_gaussian_actor, make_pmoe_actor, make_qvalue_network
from pmoe_lightning.algorithms import make_ppo, make_sac
from pmoe_lightning.callbacks import EstimatorVariance, MixtureDiagnostics
from pmoe_lightning.callbacks.mixture import mixture_metrics
from pmoe_lightning.estimators import AbstractEstimator, GumbelSoftmax, Implicit, Marginalized, Pathwise, check_pair
from pmoe_lightning.estimators.gradient_statistics import gradient_statistics
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.losses import PMOESACLoss
from pmoe_lightning.modules.distributions import TanhGaussianMixture
from pmoe_lightning.modules.mixture import MixtureDistribution
from pmoe_lightning.safe.constraint import CostConstraint

O, A, K = 3, 2, 3  # noqa: E741 (the shape letters)
SPACES = (O, [-2.0] * A, [2.0] * A)
DIMS = {"observation_dim": O, "action_dim": A, "hidden_sizes": (32, 32)}
OWN = [cls for cls in AbstractEstimator.__subclasses__() if cls.__module__.startswith("pmoe_lightning.")]
#: What a mixture with full covariance and several components cannot serve.
REFUSED = {Implicit: "diagonal_scales", Pathwise: "at most 1 component"}
SERVED = [cls for cls in OWN if cls not in REFUSED]


def mixture(*batch: int, dtype: torch.dtype = torch.float64) -> FullCovarianceMixture:
    generator = torch.Generator().manual_seed(0)
    logits, loc, factor = (
        torch.randn(*batch, *shape, generator=generator, dtype=dtype) for shape in ((K,), (K, A), (K, A, A))
    )
    tril = factor.tril(-1) + (0.3 * factor.diagonal(dim1=-2, dim2=-1) - 0.7).exp().diag_embed()
    return FullCovarianceMixture(logits, 0.5 * loc, tril, torch.full((A,), -2.0), torch.full((A,), 2.0))


def test_both_mixtures_have_the_members_of_the_contract():
    diagonal = TanhGaussianMixture(torch.zeros(4, K), torch.zeros(4, K, A), torch.ones(4, K, A))
    assert isinstance(diagonal, MixtureDistribution)
    members = {*vars(MixtureDistribution), *MixtureDistribution.__annotations__}
    members = {name for name in members if not name.startswith("_")}
    assert {name for name in members if not hasattr(mixture(4), name)} == {"scale"}


def test_the_density_is_that_of_torch():
    own = mixture(5)
    theirs = MixtureSameFamily(
        Categorical(logits=own.log_weights), MultivariateNormal(own.loc, scale_tril=own.scale_tril)
    )
    u, component = own.rsample_unsquashed((7,)), own.sample_component((7,))
    torch.testing.assert_close(own.log_prob_unsquashed(u), theirs.log_prob(u))
    of_all = own.component_log_prob_unsquashed(u)
    torch.testing.assert_close(own.log_prob_given(u, component), of_all.gather(-1, component.unsqueeze(-1)).squeeze(-1))
    strata = own.rsample_components()
    expected = own.component_log_prob_unsquashed(strata).diagonal(dim1=0, dim2=-1).movedim(-1, 0)
    torch.testing.assert_close(own.stratum_log_prob_unsquashed(strata), expected)


def test_the_draws_have_the_covariance():
    torch.manual_seed(0)
    own, number = mixture(), 40_000
    for k in range(K):
        u = own.rsample_given(torch.full((number,), k))
        expected = own.scale_tril[k] @ own.scale_tril[k].T
        # Four standard errors of each entry: fails for a right program in one of about a thousand seeds.
        error = ((expected.diagonal().outer(expected.diagonal()) + expected.square()) / number).sqrt()
        assert ((u.T.cov() - expected).abs() < 4 * error).all()


# --- what serves -----------------------------------------------------------------------------------------------------


def one_step_tasks(number: int) -> TensorDict:
    """Minibatches [number, 64] of episodes of one step, whose reward wants both actions equal to the state."""
    observation, action = torch.rand(number, 64, O) * 2 - 1, torch.rand(number, 64, A) * 4 - 2
    over = torch.ones(number, 64, 1, dtype=torch.bool)
    outcome = {"observation": observation, "reward": reward(observation, action), "done": over, "terminated": over}
    following = TensorDict(outcome, batch_size=(number, 64))
    return TensorDict({"observation": observation, "action": action, "next": following}, batch_size=(number, 64))


def reward(observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return -(action - observation[..., :1]).square().sum(-1, keepdim=True)


def train(actor, estimator: AbstractEstimator, updates: int = 150, **arguments) -> float:
    """How much the reward of the policy's own draws rises."""
    algorithm = make_sac(actor, estimator, **DIMS, lr=3e-3, alpha_init=0.05, **arguments)
    optimizer, states = algorithm.configure_optimizers(), torch.rand(2000, O) * 2 - 1

    def drawn() -> float:
        with torch.no_grad():
            return float(reward(states, actor(TensorDict(observation=states, batch_size=2000))["action"]).mean())

    before = drawn()
    for minibatch in one_step_tasks(updates):
        out = algorithm.loss(minibatch)
        optimizer.zero_grad()
        sum(value for name, value in out.items() if name.startswith("loss_")).backward()
        optimizer.step()
    return drawn() - before


@pytest.mark.parametrize("estimator", SERVED)
def test_it_trains_with_every_estimator_that_it_serves(estimator):
    torch.manual_seed(0)
    assert train(make_full_covariance_actor(*SPACES), estimator()) > 0.7


def test_one_component_is_served_pathwise():
    torch.manual_seed(0)
    assert train(make_full_covariance_actor(*SPACES, num_components=1), Pathwise()) > 0.7


def test_it_is_evolved_by_a_transform_and_trained_under_a_constraint():
    torch.manual_seed(0)
    transform = make_hamiltonian_transform(O, A, step_size=0.2)
    algorithm = make_sac(
        make_full_covariance_actor(*SPACES),
        Marginalized(),
        **DIMS,
        action_transform=transform,
        constraint=CostConstraint(),
    )
    minibatch = one_step_tasks(1)[0]
    minibatch["next", "cost"] = torch.ones(64, 1)
    assert all(value.isfinite().all() for value in algorithm.loss(minibatch).values())
    assert algorithm.policy(TensorDict(observation=torch.zeros(5, O), batch_size=5))["action"].shape == (5, A)


def test_ppo_trains_it():
    torch.manual_seed(0)
    actor = make_full_covariance_actor(*SPACES, return_log_prob=True)
    algorithm = make_ppo(actor, Marginalized(), observation_dim=O, action_dim=A, entropy_coeff=0.01)
    rollout = actor(TensorDict(observation=torch.randn(32, O), batch_size=32)).detach()
    rollout.update({"advantage": torch.randn(32, 1), "value_target": torch.randn(32, 1)})
    out = algorithm.loss(rollout)
    sum(value for name, value in out.items() if name.startswith("loss_")).backward()
    assert all(parameter.grad.isfinite().all() for parameter in algorithm.loss.actor_network_params.parameters())
    torch.testing.assert_close(out["kl_approx"], torch.zeros(()), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "estimator", [cls for cls in SERVED if cls.__name__ in ("HalfReparameterized", "ScoreFunction")]
)
def test_the_unbiased_estimators_agree(estimator):
    """The mean gradients differ by as much as their noise says."""
    torch.manual_seed(0)
    own = mixture(4)
    loss = PMOESACLoss(make_full_covariance_actor(*SPACES), [make_qvalue_network(O, A) for _ in range(2)]).double()
    states = TensorDict(observation=torch.randn(4, O, dtype=torch.float64), batch_size=4)
    found, exact = (
        gradient_statistics(each, own, lambda repeated: loss.objective(states, repeated), num_samples=1000)
        for each in (estimator(), Marginalized())
    )
    assert set(found) == {"router", "loc", "scale_tril"}
    for group in found:
        error = found[group].standard_error ** 2 + exact[group].standard_error ** 2
        # The square of the distance has this mean; six times as much a right program has in at most one of 70 seeds.
        assert (found[group].mean - exact[group].mean).square().sum() < 6 * error


# --- what does not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_sac, make_ppo])
@pytest.mark.parametrize(
    ("estimator", "lacking"),
    [*((cls(), why) for cls, why in REFUSED.items()), (GumbelSoftmax(straight_through=False), "diagonal")],
)
def test_every_other_estimator_is_refused_in_one_line(make, estimator, lacking):
    with pytest.raises(
        ValueError, match=f"{type(estimator).__name__} asks for .*{lacking}.*FullCovarianceMixture"
    ) as refusal:
        make(make_full_covariance_actor(*SPACES, return_log_prob=True), estimator, observation_dim=O, action_dim=A)
    assert "\n" not in str(refusal.value)


def test_a_distribution_that_says_nothing_serves_nobody():
    for cls in OWN:
        with pytest.raises(ValueError, match=f"{cls.__name__} asks for .*draws.* TanhNormal does not offer"):
            check_pair(cls(), TanhNormal, 1)


def test_an_actor_that_says_nothing_is_refused_where_it_is_first_asked():
    network = make_gaussian_actor(*SPACES)[0]
    actor = ProbabilisticActor(network, in_keys=["loc", "scale"], out_keys=["action"], distribution_class=TanhNormal)
    loss = PMOESACLoss(actor, [make_qvalue_network(O, A) for _ in range(2)], target_entropy=-2.0)
    with pytest.raises(ValueError, match="Marginalized asks for .*TanhNormal"):
        loss.estimate(TensorDict(observation=torch.randn(4, O), batch_size=4))


def test_an_estimator_that_says_nothing_asks_for_everything():
    class Silent(AbstractEstimator):
        def __call__(self, distribution, objective):
            raise NotImplementedError

    check_pair(Silent(), TanhGaussianMixture, 5)
    with pytest.raises(ValueError, match="Silent asks for diagonal_scales, which FullCovarianceMixture"):
        check_pair(Silent(), FullCovarianceMixture, 5)


def test_too_few_components_are_refused():
    estimator = Marginalized()
    estimator.least_components = 4
    with pytest.raises(ValueError, match="Marginalized asks for at least 4 components, TanhGaussianMixture has 3 here"):
        make_sac(make_pmoe_actor(*SPACES, num_components=3), estimator, **DIMS)


# --- the callbacks leave out what it does not offer -------------------------------------------------------------------


def test_the_gradient_is_measured_without_what_it_cannot_give(caplog):
    torch.manual_seed(0)
    transform = make_hamiltonian_transform(O, A, step_size=0.2)
    algorithm = make_sac(make_full_covariance_actor(*SPACES), Marginalized(), **DIMS, action_transform=transform)
    algorithm.last_observation = torch.randn(20, O)
    callback = EstimatorVariance(num_samples=4)
    with caplog.at_level(logging.INFO):
        measured, again = callback.measure(algorithm), callback.measure(algorithm)
    assert set(measured) == set(again)
    names = {
        f"{name}_{group}"
        for name in ("variance", "signal_to_noise", "cosine")
        for group in ("router", "loc", "scale_tril")
    }
    assert set(measured) == {f"train/estimator/{name}" for name in names}
    assert caplog.messages == [
        "FullCovarianceMixture is measured without the share of wrong signs: it does not offer diagonal_scales"
    ]


def test_the_mixture_is_measured_without_what_it_cannot_give(caplog):
    metrics = mixture_metrics(mixture(10))
    assert "train/mixture/component_distance" in metrics and "train/mixture/scale" not in metrics
    algorithm = make_sac(make_full_covariance_actor(*SPACES), Marginalized(), **DIMS)
    algorithm.last_observation = torch.randn(20, O)
    callback = MixtureDiagnostics(every_frames=10, figure_every_frames=20)
    with caplog.at_level(logging.INFO):
        watch(callback, algorithm, frames=(10, 20, 30))
    assert len(callback.history) == 3
    told = "FullCovarianceMixture is measured without the scale of its components: it does not offer diagonal_scales"
    assert caplog.messages == [told]


@pytest.mark.parametrize("callback", [MixtureDiagnostics(10, 20), EstimatorVariance(10)])
def test_no_distribution_ends_a_run(callback, caplog):
    """One that offers nothing, and one that breaks its word."""
    algorithm = make_sac(make_full_covariance_actor(*SPACES), Marginalized(), **DIMS)
    algorithm.last_observation = torch.randn(20, O)
    silent = TanhNormal(torch.zeros(20, A), torch.ones(20, A))
    for distribution, level in ((silent, logging.INFO), (Liar(), logging.WARNING)):
        algorithm.actor.get_dist = lambda _, distribution=distribution: distribution
        caplog.clear()
        with caplog.at_level(logging.INFO):
            watch(callback, algorithm, frames=(10,))
        assert [record.levelno for record in caplog.records] == [level]
        assert "\n" not in caplog.messages[0]


class Liar:
    offers = TanhGaussianMixture.offers


def watch(callback, algorithm, frames: tuple[int, ...]) -> None:
    """The callback in a run that reaches these frames."""
    trainer = SimpleNamespace(datamodule=SimpleNamespace(env_frames=0), loggers=[], callbacks=[], is_global_zero=True)
    callback.on_train_start(trainer, algorithm)
    for reached in frames:
        trainer.datamodule.env_frames = reached
        callback.on_train_batch_end(trainer, algorithm)
