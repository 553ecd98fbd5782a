"""What training decides before a run starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_configuration import configure

from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.run.assemble import UPDATES_TO_REPAY_COMPILING, resolve_compile
from pmoe_lightning.run.surroundings import check_devices, check_matmul_precision
from pmoe_lightning.run.training import out_of_memory_in_one_line


def test_compiling_is_as_told_or_where_it_is_repaid():
    assert resolve_compile(True, 1) and not resolve_compile(False, 1e9)
    assert resolve_compile("auto", UPDATES_TO_REPAY_COMPILING)
    assert not resolve_compile("auto", UPDATES_TO_REPAY_COMPILING - 1)


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(ConfigurationError, match="^trainer.accelerator=cuda trainer.devices=99: .*$"):
        check_devices(configure("trainer.accelerator=cuda", "trainer.devices=99").trainer)
    check_devices(configure("trainer.accelerator=cpu", "trainer.devices=2").trainer)


def test_a_gpu_is_asked_for_by_name():
    trainer = configure("trainer=gpu", "trainer.devices=4").trainer
    assert (trainer.accelerator, trainer.devices) == ("gpu", 4)


def test_a_precision_without_its_hardware_is_refused(caplog):
    with pytest.raises(ConfigurationError, match="matmul_precision=tf32"):
        check_matmul_precision("tf32", "cpu")
    with pytest.raises(ConfigurationError, match="matmul_precision=float32-onednn is of a library for CPUs"):
        check_matmul_precision("float32-onednn", "cuda")
    check_matmul_precision("tf32", "cuda")
    check_matmul_precision("bf16-hidden", "cuda")
    check_matmul_precision("float32", "cpu")
    assert not caplog.records


@pytest.mark.parametrize(
    ("precision", "ratio", "said"),
    [
        ("bf16-hidden", 0.51, None),
        ("bf16-hidden", 1.06, None),
        ("bf16-hidden", 2.96, "3.0"),
        ("float32-onednn", 0.51, None),
        ("float32-onednn", 0.96, "1.0"),  # whose copies of transposed factors then make an update slower
    ],
)
def test_a_precision_is_warned_of_where_it_does_not_pay(precision, ratio, said, caplog, monkeypatch):
    monkeypatch.setattr("pmoe_lightning.run.surroundings.over_float32", lambda asked: ratio)
    check_matmul_precision(precision, "cpu")
    line = f"matmul_precision={precision}: a product takes {said} times as long as in float32 here"
    assert caplog.messages == [line] * (said is not None)


@pytest.mark.parametrize("make", [torch.empty, np.empty])
def test_more_memory_than_there_is_is_one_line(make):
    with (
        pytest.raises(RunError, match="^out of memory: .*llocate.*ask for smaller networks"),
        out_of_memory_in_one_line(),
    ):
        make(1 << 50)
    with pytest.raises(RuntimeError, match="another"), out_of_memory_in_one_line():
        raise RuntimeError("another")
