"""Every loss, estimator, transform and update on a device that is not the CPU, where there is none.

PyTorch's fake tensors have a shape, a type and a device but no values: what mixes two devices fails as on a GPU. They
run in a process of their own, because a device that is registered stays.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pmoe_lightning import make_gaussian_actor, make_pmoe_actor
from pmoe_lightning.algorithms import make_dac, make_ppo, make_sac
from pmoe_lightning.estimators import AbstractEstimator, Frequency, GumbelSoftmax
from pmoe_lightning.hamiltonian import make_hamiltonian_transform
from pmoe_lightning.modules.crossq import make_crossq_network
from pmoe_lightning.modules.option_policies import make_option_actor
from pmoe_lightning.safe.constraint import CostConstraint
from pmoe_lightning.updates import OnPolicyUpdate, SACUpdate
from pmoe_lightning.updates.adam import moments
from pmoe_lightning.updates.base import AbstractUpdate
from pmoe_lightning.updates.compilation import ModuleState

DEVICE = "absent"
B, O, A = 8, 5, 3  # noqa: E741 (the shape letters)
SPACES = (O, [-2.0] * A, [2.0] * A)
DIMS = {"observation_dim": O, "action_dim": A, "hidden_sizes": (16, 16)}
ESTIMATORS: dict[str, Callable[[], AbstractEstimator]] = {
    cls.__name__: cls for cls in AbstractEstimator.__subclasses__() if cls.__module__.startswith("pmoe_lightning.")
} | {
    "Frequency_all": lambda: Frequency(backpropagate="all", log_prob="mixture", rank_by="soft_q"),
    "GumbelSoftmax_relaxed": lambda: GumbelSoftmax(straight_through=False, final_temperature=0.1),
}


class Constants(TorchFunctionMode):
    """Makes what is made of Python numbers on the CPU first: fake tensors of a device without kernels cannot."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (torch.tensor, torch.as_tensor) or isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)
        device = kwargs.pop("device", None)
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


class OneDevice(TorchDispatchMode):
    """Refuses what PyTorch allows, too: a number on the CPU, for which a GPU would have to wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if len(found) > 1 and func is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{func} of tensors on {sorted(found)}")
        return func(*args, **kwargs or {})


# --- the parts, made on the CPU, and what is run of them on the device ------------------------------------------------


def minibatch(*batch: int) -> TensorDict:
    def flag() -> torch.Tensor:
        return torch.zeros(*batch, 1, dtype=torch.bool)

    following = {"observation": torch.randn(*batch, O), "reward": torch.randn(*batch, 1), "cost": torch.rand(*batch, 1)}
    following |= {"done": flag(), "terminated": flag(), "truncated": flag()}
    observation, action = torch.randn(*batch, O), torch.rand(*batch, A)
    return TensorDict({"observation": observation, "action": action, "next": following}, batch_size=batch)


def actor_for(estimator: AbstractEstimator, **arguments: Any):
    return (make_gaussian_actor if estimator.most_components == 1 else make_pmoe_actor)(*SPACES, **arguments)


def sac(name: str, *, force: str | None = None, safe: bool = False, critic: Callable | None = None):
    estimator = ESTIMATORS[name]()
    transform = None if force is None else make_hamiltonian_transform(O, A, force=force, hidden_size=8)
    constraint = CostConstraint(num_candidates=3) if safe else None
    parts = {"action_transform": transform, "constraint": constraint, "make_critic": critic}
    return make_sac(actor_for(estimator), estimator, **DIMS, **parts)


def ppo(name: str):
    estimator = ESTIMATORS[name]()
    return make_ppo(actor_for(estimator, return_log_prob=True), estimator, **DIMS, entropy_coeff=0.01)


def dac(_: str = ""):
    actor = make_option_actor(*SPACES, num_options=3, hidden_sizes=(16, 16), return_log_prob=True)
    return make_dac(actor, **DIMS, entropy_coeff=0.01)


def rollout(algorithm: Any, *batch: int) -> TensorDictBase:
    steps = minibatch(*batch).exclude("action")
    steps["option_previous"] = torch.zeros(*batch, 1, dtype=torch.long)
    steps = algorithm.actor(steps).detach()
    estimated = ("advantage", "advantage_high", "advantage_low", "value_target", "state_value")
    return steps.update({name: torch.randn(*batch, 1) for name in estimated})


def absent(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like this on the device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE, requires_grad=tensor.requires_grad)


def stepped(algorithm: Any, batch: TensorDictBase) -> None:
    """The losses and their gradients."""
    with OneDevice():
        out = algorithm.loss(batch)
        sum(value for name, value in out.items() if name.startswith("loss_")).backward()
    assert {value.device.type for value in out.values(True, True)} == {DEVICE}, dict(out.items())


def acted(algorithm: Any, batch: TensorDictBase) -> None:
    with OneDevice(), torch.no_grad():
        action = algorithm.policy(batch.select("observation")).get("action")
    assert action.device.type == DEVICE


def moved(run: Callable[[Any, TensorDictBase], None], algorithm: Any, batch: TensorDictBase) -> None:
    """Run with the module and the batch on the device."""
    module = algorithm.policy if run is acted else algorithm.loss
    state = ModuleState(module)
    with FakeTensorMode(allow_non_fake_inputs=True), Constants():
        tensors = [absent(tensor) for tensor in state.tensors]
        batch = batch.apply(absent, device=DEVICE)
        for name in getattr(algorithm.estimator, "annealed", ()):  # as ``anneal`` leaves it: on the CPU
            setattr(algorithm.estimator, name, torch.zeros(()))
        with state.replaced(tensors):
            run(algorithm, batch)


def updated(update: AbstractUpdate, batch: TensorDictBase) -> None:
    """The function that is compiled, of tensors on the device."""
    columns = dict(batch.items(include_nested=True, leaves_only=True))
    update._layout = update._layout_of(batch)
    trained = [group["params"] for group in update.optimizer.param_groups]
    memory = chain.from_iterable(column for group in trained for column in moments(update.optimizer, group))
    annealed = [getattr(update.estimator, name) for name in update._annealed]
    factors = torch.ones(len(update.optimizer.param_groups), 2)
    with FakeTensorMode(allow_non_fake_inputs=True), Constants():
        tensors = [absent(tensor) for tensor in (*update._module.tensors, *memory, *annealed)]
        tensors += [absent(columns[key]) for key in update._layout.columns] + [absent(factors)]
        with torch.no_grad(), OneDevice():
            (values,) = update.update(0, *(tensor.detach() for tensor in tensors))
    assert values.device.type == DEVICE


def sac_update(algorithm: Any) -> None:
    update = SACUpdate(algorithm.loss, algorithm.configure_optimizers(), tau=0.01, compile=False)
    updated(update, minibatch(B))


def on_policy_update(algorithm: Any) -> None:
    optimizer = torch.optim.Adam(algorithm.loss.parameters())
    update = OnPolicyUpdate(algorithm.loss, optimizer, max_grad_norm=0.5, compile=False)
    updated(update, rollout(algorithm, B))


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for name in ESTIMATORS:
        found[f"sac-{name}"] = lambda name=name: moved(stepped, sac(name), minibatch(B))
        found[f"sac-gated-{name}"] = lambda name=name: moved(stepped, sac(name, force="gated"), minibatch(B))
        found[f"ppo-{name}"] = lambda name=name: moved(stepped, *rolled(ppo(name)))
    for force in ("raw", "normalized", "gated", None):
        for safe in (False, True):
            make = partial(sac, "Frequency", force=force, safe=safe)
            found[f"acting-{force}-{safe}"] = lambda make=make: moved(acted, make(), minibatch(B))
            found[f"sac-{force}-{safe}"] = lambda make=make: moved(stepped, make(), minibatch(B))
    found["dac"] = lambda: moved(stepped, *rolled(dac()))
    for name in ("Frequency", "GumbelSoftmax_relaxed"):
        found[f"update-sac-{name}"] = lambda name=name: sac_update(sac(name))
        found[f"update-ppo-{name}"] = lambda name=name: on_policy_update(ppo(name))
    found["update-sac-safe"] = lambda: sac_update(sac("Frequency", force="gated", safe=True))
    found["sac-crossq"] = lambda: moved(stepped, sac("Frequency", critic=make_crossq_network), minibatch(B))
    found["update-sac-crossq"] = lambda: sac_update(sac("Frequency", critic=make_crossq_network))
    found["update-dac"] = lambda: on_policy_update(dac())
    return found


def rolled(algorithm: Any) -> tuple[Any, TensorDictBase]:
    return algorithm, rollout(algorithm, B)


CASES = cases()


# --- the process and the tests ----------------------------------------------------------------------------------------


def main(names: list[str]) -> None:
    """One line of JSON per case: its name, and the error or nothing."""
    _setup_privateuseone_for_python_backend(rename=DEVICE)
    for name in names or CASES:
        error = ""
        try:
            CASES[name]()
        except Exception as failure:
            if names:
                raise
            error = f"{type(failure).__name__}: {failure}"
        print(json.dumps([name, error[:500]]), flush=True)


@pytest.fixture(scope="module")
def errors() -> Iterator[dict[str, str]]:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    yield dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@pytest.mark.parametrize("name", CASES)
def test_everything_stays_on_its_device(name, errors):
    assert errors[name] == ""


if __name__ == "__main__":
    main(sys.argv[1:])
