"""The update as a function of tensors against the loss module, optimizer and clipping that define it, draw for draw."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from pmoe_lightning.algorithms import make_dac, make_ppo
from pmoe_lightning.algorithms.on_policy import OnPolicyAlgorithm
from pmoe_lightning.estimators import (
    AbstractEstimator,
    Frequency,
    GumbelSoftmax,
    HalfReparameterized,
    Implicit,
    Marginalized,
    Pathwise,
    ScoreFunction,
)
from pmoe_lightning.modules.actors import make_gaussian_actor, make_pmoe_actor
from pmoe_lightning.modules.flow import make_flow_actor
from pmoe_lightning.modules.option_policies import make_option_actor
from pmoe_lightning.updates import OnPolicyUpdate

B, OBSERVATION_DIM, A, LOW, HIGH = 16, 5, 2, [-1.0, -2.0], [1.0, 3.0]
SIZES = {"hidden_sizes": (16, 16), "activation": "tanh"}


def ppo(estimator: AbstractEstimator) -> OnPolicyAlgorithm:
    make = make_gaussian_actor if isinstance(estimator, Pathwise) else make_pmoe_actor
    actor = make(OBSERVATION_DIM, LOW, HIGH, scale="state_independent", return_log_prob=True, **SIZES)
    sizes = {"observation_dim": OBSERVATION_DIM, "action_dim": A, **SIZES}
    return make_ppo(actor, estimator, entropy_coeff=0.01, lr=1e-3, minibatch_size=B, **sizes)


def flow() -> OnPolicyAlgorithm:
    actor = make_flow_actor(OBSERVATION_DIM, LOW, HIGH, return_log_prob=True, **SIZES)
    sizes = {"observation_dim": OBSERVATION_DIM, "action_dim": A, **SIZES}
    return make_ppo(actor, Marginalized(), entropy_coeff=0.01, lr=1e-3, minibatch_size=B, **sizes)


def dac() -> OnPolicyAlgorithm:
    actor = make_option_actor(OBSERVATION_DIM, LOW, HIGH, return_log_prob=True, **SIZES)
    sizes = {"observation_dim": OBSERVATION_DIM, "action_dim": A, **SIZES}
    return make_dac(actor, entropy_coeff=0.01, lr=1e-3, minibatch_size=B, **sizes)


ALGORITHMS: dict[str, Callable[[], OnPolicyAlgorithm]] = {
    "frequency": lambda: ppo(Frequency()),
    "gumbel_softmax": lambda: ppo(GumbelSoftmax(final_temperature=0.1)),
    "half_reparameterized": lambda: ppo(HalfReparameterized()),
    "implicit": lambda: ppo(Implicit()),
    "marginalized": lambda: ppo(Marginalized()),
    "pathwise": lambda: ppo(Pathwise()),
    "score_function": lambda: ppo(ScoreFunction()),
    "dac": dac,
    "flow": flow,
}


def transitions(algorithm: OnPolicyAlgorithm, num: int = 10 * B) -> TensorDictBase:
    """What the policy did in random states, with advantages that reward one half of the actions."""
    batch = TensorDict({"observation": torch.randn(num, OBSERVATION_DIM)}, batch_size=num)
    if "option_previous" in algorithm.policy.in_keys:
        batch.set("option_previous", torch.randint(-1, 4, (num, 1)))
    with torch.no_grad():
        algorithm.policy(batch)
    reward = batch["action"].sum(-1, keepdim=True) + torch.randn(num, 1)
    names = [key for key in algorithm.minibatch_keys if key.startswith("advantage")]
    batch.update(dict.fromkeys(names, reward) | {"value_target": reward + batch["observation"][:, :1]})
    return batch.select("observation", *algorithm.minibatch_keys)


def readable_step(algorithm: OnPolicyAlgorithm, optimizer: torch.optim.Optimizer, minibatch: TensorDictBase) -> dict:
    out = algorithm.loss(minibatch)
    optimizer.zero_grad()
    sum(value for name, value in out.items() if name.startswith("loss_")).backward()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], algorithm.max_grad_norm)
    optimizer.step()
    return {name: value.detach() for name, value in out.items()} | {"gradient_norm": norm.detach()}


def run_both(name: str, passes: int, *, compile: bool, device: str = "cpu") -> tuple[float, float]:
    """Step both forms from the same start; returns their largest difference, and how far they have gone."""
    torch.manual_seed(0)
    readable = ALGORITHMS[name]()
    data = transitions(readable).to(device)
    readable.to(device)
    readable.max_grad_norm, norms = 2.4, []
    fast = copy.deepcopy(readable)
    start = {key: value.clone() for key, value in readable.loss.named_parameters()}
    adams = readable.configure_optimizers(), fast.configure_optimizers()
    update = OnPolicyUpdate(fast.loss, adams[1], max_grad_norm=fast.max_grad_norm, compile=compile)
    for i in range(passes):
        order = torch.randperm(len(data))
        for algorithm in (readable, fast):
            if algorithm.estimator is not None:
                algorithm.estimator.anneal(i / passes)
        torch.manual_seed(i)
        expected = [readable_step(readable, adams[0], data[rows]) for rows in order.split(B)]
        torch.manual_seed(i)
        names = sorted(data.keys(), reverse=i % 2 == 1)  # a program must not mind the order of the entries
        out = update(data.select(*names)[order].view(-1, B))
        assert out.keys() == expected[0].keys()
        norms += out["gradient_norm"].tolist()
        for key, values in out.items():
            theirs = torch.stack([each[key] for each in expected])
            torch.testing.assert_close(values, theirs, rtol=2e-3, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}")
    for mine, other in zip(*(adam.state_dict()["state"].values() for adam in adams), strict=True):
        assert mine.keys() == other.keys() and mine["step"] == other["step"] == passes * 10
    assert min(norms) < readable.max_grad_norm < max(norms)  # so that clipping is tested both ways
    pairs = zip(readable.loss.named_parameters(), fast.loss.parameters(), strict=True)
    differences = [((a - b).abs().max().item(), (a - start[key]).abs().max().item()) for (key, a), b in pairs]
    return tuple(max(column) for column in zip(*differences, strict=True))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_hundred_updates_are_those_of_the_loss_module(name: str) -> None:
    difference, distance = run_both(name, passes=20, compile=False)
    assert distance > 0.05 and difference < 1e-3 * distance


@pytest.mark.parametrize(
    "name",
    ["pathwise", *(pytest.param(name, marks=pytest.mark.slow) for name in ("frequency", "gumbel_softmax", "dac"))],
)
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_compiled_updates_are_those_of_the_loss_module(
    name: str, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pmoe_lightning.updates.compilation"):
        difference, distance = run_both(name, passes=20, compile=True, device=device)
    assert distance > 0.05 and difference < 1e-2 * distance
    assert len(caplog.records) == 1 and "compiled the update of" in caplog.text  # once, and said so


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["pathwise", "dac"])
def test_a_batch_without_an_entry_that_the_loss_reads_is_refused(name: str, compile: bool) -> None:
    """For PPO the advantage too: TorchRL's loss would estimate it, as if the shuffled rows were a trajectory."""
    algorithm = ALGORITHMS[name]()
    data = transitions(algorithm).view(-1, B)
    update = OnPolicyUpdate(algorithm.loss, algorithm.configure_optimizers(), compile=compile)
    for key in ["observation", *algorithm.minibatch_keys]:
        if (name, key) != ("pathwise", "action_unsquashed"):
            with pytest.raises(KeyError, match=f"the minibatches lack what .* reads: .*{key}"):
                update(data.exclude(key))
