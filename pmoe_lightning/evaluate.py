"""Evaluate a policy: ``python -m pmoe_lightning.evaluate checkpoint=PATH [episodes=10 seed=0 ...] [--json]``.

The same run through MLflow: ``mlflow run . -e evaluate -P checkpoint=PATH``. Exit code 0; 1 when the checkpoint or the
tracking server cannot be used; 2 for wrong arguments.
"""

import argparse
import difflib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmoe_lightning.errors import ConfigurationError, RunError

if TYPE_CHECKING:
    from pmoe_lightning.envs import GymnasiumEnv
    from pmoe_lightning.evaluation import Evaluation

_MAX_ENVS = 16
_WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
_RULES = ("trained", "best_value", "max_weight", "sample_component", "sample")


@dataclass(frozen=True)
class Request:
    """What the user asked for; the defaults are those of the command."""

    checkpoint: str
    episodes: int = 10
    seed: int = 0
    rule: str = "trained"
    env: str = ""
    video: bool = False
    output: str = "evaluation"
    json: bool = False
    config_dir: str = ""


_HELP = {
    "checkpoint": "a file, an MLflow run id, models:/<name>@<alias> or models:/<name>/<version>",
    "episodes": "number of episodes",
    "seed": "episode i is seeded with seed + i",
    "rule": "of a mixture: best_value (mean of the component the critics prefer), max_weight (of the likeliest one), "
    "sample_component (of a drawn one), sample, or trained (actor.deterministic of its training)",
    "env": "Gymnasium id; the environment of the checkpoint when empty",
    "video": "also film the first episode",
    "output": "folder of the video",
    "config_dir": "the folder that --config-dir was in training, where the policy or environment is of your own",
    "json": "print one JSON object and nothing else on standard output",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        request = parse(sys.argv[1:] if arguments is None else arguments)
        report(request, *evaluate(request))
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse(arguments: Sequence[str]) -> Request:
    """Read ``key=value``, ``--key=value`` and ``--key value`` alike: MLflow passes parameters in all of these forms.

    An empty value means the default. ``--help`` prints the keys and exits.

    Raises:
        ConfigurationError: an unknown key, a value of the wrong kind, or no checkpoint.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        _help_parser().parse_args(["--help"])
    kinds = {field.name: field.type for field in fields(Request)}
    values: dict[str, Any] = {}
    waiting = [argument for argument in arguments if argument.strip()]
    while waiting:
        argument = waiting.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        key = "config_dir" if key == "config-dir" else key  # as the train command spells it
        if key not in kinds:
            raise ConfigurationError(f"unknown argument {argument!r}{_nearest(key, kinds)}")
        if not equals:
            if not argument.startswith("--"):
                raise ConfigurationError(f"{key} needs a value: write {key}=...")
            if kinds[key] is bool and (not waiting or waiting[0].lower() not in _WORDS):
                value = "true"
            elif not waiting:
                raise ConfigurationError(f"--{key} needs a value")
            else:
                value = waiting.pop(0)
        if value.strip():
            values[key] = _convert(key, value.strip(), kinds[key])
    if "checkpoint" not in values:
        raise ConfigurationError("checkpoint is missing: give checkpoint=<file, MLflow run id or models:/name@alias>")
    return Request(**values)


def _convert(key: str, value: str, kind: Any) -> Any:
    if kind is bool:
        if value.lower() not in _WORDS:
            raise ConfigurationError(f"{key} must be true or false, not {value!r}")
        return _WORDS[value.lower()]
    if kind is int:
        lowest = 1 if key == "episodes" else 0
        if not value.isdecimal() or not lowest <= int(value) < 2**31:
            raise ConfigurationError(f"{key} must be a whole number of at least {lowest}, not {value!r}")
        return int(value)
    if key == "rule" and value not in _RULES:
        raise ConfigurationError(f"unknown rule {value!r}{_nearest(value, _RULES)}")
    return value


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _help_parser() -> argparse.ArgumentParser:
    defaults = {field.name: str(field.default).lower() for field in fields(Request) if field.default is not MISSING}
    lines = [f"  {key:<11} {text} [{defaults.get(key, 'required')}]" for key, text in _HELP.items()]
    return argparse.ArgumentParser(
        prog="python -m pmoe_lightning.evaluate",
        usage="%(prog)s checkpoint=PATH [key=value ...] [--json]",
        description="Run whole episodes with the policy of a checkpoint; report its mean return with a 95 % interval.",
        epilog="keys, with their defaults:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def evaluate(request: Request) -> tuple[str, str, "Evaluation", Path | None]:
    """Load the policy, run the episodes and film one if asked.

    Returns:
        the environment's id, the rule, the evaluation, and the path of the video, if there is one.

    Raises:
        RunError: the checkpoint cannot be used.
        ConfigurationError: the environment cannot be made, or does not fit the policy.
    """
    from pmoe_lightning.checkpoints.files import read_checkpoint
    from pmoe_lightning.checkpoints.policy import build_policy, policy_entry, trained_rule
    from pmoe_lightning.checkpoints.resolve import resolve_checkpoint
    from pmoe_lightning.envs import with_memory
    from pmoe_lightning.evaluation import evaluate_policy

    where = f"checkpoint {request.checkpoint}"
    entry = policy_entry(read_checkpoint(resolve_checkpoint(request.checkpoint)), where)
    rule = trained_rule(entry) if request.rule == "trained" else request.rule
    sample = rule == "sample"
    parts = _own_parts(entry["description"], request.config_dir)
    policy = build_policy(entry, rule=None if sample else rule, parts=parts, where=where)
    make, env_id, env_kwargs = _environment(request, entry["description"], parts)
    num_envs = min(request.episodes, _MAX_ENVS)
    env = with_memory(make, policy)(id=env_id, num_envs=num_envs, seed=request.seed, **env_kwargs)
    try:
        _check_fit(entry["description"], env_id, env)
        result = evaluate_policy(policy, env, episodes=request.episodes, seed=request.seed, sample=sample)
    finally:
        env.close()
    return env_id, rule, result, _video(request, policy, make, env_id, env_kwargs, sample) if request.video else None


def _own_parts(description: dict[str, Any], config_dir: str) -> dict[str, Any]:
    """What makes the options that the description names, where the user's folder has them: local files choose code."""
    from pmoe_lightning.checkpoints.policy import own_parts
    from pmoe_lightning.configuration import read_option

    if config_dir and not Path(config_dir).is_dir():
        raise ConfigurationError(f"config_dir={config_dir} is not a folder")
    return {
        f"{group}/{name}": read_option(group, name, config_dir)[0]
        for group, name in own_parts(description).items()
        if name in _options(config_dir, group)
    }


def _options(config_dir: str, group: str) -> list[str]:
    return [file.stem for file in Path(config_dir, group).glob("*.yaml")] if config_dir else []


def _environment(
    request: Request, description: dict[str, Any], parts: dict[str, Any]
) -> tuple[Any, str, dict[str, Any]]:
    """What makes the environment, its id, and the arguments besides."""
    from pmoe_lightning.configuration import read_option
    from pmoe_lightning.envs import make_env

    trained, own = description["env"], description.get("own_parts", {}).get("env")
    if request.env in _options(request.config_dir, "env"):
        make, values = read_option("env", request.env, request.config_dir)
        return make, values.pop("id"), values
    if request.env and request.env != trained["id"]:
        return make_env, request.env, {}
    if own is not None:
        if f"env/{own}" not in parts:
            raise ConfigurationError(
                f"the checkpoint's environment is env={own}, which is not of this package: give the --config-dir that "
                f"holds env/{own}.yaml, or env=<id>"
            )
        return parts[f"env/{own}"], trained["id"], trained.get("kwargs", {})
    if request.env:
        return make_env, request.env, trained.get("kwargs", {})
    if ":" in trained["id"]:
        # Gymnasium imports what stands before the colon, and a checkpoint must not choose what is imported.
        raise RunError(
            f"the checkpoint's environment {trained['id']} lies in a module of its own; if you trust it, say "
            f"env={trained['id']}"
        )
    return make_env, trained["id"], trained.get("kwargs", {})


def _check_fit(description: dict[str, Any], env_id: str, env: "GymnasiumEnv") -> None:
    policy = description["observation_dim"], len(description["action_low"])
    world = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
    if policy != world:
        raise ConfigurationError(
            "the policy maps {} observations to {} actions, but {} has {} and {}".format(*policy, env_id, *world)
        )


def _video(
    request: Request, policy: Any, make: Any, env_id: str, env_kwargs: dict[str, Any], sample: bool
) -> Path | None:
    from pmoe_lightning.evaluation import record_video

    path = Path(request.output, f"{env_id.replace(':', '-').replace('/', '-')}-seed{request.seed}.mp4")
    try:
        return record_video(policy, env_id, path, seed=request.seed, env_kwargs=env_kwargs, sample=sample, make=make)
    except RunError as error:
        print(f"warning: no video: {error}", file=sys.stderr)
        return None


def report(request: Request, env_id: str, rule: str, result: "Evaluation", video: Path | None) -> None:
    """Print the result, and add it to the MLflow run when ``mlflow run`` opened one."""
    mean, (low, high) = result.mean, result.interval
    summary = {
        "checkpoint": request.checkpoint,
        "env": env_id,
        "episodes": request.episodes,
        "seed": request.seed,
        "rule": rule,
        "mean": _finite(mean),
        "interval": [_finite(low), _finite(high)],
        "returns": [_finite(value) for value in result.returns],
        "lengths": list(result.lengths),
        **({"costs": list(result.costs), "violations": list(result.violations)} if result.costs else {}),
        "video": None if video is None else str(video),
    }
    print(json.dumps(summary) if request.json else _table(summary, result))
    if os.environ.get("MLFLOW_RUN_ID"):
        _log(summary, video)


def _table(summary: dict[str, Any], result: "Evaluation") -> str:
    def number(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.2f}"

    low, high = summary["interval"]
    lengths = result.lengths
    interval = f"95 % interval {number(low)} to {number(high)}" if summary["episodes"] > 1 else "no interval"
    seeds = f"seeds {summary['seed']} to {summary['seed'] + summary['episodes'] - 1}"
    rows = {
        "checkpoint": summary["checkpoint"],
        "environment": summary["env"],
        "episodes": f"{summary['episodes']} ({seeds}), rule {summary['rule']}",
        "return": f"mean {number(summary['mean'])}, {interval}",
        "": f"min {min(result.returns):.2f}, max {max(result.returns):.2f}",
        "length": f"mean {sum(lengths) / len(lengths):.1f}, min {min(lengths)}, max {max(lengths)}",
    }
    if result.costs:
        count, steps = sum(result.violations), sum(lengths)
        rows["cost"] = f"mean {sum(result.costs) / len(result.costs):.1f}, {count} of {steps} steps with a cost"
    if summary["video"]:
        rows["video"] = summary["video"]
    return "\n".join(f"{name:<12}{text}" for name, text in rows.items())


def _log(summary: dict[str, Any], video: Path | None) -> None:
    import mlflow

    from pmoe_lightning.tracking.server import check_server

    run_id = os.environ["MLFLOW_RUN_ID"]
    try:
        check_server()
        client = mlflow.MlflowClient()
        for name, value in zip(("", "_low", "_high"), (summary["mean"], *summary["interval"]), strict=True):
            if value is not None:
                client.log_metric(run_id, f"eval/episode_return{name}", value)
        client.log_dict(run_id, summary, "evaluation.json")
        if video is not None:
            client.log_artifact(run_id, str(video), "videos")
    except (RunError, mlflow.MlflowException) as error:
        print(f"warning: not added to MLflow run {run_id}: {str(error).splitlines()[0]}", file=sys.stderr)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
