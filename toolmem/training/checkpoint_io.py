"""Lightning's door to our checkpoint files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from toolmem import checkpoints


class AtomicCheckpointIO(CheckpointIO):
    """Writes checkpoints in one step, and reads plain data only, with errors that speak."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``: temporary name, synced, renamed."""
        checkpoints.write(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; ``weights_only`` is always on.

        Raises:
            ToolmemError: when it is missing, truncated or corrupt.
        """
        return checkpoints.read(path, map_location="cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the file, if it is there."""
        Path(path).unlink(missing_ok=True)
