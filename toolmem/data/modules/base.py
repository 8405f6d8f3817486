"""What the DataModules share: resuming, ranks, and the streams' life."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl

from toolmem.data.batch import Batch
from toolmem.data.stream import IndexedBatches
from toolmem.errors import ToolmemError

STATE_FORMAT = 1


class HeldOut:
    """One pass over a stream's first epoch: validation data, the same every time.

    Args:
        batches: the stream.
        n_batches: how many to take.
    """

    def __init__(self, batches: IndexedBatches, n_batches: int) -> None:
        self.batches = batches
        self.n_batches = n_batches

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Batch]:
        return (self.batches.batch_at(index) for index in range(self.n_batches))


class StatefulDataModule(pl.LightningDataModule, ABC):
    """A DataModule whose training stream is endless and can be taken up after any batch.

    Each training `Batch` carries where the stream stands after it; training reports back with
    `consumed`, so batches that were prefetched but never trained on are neither lost nor repeated.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stream_state: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None

    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """Option -> value, of all that decides which batch is the n-th: kept in the state."""

    @property
    def rank_and_world(self) -> tuple[int, int]:
        """The number of this process among those that read different data, and their count."""
        trainer = self.trainer
        if trainer is None:
            return 0, 1
        # a strategy knows that ranks of one tensor-parallel group must read the same
        shares = trainer.distributed_sampler_kwargs or {}
        world = int(shares.get("num_replicas", trainer.world_size))
        return int(shares.get("rank", trainer.global_rank)), world

    @property
    def model_looks_both_ways(self) -> bool:
        """Does the model that is trained on this data look both ways within spans?

        Raises:
            ToolmemError: when it does, and the data cannot serve it.
        """
        model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        if model is None:
            return False
        self.check_model(model)
        return getattr(model, "attention_mask", "causal") == "prefix"

    def check_model(self, model: Any) -> None:
        """Refuse a model that this data cannot train.

        Args:
            model: a ``LanguageModel``.

        Raises:
            ToolmemError: for one that looks both ways within spans where every token bears loss.
        """
        looks_both_ways = getattr(model, "attention_mask", "causal") == "prefix"
        if looks_both_ways and getattr(self, "mask", "all") == "all":
            raise ToolmemError(
                "model.model.init_args.attention_mask is prefix, and every token of the data bears loss: "
                "within a span a token would see its own target. Use attention_mask: causal, or "
                "dialogues with data.init_args.mask: assistant"
            )

    def consumed(self, state: dict[str, Any]) -> None:
        """Training is done with the batch that carried ``state``."""
        self._stream_state = state

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which training goes on after the last batch consumed."""
        return {
            "format": STATE_FORMAT,
            "world_size": self.rank_and_world[1],
            "signature": self.signature(),
            "stream": self._stream_state,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next `train_dataloader` begin where ``state_dict`` was taken.

        Raises:
            ToolmemError: for a state that another version wrote.
        """
        if state_dict.get("format") != STATE_FORMAT:
            raise ToolmemError(
                f"the checkpoint's data state has format {state_dict.get('format')}, this version "
                f"reads {STATE_FORMAT}: resume with the toolmem that wrote it"
            )
        # checked when training asks for data: validation may well be on other data
        self._loaded = state_dict
        self._stream_state = state_dict["stream"]

    @property
    def _came_from(self) -> str:
        """The checkpoint that training goes on from, for messages."""
        return str(getattr(self.trainer, "ckpt_path", None) or "the checkpoint")

    def resume_state(self, same_world: bool = False) -> dict[str, Any] | None:
        """The stream's state to begin with, None for the start.

        Args:
            same_world: the stream cannot be shared out anew among another number of processes.

        Raises:
            ToolmemError: when the state does not fit this run, naming the option.
        """
        loaded = self._loaded
        if loaded is not None:
            for key, value in self.signature().items():
                before = loaded["signature"].get(key)
                if before != value:
                    raise ToolmemError(
                        f"cannot resume from {self._came_from}: data.init_args.{key} is {value!r}, "
                        f"the checkpoint's run had "
                        f"{before!r}; set it as it was, or start a new run"
                    )
            world = self.rank_and_world[1]
            if same_world and loaded["world_size"] != world:
                raise ToolmemError(
                    f"cannot resume from {self._came_from}: its run read its documents with world_size "
                    f"{loaded['world_size']}, this one has {world}; use as many devices as before"
                )
        return self._stream_state

    def test_dataloader(self) -> Any:
        """The same as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """The same as for validation."""
        return self.val_dataloader()
