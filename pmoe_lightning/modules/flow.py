r"""A normalizing-flow policy: a Gaussian sent through invertible splines that depend on the state.

    u = g(z; s),    z ~ N(0, 1)^A,    log pi(u|s) = log N(g^-1(u; s); 0, 1) + log |d g^-1 / du|,    a = squash(u)

Neural spline flows (Durkan et al. 2019, arXiv 1906.04032) as zuko has them, conditioned on the features of a trunk. The
density is exact, so that SAC and PPO train it as they train a Gaussian; a baseline for mixtures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.data import Bounded

from pmoe_lightning.errors import RunError
from pmoe_lightning.limits import Limit, checked
from pmoe_lightning.modules.actors import BoundModule, MixtureActor, MixtureSampler, action_bounds
from pmoe_lightning.modules.distributions import TanhBounds
from pmoe_lightning.modules.mixture import Offer
from pmoe_lightning.modules.networks import Activation, HiddenSizes, Initialization, make_mlp

FlowRule = Literal["base_mode"]
FEATURES = "flow_features"
NUM_BINS = 8
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class FlowNetwork(nn.Module):
    """The trunk: observation [*B, O] -> features [*B, H]."""

    num_components = 1

    def __init__(self, trunk: nn.Sequential) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, observation: Float[Tensor, "*B O"]) -> Float[Tensor, "*B H"]:
        return self.trunk(observation)


class FlowHead(nn.Module):
    """g and its inverse, both given the features of the states.

    Args:
        splines: a lazy transform of zuko, which makes g^-1 of features.
    """

    def __init__(self, splines: nn.Module) -> None:
        super().__init__()
        self.splines = splines

    def forward(
        self, features: Float[Tensor, "*B H"], values: Float[Tensor, "*S A"], draws: bool
    ) -> tuple[Float[Tensor, "*S A"], Float[Tensor, "*S"] | None]:
        """u = g(z) where it ``draws``, otherwise z = g^-1(u) and log |d g^-1 / du|."""
        transform = self.splines(features)
        return (transform.inv(values), None) if draws else transform.call_and_ladj(values)


class FlowActions(TanhBounds, Distribution):
    r"""The density of u = g(z; s), z ~ N(0, 1)^A, squashed by tanh into ``[low, high]``.

    In the words of the mixture (``modules.mixture``) it is one component of weight 1, so every estimator but those that
    ask for a component's mode serves it.

    Args:
        features: of the states [*B, H].
        low, high: action bounds.
        head: a ``FlowHead``, bound.
        deterministic: ``base_mode``: squash(g(0; s)), the image of the base's mode. It is not the density's mode.
    """

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True
    offers: ClassVar[frozenset[Offer]] = frozenset({"draws", "weights", "component_draws", "component_densities"})
    num_components = 1

    def __init__(
        self,
        features: Float[Tensor, "*B H"],
        low: Tensor,
        high: Tensor,
        *,
        head: BoundModule,
        deterministic: FlowRule = "base_mode",
    ) -> None:
        self.features, self.head, self.deterministic = features, head, deterministic
        TanhBounds.__init__(self, low, high)
        Distribution.__init__(self, features.shape[:-1], low.shape[-1:], validate_args=False)

    # --- draws -------------------------------------------------------------------------------------------------------

    def rsample_unsquashed(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "*S A"]:
        """u = g(z; s)."""
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        return self._of_base(torch.randn(shape, dtype=self.features.dtype, device=self.features.device))

    def log_prob_unsquashed(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """log N(g^-1(u)) + log |d g^-1 / du|."""
        z, log_det = self.head(self.features, u, False)
        return log_det - (0.5 * z.square() + _HALF_LOG_2PI).sum(-1)

    def log_prob(self, value: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """log pi(a|s); it goes through atanh."""
        u = self.unsquash(value)
        return self.log_prob_unsquashed(u) - self.log_abs_det_jacobian(u)

    def deterministic_unsquashed(self) -> Float[Tensor, "*B A"]:
        """g(0; s)."""
        return self._of_base(self.features.new_zeros(self.batch_shape + self.event_shape))

    def mode_unsquashed(self) -> Float[Tensor, "*B A"]:
        """No formula has it."""
        raise NotImplementedError("the mode of a flow has no closed form: use ExplorationType.DETERMINISTIC")

    def _of_base(self, z: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        return self.head(self.features, z, True)[0]

    # --- a mixture of one component ----------------------------------------------------------------------------------

    @property
    def log_weights(self) -> Float[Tensor, "*B 1"]:
        return self.features.new_zeros(*self.batch_shape, 1)

    @property
    def weights(self) -> Float[Tensor, "*B 1"]:
        return self.features.new_ones(*self.batch_shape, 1)

    def sample_component(self, sample_shape: Sequence[int] = ()) -> Int[Tensor, "*SB"]:
        return torch.zeros(*sample_shape, *self.batch_shape, dtype=torch.long, device=self.features.device)

    def take_component(self, values: Float[Tensor, "*B 1 A"], component: Int[Tensor, "*SB"]) -> Float[Tensor, "*SB A"]:
        return values.squeeze(-2).expand(*component.shape, values.shape[-1])

    def rsample_components(self) -> Float[Tensor, "1 *B A"]:
        return self.rsample_unsquashed((1,))

    def rsample_given(self, component: Int[Tensor, "*SB"]) -> Float[Tensor, "*SB A"]:
        return self.rsample_unsquashed(component.shape[: component.ndim - len(self.batch_shape)])

    def component_log_prob_unsquashed(self, u: Float[Tensor, "*S A"]) -> Float[Tensor, "*S 1"]:
        return self.log_prob_unsquashed(u).unsqueeze(-1)

    def stratum_log_prob_unsquashed(self, u: Float[Tensor, "1 *B A"]) -> Float[Tensor, "1 *B"]:
        return self.log_prob_unsquashed(u)

    def log_prob_given(self, u: Float[Tensor, "*SB A"], component: Int[Tensor, "*SB"]) -> Float[Tensor, "*SB"]:
        return self.log_prob_unsquashed(u)

    def component_posterior(self, value: Float[Tensor, "*S A"]) -> Float[Tensor, "*S 1"]:
        return value.new_ones(*value.shape[:-1], 1)


@checked
def make_flow_actor(
    observation_dim: int,
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    *,
    num_transforms: Annotated[int, Limit(low=1, high=16)] = 2,
    hidden_sizes: HiddenSizes = (256, 256),
    activation: Activation = "relu",
    initialization: Initialization = "default",
    deterministic: FlowRule = "base_mode",
    return_log_prob: bool = False,
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
) -> MixtureActor:
    """A normalizing-flow actor, see ``FlowActions``.

    It needs zuko: ``pip install "pmoe-lightning[flow]"``.

    Args:
        observation_dim: O.
        action_low, action_high: the action bounds [A].
        num_transforms: coupling layers of rational-quadratic splines with eight bins, each with a hidden layer as wide
            as the last of the trunk.
        hidden_sizes, activation, initialization: of the trunk.
        deterministic: in evaluation, the image of the base's mode.
        return_log_prob: also write ``action_log_prob`` and ``action_unsquashed`` (PPO needs both).
        observation_key, action_key: entries the policy reads and writes.

    Raises:
        ValueError: bounds that are not finite or not ordered.
        RunError: zuko is not installed.

    Example:
        >>> actor = make_flow_actor(17, [-1.0] * 6, [1.0] * 6)
        >>> actor(TensorDict(observation=torch.randn(5, 17), batch_size=5))["action"].shape
        torch.Size([5, 6])
    """
    low, high = action_bounds(action_low, action_high)
    trunk = make_mlp(observation_dim, hidden_sizes, activation, initialization)
    return MixtureActor(
        TensorDictModule(FlowNetwork(trunk), in_keys=[observation_key], out_keys=[FEATURES]),
        MixtureSampler(
            low,
            high,
            distribution_class=FlowActions,
            parameter_keys=[FEATURES],
            head=_make_head(low.numel(), hidden_sizes[-1], num_transforms),
            deterministic=deterministic,
            return_log_prob=return_log_prob,
            action_key=action_key,
            spec=Bounded(low.clone(), high.clone(), shape=low.shape),
        ),
    )


def spline_parameters(action_dim: int, width: int, num_transforms: int = 2) -> int:
    """How many weights the splines of a flow have, without the trunk."""
    hidden, out = (action_dim + width) * width, width * action_dim * (3 * NUM_BINS - 1)
    return num_transforms * (hidden + out)


def _make_head(action_dim: int, width: int, num_transforms: int) -> FlowHead:
    try:
        from zuko.flows import NSF
    except ImportError as error:
        raise RunError('actor=flow needs zuko: pip install "pmoe-lightning[flow]"') from error
    sizes: dict[str, Any] = {"features": action_dim, "context": width, "hidden_features": [width]}
    # Two passes: half of the action conditions the other half, so that both directions take two evaluations at most.
    return FlowHead(NSF(**sizes, bins=NUM_BINS, transforms=num_transforms, passes=2).transform)
