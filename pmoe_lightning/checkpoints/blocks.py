"""Blocks: parts of a checkpoint that never change again, written once, beside it, and named by their digest.

A replay buffer of pictures is gigabytes, of which little is new from one checkpoint to the next. A block is the file
``frames/<SHA-256 of its bytes>``; a checkpoint names those that it is made of. It is there, whole and on the disk,
before the checkpoint that names it, and is removed when no checkpoint in the folder names it any more.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmoe_lightning.errors import RunError
from pmoe_lightning.processes.partial_files import partial_file, sync_folder

__all__ = ["FOLDER", "locate_blocks", "named_blocks", "read_block", "remove_unnamed", "write_block"]

#: Of the blocks, beside the checkpoints.
FOLDER = "frames"
_DIGEST_LENGTH = 2 * hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


def write_block(content: Tensor, folder: Path) -> str:
    """Write the bytes of a tensor, whole or not at all, where they are not there already; returns the file's name.

    Raises:
        RunError: it cannot be written (disk full, no permission); no checkpoint names it yet.
    """
    values = content.contiguous().numpy().tobytes()
    name = hashlib.sha256(values).hexdigest()
    path = folder / name
    with suppress(OSError):  # one that a killed run has left, or that was damaged since
        if path.read_bytes() == values:
            return name
    partial = partial_file(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(values)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(folder)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(
            f"block {path} of the replay buffer cannot be written: {reason}; no checkpoint is lost"
        ) from error
    finally:
        with suppress(OSError):  # where there is no folder
            partial.unlink(missing_ok=True)
    return name


def read_block(path: Path) -> Tensor:
    """The bytes of a block, uint8 [M].

    Raises:
        RunError: it is missing, or not what was written.
    """
    try:
        content = bytearray(path.read_bytes())
    except OSError as error:
        raise RunError(f"block {path} of the replay buffer cannot be read: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != path.name:
        raise RunError(f"block {path} of the replay buffer is damaged: its SHA-256 does not match")
    return torch.frombuffer(content, dtype=torch.uint8)


def locate_blocks(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Verify the blocks that a checkpoint names, and write into it where they lie: beside ``path``, which it was.

    Raises:
        RunError: one is missing or damaged, or a name is no digest.
    """
    folder = Path(path).absolute().parent / FOLDER
    for name in _names(checkpoint, path):
        read_block(folder / name)
    for frames in _frames(checkpoint):
        frames["folder"] = str(folder)


def named_blocks(path: Path) -> list[Path]:
    """The files of the blocks that a checkpoint, already verified, names; none where it has no pictures.

    Raises:
        RunError: a name is no digest.
    """
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return [path.parent / FOLDER / name for name in dict.fromkeys(_names(content, path))]


def remove_unnamed(folder: Path) -> None:
    """Remove the blocks that no checkpoint beside ``folder`` names, and that are older than the newest of these.

    A younger one is of a checkpoint that is being written. Nothing is removed where a checkpoint cannot be read.
    """
    names, newest = set[str](), 0.0
    for path in folder.parent.glob("*.ckpt"):
        try:
            newest = max(newest, path.stat().st_mtime)
            names.update(block.name for block in named_blocks(path))
        except Exception as error:  # whatever a damaged file makes of itself
            _log.debug("blocks are kept, because %s cannot be read: %s", path, error)
            return
    for block in folder.glob("*"):
        if _is_digest(block.name) and block.name not in names and block.stat().st_mtime < newest:
            block.unlink(missing_ok=True)


def _frames(checkpoint: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of every process, what it says of its pictures."""
    for experience in checkpoint.get("experience", []):
        frames = experience.get("replay", {}).get("frames")
        if frames is not None:
            yield frames


def _names(checkpoint: Mapping[str, Any], path: str | Path) -> Iterator[str]:
    for frames in _frames(checkpoint):
        for name in frames["blocks"].values():
            if not _is_digest(name):
                raise RunError(f"checkpoint {path} names a block {name!r}, which is no SHA-256")
            yield name


def _is_digest(name: Any) -> bool:
    return isinstance(name, str) and len(name) == _DIGEST_LENGTH and set(name) <= set("0123456789abcdef")
