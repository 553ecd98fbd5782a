"""The train command: from a configuration to a trained policy, its checkpoints and one MLflow run.

    python -m pmoe_lightning.train algo=sac env=Hopper-v5 seed=3

Here the request is read and refused or accepted; ``training.py`` carries it out. Only the latter imports torch,
Lightning and MLflow, so ``--help`` and refusals are quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pmoe_lightning import __version__
from pmoe_lightning.configuration import compose_jobs, describe_groups, normalise_argv, register, validate
from pmoe_lightning.errors import ConfigurationError, RunError
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

Choices (group=option, files in conf/)
{choices}

Values (key=value)
  total_frames seed num_threads compile matmul_precision
  algo.lr algo.gamma actor.num_components env.id data.num_envs trainer.devices ...
  --cfg job prints all of them, --cfg job --package algo those of one group.

Results go to outputs/<algo>-<env>/<time>/ and to MLflow: see them with `mlflow ui`.
"""

register()


@hydra.main(version_base="1.3", config_path="pkg://pmoe_lightning.conf", config_name="config")
def _hydra_main(cfg: DictConfig) -> None:
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        from pmoe_lightning.sweep import run_job

        run_job(cfg)  # an exit, which the lines below make of an error, would end the sweep
        return
    from pmoe_lightning.training import run_training

    with _one_line_errors():
        validate(cfg)
        run_training(cfg)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong configuration, 130 Ctrl-C, 143 SIGTERM."""
    # Hydra would cut the traceback of a real error short.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    if "--version" in sys.argv[1:]:  # Hydra would say its own
        print(f"pmoe_lightning {__version__}")
        sys.exit()
    try:
        with _one_line_errors():
            words, jobs = _refuse_what_cannot_run(normalise_argv(sys.argv[1:]))
            sys.argv[1:] = words
            with _sweep(jobs, words) if jobs else nullcontext():
                _hydra_main()
    except KeyboardInterrupt:
        sys.exit(130)


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
    from pmoe_lightning.sweep import sweep_run

    return sweep_run(jobs, words)


def _refuse_what_cannot_run(words: list[str]) -> tuple[list[str], list[DictConfig]]:
    """Raise before Hydra makes a folder and before an MLflow run exists.

    Returns:
        the words with ``resume`` a file, and the jobs of a sweep, none for a single run.
    """
    arguments = get_args_parser().parse_args(words)
    if arguments.help:
        # Hydra's own help takes seconds to collect what it prints.
        print(HELP.format(choices=describe_groups()), end="")
        sys.exit()
    prints_only = arguments.hydra_help or arguments.shell_completion
    other_source = arguments.config_path or arguments.config_name or arguments.experimental_rerun
    if other_source and arguments.multirun:
        raise ConfigurationError("a sweep reads conf/config.yaml: put files of your own into a folder for --config-dir")
    if prints_only or other_source:
        return words, []
    jobs = compose_jobs(arguments.overrides, multirun=arguments.multirun, config_dir=arguments.config_dir)
    for cfg in jobs:
        validate(cfg)
    if arguments.cfg is not None or arguments.info is not None:
        return words, []
    resumes = any(cfg.resume is not None for cfg in jobs)
    if resumes and arguments.multirun:
        raise ConfigurationError("resume continues one run: leave out --multirun")
    from pmoe_lightning.training import check_surroundings

    check_surroundings(jobs)
    if arguments.multirun:
        from pmoe_lightning.sweep import check_sweep

        check_sweep(jobs)
        return words, jobs
    if resumes:
        from pmoe_lightning.resume import resume_words

        words = resume_words(words, jobs[0])
    return words, []


def _print_line(kind: str, error: Exception, *, code: int) -> int:
    print(without_secrets(f"{kind}: {' '.join(str(error).split())}"), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
