"""From ``resume=...`` to the checkpoint that is meant, checked before anything starts.

A resumed run is the same run: same configuration, same output folder, same MLflow run. What may differ is where and how
long it runs (``FREE``); anything else that differs is an error which says how to write the command.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pmoe_lightning.configuration import quote_value, read_value
from pmoe_lightning.errors import ConfigurationError, RunError

LAST = Path("checkpoints", "last.ckpt")
#: Top-level keys that a resumed run may change.
FREE = ("resume", "total_frames", "num_threads", "compile", "matmul_precision", "trainer", "callbacks", "logger")
_log = logging.getLogger(__name__)
_read_already: dict[Path, dict[str, Any]] = {}


def resume_words(words: Sequence[str], cfg: DictConfig) -> list[str]:
    """The command line with ``resume`` made a file, and its run's folder as that of this run.

    ``resume`` is ``auto`` (the newest unfinished run of this configuration below ``outputs/``, or that in
    ``hydra.run.dir`` if it is given; a new run if there is none), a run's folder, a checkpoint, or an MLflow run id.

    Raises:
        ConfigurationError: the checkpoint is of another configuration, or its run is at its end.
        RunError: there is no such checkpoint, or it is damaged and so is the one before it.
    """
    rest = [word for word in words if not _sets(word, "resume")]
    given = _given_folder(words, cfg)
    found = _find_unfinished(cfg, given) if cfg.resume == "auto" else _read_and_check(cfg, _find(str(cfg.resume)))
    if found is None:
        _log.warning("resume=auto: no unfinished run of this configuration, starting a new one")
        return [*rest, "resume=null"]
    path, checkpoint = found
    _read_already.clear()
    _read_already[path.absolute()] = checkpoint
    rest.append(f"resume={quote_value(str(path.absolute()))}")
    folder = path.absolute().parent.parent
    if given is None and (folder / ".hydra").is_dir():
        rest.append(f"hydra.run.dir={quote_value(str(folder))}")
    return rest


def take_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint that :func:`resume_words` has read in this process, or else read now.

    With its replay buffer it may be gigabytes: whoever takes it is the only one to keep it.
    """
    from pmoe_lightning.checkpoints.files import read_checkpoint

    path = Path(path).absolute()
    return _read_already.pop(path, None) or read_checkpoint(path)


def read_newest(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint at ``path``, or the one it replaced if it is damaged; with a warning then.

    Raises:
        RunError: neither can be read.
    """
    from pmoe_lightning.checkpoints.files import previous_checkpoint, read_checkpoint

    previous = previous_checkpoint(path)
    try:
        return path, read_checkpoint(path)
    except RunError as error:
        if not previous.is_file():
            raise
        checkpoint = read_checkpoint(previous)
        _log.warning("%s; using the one before it, %s", error, previous)
        return previous, checkpoint


def describe(cfg: DictConfig) -> dict[str, Any]:
    """What a checkpoint says about its run, for :func:`resume_words` to compare: dotted keys and plain values."""
    return _flat({key: _plain(cfg[key]) for key in cfg if key not in FREE})


def command(words: Sequence[str], output_dir: Path, flags: Sequence[str] = ()) -> str:
    """How to resume the run that these overrides and flags started, as a line for a shell."""
    words = [word for word in words if not _sets(word, "resume", "hydra.run.dir")]
    resume = f"resume={quote_value(str(output_dir))}"
    return shlex.join(["python", "-m", "pmoe_lightning.train", *flags, *words, resume])


def _find(reference: str) -> Path:
    if re.fullmatch(r"[0-9a-f]{32}", reference) and not Path(reference).exists():
        from pmoe_lightning.checkpoints.resolve import resolve_last_checkpoint

        return resolve_last_checkpoint(reference)
    path = Path(reference)
    return path / LAST if path.is_dir() else path


def _sets(word: str, *keys: str) -> bool:
    return word.lstrip("+").startswith(tuple(f"{key}=" for key in keys))


def _given_folder(words: Sequence[str], cfg: DictConfig) -> str | None:
    """``hydra.run.dir`` of the command line, filled in from the configuration; None where it is not to be known yet."""
    text = read_value(words, "hydra.run.dir")
    if text is None:
        return None
    try:
        return OmegaConf.create({**OmegaConf.to_container(cfg), "run_dir": text}).run_dir
    except OmegaConfBaseException:
        return None


def _read_and_check(cfg: DictConfig, path: Path) -> tuple[Path, dict[str, Any]]:
    path, checkpoint = read_newest(path)
    _check(cfg, checkpoint, path)
    return path, checkpoint


def _find_unfinished(cfg: DictConfig, folder: str | None) -> tuple[Path, dict[str, Any]] | None:
    if folder is not None:
        return _read_and_check(cfg, Path(folder, LAST)) if Path(folder, LAST).exists() else None
    # At any depth: an environment id with a slash is a folder more.
    found = sorted(Path("outputs").glob(f"**/{LAST}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        try:
            return _read_and_check(cfg, path)
        except (RunError, ConfigurationError):
            continue
    return None


def _check(cfg: DictConfig, checkpoint: dict[str, Any], path: Path) -> None:
    from pmoe_lightning.checkpoints.policy import policy_entry

    run, frames = checkpoint.get("run"), policy_entry(checkpoint, f"checkpoint {path}").get("env_frames")
    complete = isinstance(run, dict) and isinstance(run.get("configuration"), dict) and isinstance(frames, int)
    if not complete or "experience" not in checkpoint:
        raise RunError(f"checkpoint {path} holds a policy but not the run that made it: resume from its {LAST.name}")
    _check_units(checkpoint["policy"]["description"], path)
    now, then = describe(cfg), run["configuration"]
    differing = [key for key in {**then, **now} if now.get(key) != then.get(key)]
    if differing:
        words = " ".join(f"{key}={then[key]}" for key in differing[:5] if key in then)
        raise ConfigurationError(
            f"resume={path} is a run with another {', '.join(differing[:5])}"
            f"{' and more' * (len(differing) > 5)}: repeat its command{f', with {words}' * bool(words)}"
        )
    if frames >= cfg.total_frames:
        raise ConfigurationError(
            f"resume={path} has all of its {frames:,} frames: raise total_frames={cfg.total_frames} to extend the run"
        )


def _check_units(description: dict[str, Any], path: Path) -> None:
    """Refuse what learned from actions in the environment's own units: here they are normalised to [-1, 1]."""
    bounds = {abs(bound) for key in ("action_low", "action_high") for bound in description[key]}
    if description.get("action_units") != "normalized" and bounds != {1}:
        raise ConfigurationError(
            f"resume={path} learned from actions in units of the environment, which are normalised now: it can be "
            "evaluated, not resumed; train anew"
        )


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for key, value in values.items():
        pairs |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return pairs
