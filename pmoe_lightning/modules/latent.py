r"""The amortised policy: an action is a function of the state and of noise, and has no density.

    a = squash(f(s, z)),    z ~ U(0, 1)^Z

That of DrAC (2025, arXiv 2511.01374). In place of an entropy its temperature holds the distance of its draws at a
target. A baseline for mixtures: it can keep any number of modes, and nobody can say how likely each is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.data import Bounded

from pmoe_lightning.limits import Width, checked
from pmoe_lightning.modules.actors import BoundModule, MixtureActor, MixtureSampler, action_bounds
from pmoe_lightning.modules.distributions import TanhBounds
from pmoe_lightning.modules.mixture import Offer
from pmoe_lightning.modules.networks import Activation, HiddenSizes, Initialization, initialize, make_mlp

LatentRule = Literal["center"]
FEATURES = "latent_features"
_SMALLEST_DISTANCE = 1e-5


class LatentHead(nn.Module):
    """What is left of f behind the part of its first layer that reads the state: u = f(s, z).

    Args:
        network: the hidden layers of f, the first of which reads (s, z).
        action_dim: A.
        latent_dim: Z, the last Z inputs of the first layer.
        num_pairs: M, see ``LatentActions``.
        initialization: of the last layer.
    """

    def __init__(
        self,
        network: nn.Sequential,
        action_dim: int,
        *,
        latent_dim: int,
        num_pairs: int,
        initialization: Initialization,
    ) -> None:
        super().__init__()
        first, *rest = list[Any](network)
        self.latent_dim, self.num_pairs, self.action_dim = latent_dim, num_pairs, action_dim
        self.of_latent = nn.Linear(latent_dim, first.out_features, bias=False)
        self.of_latent.weight.data.copy_(first.weight.data[:, -latent_dim:])
        width = next(layer.out_features for layer in reversed(network) if isinstance(layer, nn.Linear))
        last = nn.Linear(width, action_dim)
        initialize(last, initialization, gain=0.01)
        self.rest = nn.Sequential(*rest, last)

    def forward(self, features: Float[Tensor, "*B H"], z: Float[Tensor, "*S Z"]) -> Float[Tensor, "*S A"]:
        """u at the latents, of states whose part of the first layer this is; sample dimensions come first."""
        return self.rest(features + self.of_latent(z))


class LatentNetwork(nn.Module):
    """The part of the first layer of f that reads the state: observation [*B, O] -> features [*B, H]."""

    num_components = 1

    def __init__(self, network: nn.Sequential, observation_dim: int) -> None:
        super().__init__()
        first = cast(nn.Linear, network[0])
        self.of_state = nn.Linear(observation_dim, first.out_features)
        self.of_state.weight.data.copy_(first.weight.data[:, :observation_dim])
        self.of_state.bias.data.copy_(first.bias.data)

    def forward(self, observation: Float[Tensor, "*B O"]) -> Float[Tensor, "*B H"]:
        return self.of_state(observation)


class LatentActions(TanhBounds, Distribution):
    r"""What is drawn by a = squash(f(s, z)), z ~ U(0, 1)^Z. It has draws, and no density.

    Where a loss takes log pi(a|s), of the action normalised to [-1, 1], it gets minus the *diversity*

        D(s) = 1/M sum_i log(|x_i - y_i|_2 + 1e-5),    x_i, y_i = tanh(f(s, z)), 2 M independent draws at s

    (``offers``), which is differentiated through all of them: E[D] is the mean logarithm of the distance of two
    actions. It is no entropy and has no nats; a target for it is log(beta sqrt A), a distance of beta times that from
    the centre of the action box to its corners.

    Args:
        features: of the states [*B, H].
        low, high: action bounds.
        head: a ``LatentHead``, bound.
        deterministic: ``center``: the action at z = (1/2, ..., 1/2). Such a policy has no natural rule: its centre is
            one action among many, and may lie between two ways.
    """

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True
    offers: ClassVar[frozenset[Offer]] = frozenset({"diversity"})
    num_components = 1

    def __init__(
        self,
        features: Float[Tensor, "*B H"],
        low: Tensor,
        high: Tensor,
        *,
        head: BoundModule,
        deterministic: LatentRule = "center",
    ) -> None:
        self.features, self.head, self.deterministic = features, head, deterministic
        TanhBounds.__init__(self, low, high)
        Distribution.__init__(self, features.shape[:-1], torch.Size([head.module.action_dim]), validate_args=False)

    def rsample_unsquashed(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "*S A"]:
        """u = f(s, z) with a z of its own for each."""
        shape = (*sample_shape, *self.batch_shape, self.head.module.latent_dim)
        return self.head(self.features, torch.rand(shape, dtype=self.features.dtype, device=self.features.device))

    def diversity(self) -> Float[Tensor, "*B"]:
        """D(s), from fresh draws."""
        u = self.rsample_unsquashed((2 * self.head.module.num_pairs,))
        x, y = TanhBounds.normalized(u).squash(u).chunk(2)
        return ((x - y).norm(dim=-1) + _SMALLEST_DISTANCE).log().mean(0)

    def log_prob_unsquashed(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """What stands for log pi(u|s): -D(s) once the loss has passed on to the normalised action."""
        return TanhBounds.normalized(u).log_abs_det_jacobian(u) - self.diversity()

    def deterministic_unsquashed(self) -> Float[Tensor, "*B A"]:
        """u = f(s, (1/2, ..., 1/2))."""
        shape = (*self.batch_shape, self.head.module.latent_dim)
        return self.head(self.features, self.features.new_full(shape, 0.5))

    def mode_unsquashed(self) -> Float[Tensor, "*B A"]:
        """Without a density nobody knows the mode."""
        raise NotImplementedError("actor latent has no density, and so no mode: use ExplorationType.DETERMINISTIC")


@checked
def make_latent_actor(
    observation_dim: int,
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    *,
    latent_dim: Width = 16,
    num_pairs: Width = 8,
    hidden_sizes: HiddenSizes = (256, 256),
    activation: Activation = "relu",
    initialization: Initialization = "default",
    deterministic: LatentRule = "center",
    return_log_prob: bool = False,
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
) -> MixtureActor:
    """The amortised actor of DrAC (2025, arXiv 2511.01374): see ``LatentActions``. SAC with ``pathwise`` trains it.

    Args:
        observation_dim: O.
        action_low, action_high: the action bounds [A].
        latent_dim: Z, how many uniform numbers an action is made of.
        num_pairs: M, pairs of draws by which the diversity is measured.
        hidden_sizes, activation, initialization: of f.
        deterministic: in evaluation, the action at the centre of the latents; the policy has no natural one.
        return_log_prob: refused.
        observation_key, action_key: entries the policy reads and writes.

    Raises:
        ValueError: bounds that are not finite or not ordered; or a log-probability is asked for: there is none.

    Example:
        >>> actor = make_latent_actor(17, [-1.0] * 6, [1.0] * 6)
        >>> actor(TensorDict(observation=torch.randn(5, 17), batch_size=5))["action"].shape
        torch.Size([5, 6])
    """
    if return_log_prob:
        raise ValueError("actor latent has no density, so no log-probability of what it did: use SAC, or another actor")
    low, high = action_bounds(action_low, action_high)
    network = make_mlp(observation_dim + latent_dim, hidden_sizes, activation, initialization)
    sizes = {"latent_dim": latent_dim, "num_pairs": num_pairs}
    head = LatentHead(network, low.numel(), initialization=initialization, **sizes)
    return MixtureActor(
        TensorDictModule(LatentNetwork(network, observation_dim), in_keys=[observation_key], out_keys=[FEATURES]),
        MixtureSampler(
            low,
            high,
            distribution_class=LatentActions,
            parameter_keys=[FEATURES],
            head=head,
            deterministic=deterministic,
            return_log_prob=False,
            action_key=action_key,
            spec=Bounded(low.clone(), high.clone(), shape=low.shape),
        ),
    )
