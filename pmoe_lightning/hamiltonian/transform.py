r"""Actions evolved by leapfrog on the action value: the transform itself, and a TensorDict module that acts with it.

The dynamics run on the unsquashed action u, towards the density that soft actor-critic's policy is fitted to:

    log_target(s, u) = Q(s, a(u)) / alpha + sum_d log |da_d/du_d|        (-log_target is the potential energy)
    rho_0 ~ N(0, T_0 tau^2 I);   (u_L, rho_L) = leapfrog(u_0, rho_0)     (``leapfrog``)

The density of u_L has no closed form. What scores it is a lower bound on its entropy, from the joint density of
position and momentum and the unit Jacobian:

    log pi_hat(u_L|s) = log pi(u_0|s) + log N(rho_0; 0, T_0 tau^2) - log N(rho_L; 0, tau^2) - log|det|
                      = log pi(u_0|s) + |rho_L|^2 / (2 tau^2) - |rho_0|^2 / (2 T_0 tau^2)

    E[-log pi_hat] = entropy of u_L - E KL(p(rho_L | u_L, s) || N(0, tau^2)) <= entropy of u_L.

Tempering cancels: log|det| = -(A/2) log T_0 is the difference of the two normalising constants. What soft actor-critic
pays for the evolved action is then what it paid for the drawn one plus alpha times the change of energy,

    alpha log pi_hat(a_L|s) - Q(s, a_L) = alpha log pi(a_0|s) - Q(s, a_0) + alpha (H_L - H_0),

so an exact integration of Hamilton's equations changes the value of neither, only where the policy acts; what a force
or a temperature gains beyond that is gained in energy.

No derivative leads from u_L back to u_0. The chain rule through the leapfrog holds the curvature of Q. With curvature
omega^2 of log_target in u, a trajectory of length eps L turns by the angle omega eps L: what leaves the curvature out
is off by about cos(omega eps L), and beyond a quarter of a turn it has the wrong sign. A relu critic has all its
curvature in kinks, where no automatic differentiation sees it. The identity above says what to do instead: the drawn
action's cost is differentiated, and the change of energy, of which the value is enough, is the ``remainder`` that
estimators multiply with a score (``estimators.base``).

Source: this project's definition throughout (see the package). Salimans et al. (2015, arXiv 1410.6460) and Caterini et
al. (2018, arXiv 1805.11328) bound a marginal likelihood in this way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase
from tensordict.nn.probabilistic import interaction_type
from tensordict.utils import NestedKey
from torch import Tensor, nn

from pmoe_lightning.hamiltonian.forces import AbstractForce, Gated, Normalized, Raw
from pmoe_lightning.hamiltonian.leapfrog import is_divergent, kinetic_energy, leapfrog, metropolis_accepts
from pmoe_lightning.limits import Flag, Limit, Of, PositiveFloat, checked, take
from pmoe_lightning.modules.distributions import TanhBounds
from pmoe_lightning.modules.keys import beside

Pullback = Callable[[Float[Tensor, "Q *S"]], Float[Tensor, "*S A"]]
ActionValue = Callable[[Float[Tensor, "*S A"]], tuple[Float[Tensor, "Q *S"], Pullback]]
"""a -> Q_i(s, a), and the map from weights c_i to sum_i c_i dQ_i/da. ``differentiable`` makes one of any function."""
Use = Literal["acting", "actor_loss", "critic_target"]
EvolvedDensity = Literal["joint", "base"]
Reduction = Literal["min", "mean"]


class Evolution(NamedTuple):
    """What became of unsquashed actions."""

    u: Float[Tensor, "*S A"]
    log_prob: Float[Tensor, "*S"]
    """Of the unsquashed action: what the draw had, or log pi_hat."""
    energy_error: Float[Tensor, "*S"]
    """H_L - H_0 of the proposed trajectory, detached."""
    stays: Bool[Tensor, "*S"]
    """Where the proposal was rejected: u and log_prob are those of the draw."""
    qvalue_gain: Float[Tensor, "*S"]
    """Q(s, a_L) - Q(s, a_0), detached, zero where the draw stays."""
    qvalue: Float[Tensor, "*S"]
    """Q(s, a_L) or, where the draw stays, Q(s, a_0), reduced as for the dynamics; differentiable as ``u`` is."""
    drawn_qvalue: Float[Tensor, "*S"]
    """Q(s, a_0), differentiable in u_0 with the dQ/da that the dynamics have computed anyway."""


class Trajectory(NamedTuple):
    """Where leapfrog leads."""

    positions: tuple[Float[Tensor, "*S A"], ...]
    """u_0 .. u_L."""
    momentum: Float[Tensor, "*S A"]
    """rho_L."""
    qvalues: tuple[Float[Tensor, "*S"], ...]
    """Q(s, a_0) .. Q(s, a_L), detached."""
    slopes: tuple[Float[Tensor, "*S A"], ...]
    """dQ/da there, detached."""


class HamiltonianTransform(nn.Module):
    r"""Evolves unsquashed actions along trajectories of the action value.

    An element whose trajectory diverges (``leapfrog.is_divergent``), which includes every one that is not finite, stays
    where it was, with the log-density it had. With ``num_leapfrog_steps=0`` the transform does nothing and draws no
    random number.

    What is differentiated: the parameters of the force and the step size, along the trajectory from a given u_0. There
    dQ/da enters as a constant, which is exact for a critic that is linear in a and approximate for others; a step size
    learned with the ``raw`` force is not to be trusted (docs/hamiltonian.md has sizes). u_0 is held fixed: see above
    for what takes the place of its derivative.

    Args:
        force: see ``forces``.
        num_leapfrog_steps: L, of a trajectory.
        step_size: eps, of a leapfrog step; None is that of the force.
        learn_step_size: make eps a parameter, trained with the actor and kept within (0, 4 step_size).
        momentum_scale: tau, of the initial momentum. The drift is eps rho whatever tau is: below 1 there is less noise
            than the target's temperature asks for, and ``joint`` charges every gain of momentum 1/tau^2 times as much.
        temperature: T_0 of ``leapfrog``: above 1, the momentum starts hotter and cools along the trajectory.
        metropolis: when acting, keep a sampled trajectory's end only by Metropolis's rule.
        log_prob: ``joint`` scores with log pi_hat; ``base`` leaves its momentum terms out and so overstates the
            entropy: gains in Q reappear as kinetic energy, which nobody pays for.
        critic_reduction: Q, which drives the dynamics, is the ``min`` or the ``mean`` over critics.
        used_in: where evolved actions replace drawn ones: ``acting``, ``actor_loss``, ``critic_target``.

    Raises:
        ValueError: an unknown switch or a number out of range.
    """

    @checked
    def __init__(
        self,
        force: AbstractForce,
        *,
        num_leapfrog_steps: Annotated[int, Limit(low=0, high=1000)] = 3,
        step_size: PositiveFloat | None = None,
        learn_step_size: Flag = False,
        momentum_scale: PositiveFloat = 1.0,
        temperature: Annotated[float, Limit(low=1)] = 1.0,
        metropolis: Flag = False,
        log_prob: EvolvedDensity = "joint",
        critic_reduction: Reduction = "min",
        used_in: Collection[Use] = get_args(Use),
    ) -> None:
        super().__init__()
        step_size = force.step_size if step_size is None else step_size
        if metropolis and temperature != 1:
            raise ValueError(
                "action transform: metropolis needs temperature=1, because a tempered trajectory has no reverse"
            )
        if "actor_loss" not in used_in and (learn_step_size or any(p.requires_grad for p in force.parameters())):
            raise ValueError(
                "action transform: what it learns, it learns from the actor loss: use it in actor_loss, too"
            )
        self.force, self.num_leapfrog_steps = force, num_leapfrog_steps
        self.momentum_scale, self.temperature, self.metropolis = momentum_scale, temperature, metropolis
        self.log_prob, self.critic_reduction, self.used_in = log_prob, critic_reduction, frozenset(used_in)
        self._max_step_size = 4 * step_size
        logit = torch.tensor(0.25).logit()
        if learn_step_size:
            self.step_size_logit = nn.Parameter(logit)
        else:
            self.register_buffer("step_size_logit", logit)

    @property
    def step_size(self) -> Tensor:
        """eps."""
        return self._max_step_size * self.step_size_logit.sigmoid()

    def is_used_in(self, use: Use) -> bool:
        """Whether it changes anything there."""
        return self.num_leapfrog_steps > 0 and use in self.used_in

    def sample_momentum(self, like: Float[Tensor, "*B A"]) -> Float[Tensor, "*B A"]:
        """rho_0 ~ N(0, T_0 tau^2 I) of the shape, type and device of a tensor."""
        return self.momentum_scale * self.temperature**0.5 * torch.randn_like(like)

    def forward(
        self,
        u: Float[Tensor, "*S A"],
        log_prob: Float[Tensor, "*S"],
        momentum: Float[Tensor, "*M A"],
        *,
        observation: Float[Tensor, "*B O"],
        qvalue: ActionValue,
        bounds: TanhBounds,
        alpha: Tensor | float,
        metropolis: bool = False,
    ) -> Evolution:
        """Evolve actions that were drawn with this log-density.

        Args:
            u, log_prob: unsquashed actions [*S, *B, A] at states [*B], and their log-density [*S, *B].
            momentum: rho_0, one per state, which all samples of a state share; or any that u broadcasts with.
            observation: the states.
            qvalue: the action values in these states.
            bounds: squashes u.
            alpha: the temperature.
            metropolis: decide by Metropolis's rule, too.
        """
        drawn, u = u, u.detach()
        momentum = momentum.expand_as(u)
        path = self.trajectory(u, momentum, observation=observation, qvalue=qvalue, bounds=bounds, alpha=alpha)
        end, gain = path.positions[-1], path.qvalues[-1] - path.qvalues[0]
        hot = self.momentum_scale * self.temperature**0.5
        heat = kinetic_energy(path.momentum, self.momentum_scale) - kinetic_energy(momentum, hot)
        widening = bounds.log_abs_det_jacobian(end) - bounds.log_abs_det_jacobian(u)
        energy_error = (heat - widening).detach() - gain / alpha
        stays = is_divergent(energy_error)
        if metropolis:
            stays = stays | ~metropolis_accepts(energy_error)
        evolved = torch.where(stays.unsqueeze(-1), u, end)
        if self.log_prob == "joint":
            log_prob = torch.where(stays, log_prob, log_prob + heat)
        value = torch.where(stays, path.qvalues[0], path.qvalues[-1])
        slope = torch.where(stays.unsqueeze(-1), path.slopes[0], path.slopes[-1])
        return Evolution(
            evolved,
            log_prob,
            energy_error,
            stays,
            gain.masked_fill(stays, 0.0),
            _with_slope(value, slope, bounds.squash(evolved)),
            _with_slope(path.qvalues[0], path.slopes[0], bounds.squash(drawn)),
        )

    def trajectory(
        self,
        u: Float[Tensor, "*S A"],
        momentum: Float[Tensor, "*S A"],
        *,
        observation: Float[Tensor, "*B O"],
        qvalue: ActionValue,
        bounds: TanhBounds,
        alpha: Tensor | float,
    ) -> Trajectory:
        """The trajectory from u and momentum, whatever becomes of its end; arguments as ``forward``'s."""
        observation = observation.expand(*u.shape[:-1], -1)
        visited: list[tuple[Tensor, Tensor, Tensor]] = []

        def force(position: Tensor) -> Tensor:
            value, slope = self._value_and_gradient(qvalue, bounds.squash(position).detach())
            visited.append((position, value, slope))
            # The gradient of log_target: the chain rule through a(u), and d/du log(1 - tanh(u)^2) = -2 tanh(u).
            gradient = _finite(slope / alpha) * bounds.squash_derivative(position) - 2 * position.tanh()
            return self.force(observation, position, gradient)

        steps, temperature = self.num_leapfrog_steps, self.temperature
        _, momentum = leapfrog(u, momentum, force, self.step_size, steps, temperature=temperature)
        positions, qvalues, slopes = zip(*visited, strict=True)
        return Trajectory(positions, momentum, qvalues, slopes)

    @torch.no_grad()
    def _value_and_gradient(self, qvalue: ActionValue, action: Tensor) -> tuple[Tensor, Tensor]:
        """Q [*S] reduced over the critics, and dQ/da [*S, A]."""
        values, pullback = qvalue(action)
        if self.critic_reduction == "mean":
            return values.mean(0), pullback(torch.full_like(values, 1 / len(values)))
        value, least = values.min(0)
        critics = torch.arange(len(values), device=values.device).view(-1, *[1] * least.ndim)
        return value, pullback((critics == least).to(values.dtype))

    @torch.no_grad()
    def diagnose(self, u: Float[Tensor, "*S A"], evolution: Evolution, bounds: TanhBounds) -> dict[str, Tensor]:
        """Means over all elements of what became of u: what a loss reports."""
        energy_error, stays, gain = evolution.energy_error, evolution.stays, evolution.qvalue_gain
        finite = energy_error.isfinite()
        moved = bounds.squash(evolution.u) - bounds.squash(u)
        return {
            "hamiltonian_energy_error": energy_error.abs().masked_fill(stays, 0.0).mean(),
            "hamiltonian_acceptance": energy_error.neg().exp().clamp_max(1.0).masked_fill(~finite, 0.0).mean(),
            "hamiltonian_rejected": stays.to(gain.dtype).mean(),
            "hamiltonian_nonfinite": (~finite).to(gain.dtype).mean(),
            "hamiltonian_qvalue_gain": gain.mean(),
            "hamiltonian_distance": moved.square().sum(-1).sqrt().mean(),
            "hamiltonian_step_size": self.step_size.clone(),
        }


class EvolveAction(TensorDictModuleBase):
    """Acts with a transform: placed behind any TorchRL actor, it replaces the actor's action by the evolved one.

        policy = TensorDictSequential(actor, EvolveAction(...))

    Reads the observation and the action [*B, A] and writes the action. Where the actor also writes its
    ``action_log_prob`` and ``action_unsquashed``, both become those of the evolved action; else u is found from the
    action. Without exploration the momentum starts at zero and Metropolis's rule is not asked: the action is a
    function of the observation. Works without gradients and in inference mode.

    Args:
        transform: the transform; ``metropolis`` is its own.
        qvalue: maps an observation [*B, O] to the ``ActionValue`` there, of the action normalised to [-1, 1]. A module
            among its attributes belongs to the policy: critics of the loss act with their live weights, and travel to
            other processes with the policy.
        log_alpha: logarithm of the temperature; of the loss, it stays live, too.
        low, high: the action bounds [A].
        observation_key, action_key: entries the transform reads; it writes the latter.
    """

    def __init__(
        self,
        transform: HamiltonianTransform,
        qvalue: Callable[[Tensor], ActionValue],
        log_alpha: Tensor,
        low: Tensor,
        high: Tensor,
        *,
        observation_key: NestedKey = "observation",
        action_key: NestedKey = "action",
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = [observation_key, action_key], [action_key]
        self.transform, self.qvalue = transform, qvalue
        if isinstance(log_alpha, nn.Parameter):
            self.log_alpha = log_alpha
        else:
            self.register_buffer("log_alpha", log_alpha)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.default_interaction_type = InteractionType.RANDOM

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if not self.transform.is_used_in("acting"):
            return tensordict
        observation_key, action_key = self.in_keys
        observation, action = tensordict.get(observation_key), tensordict.get(action_key)
        explores = (interaction_type() or self.default_interaction_type) is InteractionType.RANDOM
        momentum = self.transform.sample_momentum(action) if explores else torch.zeros_like(action)
        names = [beside(action_key, suffix) for suffix in ("_unsquashed", "_log_prob")]
        drawn = {key: tensordict.get(key, None) for key in names}
        unsquashed, log_prob = drawn.values()
        accepts = self.transform.metropolis and explores
        evolved = self.evolve(observation, action, momentum, unsquashed, log_prob, accepts)
        tensordict.set(action_key, evolved[0])
        for (key, before), after in zip(drawn.items(), evolved[1:], strict=True):
            if before is not None:
                tensordict.set(key, after)
        return tensordict

    def evolve(
        self,
        observation: Float[Tensor, "*B O"],
        action: Float[Tensor, "*B A"],
        momentum: Float[Tensor, "*B A"],
        u: Float[Tensor, "*B A"] | None,
        log_prob: Float[Tensor, "*B"] | None,
        metropolis: bool,
    ) -> tuple[Float[Tensor, "*B A"], Float[Tensor, "*B A"], Float[Tensor, "*B"]]:
        """The evolved action, its u and its log-density, as a function of tensors alone; no log_prob counts as 0."""
        bounds, normalized = TanhBounds(self.low, self.high), TanhBounds.normalized(action)
        u = bounds.unsquash(action) if u is None else u
        log_prob = action.new_zeros(action.shape[:-1]) if log_prob is None else log_prob
        evolution = self.transform(
            u,
            log_prob + bounds.log_abs_det_jacobian(u),
            momentum,
            observation=observation,
            qvalue=self.qvalue(observation),
            bounds=normalized,
            alpha=self.log_alpha.detach().exp(),
            metropolis=metropolis,
        )
        log_prob = evolution.log_prob - bounds.log_abs_det_jacobian(evolution.u)
        return bounds.squash(evolution.u), evolution.u, log_prob


def differentiable(qvalue: Callable[[Tensor], Tensor]) -> ActionValue:
    """The ``ActionValue`` of any function a [*S, A] -> Q_i(s, a) [Q, *S] of tensors, by ``torch.func``."""

    def value_and_pullback(action: Tensor) -> tuple[Tensor, Pullback]:
        values, pullback = torch.func.vjp(qvalue, action)[:2]
        return values, lambda cotangent: pullback(cotangent)[0]

    return value_and_pullback


@checked
def make_hamiltonian_transform(
    observation_dim: int,
    action_dim: int,
    *,
    force: Literal["raw", "normalized", "gated"] = "gated",
    **arguments: Annotated[Any, Of(HamiltonianTransform), Of(Normalized, force="normalized"), Of(Gated, force="gated")],
) -> HamiltonianTransform:
    """A ``HamiltonianTransform`` from names and numbers.

    Args:
        observation_dim, action_dim: O and A.
        force: which one drives the dynamics.
        **arguments: of ``HamiltonianTransform`` and of the force; those of another force change nothing.

    Raises:
        ValueError: an unknown name or a number out of range.
    """
    of_force = take(arguments, Gated)  # which has those of the others, too
    if force == "raw":
        made: AbstractForce = Raw()
    elif force == "normalized":
        made = Normalized(**take(of_force, Normalized))
    else:
        made = Gated(observation_dim, action_dim, **of_force)
    return HamiltonianTransform(made, **arguments)


def _with_slope(value: Float[Tensor, "*S"], slope: Float[Tensor, "*S A"], action: Float[Tensor, "*S A"]) -> Tensor:
    """The value, with this derivative by the action."""
    return value + (slope * (action - action.detach())).sum(-1)


def _finite(gradient: Tensor) -> Tensor:
    """Entries that are not numbers become zero and huge ones merely large, so that no later step overflows."""
    limit = torch.finfo(gradient.dtype).max ** 0.5
    return gradient.nan_to_num(0.0).clamp(-limit, limit)
