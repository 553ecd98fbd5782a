"""Checkpoints of an earlier version act and are evaluated as they were by that version (tests/fixtures)."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import ROOT

FIXTURES = ROOT / "tests" / "fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_checkpoint_of_an_earlier_version_acts_and_is_evaluated_as_it_was(name, monkeypatch):
    """Actions to rounding; returns loosely, since an episode of HalfCheetah enlarges what another processor rounds."""
    monkeypatch.syspath_prepend(str(FIXTURES))
    sys.modules.pop("record", None)
    from record import record

    now, then = record(FIXTURES / f"{name}.ckpt"), EXPECTED[name]
    assert now.keys() == then.keys()
    for rule, of_rule in then.items():
        actions, returns = (torch.tensor(now[rule][key]) for key in ("actions", "returns"))
        torch.testing.assert_close(actions, torch.tensor(of_rule["actions"]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(returns, torch.tensor(of_rule["returns"]), rtol=0.05, atol=1.0)
