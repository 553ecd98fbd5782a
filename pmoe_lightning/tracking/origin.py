"""Where a run came from: the commit, the packages and the machine."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from pmoe_lightning import __version__

_PACKAGES = (
    "torch",
    "torchrl",
    "tensordict",
    "lightning",
    "gymnasium",
    "mujoco",
    "numpy",
    "mlflow",
    "hydra-core",
    "omegaconf",
)


def provenance(folder: str | Path | None = None) -> dict:
    """Describe the code and the software that is about to run.

    Args:
        folder: the checkout to describe; by default the one that holds this package, else the current folder.

    Returns:
        Plain values: ``git_commit`` (``None`` outside a checkout), ``git_dirty`` (tracked files differ from the commit;
        ``None`` outside), ``packages`` (name to version, only installed ones), ``python``, ``platform``.
    """
    if folder is None:
        root = Path(__file__).resolve().parents[2]
        folder = root if (root / ".git").exists() else Path.cwd()
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
        "packages": {"pmoe_lightning": __version__} | {name: v for name in _PACKAGES if (v := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _git(folder: str | Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
