"""A policy as a graph of tensors: entries by name in, entries by name out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModuleBase, set_interaction_type
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pmoe_lightning.envs import carried_entries
from pmoe_lightning.errors import RunError, first_line

Entries = Mapping[str, Tensor]


class PolicyGraph(nn.Module):
    """``{"observation": [N, O]} -> {"action": [N, A]}``, and what else the policy reads and hands on to its next step.

    It acts as ``evaluate`` does: without exploration. Who traces it without gradients gets a graph without them.

    Args:
        policy: reads and writes a TensorDict.
        guarded: the graph refuses what is not finite, an observation or an action, by an operator that ONNX lacks.
    """

    def __init__(self, policy: TensorDictModuleBase, *, guarded: bool = False) -> None:
        super().__init__()
        self.policy, self.guarded = policy, guarded
        self.in_keys = sorted(map(str, policy.in_keys))
        self.out_keys = sorted(["action", *carried_entries(policy)])

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.guarded:
            _assert_finite(inputs, "the observation holds NaN or an infinity")
        with set_interaction_type(InteractionType.DETERMINISTIC):
            acted = self.policy(TensorDict(inputs, batch_size=[inputs[self.in_keys[0]].shape[0]]))
        outputs = {key: acted.get(key) for key in self.out_keys}
        if self.guarded:
            _assert_finite(outputs, "the observation is too large for the policy: its action is not finite")
        return outputs


def _assert_finite(entries: Entries, message: str) -> None:
    for values in entries.values():
        if values.is_floating_point():
            torch._assert_async(values.isfinite().all(), message)


def trace(graph: PolicyGraph, inputs: Entries) -> ExportedProgram:
    """The graph as ``torch.export`` traces it, for any number of rows.

    Args:
        graph: in evaluation mode, without gradients.
        inputs: entries [N, ...], N at least 2, of the shapes and types that the policy reads.

    Raises:
        RunError: it cannot be traced, or draws random numbers, so that it is no function of what it reads.
    """
    rows = {key: values[:2].clone() for key, values in sorted(inputs.items())}  # one row would be traced as a constant
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of TensorDict's internals: nothing that a user could act on
            program = torch.export.export(graph, (rows,), dynamic_shapes=({key: {0: Dim("batch")} for key in rows},))
    except Exception as error:  # of the tracer, or of somebody's own part: any kind
        raise RunError(f"the policy cannot be exported: {first_line(error)}") from error
    if drawn := _random_operators(program):
        raise RunError(
            f"the policy cannot be exported: it draws random numbers ({', '.join(drawn)}), so its action is not a "
            "function of the observation; rule=max_weight does not draw, several candidates of a safe policy always do"
        )
    return program


def _random_operators(program: ExportedProgram) -> list[str]:
    operators = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return sorted(str(each) for each in operators if torch.Tag.nondeterministic_seeded in each.tags)
