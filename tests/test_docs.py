"""The programs printed in README and docs run as they are printed."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT
from tensordict import TensorDict

from pmoe_lightning import PMOESACLoss, make_pmoe_actor, make_qvalue_network


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_the_readme_program_makes_a_loss():
    names: dict = {}
    exec(programs("README.md")[0], names)
    assert names["env"].action_spec.shape == (1, 6) and "loss_frequency" in names["loss"].out_keys


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_torchrl_program_trains():
    """Shortened from 10,000 frames to 1,152, of which the last three iterations make 64 updates each."""
    program = next(program for program in programs("docs/torchrl.md") if "Collector" in program)
    names: dict = {}
    torch.manual_seed(0)
    exec(program.replace("total_frames=10_000", "total_frames=1_152"), names)
    assert names["env"].action_spec.shape == (4, 1)
    steps = {int(state["step"]) for state in names["optimizer"].state.values()}
    assert steps == {3 * 64}  # iterations 16, 17 and 18 of 64 frames find a thousand transitions


def test_the_hamiltonian_program_makes_a_policy_that_evolves():
    names: dict = {}
    exec(programs("docs/hamiltonian.md")[0], names)
    states = TensorDict(observation=torch.randn(5, 17), batch_size=5)
    with torch.no_grad():
        drawn, evolved = names["actor"](states.copy())["action"], names["policy"](states.copy())["action"]
    assert evolved.shape == drawn.shape == (5, 6) and not torch.equal(evolved, drawn)


def test_the_estimator_of_the_page_estimates():
    program = next(program for program in programs("docs/torchrl.md") if "AbstractEstimator" in program)
    names: dict = {}
    exec(program, names)
    critics = [make_qvalue_network(3, 2, hidden_sizes=(8,)) for _ in range(2)]
    actor = make_pmoe_actor(3, [-1.0] * 2, [1.0] * 2, hidden_sizes=(8,))
    loss = PMOESACLoss(actor, critics, estimator=names["WinnerTakesAll"](), target_entropy=-2.0)
    surrogate = loss.estimate(TensorDict(observation=torch.randn(5, 3), batch_size=5))
    assert surrogate.loss.shape == surrogate.log_prob.shape == (5,)
    surrogate.loss.sum().backward()
    assert actor[0].module.loc.weight.grad.any()
