"""Reading and writing one checkpoint file.

A checkpoint is a ``torch.save`` archive: a zip whose entries are stored uncompressed, each with its CRC-32. Reading
verifies every entry first and then accepts tensors and plain values only: nothing in the file is imported or executed.
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from pmoe_lightning.errors import RunError


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write ``checkpoint`` so that ``path`` holds either its old content or all of the new one, whatever happens.

    The temporary file lies in the target's own folder, because only a rename within one filesystem is atomic; file and
    folder are synced, so the order survives a power cut. A writer killed half-way leaves ``.<name>.partial`` behind,
    which the next write of the same target replaces.

    Raises:
        OSError: when the file cannot be written (disk full, no permission); the old content is then intact.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            _save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _save(checkpoint: dict[str, Any], file) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch's zip writer reports a failed write() (a full disk) as an internal error and hides the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its rename is journalled.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_checkpoint(path: str | Path) -> None:
    """Check that ``path`` is a complete ``torch.save`` archive, without unpickling any of it.

    Raises:
        RunError: the file is missing, is no such archive, or one of its entries is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"checkpoint {path} does not exist" if not path.exists() else f"checkpoint {path} is not a file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # A compressed entry is not torch.save's, and could unpack to more than the memory.
            foreign = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or not any(
                entry.filename.endswith("data.pkl") for entry in entries
            )
            damaged = None if foreign else archive.testzip()
    except OSError as error:
        raise RunError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise RunError(f"checkpoint {path} is damaged or is not a checkpoint: {error}") from error
    if foreign:
        raise RunError(f"checkpoint {path} is not a PyTorch checkpoint")
    if damaged:
        raise RunError(f"checkpoint {path} is damaged: entry {damaged} does not match its checksum")


def read_checkpoint(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values.

    Args:
        path: a file written by training.
        map_location: where tensors go, as for ``torch.load``.

    Returns:
        the dictionary given to :func:`write_checkpoint`.

    Raises:
        RunError: the file is missing, damaged, not a checkpoint, or holds anything but tensors and plain values.
    """
    verify_checkpoint(path)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        reason = "it holds objects other than tensors and plain values" if "weights_only" in str(error) else error
        raise RunError(f"checkpoint {path} cannot be read: {str(reason).splitlines()[0]}") from error
    if not isinstance(checkpoint, dict):
        raise RunError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dictionary")
    return checkpoint
