"""Evaluate a policy: ``pmoe-evaluate checkpoint=PATH [episodes=10 seed=0 +env.KEY=VALUE ...] [--json]``.

That is ``python -m pmoe_lightning.evaluate``, and through MLflow ``mlflow run . -e evaluate -P checkpoint=PATH``. Exit
code 0; 1 when the checkpoint or the tracking server cannot be used; 2 for wrong arguments.
"""

import argparse
import ctypes
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmoe_lightning import __version__
from pmoe_lightning.errors import ConfigurationError, RunError, error_line
from pmoe_lightning.processes.output import exit_code_of

if TYPE_CHECKING:
    from tensordict.nn import TensorDictModule

    from pmoe_lightning.checkpoints.loaded import LoadedPolicy
    from pmoe_lightning.envs import AbstractEnvironment
    from pmoe_lightning.evaluation.episodes import EpisodeResults
    from pmoe_lightning.evaluation.mode_episodes import ModeReport
    from pmoe_lightning.evaluation.rules import RuleChoice

_MAX_ENVS = 16
_RULES = ("trained", "chosen", "best_value", "max_weight", "mean", "sample_component", "sample")
ENV_PREFIXES = ("env.", "+env.", "++env.")  # as for the train command
_CHOSEN_HERE = ("num_envs", "seed", "render_mode", "carry")  # arguments of make_env that are not the environment's


@dataclass(frozen=True)
class Request:
    """What the user asked for; the defaults are those of the command."""

    checkpoint: str
    episodes: int = 10
    max_episode_steps: int = 10_000
    seed: int = 0
    rule: str = "trained"
    env: str = ""
    modes: bool = False
    mode_episodes: int = 400
    video: bool = False
    output: str = "evaluation"
    json: bool = False
    config_dir: str = ""
    env_arguments: dict[str, Any] = field(default_factory=dict)  # dotted names below ``env``


@dataclass(frozen=True)
class Judged:
    """A policy, the environment it acted in, by which rule, and how well."""

    policy: "LoadedPolicy"
    make_env: Callable[..., "AbstractEnvironment"]
    env_id: str
    env_kwargs: dict[str, Any]
    rule: str
    result: "EpisodeResults"
    modes: "ModeReport | None" = None
    choice: "RuleChoice | None" = None

    def make_again(self) -> Callable[..., "AbstractEnvironment"]:
        """What makes such environments, called with ``num_envs``, ``seed`` and what is to be different."""
        from pmoe_lightning.envs import with_memory

        return partial(with_memory(self.make_env, self.policy), **{"id": self.env_id, **self.env_kwargs})


_HELP = {
    "checkpoint": "a file, an MLflow run id, models:/<name>@<alias> or models:/<name>/<version>",
    "episodes": "number of episodes",
    "max_episode_steps": "an episode that has not ended by then is cut short",
    "seed": "episode i is seeded with seed + i",
    "rule": "of a mixture: best_value (mean of the component the critics prefer), max_weight (of the likeliest one), "
    "mean (of all, by weight), sample_component (of a drawn one), sample, trained (that of its training), or "
    "chosen (the best of the first three on four episodes of their own)",
    "env": "Gymnasium id, or a choice of the train command such as dm_control; that of the checkpoint when empty",
    "+env.KEY": "an argument of the environment, as for the train command, such as +env.max_episode_steps=200",
    "modes": "also count the equally good ways that drawn actions take, and draw them; the environment must name them",
    "mode_episodes": "number of drawn episodes for modes=true",
    "video": "also film the first episode",
    "output": "folder of the video and of the figure of modes=true",
    "config_dir": "the folder that --config-dir was in training, where the policy or environment is of your own",
    "json": "print one JSON object and nothing else on standard output",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return exit_code_of(lambda: run(parse(sys.argv[1:] if arguments is None else arguments)))


def run(request: Request) -> None:
    """Evaluate and say how it went, then draw and film if asked: however that ends, the result is there.

    Raises:
        RunError: the checkpoint cannot be used.
        ConfigurationError: the environment cannot be made, or does not fit the policy.
    """
    printing = _only_on_stderr if request.json else nullcontext
    with printing():
        judged = evaluate(request)
    if not request.json:
        print(_table(request, judged), flush=True)
    video = figure = None
    try:
        with printing():
            figure = _figure(request, judged) if request.modes else None
            video = _video(request, judged) if request.video else None
    finally:
        summary = _summary(request, judged, video)
        if request.json:
            print(json.dumps(summary))
        for name, path in {"figure": figure, "video": video}.items():
            if path is not None and not request.json:
                print(_row(name, str(path)))
        if os.environ.get("MLFLOW_RUN_ID"):
            with printing():
                _log(summary, {"videos": video, "figures": figure})


@contextmanager
def _only_on_stderr() -> Iterator[None]:
    """Standard output becomes standard error, for what C libraries and child processes print, too."""
    sys.stdout.flush()
    standard_output = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()  # of whoever kept it from before
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # C keeps a buffer of its own
        os.dup2(standard_output, 1)
        os.close(standard_output)


def parse(arguments: Sequence[str]) -> Request:
    """Read the words as the train command reads its own (``read_words``); a value in quotes is what they hold.

    An empty value means the default. ``--help``, ``--version`` and ``--shell-completion`` print and exit.

    Raises:
        ConfigurationError: an unknown key, a value of the wrong kind, or no checkpoint.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        _help_parser().parse_args(["--help"])
    if "--version" in arguments:
        print(f"pmoe_lightning {__version__}")
        sys.exit()
    if any(argument in ("-sc", "--shell-completion") for argument in arguments):
        print(_shell_completion(arguments))
        sys.exit()
    from pmoe_lightning.configuration.arguments import needs_value, read_words

    kinds = {each.name: each.type for each in fields(Request) if each.name != "env_arguments"}
    values: dict[str, Any] = {}
    env_arguments: dict[str, Any] = {}
    for text, key, value in read_words(arguments, switches=[key for key, kind in kinds.items() if kind is bool]):
        key = "config_dir" if key == "config-dir" else key  # as the train command spells it
        of_env = key.startswith(ENV_PREFIXES)
        if key not in kinds and not of_env:
            raise ConfigurationError(f"unknown argument {text!r}{nearest_word(key, kinds)}")
        if value is None:
            raise ConfigurationError(needs_value(key).removeprefix("" if text.startswith("--") else "--"))
        if not value.strip():
            continue
        if key.lstrip("+") == "env.id":
            values["env"] = unquoted("env", value.strip())
        elif of_env:
            env_arguments |= env_argument(key, value.strip())
        else:
            values[key] = _convert(key, value.strip(), kinds[key])
    if "checkpoint" not in values:
        raise ConfigurationError("checkpoint is missing: give checkpoint=<file, MLflow run id or models:/name@alias>")
    return Request(**values, env_arguments=env_arguments)


def env_argument(key: str, value: str) -> dict[str, Any]:
    """The argument's dotted name below ``env`` and its value, read as the train command reads it."""
    from pmoe_lightning.configuration.arguments import check_finite, read_override

    name, parsed = read_override(f"{key}={value}")
    check_finite(name, parsed)
    name = name.removeprefix("env.")
    if name.partition(".")[0] in _CHOSEN_HERE:
        raise ConfigurationError(f"{key} is not an argument of the environment: the command itself chooses it")
    return {name: parsed}


def _shell_completion(arguments: Sequence[str]) -> str:
    """What bash is to evaluate so that it completes the keys, asked for as with the train command."""
    if "uninstall=bash" in arguments:
        return "complete -r pmoe-evaluate"
    if "install=bash" not in arguments:
        raise ConfigurationError("completion is for bash: write --shell-completion install=bash (or uninstall=bash)")
    words = [f"--{key}" if kind is bool else f"{key}=" for key, kind in Request.__annotations__.items() if key in _HELP]
    return f"complete -o nospace -o default -W '{' '.join([*words, '--help', '--version'])}' pmoe-evaluate"


def unquoted(key: str, text: str) -> str:
    """What is in the quotes; text without any, such as a path, is taken as it is, whatever characters are in it."""
    from pmoe_lightning.configuration.arguments import read_override

    return str(read_override(f"{key}={text}")[1]) if text[0] in "'\"" else text


def _convert(key: str, value: str, kind: Any) -> Any:
    from pmoe_lightning.configuration.arguments import TRUTH_VALUES, read_override

    if kind is bool:
        if value.lower() not in TRUTH_VALUES:
            raise ConfigurationError(f"{key} must be true or false, not {value!r}")
        return TRUTH_VALUES[value.lower()]
    if kind is int:
        lowest = 0 if key == "seed" else 1
        number = int(value) if value.isdecimal() else read_override(f"{key}={value}")[1]  # to Hydra 007 is text
        if type(number) is not int or not lowest <= number < 2**31:
            raise ConfigurationError(f"{key} must be a whole number of at least {lowest}, not {value!r}")
        return number
    value = unquoted(key, value)
    if key == "rule" and value not in _RULES:
        raise ConfigurationError(f"unknown rule {value!r}{nearest_word(value, _RULES)}")
    return value


def nearest_word(word: str, known: Any) -> str:
    from pmoe_lightning.configuration.composition import nearest

    return nearest(word, list(known)) or f"; known: {', '.join(known)}"


def _help_parser() -> argparse.ArgumentParser:
    defaults = {field.name: str(field.default).lower() for field in fields(Request) if field.default is not MISSING}
    defaults |= {"checkpoint": "required", "+env.KEY": "as in training"}
    lines = [f"  {key:<17} {text} [{defaults[key]}]" for key, text in _HELP.items()]
    return argparse.ArgumentParser(
        prog="pmoe-evaluate",
        usage="%(prog)s checkpoint=PATH [key=value ...] [--json] [--version] [--shell-completion install=bash]",
        description="Run whole episodes with the policy of a checkpoint; report its mean return with a 95 % interval.",
        epilog="keys, with their defaults:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def evaluate(request: Request) -> Judged:
    """Load the policy and run the episodes.

    Raises:
        RunError: the checkpoint cannot be used.
        ConfigurationError: the environment cannot be made, or does not fit the policy.
    """
    from pmoe_lightning.checkpoints.files import read_checkpoint
    from pmoe_lightning.checkpoints.policy import (
        build_critics,
        build_policy,
        candidate_rules,
        policy_entry,
        trained_rule,
    )
    from pmoe_lightning.envs import with_memory
    from pmoe_lightning.envs.modes import named_modes
    from pmoe_lightning.evaluation.episodes import evaluate_policy
    from pmoe_lightning.evaluation.rules import RuleChoice, choose_rule
    from pmoe_lightning.tracking.references import resolve_checkpoint

    where = f"checkpoint {request.checkpoint}"
    entry = policy_entry(read_checkpoint(resolve_checkpoint(request.checkpoint)), where)
    rule = trained_rule(entry) if request.rule in ("trained", "chosen") else request.rule
    sample, choice = rule == "sample", None
    parts = read_own_parts(entry["description"], request.config_dir)
    policy = build_policy(entry, rule=None if sample else rule, parts=parts, where=where)
    make, env_id, env_kwargs = find_environment(request, entry["description"], parts)
    num_envs = min(request.episodes, _MAX_ENVS)
    env = with_memory(make, policy)(id=env_id, num_envs=num_envs, seed=request.seed, **env_kwargs)
    try:
        check_fit(entry["description"], env_id, env)
        if request.modes and named_modes(env) is None:
            raise ConfigurationError(
                f"modes=true needs an environment that names its modes, and {env_id} does not: see docs/many_ways.md"
            )
        limit: dict[str, Any] = {"max_episode_steps": request.max_episode_steps}
        if request.rule == "chosen":
            candidates = {
                rule: build_policy(entry, rule=rule, parts=parts, where=where) for rule in candidate_rules(entry)
            }
            choice = choose_rule(candidates, env, seed=_seed_apart(request), **limit) if len(candidates) > 1 else None
            rule, policy = (rule, policy) if choice is None else (choice.rule, candidates[choice.rule])
        elif request.rule == "trained" and (chosen := entry["description"].get("rule_chosen")):
            choice = RuleChoice(**chosen)
        result = evaluate_policy(policy, env, episodes=request.episodes, seed=request.seed, sample=sample, **limit)
    finally:
        env.close()
    judged = Judged(policy, make, env_id, env_kwargs, rule, result, choice=choice)
    if not request.modes:
        return judged
    critics = build_critics(entry, parts, where) if entry.get("action_values") else []
    return replace(judged, modes=_measure_modes(request, judged, critics, entry.get("alpha")))


def _seed_apart(request: Request) -> int:
    """The seed of episodes that are none of those reported."""
    return request.seed + max(request.episodes, request.mode_episodes if request.modes else 0)


def _measure_modes(
    request: Request, judged: Judged, critics: "list[TensorDictModule]", alpha: float | None
) -> "ModeReport | None":
    """The ways that drawn actions take; the price is that of drawing instead of the deterministic rule."""
    from pmoe_lightning.evaluation.mode_episodes import measure_modes

    return measure_modes(
        judged.policy,
        judged.make_again(),
        episodes=request.mode_episodes,
        seed=request.seed,
        max_episode_steps=request.max_episode_steps,
        critics=critics,
        alpha=alpha,
    )


def read_own_parts(description: dict[str, Any], config_dir: str) -> dict[str, Any]:
    """What makes the choices that the description names, where the user's folder has them: local files choose code."""
    from pmoe_lightning.checkpoints.policy import own_parts
    from pmoe_lightning.configuration import read_choice

    if config_dir and not Path(config_dir).is_dir():
        raise ConfigurationError(f"config_dir={config_dir} is not a folder")
    return {
        f"{group}/{name}": read_choice(group, name, config_dir)[0]
        for group, name in own_parts(description).items()
        if name in _choices(config_dir, group)
    }


def _choices(config_dir: str, group: str) -> list[str]:
    return [file.stem for file in Path(config_dir, group).glob("*.yaml")] if config_dir else []


def find_environment(
    request: Request, description: Mapping[str, Any], parts: Mapping[str, Any]
) -> tuple[Any, str, dict[str, Any]]:
    """What makes the environment, its id, and its arguments: those of training where it is that, and of the command."""
    make, env_id, arguments = _chosen_environment(request, description, parts)
    is_task = env_id == arguments.get("task")  # as in conf/env/dm_control.yaml
    for name, value in request.env_arguments.items():
        arguments = _with_argument(arguments, name, value)
    return make, str(arguments["task"]) if is_task else env_id, arguments


def _chosen_environment(
    request: Request, description: Mapping[str, Any], parts: Mapping[str, Any]
) -> tuple[Any, str, dict[str, Any]]:
    from pmoe_lightning.configuration import read_choice
    from pmoe_lightning.envs import MAKERS, make_env

    trained, own = description["env"], description.get("own_parts", {}).get("env")
    if request.env in MAKERS or request.env in _choices(request.config_dir, "env"):
        make, values = read_choice("env", request.env, request.config_dir)
        env_id = values.pop("id", values.get("task"))
        if not isinstance(env_id, str):
            raise ConfigurationError(f"env={request.env} has no id, which says what it is called")
        return make, env_id, values
    if request.env and request.env != trained["id"]:
        return make_env, request.env, {}
    if (backend := trained.get("backend")) is not None:
        if backend not in MAKERS:
            raise RunError(f"the checkpoint's environment is env={backend}, which this version does not have")
        return MAKERS[backend], trained["id"], _trained_arguments(request, trained)
    if own is not None:
        if f"env/{own}" not in parts:
            raise ConfigurationError(
                f"the checkpoint's environment is env={own}, which is not of this package: give the --config-dir that "
                f"holds env/{own}.yaml, or env=<id>"
            )
        return parts[f"env/{own}"], trained["id"], _trained_arguments(request, trained)
    if not request.env and ":" in trained["id"]:
        # Gymnasium imports what stands before the colon, and a checkpoint must not choose what is imported.
        raise RunError(
            f"the checkpoint's environment {trained['id']} lies in a module of its own; if you trust it, say "
            f"env={trained['id']}"
        )
    return make_env, trained["id"], _trained_arguments(request, trained)


def _trained_arguments(request: Request, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Of the environment, as the checkpoint has them; its wrappers are modules, which it must not choose either.

    Raises:
        RunError: it has some, and the command does not say which to put around the environment.
    """
    arguments = dict(trained.get("kwargs", {}))
    wrappers = arguments.pop("wrappers", None)
    if wrappers and "wrappers" not in request.env_arguments:
        from pmoe_lightning.configuration.arguments import write_value

        raise RunError(
            f"the checkpoint's environment {trained['id']} is wrapped by modules of their own; if you trust them, say "
            f"env.wrappers={write_value(wrappers)}, or env.wrappers=[] to go without"
        )
    return arguments


def _with_argument(arguments: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The arguments with one more, whose name may be dotted: ``a.b`` is the entry b of the argument a."""
    first, _, rest = name.partition(".")
    if rest:
        inner = arguments.get(first)
        value = _with_argument(inner if isinstance(inner, Mapping) else {}, rest, value)
    return {**arguments, first: value}


def check_fit(description: dict[str, Any], env_id: str, env: "AbstractEnvironment") -> None:
    seen = (description.get("encoder") or {}).get("shape")
    shows = list(env.entries[env.observed].shape) if env.observed == "pixels" else None
    if seen != shows:
        raise ConfigurationError(
            f"the policy sees {_shown(seen)}, but {env_id} shows {_shown(shows)}: +env.pixels.size=..."
        )
    policy = description["observation_dim"], len(description["action_low"])
    world = policy[0] if seen else env.entries[env.observed].shape[-1], env.action_spec.shape[-1]
    if policy != world:
        raise ConfigurationError(
            "the policy maps {} observations to {} actions, but {} has {} and {}".format(*policy, env_id, *world)
        )


def _shown(pixels: list[int] | None) -> str:
    return "its state" if pixels is None else f"pixels of {' x '.join(map(str, pixels))}"


def _video(request: Request, judged: Judged) -> Path | None:
    from pmoe_lightning.evaluation.film import record_video

    env_id, sample = judged.env_id, judged.rule == "sample"
    path = Path(request.output, f"{_file_name(env_id)}-seed{request.seed}.mp4")
    try:
        arguments: dict[str, Any] = {"seed": request.seed, "env_kwargs": judged.env_kwargs, "make": judged.make_env}
        return record_video(judged.policy, env_id, path, sample=sample, **arguments)
    except Exception as error:  # of the environment, its renderer, the encoder: none is worth the result
        print(f"warning: no video: {error_line(error)}", file=sys.stderr)
        return None


def _figure(request: Request, judged: Judged) -> Path | None:
    from pmoe_lightning.evaluation.mode_episodes import draw_ways

    path = Path(request.output, f"{_file_name(judged.env_id)}-seed{request.seed}-ways.png")
    try:
        figure = draw_ways(judged.policy, judged.make_again(), seed=request.seed)
        if figure is None:
            print(f"no figure: {judged.env_id} is not a task on a plane", file=sys.stderr)
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except Exception as error:  # of the environment, or of the disk: none is worth the result
        print(f"warning: no figure: {error_line(error)}", file=sys.stderr)
        return None
    return path


def _file_name(env_id: str) -> str:
    return env_id.replace(":", "-").replace("/", "-")


def _summary(request: Request, judged: Judged, video: Path | None = None) -> dict[str, Any]:
    """The result in plain values, as ``--json`` prints it."""
    result = judged.result
    low, high = result.interval
    return {
        "checkpoint": request.checkpoint,
        "env": judged.env_id,
        **({"env_arguments": request.env_arguments} if request.env_arguments else {}),
        "episodes": request.episodes,
        "seed": request.seed,
        "rule": judged.rule,
        **({} if judged.choice is None else {"rule_chosen": judged.choice.plain()}),
        "mean": _finite(result.mean),
        "interval": [_finite(low), _finite(high)],
        "returns": [_finite(value) for value in result.returns],
        "lengths": list(result.lengths),
        "cut_short": result.cut_short,
        **({"costs": list(result.costs), "violations": list(result.violations)} if result.costs else {}),
        **({"modes": _mode_summary(judged.modes)} if judged.modes is not None else {}),
        "video": None if video is None else str(video),
    }


def _mode_summary(report: "ModeReport") -> dict[str, Any]:
    return {
        "episodes": report.episodes,
        "counts": list(report.counts),
        **{name: _finite(value) for name, value in report.measures.items()},
        "left_out": report.left_out,
        "warning": report.warning,
    }


def _table(request: Request, judged: Judged) -> str:
    def number(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.2f}"

    summary, result = _summary(request, judged), judged.result
    low, high = summary["interval"]
    lengths = result.lengths
    interval = f"95 % interval {number(low)} to {number(high)}" if summary["episodes"] > 1 else "no interval"
    seeds = f"seeds {summary['seed']} to {summary['seed'] + summary['episodes'] - 1}"
    rows = {
        "checkpoint": summary["checkpoint"],
        "environment": " ".join([judged.env_id, *(f"{key}={value}" for key, value in request.env_arguments.items())]),
        "episodes": f"{summary['episodes']} ({seeds}), rule {judged.choice or summary['rule']}",
        "return": f"mean {number(summary['mean'])}, {interval}",
        "": f"min {min(result.returns):.2f}, max {max(result.returns):.2f}",
        "length": f"mean {sum(lengths) / len(lengths):.1f}, min {min(lengths)}, max {max(lengths)}",
    }
    if result.cut_short:
        rows["cut short"] = f"{result.cut_short} episodes that had not ended after {max(lengths):,} steps"
    if result.costs:
        count, steps = sum(result.violations), sum(lengths)
        rows["cost"] = f"mean {sum(result.costs) / len(result.costs):.1f}, {count} of {steps} steps with a cost"
    if judged.modes is not None:
        rows |= _mode_rows(judged.modes)
    return "\n".join(_row(name, text) for name, text in rows.items())


def _mode_rows(report: "ModeReport") -> dict[str, str]:
    measures, counts = report.measures, ", ".join(map(str, report.counts))

    def told(*names: str) -> str:
        known = [name for name in names if math.isfinite(measures.get(name, math.nan))]
        return ", ".join(f"{name.replace('_', ' ')} {measures[name]:.3g}" for name in known)

    rows = {
        "modes": f"kept {measures['kept']:.0f} of {len(report.counts)}, {report.episodes} drawn episodes: {counts}",
        "drawn": f"mean {measures['return_sampled']:.2f}, price {measures['price']:.2f} beside the rule",
        "ways": told("score", "success", "balance", "removal_success", "blocked_success"),
    }
    if start := told("alpha", "gap", "gap_over_alpha"):
        rows["start"] = start
    if report.left_out:
        rows["left out"] = "; ".join(f"{name}: {why}" for name, why in report.left_out.items())
    if report.warning:
        rows["warning"] = report.warning
    return rows


def _row(name: str, text: str) -> str:
    return f"{name:<12}{text}"


def _log(summary: dict[str, Any], files: Mapping[str, Path | None]) -> None:
    """Add the result, and files by their artifact folders, to the MLflow run that this is part of."""
    import mlflow

    from pmoe_lightning.tracking.address import store_line
    from pmoe_lightning.tracking.server import check_server

    run_id = os.environ["MLFLOW_RUN_ID"]
    try:
        check_server()
        client = mlflow.MlflowClient()
        for name, value in zip(("", "_low", "_high"), (summary["mean"], *summary["interval"]), strict=True):
            if value is not None:
                client.log_metric(run_id, f"eval/episode_return{name}", value)
        client.log_dict(run_id, summary, "evaluation.json")
        for folder, path in files.items():
            if path is not None:
                client.log_artifact(run_id, str(path), folder)
    except (RunError, mlflow.MlflowException) as error:
        print(f"warning: not added to MLflow run {run_id}: {store_line(error)}", file=sys.stderr)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
