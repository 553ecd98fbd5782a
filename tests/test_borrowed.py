"""What is borrowed is no part of the module, and is still shared where the module is copied."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from pmoe_lightning.modules.borrowed import Borrowed


class Whole(nn.Module):
    """Has one layer and borrows that and another."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(2, 3)
        self.shared, self.foreign = Borrowed(self.own), Borrowed(nn.Linear(2, 3))


def test_what_is_borrowed_is_no_part():
    whole = Whole().double()
    assert list(whole.state_dict()) == ["own.weight", "own.bias"]
    assert [name for name, _ in whole.named_parameters(remove_duplicate=False)] == ["own.weight", "own.bias"]
    assert whole.shared.module.weight.dtype == torch.float64 and whole.foreign.module.weight.dtype == torch.float32


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_what_is_shared_is_shared_in_a_copy(duplicate):
    whole = Whole()
    other = duplicate(whole)
    assert other.shared.module is other.own is not whole.own
    assert other.foreign.module is not whole.foreign.module
