"""From a checkpoint to a file: traced, compared with the policy, and written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmoe_lightning import __version__
from pmoe_lightning.checkpoints.loaded import LoadedPolicy
from pmoe_lightning.checkpoints.policy import build_policy, trained_rule
from pmoe_lightning.envs import AbstractEnvironment
from pmoe_lightning.errors import ConfigurationError, RunError, error_line
from pmoe_lightning.exporting.formats import FORMATS, Format, check_installed, convert, encode, load
from pmoe_lightning.exporting.graph import PolicyGraph, trace
from pmoe_lightning.exporting.observations import draw, observe, with_extremes
from pmoe_lightning.exporting.parity import TOLERANCE, Parity, compare
from pmoe_lightning.modules.networks import matmul_precision, set_matmul_precision
from pmoe_lightning.processes.partial_files import partial_file

OBSERVATIONS = 10_000
_SEED = 0


@dataclass(frozen=True)
class PolicyFile:
    """What was written."""

    path: Path
    metadata: dict[str, str]
    parity: Parity


def export_policy(
    entry: Mapping[str, Any],
    path: str | Path,
    *,
    format: Format = "onnx",
    rule: str | None = None,
    parts: Mapping[str, Callable[..., Any]] | None = None,
    make_env: Callable[..., AbstractEnvironment] | str,
    env_id: str | None = None,
    overwrite: bool = False,
    where: str = "the checkpoint",
) -> PolicyFile:
    """Write the policy of a checked entry (``checkpoints.policy.policy_entry``) as a file, as ``evaluate`` judges it.

    Args:
        entry: of a checkpoint.
        path: of the file.
        format: ``onnx``, or ``pt2``, the archive of ``torch.export``.
        rule: the deterministic rule; that of its training when ``None``.
        parts: see ``load_policy``.
        make_env: makes the environment in which it is tried, called with ``num_envs`` and ``seed``; or why there is
            none: it is then tried on normal draws, and the file says so.
        env_id: the name of that environment, where it is not the checkpoint's.
        overwrite: a file that is there may be replaced.
        where: names the checkpoint in errors.

    Raises:
        ConfigurationError: the file exists.
        RunError: the policy cannot be exported, the file does not act as it does, or it cannot be written.
    """
    path = Path(path)
    check_place(path, format, overwrite)
    check_installed(format)
    with _in_float32():
        content, metadata, parity = _made(entry, format, rule or trained_rule(entry), parts, make_env, env_id, where)
    _write(content, path, format, overwrite)
    return PolicyFile(path, metadata, parity)


def _made(
    entry: Mapping[str, Any],
    format: Format,
    rule: str,
    parts: Mapping[str, Callable[..., Any]] | None,
    make_env: Callable[..., AbstractEnvironment] | str,
    env_id: str | None,
    where: str,
) -> tuple[bytes, dict[str, str], Parity]:
    """The content of the file, what it says of itself, and how it compares with the policy."""
    policy = build_policy(entry, rule=rule, parts=parts, where=where).requires_grad_(False)
    for name, values in policy.state_dict().items():
        if not values.isfinite().all():
            raise RunError(f"{where}: the policy cannot be exported: {name} is not finite")
    inputs, source = _tried_on(policy, make_env, env_id or entry["description"]["env"]["id"])
    graph = PolicyGraph(policy, guarded=format == "pt2").eval()
    converted = convert(trace(graph, inputs), format, graph)
    low, high = (torch.tensor(entry["description"][f"action_{end}"]) for end in ("low", "high"))
    run = load(encode(converted, format, {}), format, graph.out_keys)
    parity = compare(policy, rule, run, inputs, (high - low) / 2)
    metadata = _metadata(entry, rule, graph, parity, source)
    return encode(converted, format, metadata), metadata, parity


@contextmanager
def _in_float32() -> Iterator[None]:
    """Products as ``evaluate`` makes them, whatever precision a run in this process trains in."""
    before = matmul_precision()
    set_matmul_precision("float32")
    try:
        yield
    finally:
        set_matmul_precision(before)


def _tried_on(
    policy: LoadedPolicy, make_env: Callable[..., AbstractEnvironment] | str, env_id: str
) -> tuple[dict[str, Tensor], str]:
    """The entries that the policy is tried on, and where they are from."""
    if callable(make_env):
        inputs = observe(policy, make_env, OBSERVATIONS, seed=_SEED)
        source = f"its episodes in {env_id} from seed {_SEED} on, and corners beyond them"
    else:
        inputs, source = draw(policy, OBSERVATIONS), f"normal draws, and corners beyond them, because {make_env}"
    return with_extremes(inputs), source


def _metadata(entry: Mapping[str, Any], rule: str, graph: PolicyGraph, parity: Parity, source: str) -> dict[str, str]:
    """The facts of a file; what is not text is JSON."""
    description = entry["description"]
    environment = description["env"]
    arguments = dict(environment["kwargs"])
    # Of this package alone, and not of whoever makes the environment elsewhere.
    ours = {key: arguments.pop(key, None) for key in ("pixels", "velocity_limit")}
    facts = {
        "env": environment["id"],
        "env_backend": environment.get("backend", description.get("own_parts", {}).get("env", "gymnasium")),
        "env_kwargs": arguments,
        **{key: value for key, value in ours.items() if value},
        "actor": description["actor"],
        "rule": rule,
        "inputs": graph.in_keys,
        "outputs": graph.out_keys,
        "observation_dim": description["observation_dim"],
        "action_low": description["action_low"],
        "action_high": description["action_high"],
        "env_frames": entry.get("env_frames"),
        "updates": entry.get("updates"),
        "parity_observations": parity.observations,
        "parity_source": source,
        "parity_largest_difference": parity.largest_difference,
        "parity_tolerance": TOLERANCE,
        "parity_near_ties": parity.near_ties,
        "parity_ill_conditioned": parity.ill_conditioned,
        "pmoe_lightning": __version__,
        "torch": torch.__version__,
    }
    return {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in facts.items()}


def check_place(path: Path, format: Format, overwrite: bool = False) -> None:
    """Refuse a place where a file must not or cannot be written, before minutes of work.

    Raises:
        ConfigurationError: a folder is there, or a file that must not be replaced; its folder is none, or not ours to
            write in; its suffix is that of another format.
    """
    if path.suffix[1:] in FORMATS and path.suffix[1:] != format:
        raise ConfigurationError(
            f"output={path} has the suffix of format={path.suffix[1:]}: say that, or name a file .{format}"
        )
    try:
        if path.is_dir():
            raise ConfigurationError(f"output={path} is a folder: name a file")
        if os.path.lexists(path) and not overwrite:
            raise ConfigurationError(f"output={path} exists, and is not overwritten: name another file, or remove it")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
    except OSError as error:  # a name that is too long, a loop of links
        raise ConfigurationError(f"output={path} cannot be a file: {error.strerror}") from error
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "may not be written in" if folder.is_dir() else "is not a folder"
        raise ConfigurationError(f"output={path} cannot be written: {folder} {why}")


def _write(content: bytes, path: Path, format: Format, overwrite: bool) -> None:
    partial = partial_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        check_place(path, format, overwrite)  # it may have appeared meanwhile
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error_line(error)}") from error
    finally:
        with suppress(OSError):  # of the folder, which has been said
            partial.unlink(missing_ok=True)
