"""Lightning's doors to our checkpoint files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from toolmem import checkpoints
from toolmem.checkpoints import places
from toolmem.checkpoints.background import BackgroundWriter, WhenBusy
from toolmem.checkpoints.formats import write_flat
from toolmem.checkpoints.state import Flat, flatten
from toolmem.errors import ToolmemError

# What a process that Lightning forked hands over to the one that forked it, which reads it by torch.load.
HANDED_OVER = ".temp.ckpt"


@dataclass(frozen=True)
class Saving:
    """How a checkpoint is to be saved.

    Args:
        also: other files that are to hold the same.
        keep_last: how many to keep of the name, this one included (``last-1.ckpt``, ...).
        background: only copy tensors now, and write them meanwhile.
        later: tells by its name whether a tensor stays as it is until the next optimizer step.
        replaceable: a newer one will do as well.
    """

    also: tuple[Path, ...] = ()
    keep_last: int = 1
    background: bool = False
    later: Callable[[str], bool] = field(default=lambda name: False)
    replaceable: bool = False


class AtomicCheckpointIO(CheckpointIO):
    """Writes checkpoints in one step, and reads plain data only, with errors that speak.

    Args:
        when_busy: of saves in the background (``BackgroundWriter``).
    """

    def __init__(self, when_busy: WhenBusy = "wait") -> None:
        self.writer = BackgroundWriter(when_busy)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``: temporary name, synced, renamed.

        Args:
            checkpoint: plain data and tensors.
            path: of the file.
            storage_options: a `Saving`, with which an error is told by ``writer.take_error``: raised
                here, on one rank, it would leave the others waiting. None raises.

        Raises:
            ToolmemError: when the folder cannot be written or the disk is full.
        """
        if Path(path).name == HANDED_OVER:
            torch.save(checkpoint, path)
            return
        self.save_flat(flatten(checkpoint), Path(path), storage_options or Saving())
        if storage_options is None and (error := self.writer.take_error()) is not None:
            raise error

    def save_flat(self, flat: Flat, path: Path, saving: Saving) -> None:
        """The same of a checkpoint taken apart; errors are told by ``writer.take_error``."""

        def write(tensors: Mapping[str, Tensor]) -> None:
            write_flat(Flat(flat.tree, tensors), path, saving.keep_last)
            for other in saving.also:
                places.copy(path, other)

        self.run(flat.tensors, write, saving)

    def run(
        self,
        tensors: Mapping[str, Tensor],
        write: Callable[[Mapping[str, Tensor]], None],
        saving: Saving,
    ) -> None:
        """Write tensors now, or a copy of them in the background.

        Args:
            tensors: by name.
            write: gets them, or the copy.
            saving: how.
        """
        if saving.background:
            later = frozenset(filter(saving.later, tensors))
            self.writer.save(tensors, write, later, saving.replaceable)
            return
        self.writer.wait()
        try:
            write(tensors)
        except ToolmemError as error:
            self.writer.error = error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of either form; ``weights_only`` is always on.

        Raises:
            ToolmemError: when it is missing, truncated or corrupt.
        """
        self.writer.wait()
        return checkpoints.read(path, map_location="cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete it, if it is there."""
        self.writer.wait()
        places.remove(Path(path))

    def teardown(self) -> None:
        """Nothing is left half-written."""
        self.writer.wait()
