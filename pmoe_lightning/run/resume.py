"""From ``resume=...`` to the checkpoint that is meant, checked before anything starts.

A resumed run is the same run: same configuration, same output folder, same MLflow run. What may differ is where and how
long it runs (``FREE``); anything else that differs is an error which says how to write the command. A run that was
killed after its last checkpoint is finished: what follows training is done, and nothing is trained.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pmoe_lightning.configuration import is_set_by, quote_value, with_value
from pmoe_lightning.configuration.schemas import fields_of, schemas
from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.processes import run_folder

LAST = Path("checkpoints", "last.ckpt")
PREVIOUS = Path("checkpoints", "last.previous.ckpt")
#: Top-level keys that a resumed run may change.
FREE = (
    "init_from",
    "resume",
    "total_frames",
    "num_threads",
    "compile",
    "matmul_precision",
    "trainer",
    "callbacks",
    "logger",
)
#: Without anything arriving, for what MLflow had not taken of a finished run.
_DELIVERY_PATIENCE_SECONDS = 30.0
#: What runs of a replay buffer did before these keys were there.
_LATER = {"algo.betas": [0.9, 0.999], "algo.policy_delay": 1, "data.n_step": 1, "data.normalize_observation": False}
#: What they did before there were pixels and wrappers.
_LATER |= {"env.pixels.size": None, "env.pixels.grey": False, "env.pixels.stack": 3, "env.pixels.look": "default"}
_LATER |= {"env.wrappers": []}
_LATER |= {"encoder": None, "data.random_shift": 4}
#: What PPO's default estimator was, and what it is. A run that goes on keeps its own where the command names none.
_FORMER_DEFAULT, _DEFAULT = "frequency", "marginalized"
_log = logging.getLogger(__name__)
_read_already: dict[Path, dict[str, Any]] = {}


class NothingLeft(Exception):
    """The run is finished, and everything of it is where it belongs: said in a line, and no error."""


def refuse_occupied(cfg: DictConfig, folder: Path, *, is_named: bool) -> None:
    """Refuse a run into a folder that another process writes to or, unless it is to be resumed, that holds a run.

    Light: before anything is imported that takes seconds.

    Args:
        cfg: of the run.
        folder: what Hydra would write to.
        is_named: whether the command line says so.

    Raises:
        ConfigurationError: says who writes there, or what to type instead.
    """
    if not run_folder.is_first_process():
        return
    if cfg.resume is None or is_named:
        run_folder.refuse_held(folder)
    if cfg.resume is None and run_folder.holds_run(folder):
        how = "go on with it by" if _has_checkpoint(folder) else "start it anew by"
        again = f"resume=auto hydra.run.dir={folder}"
        raise ConfigurationError(f"{folder} holds a run: {how} {again}, or give another hydra.run.dir")
    if cfg.resume not in (None, "auto") and Path(cfg.resume).exists():
        run_folder.refuse_held(_home(_in_folder(Path(cfg.resume))))


def resume_words(
    words: Sequence[str], cfg: DictConfig, folder: Path | None = None, *, is_named: bool = False
) -> list[str]:
    """The command line with ``resume`` made a file, and its run's folder as that of this run, which holds it from now.

    ``resume`` is ``auto`` (the newest unfinished run of this configuration below ``outputs/``, or that in
    ``hydra.run.dir`` if it is given; a new run if there is none), a run's folder, a checkpoint, or an MLflow run id.

    Args:
        words: the command line.
        cfg: what it composes to.
        folder: what Hydra would write to.
        is_named: whether the command line says so.

    Raises:
        ConfigurationError: the checkpoint is of another configuration, or another process writes to its run's folder.
        RunError: there is no such checkpoint, or it is damaged and so is the one before it; or the run is finished but
            not all of it is in MLflow, which still does not take it.
        NothingLeft: the run is at its end.
    """
    rest = [word for word in words if not is_set_by(word, "resume")]
    names_estimator = any(is_set_by(word, "estimator") for word in words)
    if folder is not None:
        rest = with_value(rest, "hydra.run.dir", str(folder))
    named = folder if is_named else None
    find = _find_unfinished if cfg.resume == "auto" else _find_as_told
    found = find(cfg, named, keeps_estimator=not names_estimator)
    if found is None:
        _log.warning("resume=auto: no unfinished run of this configuration, starting a new one")
        rest.append("resume=null")
    else:
        path, checkpoint = found
        _read_already.clear()
        _read_already[path.absolute()] = checkpoint
        rest.append(f"resume={quote_value(str(path.absolute()))}")
        if not names_estimator and _has_former_default(cfg, checkpoint["run"]["configuration"]):
            rest.append(f"estimator={_FORMER_DEFAULT}")
        rest = [word for word in rest if not is_set_by(word, "init_from")]  # it has begun, and has what it took
        if not is_named and run_folder.has_begun(_home(path)):
            return with_value(rest, "hydra.run.dir", str(_home(path)))
    if folder is not None:
        run_folder.hold(folder)
    return rest


def take_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint that :func:`resume_words` has read in this process, or else read now.

    With its replay buffer it may be gigabytes: whoever takes it is the only one to keep it.
    """
    path = Path(path).absolute()
    return _read_already.pop(path, None) or _read(path)


def read_newest(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint at ``path``, or the one it replaced if it is damaged; with a warning then.

    Raises:
        RunError: neither can be read.
    """
    from pmoe_lightning.checkpoints.files import previous_checkpoint

    previous = previous_checkpoint(path)
    try:
        return path, _read(path)
    except RunError as error:
        if not previous.is_file():
            raise
        try:
            checkpoint = _read(previous)
        except RunError as second:
            raise RunError(f"{error}; and {second}") from second
        _log.warning("%s; using the one before it, %s", error, previous)
        return previous, checkpoint


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint with the blocks of its replay buffer verified."""
    from pmoe_lightning.checkpoints.blocks import locate_blocks
    from pmoe_lightning.checkpoints.files import read_checkpoint

    checkpoint = read_checkpoint(path)
    locate_blocks(checkpoint, path)
    return checkpoint


def describe(cfg: DictConfig) -> dict[str, Any]:
    """What a checkpoint says about its run, for :func:`resume_words` to compare: dotted keys and plain values."""
    return _flat({key: _plain(cfg[key]) for key in map(str, cfg) if key not in FREE})


def command(words: Sequence[str], output_dir: Path, flags: Sequence[str] = ()) -> str:
    """How to resume the run that these overrides and flags started, as a line for a shell."""
    words = [word for word in words if not is_set_by(word, "resume", "init_from", "hydra.run.dir")]
    resume = f"resume={quote_value(str(output_dir))}"
    return shlex.join(["python", "-m", "pmoe_lightning.train", *flags, *words, resume])


def _in_folder(path: Path) -> Path:
    return path / LAST if path.is_dir() else path


def _home(path: Path) -> Path:
    """The folder of the run whose checkpoint this is, if it lies where a run has written it."""
    return path.absolute().parent.parent


def _has_checkpoint(folder: Path) -> bool:
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def _hold(path: Path, named: Path | None) -> None:
    """Hold the folder that is written to, and that of the run which the checkpoint is of.

    Raises:
        ConfigurationError: another process does, or the folder that is written to holds another run.
    """
    if not run_folder.is_first_process():
        return
    home = _home(path)
    if named is not None and named.resolve() != home.resolve():
        if run_folder.holds_run(named):
            raise ConfigurationError(
                f"{named} holds another run than {home}: leave out hydra.run.dir, or give one that holds no run"
            )
        run_folder.hold(named)
    if run_folder.has_begun(home):
        # Of a run that goes on elsewhere, nothing is written here; perhaps nothing can.
        with suppress(RunError) if named is not None else nullcontext():
            run_folder.hold(home)


def _find_as_told(cfg: DictConfig, named: Path | None, *, keeps_estimator: bool) -> tuple[Path, dict[str, Any]]:
    reference, status = str(cfg.resume), None
    if re.fullmatch(r"[0-9a-f]{32}", reference) and not Path(reference).exists():
        from pmoe_lightning.tracking.references import resolve_last_checkpoint

        path, status = resolve_last_checkpoint(reference)
    else:
        path = _in_folder(Path(reference))
    _hold(path, named)
    path, checkpoint = _read_and_check(cfg, path, keeps_estimator)
    _refuse_finished(cfg, path, checkpoint, status)
    return path, checkpoint


def _find_unfinished(
    cfg: DictConfig, named: Path | None, *, keeps_estimator: bool
) -> tuple[Path, dict[str, Any]] | None:
    if named is not None:
        run_folder.hold(named)
        if not _has_checkpoint(named):
            return None
        path, checkpoint = _read_and_check(cfg, named / LAST, keeps_estimator)
        _refuse_finished(cfg, path, checkpoint)
        return path, checkpoint
    for home in _runs_below(Path("outputs")):
        before = _fingerprints(home)
        try:
            path, checkpoint = _read_and_check(cfg, home / LAST)
        except (RunError, ConfigurationError):
            continue
        if _is_complete(cfg, checkpoint) and run_folder.read_record(home).get("status", "FINISHED") == "FINISHED":
            continue
        _hold(path, None)
        # Whoever has held it until now may have gone on with it.
        return (
            (path, checkpoint) if _fingerprints(home) == before else _find_unfinished(cfg, home, keeps_estimator=False)
        )
    return None


def _runs_below(root: Path) -> list[Path]:
    """The folders of runs with a checkpoint, that with the newest one first."""
    newest: dict[Path, float] = {}
    # At any depth: an environment id with a slash is a folder more.
    for path in root.glob("**/checkpoints/last*.ckpt"):
        newest[_home(path)] = max(newest.get(_home(path), 0.0), path.stat().st_mtime)
    return sorted(newest, key=lambda home: newest[home], reverse=True)


def _fingerprints(home: Path) -> list[tuple[int, ...]]:
    states = [(home / name).stat() for name in (LAST, PREVIOUS) if (home / name).exists()]
    return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]


def _read_and_check(cfg: DictConfig, path: Path, keeps_estimator: bool = False) -> tuple[Path, dict[str, Any]]:
    path, checkpoint = read_newest(path)
    _check(cfg, checkpoint, path, keeps_estimator)
    return path, checkpoint


def _is_complete(cfg: DictConfig, checkpoint: dict[str, Any]) -> bool:
    return checkpoint["policy"]["env_frames"] >= cfg.total_frames


def _refuse_finished(cfg: DictConfig, path: Path, checkpoint: dict[str, Any], status: str | None = None) -> None:
    """Raise if the run is at its end and what follows training is done, once MLflow has all of it.

    Args:
        cfg: of the run that was asked for.
        path: the run's last checkpoint.
        checkpoint: what it holds.
        status: of a checkpoint that a store had, how its run ended.

    Raises:
        NothingLeft: says so.
        RunError: MLflow does not take what is left.
    """
    if not _is_complete(cfg, checkpoint):
        return
    # The folder of a run of an earlier version does not say it.
    status = run_folder.read_record(_home(path)).get("status") or status or _status_in_store(cfg, checkpoint)
    if status != "FINISHED":
        return
    home, run = _home(path), checkpoint["run"].get("mlflow", {}).get("run_id")
    if run_folder.is_first_process():
        _deliver(home)
        _say_if_damaged(path.with_name("best.ckpt"))
    raise NothingLeft(
        f"{home} is finished, with all of its {checkpoint['policy']['env_frames']:,} frames"
        f"{f' and MLflow run {run}' * bool(run)}: there is nothing left to do; a larger total_frames would go on"
    )


def _deliver(home: Path) -> None:
    """Send what MLflow had not taken when the run ended."""
    for note in sorted(home.glob("*/run.json")):
        from pmoe_lightning.tracking.leftovers import send_spool

        try:
            print(f"{note.parent}: {send_spool(note.parent, _DELIVERY_PATIENCE_SECONDS)}")
        except RunError as error:
            again = f"python -m pmoe_lightning.tracking.resend {shlex.quote(str(note.parent))}"
            raise RunError(f"{home} is finished, but not all of it is in MLflow ({error}): {again}") from error


def _say_if_damaged(path: Path) -> None:
    from pmoe_lightning.checkpoints.files import verify_checkpoint

    try:
        if path.exists():
            verify_checkpoint(path)
    except RunError as error:
        _log.warning("%s; an MLflow run keeps its own copy, checkpoints/%s", error, path.name)


def _status_in_store(cfg: DictConfig, checkpoint: dict[str, Any]) -> str | None:
    """What the tracking store says of the checkpoint's run; None where it does not know it."""
    run = checkpoint["run"].get("mlflow")
    if not run or not cfg.logger:
        return None
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        return MlflowClient(cfg.logger.get("tracking_uri")).get_run(run["run_id"]).info.status
    except MlflowException:
        return None


def _has_former_default(cfg: DictConfig, then: dict[str, Any]) -> bool:
    """Whether a run of PPO has the estimator that was the default once, and the configuration that of today."""
    now = describe(cfg)
    targets = [_compared(each.get("estimator._target_")) for each in (now, then)]
    return _compared(now.get("algo._target_")) == "make_ppo" and targets == [
        _DEFAULT.capitalize(),
        _FORMER_DEFAULT.capitalize(),
    ]


def _with_former_default(now: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the estimator that was the default once, and nothing of it changed."""
    rest = {key: value for key, value in now.items() if not key.startswith("estimator.")}
    fields = fields_of(schemas()["estimator"][_FORMER_DEFAULT])
    defaults = {f"estimator.{name}": field.default for name, field in fields.items() if name != "_target_"}
    return rest | {"estimator._target_": _FORMER_DEFAULT.capitalize()} | defaults


def _check(cfg: DictConfig, checkpoint: dict[str, Any], path: Path, keeps_estimator: bool = False) -> None:
    from pmoe_lightning.checkpoints.policy import policy_entry

    run: Any = checkpoint.get("run")
    frames = policy_entry(checkpoint, f"checkpoint {path}").get("env_frames")
    complete = isinstance(run, dict) and isinstance(run.get("configuration"), dict) and isinstance(frames, int)
    if not complete or "experience" not in checkpoint:
        raise RunError(f"checkpoint {path} holds a policy but not the run that made it: resume from its {LAST.name}")
    if cfg.init_from is not None and run.get("init_from", {}).get("reference") != cfg.init_from:
        raise ConfigurationError(f"resume={path} is a run that did not begin with init_from={cfg.init_from}")
    _check_units(checkpoint["policy"]["description"], path)
    now = describe(cfg)
    if keeps_estimator and _has_former_default(cfg, run["configuration"]):
        now = _with_former_default(now)
    then = _with_later_keys(run["configuration"], now)
    differing = [key for key in {**then, **now} if _compared(now.get(key)) != _compared(then.get(key))]
    if differing:
        words = " ".join(f"{key}={then[key]}" for key in differing[:5] if key in then)
        raise ConfigurationError(
            f"resume={path} is a run with another {', '.join(differing[:5])}"
            f"{' and more' * (len(differing) > 5)}: repeat its command{f', with {words}' * bool(words)}"
        )


def _with_later_keys(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run, with what it did where today's has keys that were not there yet."""
    plain: dict[str, Any] = {"critic._target_": "make_qvalue_network", "critic.initialization": "default"}
    plain |= {"critic.suggests.lr": 3e-4, "critic.suggests.betas": _LATER["algo.betas"]}
    plain["critic.suggests.policy_delay"] = 1
    plain |= {f"critic.{key}": then.get(f"algo.{key}") for key in ("hidden_sizes", "activation")}
    return {key: value for key, value in (_LATER | plain).items() if key in now} | then


def _check_units(description: dict[str, Any], path: Path) -> None:
    """Refuse what learned from actions in the environment's own units: here they are normalised to [-1, 1]."""
    bounds = {abs(bound) for key in ("action_low", "action_high") for bound in description[key]}
    if description.get("action_units") != "normalized" and bounds != {1}:
        raise ConfigurationError(
            f"resume={path} learned from actions in units of the environment, which are normalised now: it can be "
            "evaluated, not resumed; train anew"
        )


def _compared(value: Any) -> Any:
    """Of a function of this package the name alone, because modules move."""
    return re.sub(r"^pmoe_lightning\.(\w+\.)*", "", value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for key, value in values.items():
        pairs |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return pairs
