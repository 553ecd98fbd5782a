"""What a run is called, and what is said of it on its page: that which tells it from its neighbours."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from mlflow.utils import name_utils

from pmoe_lightning.tracking.address import without_secrets

#: The tag whose text MLflow shows as the description of a run, an experiment or a model.
NOTE = "mlflow.note.content"
EXPERIMENT_NOTE = """\
Training runs of pmoe_lightning: multimodal policies for continuous control.

A run's name says what was chosen: algorithm, task, actor, estimator, further options, seed. Steps are environment
frames; `eval/episode_return` judges the policy without exploration. A sweep is one run with a child per job."""
_MAX_LENGTH = 200
#: Options whose choice a name begins with.
_CHOICES = ("algo", "env", "actor", "estimator", "action_transform", "safe")
#: What a run does not become another by.
_SILENT = ("hydra.", "hydra/", "logger.", "resume=")


def run_name(chosen: Mapping[str, str], words: Sequence[str], seed: int) -> str:
    """For example ``sac Hopper-v5 pmoe frequency algo.lr=0.001 seed=3``.

    Args:
        chosen: the choice of each of ``algo env actor estimator action_transform safe``; ``none`` is not said.
        words: the overrides that the run was started with.
        seed: of the run.
    """
    choices = [chosen[group] for group in _CHOICES if chosen[group] != "none"]
    return _within_limit([*choices, *_further(words), f"seed={seed}"])


def sweep_name(words: Sequence[str]) -> str:
    """``sweep`` and the words that it was started with, for example ``sweep algo=sac seed=1,2,3``."""
    return _within_limit(["sweep", *(word for word in words if _is_said(word))])


def describe_run(name: str, words: Sequence[str], total_frames: int, folder: str | Path) -> str:
    """The text on a run's page."""
    return short_enough(
        f"{name}, {total_frames:,} environment frames.\n\n"
        f"Started with `{_command(words)}`; results in `{folder}`. `config.yaml` has every value."
    )


def describe_sweep(words: Sequence[str], jobs: int) -> str:
    """The text on the page of a sweep's parent."""
    return short_enough(
        f"{jobs} runs, started with `{_command(words)}`.\n\nAt the end `sweep.csv` and the figure `sweep` compare them."
    )


def is_invented(name: str | None) -> bool:
    """Whether MLflow has made up this name, such as ``bold-crow-123``, as it does where nobody gives one."""
    first, _, rest = (name or "").partition("-")
    noun, _, number = rest.rpartition("-")
    words = name_utils._GENERATOR_PREDICATES, name_utils._GENERATOR_NOUNS
    return not name or (first in words[0] and noun in words[1] and number.isdigit())


def _further(words: Sequence[str]) -> list[str]:
    groups = (*_CHOICES, "env.id", "seed")
    return [word for word in words if _is_said(word) and word.lstrip("+").partition("=")[0] not in groups]


def _is_said(word: str) -> bool:
    return not word.lstrip("+~").startswith(_SILENT) and word not in ("-m", "--multirun")


def _command(words: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "pmoe_lightning.train", *map(without_secrets, words)])


def _within_limit(words: Sequence[str]) -> str:
    name = without_secrets(" ".join(words))
    if len(name) <= _MAX_LENGTH:
        return name
    # What is cut off may be all that tells two runs apart.
    return f"{name[: _MAX_LENGTH - 12]}... {sha256(name.encode()).hexdigest()[:8]}"


def short_enough(text: str, limit: int = 4000) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
