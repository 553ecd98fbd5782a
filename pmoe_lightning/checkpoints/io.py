"""The Lightning plugin that writes checkpoints atomically and verifies them before reading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from pmoe_lightning.checkpoints.blocks import locate_blocks
from pmoe_lightning.checkpoints.files import read_checkpoint, write_checkpoint
from pmoe_lightning.errors import RunError


class AtomicCheckpointIO(TorchCheckpointIO):
    """``Trainer(plugins=[AtomicCheckpointIO()])``: a killed run never leaves a damaged checkpoint.

    Lightning's own writer goes through the system's temporary folder, so on another filesystem its last step is a copy
    that can be cut short. Local paths only take this way; a URL (``s3://...``) is left to Lightning.

    Args:
        already_read: checkpoints by path that need not be read again; what is loaded is taken out.
    """

    def __init__(self, already_read: dict[Path, dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.already_read = {} if already_read is None else already_read

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; see :func:`write_checkpoint`.

        Raises:
            RunError: it cannot be written (disk full, no permission); what was there before is intact.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_checkpoint(checkpoint, path)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"checkpoint {path} cannot be written: {reason}; the one before it is intact") from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verify and read ``path``: tensors and plain values only, unless ``weights_only`` is ``False``.

        Raises:
            RunError: the file, or a block that it names, is missing or damaged, or it is not a checkpoint.
        """
        if weights_only is False or "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only is not False)
        if Path(path) in self.already_read:
            return self.already_read.pop(Path(path))
        checkpoint = read_checkpoint(path, map_location=map_location)
        locate_blocks(checkpoint, path)
        return checkpoint
