"""Whether a file acts as the policy that it was made of."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
from tensordict import TensorDict
from torch import Tensor

from pmoe_lightning.checkpoints.loaded import LoadedPolicy
from pmoe_lightning.errors import RunError
from pmoe_lightning.exporting.formats import Run
from pmoe_lightning.exporting.graph import Entries, PolicyGraph
from pmoe_lightning.modules.acting import distribution_at, states_of_actor
from pmoe_lightning.modules.actors import BestValueActor
from pmoe_lightning.modules.mixture import MixtureDistribution, missing
from pmoe_lightning.modules.option_policies import OptionPolicies

#: Of an action normalised to [-1, 1].
TOLERANCE = 1e-5
#: Scores closer than this, or than single precision can tell scores of that size apart, are a near-tie.
NEAR_TIE, _RESOLUTION = 1e-4, 1e-6
#: So many of the observations may be left out of the comparison.
MAX_LEFT_OUT = 1e-3
_SINGLE_ROWS = 100  # are also given one at a time, as a control loop does
_BLOCK = 500  # rows at once: what an encoder makes of ten thousand pictures would take a machine's memory


@dataclass(frozen=True)
class Parity:
    """How a file compares with its policy."""

    observations: int
    largest_difference: float
    """Of the normalised action, over the observations compared."""
    near_ties: int
    """Observations left out because the rule's two largest scores are within ``NEAR_TIE``, of different actions."""
    ill_conditioned: int
    """Further ones left out because the policy's own action changes by more than the tolerance in double precision:
    at a kink of a critic that an action transform follows, for example."""


@torch.no_grad()
def compare(policy: LoadedPolicy, rule: str, run: Run, inputs: Entries, half_range: Tensor) -> Parity:
    """Run both on the same rows.

    Args:
        policy: on the CPU.
        rule: its deterministic rule.
        run: the file.
        inputs: entries [N, ...].
        half_range: (high - low) / 2 of the action bounds [A].

    Raises:
        RunError: they differ by more than ``TOLERANCE``, or too many rows would be left out.
    """
    number = len(next(iter(inputs.values())))
    exact = PolicyGraph(copy.deepcopy(policy).double())
    found = []
    for start in range(0, number, _BLOCK):
        block = {key: values[start : start + _BLOCK] for key, values in inputs.items()}
        expected = PolicyGraph(policy)(dict(block))
        difference = _difference(expected, run(block), half_range)
        if start == 0:
            alone = _difference_alone(expected, run, block, half_range)
            difference[: len(alone)] = torch.maximum(difference[: len(alone)], alone)
        ties = near_ties(policy, rule, block, half_range)
        found.append((difference, ties, _ill_conditioned(exact, block, expected, half_range) & ~ties))
    difference, ties, ill = map(torch.cat, zip(*found, strict=True))
    compared = difference[~(ties | ill)]
    largest = compared.max().item() if len(compared) else math.nan
    parity = Parity(number, largest, int(ties.sum()), int(ill.sum()))
    if parity.near_ties + parity.ill_conditioned > MAX_LEFT_OUT * number:
        raise RunError(
            f"not exported: rounding decides the action at {parity.near_ties} near-ties of the rule {rule} and "
            f"{parity.ill_conditioned} other observations of {number:,}, more than "
            f"{MAX_LEFT_OUT:.1%}: another rule may do"
        )
    if not largest <= TOLERANCE:
        raise RunError(
            f"not exported: the file's actions differ from the policy's by up to {largest:.1e} of the normalised "
            f"action, more than {TOLERANCE:.0e}"
        )
    return parity


def _difference_alone(expected: Entries, run: Run, inputs: Entries, half_range: Tensor) -> Tensor:
    """That of the first rows [M], each of them given to the file alone."""
    differences = []
    for row in range(min(_SINGLE_ROWS, len(expected["action"]))):
        one, given = ({key: values[row : row + 1] for key, values in each.items()} for each in (expected, inputs))
        differences.append(_difference(one, run(given), half_range))
    return torch.cat(differences)


def _difference(expected: Entries, written: Entries, half_range: Tensor) -> Tensor:
    """The largest difference of each row [N], of actions in units of their bounds; not finite counts as infinite."""
    worst = torch.zeros(len(expected["action"]))
    for key, values in expected.items():
        scale = half_range if key == "action" else torch.ones(())
        apart = ((written[key].double() - values.double()) / scale).abs().flatten(1).amax(1)
        worst = torch.maximum(worst, apart.nan_to_num(math.inf).to(worst))
    return worst


def near_ties(policy: LoadedPolicy, rule: str, inputs: Entries, half_range: Tensor) -> Tensor:
    """Where the two largest scores by which the policy chooses are nearly alike and what they stand for is not, [N]."""
    rows = len(next(iter(inputs.values())))
    scores, modes = _choice(policy, rule, TensorDict(dict(inputs), batch_size=rows))
    if scores is None or scores.shape[-1] < 2:
        return torch.zeros(rows, dtype=torch.bool)
    (first, second), best = (pair.unbind(-1) for pair in scores.topk(2))
    close = ~(first - second >= (_RESOLUTION * first.abs()).clamp_min(NEAR_TIE))
    if modes is None:
        return close
    places = torch.stack(best, -1).unsqueeze(-1).expand(-1, -1, modes.shape[-1])
    apart = (modes.gather(-2, places).diff(dim=-2).squeeze(-2) / half_range).abs().amax(-1)
    return close & ~(apart <= TOLERANCE)


def _choice(policy: LoadedPolicy, rule: str, states: TensorDict) -> tuple[Tensor | None, Tensor | None]:
    """What the rule takes the largest of, [N, K], and the actions among which it so chooses, [N, K, A].

    Without scores where it takes no largest, without actions where more than an action depends on the choice.
    """
    for module in policy.modules():
        if isinstance(module, BestValueActor):
            ranked, values = module.component_values(states_of_actor(policy, states))
            return values.movedim(0, -1), ranked.component_modes
    if policy.actor is None:
        return None, None
    distribution = distribution_at(policy, states)
    if isinstance(distribution, OptionPolicies):
        return distribution.option_log_probs(states.get("option_previous").squeeze(-1)), None
    if rule != "max_weight" or missing(type(distribution), {"weights", "component_modes"}):
        return None, None
    mixture = cast(MixtureDistribution, distribution)
    return mixture.log_weights, mixture.component_modes


def _ill_conditioned(exact: PolicyGraph, inputs: Entries, actions: Entries, half_range: Tensor) -> Tensor:
    """Where the policy's own action is another one in double precision, bool [N]."""
    try:
        return _difference(exact(dict(inputs)), actions, half_range) > TOLERANCE
    except RuntimeError:  # a part of somebody's own that knows single precision only: then every row is compared
        return torch.zeros(len(actions["action"]), dtype=torch.bool)
