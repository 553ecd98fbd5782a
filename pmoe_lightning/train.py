"""The train command: from a configuration to a trained policy, its checkpoints and one MLflow run.

    python -m pmoe_lightning.train algo=sac env=Hopper-v5 seed=3

Here the request is read and refused or accepted; ``run/`` carries it out. Only the latter imports torch,
Lightning and MLflow, so ``--help`` and refusals are quick.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pmoe_lightning import __version__
from pmoe_lightning.configuration import (
    chosen_groups,
    compose_jobs,
    describe_groups,
    describe_keys,
    describe_root,
    normalise_argv,
    output_folder,
    read_value,
    register,
    validate,
    with_value,
)
from pmoe_lightning.errors import ConfigurationError, RunError, error_line
from pmoe_lightning.processes import run_folder
from pmoe_lightning.processes.orphans import end_with_launcher
from pmoe_lightning.processes.output import outlive_output
from pmoe_lightning.processes.stopping import stop
from pmoe_lightning.tracking.address import without_secrets

HELP = """Train a multimodal continuous-control policy.

  python -m pmoe_lightning.train [key=value ...]

Examples
  algo=ppo                                   PPO, a mixture policy, HalfCheetah-v5
  algo=sac env=Hopper-v5 seed=3              any Gymnasium id with continuous actions
  algo=sac actor=gaussian total_frames=20000 the unimodal policy
  experiment=paper                           the settings of the PMOE authors' SAC code
  debug=default                              every part of a run once, in seconds
  -m algo=ppo,sac seed=1,2,3                 one run per combination, below one parent run
  algo=sac resume=auto                       go on with the newest unfinished run of this configuration

Choices (group=choice, files in conf/)
{choices}

Values (key=value)
{keys}
  algo.lr algo.gamma actor.num_components env.id data.num_envs trainer.devices ...
  algo=sac --help says what each key of this choice is and may be; so does estimator=frequency --help, and any other.
  --cfg job prints all keys with their values, --cfg job --package algo those of one group.

Results go to outputs/<algo>-<env>/<time>/ and to MLflow: see them with `mlflow ui`."""


@hydra.main(version_base="1.3", config_path="pkg://pmoe_lightning.conf", config_name="config")
def _hydra_main(cfg: DictConfig) -> None:
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        from pmoe_lightning.run.sweep import run_job

        run_job(cfg)  # an exit, which the lines below make of an error, would end the sweep
        return
    from pmoe_lightning.run.training import run_training

    with _one_line_errors():
        run_folder.hold(HydraConfig.get().runtime.output_dir)  # held already, unless only Hydra could know it
        validate(cfg)
        run_training(cfg)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong configuration, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    outlive_output()  # first, so that no pipe takes the place of a closed stream
    stop.listen()
    end_with_launcher()
    # Hydra would cut the traceback of a real error short.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    if "--version" in sys.argv[1:]:  # Hydra would say its own
        print(f"pmoe_lightning {__version__}")
        sys.exit()
    try:
        with _one_line_errors():
            with stop.interruptible():
                words, jobs = _refuse_what_cannot_run(normalise_argv(sys.argv[1:]))
            sys.argv[1:] = words
            register()
            with _sweep(jobs, words) if jobs else nullcontext():
                _hydra_main()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        run_folder.release_all()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What the user can mend is one line on stderr and an exit code; anything else keeps its traceback."""
    try:
        yield
    except ConfigurationError as error:
        sys.exit(_print_line("configuration error", error, code=2))
    except RunError as error:
        sys.exit(_print_line("error", error, code=1))


def _sweep(jobs: list[DictConfig], words: list[str]) -> AbstractContextManager[None]:
    from pmoe_lightning.run.sweep import sweep_run

    return sweep_run(jobs, words)


def _refuse_what_cannot_run(words: list[str]) -> tuple[list[str], list[DictConfig]]:
    """Raise before Hydra makes a folder and before an MLflow run exists.

    Returns:
        the words with ``resume`` a file, and the jobs of a sweep, none for a single run.
    """
    arguments = get_args_parser().parse_args(words)
    if arguments.help:
        print(_help(arguments))
        sys.exit()
    prints_only = arguments.hydra_help or arguments.shell_completion
    other_source = arguments.config_path or arguments.config_name or arguments.experimental_rerun
    if other_source and arguments.multirun:
        raise ConfigurationError("a sweep reads conf/config.yaml: put files of your own into a folder for --config-dir")
    if prints_only or other_source:
        return words, []
    try:
        Path.cwd()
    except FileNotFoundError:
        raise RunError("the current folder was deleted: go to one that exists") from None
    jobs = compose_jobs(arguments.overrides, multirun=arguments.multirun, config_dir=arguments.config_dir)
    for cfg in jobs:
        validate(cfg)
    if arguments.cfg is not None or arguments.info is not None:
        return words, []
    resumes = any(cfg.resume is not None for cfg in jobs)
    if resumes and arguments.multirun:
        raise ConfigurationError("resume continues one run: leave out --multirun")
    folder = output_folder(arguments.overrides, multirun=arguments.multirun, config_dir=arguments.config_dir)
    if folder is not None and len(str(folder.absolute()).splitlines()) > 1:
        key = "hydra.sweep.dir" if arguments.multirun else "hydra.run.dir"
        raise ConfigurationError(f"{key}={str(folder)!r} has several lines: give the folder a name of one")
    if arguments.multirun:
        return _refuse_sweep(words, jobs, folder), jobs
    return _refuse_run(
        words, jobs[0], folder, is_named=read_value(arguments.overrides, "hydra.run.dir") is not None
    ), []


def _help(arguments: Namespace) -> str:
    """The help as a whole, or that of what is chosen: Hydra's own takes seconds to collect what it prints."""
    groups = [] if arguments.multirun else chosen_groups(arguments.overrides)
    if not groups:
        return HELP.format(choices=describe_groups(), keys=describe_root())
    (cfg,) = compose_jobs(arguments.overrides, config_dir=arguments.config_dir)
    return "\n\n".join(describe_keys(cfg, group) for group in groups)


def _refuse_run(words: list[str], cfg: DictConfig, folder: Path | None, *, is_named: bool) -> list[str]:
    """Raise if the run cannot begin, else hold its folder; returns the words with ``resume`` a file."""
    from pmoe_lightning.run.resume import NothingLeft, refuse_occupied, resume_words

    if folder is not None:
        refuse_occupied(cfg, folder, is_named=is_named)
    from pmoe_lightning.run.surroundings import check_surroundings

    check_surroundings([cfg])
    if cfg.resume is not None:
        try:
            return resume_words(words, cfg, folder, is_named=is_named)
        except NothingLeft as ending:
            print(ending)
            sys.exit()
    if folder is None:
        return words
    run_folder.hold(folder)
    refuse_occupied(cfg, folder, is_named=is_named)  # another run may have come and gone by now
    return with_value(words, "hydra.run.dir", str(folder))


def _refuse_sweep(words: list[str], jobs: list[DictConfig], folder: Path | None) -> list[str]:
    """Raise if the sweep cannot begin, else hold its folder; returns the words with that folder."""
    if folder is not None:
        run_folder.refuse_held(folder)
        _refuse_occupied_by_sweep(folder)
    from pmoe_lightning.run.surroundings import check_surroundings
    from pmoe_lightning.run.sweep import check_sweep

    check_surroundings(jobs)
    check_sweep(jobs)
    if folder is None:
        return words
    run_folder.hold(folder)
    _refuse_occupied_by_sweep(folder)
    return with_value(words, "hydra.sweep.dir", str(folder))


def _refuse_occupied_by_sweep(folder: Path) -> None:
    if run_folder.holds_run(folder) or any(folder.rglob(".hydra")):
        raise ConfigurationError(f"{folder} holds a sweep or a run: give another hydra.sweep.dir")


def _print_line(kind: str, error: Exception, *, code: int) -> int:
    print(without_secrets(f"{kind}: {error_line(error)}"), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
