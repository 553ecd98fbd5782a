"""A gradient estimator of one's own, in a loss and in the train command.

    python examples/own_estimator.py
    PYTHONPATH=examples python -m pmoe_lightning.train algo=sac --config-dir examples/conf estimator=heaviest

An estimator maps a distribution and an objective to a surrogate, whose gradient is the estimate; it sees no critic. The
second command finds the class by ``examples/conf/estimator/heaviest.yaml``; ``--config-dir`` adds options to any group.
"""

import torch
from tensordict import TensorDict

from pmoe_lightning import PMOESACLoss, TanhGaussianMixture, make_pmoe_actor, make_qvalue_network
from pmoe_lightning.estimators import AbstractEstimator, Objective, Surrogate


class HeaviestComponents(AbstractEstimator):
    """The exact sum over the components, cut off after the heaviest ones.

        loss = sum_{k in top} w_k cost(u_k) / sum_{k in top} w_k,    u_k = mu_k + sigma_k eps_k

    Biased, because the components left out neither act nor learn here; ``marginalized`` where none is. It asks the
    critics about ``num_kept`` actions per state instead of K.

    Args:
        num_kept: components of the sum.
    """

    asks = frozenset({"draws", "weights", "component_draws", "component_densities"})  # see ``modules/mixture.py``

    def __init__(self, *, num_kept: int = 2) -> None:
        self.num_kept = self.least_components = num_kept

    def __call__(self, distribution: TanhGaussianMixture, objective: Objective) -> Surrogate:
        log_weights, kept = distribution.log_weights.topk(self.num_kept, -1)  # [*B, num_kept]
        weights, kept = log_weights.softmax(-1).movedim(-1, 0), kept.movedim(-1, 0)  # [num_kept, *B]
        draws = distribution.rsample_components()  # [K, *B, A], before tanh
        u = draws.gather(0, kept.unsqueeze(-1).expand(*kept.shape, draws.shape[-1]))
        evaluation = objective(u, distribution.log_prob_unsquashed(u))  # squashes, scores and asks the critics
        # What an action transform adds to the cost comes as a value alone: its derivative is a score of the draws.
        evaluation = evaluation.scored(lambda: distribution.stratum_log_prob_unsquashed(draws.detach()).gather(0, kept))
        cost, log_prob = ((weights * values).sum(0) for values in (evaluation.cost, evaluation.log_prob))
        return Surrogate(cost, log_prob.detach())


if __name__ == "__main__":
    torch.manual_seed(0)
    actor = make_pmoe_actor(3, [-1.0], [1.0], num_components=4)
    loss = PMOESACLoss(actor, [make_qvalue_network(3, 1) for _ in range(2)], estimator=HeaviestComponents())
    surrogate = loss.estimate(TensorDict(observation=torch.randn(256, 3), batch_size=256))
    surrogate.loss.mean().backward()
    print(f"estimated cost {surrogate.expected_cost.mean():.3f}")
    for name, parameter in actor.named_parameters():
        print(f"{name:<32} gradient norm {parameter.grad.norm():.2e}")
