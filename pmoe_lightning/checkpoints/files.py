"""Reading and writing one checkpoint file.

A checkpoint is a ``torch.save`` archive, a zip file, whose comment at the very end is the SHA-256 of all before it.
Reading compares that first and then accepts tensors and plain values only: nothing in the file is imported or executed.
The checkpoint that a new one replaces stays beside it, as ``<name>.previous.ckpt``, unless it is damaged: then the one
before stays.
"""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from pmoe_lightning.errors import RunError, first_line
from pmoe_lightning.processes.partial_files import partial_file, sync_folder

_LABEL = b"sha256:"
_COMMENT_LENGTH = len(_LABEL) + 2 * hashlib.sha256().digest_size
#: Files that this process has written or found whole, as they were then.
_whole: dict[Path, tuple[int, ...]] = {}


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write ``checkpoint`` so that ``path`` holds either its old content or all of the new one, whatever happens.

    The temporary file lies in the target's own folder, because only a rename within one filesystem is atomic; file and
    folder are synced, so the order survives a power cut. A writer killed half-way leaves a partial file behind, see
    :mod:`pmoe_lightning.processes.partial_files`.

    Raises:
        OSError: when the file cannot be written (disk full, no permission); the old content is then intact.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_file(path)
    try:
        with open(partial, "w+b") as file:
            _save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        _keep(path)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _whole[path.absolute()] = _fingerprint(path)
    sync_folder(path.parent)


def previous_checkpoint(path: str | Path) -> Path:
    """Where the checkpoint is kept that the one at ``path`` replaced."""
    path = Path(path)
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _keep(path: Path) -> None:
    """Make the present file the previous one, if it is whole. As a second name for it first, so there is always one."""
    if not _is_whole(path):
        return
    link = partial_file(previous_checkpoint(path))
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a filesystem without hard links
        link = path
    os.replace(link, previous_checkpoint(path))


def _is_whole(path: Path) -> bool:
    """Whether the file is what was written; read only where this process has neither written nor read it itself."""
    if path.exists() and _whole.get(path.absolute()) == _fingerprint(path):
        return True
    try:
        verify_checkpoint(path)
    except RunError:
        return False
    return True


def _fingerprint(path: Path) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


class _Hashing:
    """A file to write to that remembers the digest of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    hashing = _Hashing(file)
    try:
        torch.save(checkpoint, cast(BinaryIO, hashing))  # which asks for no more than this one has
    except RuntimeError as error:
        # torch's zip writer reports a failed write() (a full disk) as an internal error and hides the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    # A zip file ends with the length of its comment, zero as torch wrote it, and the comment.
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT_LENGTH.to_bytes(2, "little") + _LABEL + hashing.digest.hexdigest().encode())


def verify_checkpoint(path: str | Path) -> None:
    """Check that ``path`` is, to the last bit, what was written, without unpickling any of it.

    Raises:
        RunError: the file is missing, is no checkpoint, or was changed since it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"checkpoint {path} does not exist" if not path.exists() else f"checkpoint {path} is not a file")
    try:
        fingerprint = _fingerprint(path)
        with open(path, "rb") as file:
            intact = _matches_its_digest(file)
        with zipfile.ZipFile(path) as archive:
            entries, signed = archive.infolist(), bool(archive.comment)
    except OSError as error:
        raise RunError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError):
        intact, entries, signed = False, [], True
    if not signed:
        raise RunError(f"checkpoint {path} carries no SHA-256: write it with Trainer(plugins=[AtomicCheckpointIO()])")
    if not intact:
        raise RunError(f"checkpoint {path} is damaged, or is not a checkpoint: its SHA-256 does not match")
    # A compressed entry is not torch.save's, and could unpack to more than the memory.
    foreign = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if foreign or not any(entry.filename.endswith("data.pkl") for entry in entries):
        raise RunError(f"checkpoint {path} is not a PyTorch checkpoint")
    _whole[path.absolute()] = fingerprint


def _matches_its_digest(file: BinaryIO) -> bool:
    """Whether the comment of the archive holds the digest of the rest, with the comment's length as torch wrote it."""
    size = os.fstat(file.fileno()).st_size - _COMMENT_LENGTH - 2
    if size < 0:
        return False
    digest = hashlib.sha256()
    while size > 0:
        content = file.read(min(size, 1 << 20))
        digest.update(content)
        size -= len(content)
    digest.update(b"\0\0")
    end = _COMMENT_LENGTH.to_bytes(2, "little") + _LABEL + digest.hexdigest().encode()
    return file.read() == end


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
        is_unsafe = "weights_only" in str(error)
        reason = "it holds objects other than tensors and plain values" if is_unsafe else first_line(error)
        raise RunError(f"checkpoint {path} cannot be read: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise RunError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dictionary")
    return checkpoint
