"""A user's script as the type checker sees it: read by mypy in ``test_types``, run by nobody.

The lines marked as errors are errors: mypy complains of a mark that is not needed.
"""

from typing import assert_type

import numpy as np
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Distribution

from pmoe_lightning import Marginalized, PMOESACLoss, TanhGaussianMixture, load_policy, make_pmoe_actor
from pmoe_lightning import make_qvalue_network as make_critic
from pmoe_lightning.checkpoints.loaded import LoadedPolicy
from pmoe_lightning.estimators import Evaluation, ObjectiveValue, Surrogate
from pmoe_lightning.hamiltonian import HamiltonianTransform
from pmoe_lightning.modules.actors import MixtureActor


def act(path: str, observation: np.ndarray) -> None:
    policy = load_policy(path, rule="max_weight")
    assert_type(policy, LoadedPolicy)
    assert_type(policy.predict(observation), np.ndarray)
    load_policy(path, devise="cpu")  # type: ignore[call-arg]


def estimate(logits: Tensor, loc: Tensor, scale: Tensor) -> None:
    mixture = TanhGaussianMixture(logits, loc, scale, low=-1.0, high=1.0)
    is_torch_distribution: Distribution = mixture
    assert_type(mixture.weights, Tensor)

    def cost(u: Tensor, log_prob: Tensor) -> Evaluation:  # which is what it was called before
        return ObjectiveValue(cost=log_prob + u.square().sum(-1), log_prob=log_prob, score=-log_prob)

    surrogate = Marginalized()(mixture, cost)
    assert_type(surrogate, Surrogate)
    assert_type(surrogate.loss, Tensor)
    Marginalized()(is_torch_distribution, cost)  # type: ignore[arg-type]
    Marginalized()(mixture, lambda u: u)  # type: ignore[arg-type]


def learn(minibatch: TensorDict) -> None:
    actor = make_pmoe_actor(3, [-1.0], [1.0], num_components=4, router="attached")
    assert_type(actor, MixtureActor)
    assert_type(actor.num_components, int)
    loss = PMOESACLoss(actor, [make_critic(3, 1) for _ in range(2)], estimator=Marginalized())
    assert_type(loss.action_transform, HamiltonianTransform | None)
    loss(minibatch)
    make_pmoe_actor(3, [-1.0], [1.0], num_components="4")  # type: ignore[arg-type]
    make_pmoe_actor(3, [-1.0], [1.0], router="attachd")  # type: ignore[arg-type]
    PMOESACLoss(actor, [make_critic(3, 1)], estimator="marginalized")  # type: ignore[arg-type]
