"""Export a policy: ``pmoe-export checkpoint=PATH [format=onnx output=FILE rule=... env=...]``.

That is ``python -m pmoe_lightning.export``. One file that acts without this package, compared with the policy before it
is written. Exit code 0; 1 when the checkpoint cannot be used or its policy cannot be exported; 2 for wrong arguments.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pmoe_lightning import __version__
from pmoe_lightning.errors import ConfigurationError, RunError, error_line
from pmoe_lightning.evaluate import (
    ENV_PREFIXES,
    check_fit,
    env_argument,
    find_environment,
    nearest_word,
    read_own_parts,
    unquoted,
)
from pmoe_lightning.evaluate import Request as Evaluation
from pmoe_lightning.processes.output import exit_code_of

if TYPE_CHECKING:
    from pmoe_lightning.envs import AbstractEnvironment
    from pmoe_lightning.exporting.formats import Format
    from pmoe_lightning.exporting.policy_file import PolicyFile

_FORMATS = ("onnx", "pt2")
_RULES = ("trained", "best_value", "max_weight", "mean", "sample_component")


@dataclass(frozen=True)
class Request:
    """What the user asked for; the defaults are those of the command."""

    checkpoint: str
    format: str = "onnx"
    output: str = ""
    rule: str = "trained"
    env: str = ""
    config_dir: str = ""
    env_arguments: dict[str, Any] = field(default_factory=dict)  # as for evaluate

    @property
    def path(self) -> Path:
        """Where the file is to be."""
        return Path(self.output or f"policy.{self.format}")


_HELP = {
    "checkpoint": ("a file, an MLflow run id, models:/<name>@<alias> or models:/<name>/<version>", "required"),
    "format": ("onnx, for ONNX Runtime; pt2, for torch.export.load", "onnx"),
    "output": ("the file; one that exists is not overwritten", "policy.<format>"),
    "rule": ("of a mixture, as for evaluate; sample, which draws, cannot be exported", "trained"),
    "env": ("Gymnasium id in which it is compared; the environment of the checkpoint when empty", ""),
    "+env.KEY": (
        "an argument of the environment, as for evaluate, such as env.wrappers=[module:Wrapper]",
        "as in training",
    ),
    "config_dir": ("the folder that --config-dir was in training, for parts of your own", ""),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return exit_code_of(lambda: print(_table(export(parse(words))), flush=True))


def parse(arguments: Sequence[str]) -> Request:
    """Read the words as the train command reads its own (``read_words``); ``--help`` and ``--version`` print and exit.

    Raises:
        ConfigurationError: an unknown key, an impossible value, or no checkpoint.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        _help_parser().parse_args(["--help"])
    if "--version" in arguments:
        print(f"pmoe_lightning {__version__}")
        sys.exit()
    from pmoe_lightning.configuration.arguments import needs_value, read_words

    known = [each.name for each in fields(Request) if each.name != "env_arguments"]
    values: dict[str, str] = {}
    env_arguments: dict[str, Any] = {}
    for text, key, value in read_words(arguments):
        key = {"config-dir": "config_dir", "env.id": "env"}.get(key, key)  # as the train command spells them
        of_env = key.startswith(ENV_PREFIXES)
        if key not in known and not of_env:
            raise ConfigurationError(f"unknown argument {text!r}{nearest_word(key, known)}")
        if value is None:
            raise ConfigurationError(needs_value(key).removeprefix("" if text.startswith("--") else "--"))
        if of_env and value.strip():
            env_arguments |= env_argument(key, value.strip())
        elif value.strip():
            values[key] = unquoted(key, value.strip())
    if "checkpoint" not in values:
        raise ConfigurationError("checkpoint is missing: give checkpoint=<file, MLflow run id or models:/name@alias>")
    request = Request(**values, env_arguments=env_arguments)
    if request.rule == "sample":
        raise ConfigurationError(
            "rule=sample draws a new action every time and cannot be exported: say rule=max_weight"
        )
    for key, allowed in (("rule", _RULES), ("format", _FORMATS)):
        word = asdict(request)[key]
        if word not in allowed:
            raise ConfigurationError(f"unknown {key} {word!r}{nearest_word(word, allowed)}")
    return request


def _help_parser() -> argparse.ArgumentParser:
    lines = [f"  {key:<12} {text} [{default}]".removesuffix(" []") for key, (text, default) in _HELP.items()]
    return argparse.ArgumentParser(
        prog="pmoe-export",
        usage="%(prog)s checkpoint=PATH [key=value ...] [--version]",
        description="Write the policy of a checkpoint as one file that acts without this package, and compare them.",
        epilog="keys, with their defaults:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def export(request: Request) -> "PolicyFile":
    """Write the file.

    Raises:
        RunError: the checkpoint cannot be used, or its policy cannot be exported.
        ConfigurationError: the file exists, or the environment that was named cannot be made or does not fit.
    """
    from pmoe_lightning.exporting.formats import check_installed
    from pmoe_lightning.exporting.policy_file import check_place, export_policy

    format = cast("Format", request.format)
    check_place(request.path, format)
    check_installed(format)
    from pmoe_lightning.checkpoints.files import read_checkpoint
    from pmoe_lightning.checkpoints.policy import policy_entry
    from pmoe_lightning.tracking.references import resolve_checkpoint

    where = f"checkpoint {request.checkpoint}"
    entry = policy_entry(read_checkpoint(resolve_checkpoint(request.checkpoint)), where)
    parts = read_own_parts(entry["description"], request.config_dir)
    return export_policy(
        entry,
        request.path,
        format=format,
        rule=None if request.rule == "trained" else request.rule,
        parts=parts,
        make_env=_environment(request, entry["description"], parts),
        env_id=request.env or None,
        where=where,
    )


def _environment(
    request: Request, description: dict[str, Any], parts: Mapping[str, Any]
) -> "Callable[..., AbstractEnvironment] | str":
    """What makes the environment in which the file is compared; why there is none, where none was asked for by name."""
    try:
        asked = Evaluation(
            request.checkpoint,
            env=request.env,
            config_dir=request.config_dir,
            env_arguments=request.env_arguments,
        )
        make, env_id, arguments = find_environment(asked, description, parts)
        make_env = partial(make, id=env_id, **arguments)
        env = make_env(num_envs=1, seed=0)
        try:
            check_fit(description, env_id, env)
        finally:
            env.close()
    except (ConfigurationError, RunError) as error:
        if request.env or request.env_arguments:
            raise
        return error_line(error)
    return make_env


def _table(written: "PolicyFile") -> str:
    parity, facts = written.parity, written.metadata
    rows = {
        "file": f"{written.path} ({written.path.stat().st_size:,} bytes)",
        "policy": f"{facts['actor']} for {facts['env']}, rule {facts['rule']}",
        "compared": f"on {parity.observations:,} observations: {facts['parity_source']}",
        "difference": f"at most {parity.largest_difference:.1e} of the normalised action",
        "left out": f"{parity.near_ties} near-ties of the rule, {parity.ill_conditioned} that rounding decides",
    }
    return "\n".join(f"{name:<12}{text}" for name, text in rows.items())


if __name__ == "__main__":
    sys.exit(main())
