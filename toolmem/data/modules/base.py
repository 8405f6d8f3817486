"""What all DataModules share: an endless training stream that goes on exactly where it stopped."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from toolmem.data.stream import IndexedBatches, make_loader
from toolmem.data.tokenizers import Tokenizer
from toolmem.errors import ToolmemError

STATE_FORMAT = 1


class StatefulDataModule(pl.LightningDataModule):
    """Batches whose place in the stream is part of the checkpoint.

    Every batch says where the stream stands after it; training reports each batch it has used by
    `consumed`, so batches that Lightning or a worker fetched ahead are neither lost nor repeated.

    Args:
        tokenizer: what the batches' ids mean.
        batch_size: rows, or dialogues, of a batch over all ranks.
        num_workers: processes that make batches; 0 makes them in the training process.

    Attributes:
        vocab_size: number of token ids.
        seq_len: longest row that a batch can have.
    """

    seq_len: int

    def __init__(self, tokenizer: Tokenizer, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ToolmemError(f"data: batch_size is {batch_size}: it must be at least 1")
        if num_workers < 0:
            raise ToolmemError(f"data: num_workers is {num_workers}: it must be 0 or more")
        self.tokenizer = tokenizer
        self.vocab_size: int = tokenizer.vocab_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._state: dict[str, Any] | None = None

    # -- what a DataModule adds

    @abstractmethod
    def train_batches(self, rank: int, world_size: int) -> IndexedBatches:
        """The endless training stream of one rank."""

    @abstractmethod
    def val_batches(self, rank: int, world_size: int) -> IndexedBatches:
        """The validation stream of one rank, its ``stop`` set."""

    @abstractmethod
    def checkpoint_info(self) -> dict[str, Any]:
        """Plain data that a checkpoint keeps: tokenizer, facts, setting."""

    # -- Lightning's side

    def train_dataloader(self) -> DataLoader:
        """The training stream, from where the checkpoint stopped."""
        batches = self.train_batches(*self._place())
        if self._state is not None:
            batches.load_state_dict(self._state)
        return make_loader(batches, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """The same held-out batches every time."""
        return make_loader(self.val_batches(*self._place()))

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def consumed(self, state: dict[str, Any]) -> None:
        """Note that training has used a batch.

        Args:
            state: the batch's own.
        """
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        """Where training stands in the stream."""
        return {
            "format": STATE_FORMAT,
            "stream": self._state,
            "world_size": self._place()[1],
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ToolmemError: when the state cannot be honoured exactly.
        """
        if state_dict.get("format") != STATE_FORMAT:
            raise ToolmemError(
                f"the checkpoint's data state has format {state_dict.get('format')}, this version reads "
                f"{STATE_FORMAT}: start a new run"
            )
        for key, now, what in (
            ("world_size", self._place()[1], "processes (trainer.devices, trainer.num_nodes)"),
            ("batch_size", self.batch_size, "rows a batch (data.init_args.batch_size)"),
        ):
            if state_dict[key] != now:
                raise ToolmemError(
                    f"the checkpoint was trained with {state_dict[key]} {what}, this run has {now}: "
                    "batches would be skipped or repeated; set it as it was"
                )
        self._state = state_dict["stream"]
