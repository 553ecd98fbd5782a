"""What a run says at its end: where its results are, and the commands for what comes next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pmoe_lightning.configuration.arguments import write_value
from pmoe_lightning.run.resume import command
from pmoe_lightning.run.warm_start import describe as describe_warm_start
from pmoe_lightning.tracking import runs_page, without_secrets


def describe_results(trainer: Trainer, output_dir: Path) -> str:
    """Where the results are and how to look at them."""
    lines = ["", f"results    {output_dir}"]
    if began := getattr(trainer.lightning_module, "init_from", None):
        lines.append(f"init_from  {describe_warm_start(began)}")
    best = last = None
    for saver in (saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)):
        # What was saved because of an error does not become a best_model_path.
        path = saver.best_model_path if saver.monitor else saver.format_checkpoint_name({})
        if Path(path).is_file():
            if saver.monitor and saver.best_model_score is not None:
                best = path
                lines.append(f"best       {best}  ({saver.monitor} {float(saver.best_model_score):.1f})")
            else:
                last = path
                lines.append(f"last       {last}")
    for logger in trainer.loggers:
        lines += _describe_run_pages(logger)
    flags = ["--config-dir", folder] if (folder := _config_dir()) else []
    if last:
        words = list(map(without_secrets, HydraConfig.get().overrides.task))
        lines.append(f"resume     {command(words, output_dir, flags)}")
    if best or last:
        words = [Path(sys.executable).name, "-m", "pmoe_lightning.evaluate", *flags, f"checkpoint={best or last}"]
        words += _asked_again(getattr(trainer.lightning_module, "policy_description", {}))
        lines.append(f"evaluate   {shlex.join(words)}")
    return "\n".join(lines)


def _asked_again(description: Mapping[str, Any]) -> list[str]:
    """What of the environment ``evaluate`` does not take from a checkpoint: names of modules, which it would import."""
    env, words = description.get("env", {"id": "", "kwargs": {}}), []
    if ":" in env["id"] and "backend" not in env and "env" not in description["own_parts"]:
        words.append(f"env={env['id']}")
    if wrappers := env["kwargs"].get("wrappers"):
        words.append(f"env.wrappers={write_value(wrappers)}")
    return words


def _describe_run_pages(logger: Any) -> list[str]:
    where = without_secrets(logger.tracking_uri)
    lines = [f"MLflow     run {logger.run_id} in {where}"]
    if where.startswith("http"):
        return [*lines, f"curves     {runs_page(where, logger.experiment_id)}"]
    lines.append(f"curves     mlflow ui --backend-store-uri {shlex.quote(where)}")
    return [*lines, f"           then {runs_page('http://127.0.0.1:5000', logger.experiment_id)}"]


def _config_dir() -> str | None:
    """The folder of ``--config-dir``, if one was given."""
    sources = HydraConfig.get().runtime.config_sources
    return next((source.path for source in sources if source.provider == "command-line"), None)
