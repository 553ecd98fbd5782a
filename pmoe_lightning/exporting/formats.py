"""The two formats of a file: how one is written to memory, and how it is run from there."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch.export import ExportedProgram

from pmoe_lightning.errors import RunError, first_line
from pmoe_lightning.exporting.graph import Entries, PolicyGraph

Format = Literal["onnx", "pt2"]
FORMATS = get_args(Format)
Run = Callable[[Entries], dict[str, torch.Tensor]]
#: The extra file of an archive of torch.export that holds the metadata, as JSON.
METADATA_FILE = "metadata.json"
_TALKATIVE = ("onnx_ir", "onnxscript", "torch.onnx._internal.exporter._registration")
_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": ()}


def check_installed(format: Format) -> None:
    """Refuse a format whose packages are not here.

    Raises:
        RunError: says which, and how to get them.
    """
    if absent := [name for name in _NEEDED[format] if find_spec(name) is None]:
        raise RunError(
            f"format {format} needs {', '.join(absent)}, not installed here: pip install 'pmoe-lightning[onnx]'"
        )


def convert(program: ExportedProgram, format: Format, graph: PolicyGraph) -> Any:
    """What ``encode`` takes: the program that ``trace`` made of the graph, in the operators of the format.

    Raises:
        RunError: an operator of the policy is not one of the format.
    """
    if format == "pt2":
        return program
    names: dict[str, Any] = {"input_names": graph.in_keys, "output_names": graph.out_keys}
    try:
        with _quiet():
            exported = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        assert exported is not None
        return exported.model_proto
    except Exception as error:  # of the exporter: any kind
        raise RunError(f"the policy cannot be written as {format}: {first_line(error)}") from error


def encode(converted: Any, format: Format, metadata: Mapping[str, str]) -> bytes:
    """The content of a file, with these facts."""
    if format == "onnx":
        del converted.metadata_props[:]
        for key, value in metadata.items():
            converted.metadata_props.add(key=key, value=value)
        return converted.SerializeToString()
    content = io.BytesIO()
    with _quiet():
        torch.export.save(converted, content, extra_files={METADATA_FILE: json.dumps(dict(metadata), indent=1)})
    return content.getvalue()


def load(content: bytes, format: Format, outputs: list[str]) -> Run:
    """The policy that the content of a file holds, run by what users of the format run it by."""
    return _run_onnx(content, outputs) if format == "onnx" else _run_pt2(content)


def _run_pt2(content: bytes) -> Run:
    with _quiet():
        module = torch.export.load(io.BytesIO(content)).module()
    return lambda inputs: module(dict(inputs))


def _run_onnx(content: bytes, outputs: list[str]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the products are small
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(inputs: Entries) -> dict[str, torch.Tensor]:
        values = session.run(outputs, {key: value.numpy() for key, value in inputs.items()})
        return {key: torch.from_numpy(value) for key, value in zip(outputs, values, strict=True)}

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of other packages and of themselves: nothing that a user could act on."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
