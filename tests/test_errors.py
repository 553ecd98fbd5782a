"""An exception as one line for people, whatever it says or does not say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ray.exceptions import RayError

from pmoe_lightning.checkpoints.files import read_checkpoint, write_checkpoint
from pmoe_lightning.data.cluster import _ray_errors
from pmoe_lightning.envs.contract import one_line
from pmoe_lightning.errors import ConfigurationError, RunError, error_line, first_line
from pmoe_lightning.tracking.address import store_line


@pytest.mark.parametrize(
    ("error", "whole", "first"),
    [
        (ValueError("wrong"), "wrong", "wrong"),
        (ValueError(), "ValueError", "ValueError"),
        (ValueError(" \n\t"), "ValueError", "ValueError"),
        (RuntimeError("\n  wrong:\n\tkey a\r\n\tkey b \n"), "wrong: key a key b", "wrong:"),
        (KeyError("a"), "'a'", "'a'"),
        (ExceptionGroup("two", [ValueError("one"), OSError()]), "two (2 sub-exceptions)", "two (2 sub-exceptions)"),
    ],
)
def test_an_error_is_one_line(error: Exception, whole: str, first: str) -> None:
    assert (error_line(error), first_line(error), store_line(error)) == (whole, first, first)


def test_a_named_error_has_its_class_once() -> None:
    assert error_line(ValueError("a\nb"), named=True) == "ValueError: a b"
    assert error_line(ValueError(), named=True) == "ValueError"


def test_of_its_causes_an_error_says_what_its_own_message_does() -> None:
    with pytest.raises(RunError) as caught:
        try:
            raise ValueError("inner")
        except ValueError as error:
            raise RunError from error
    assert error_line(caught.value) == "RunError"


def test_an_error_without_a_message_does_not_hide_where_it_came_from(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "policy.ckpt"
    write_checkpoint({"policy": {}}, path)

    def fail(*_: object, **__: object) -> None:
        raise EOFError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(RunError, match="cannot be read: EOFError$"):
        read_checkpoint(path)
    with pytest.raises(RunError, match="the Ray cluster has failed: RayError$"), _ray_errors():
        raise RayError
    with pytest.raises(ConfigurationError, match=r"info\): AssertionError$"), one_line("Mine-v0", "reset"):
        raise AssertionError
