"""Synthetic recall, without any text."""

from __future__ import annotations

from typing import Any

from toolmem.data.modules.base import HeldOut, StatefulDataModule
from toolmem.data.recall import RecallGenerator
from toolmem.data.stream import make_loader
from toolmem.data.tokenizers import SymbolTokenizer, Tokenizer
from toolmem.errors import ToolmemError


class RecallDataModule(StatefulDataModule):
    """Multi-query associative recall (MQAR, arXiv 2312.04927): every batch is new.

    Args:
        vocab_size: symbols; keys are from the lower half, values from the upper.
        seq_len: tokens in a row.
        n_pairs: key-value pairs in a row.
        batch_size: rows in a batch, over all devices.
        power_a: exponent of the law of distances; smaller asks sooner.
        random_non_queries: fill places that ask nothing with random symbols instead of 0.
        val_batches: batches in validation.
        seed: of everything.
        num_workers: processes that make batches.

    Raises:
        ToolmemError: when pairs and queries do not fit in a row, or the vocabulary is too small.
    """

    def __init__(
        self,
        vocab_size: int = 8192,
        seq_len: int = 64,
        n_pairs: int = 8,
        batch_size: int = 64,
        power_a: float = 0.01,
        random_non_queries: bool = True,
        val_batches: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if val_batches < 1:
            raise ToolmemError("data.val_batches must be at least 1")
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.n_pairs = n_pairs
        self.batch_size = batch_size
        self.power_a = power_a
        self.random_non_queries = random_non_queries
        self.val_batches = val_batches
        self.seed = seed
        self.num_workers = num_workers
        self.tokenizer: Tokenizer = SymbolTokenizer(vocab_size)
        self._generator(0)  # refuses early what cannot work

    def _generator(self, stream: int, rank: int = 0, world_size: int = 1) -> RecallGenerator:
        return RecallGenerator(
            self.vocab_size,
            self.seq_len,
            self.n_pairs,
            self.batch_size,
            power_a=self.power_a,
            random_non_queries=self.random_non_queries,
            seed=self.seed,
            stream=stream,
            rank=rank,
            world_size=world_size,
        )

    def signature(self) -> dict[str, Any]:
        """What decides which batch is the n-th."""
        keys = "vocab_size seq_len n_pairs batch_size power_a random_non_queries seed"
        return {key: getattr(self, key) for key in keys.split()}

    def checkpoint_info(self) -> dict[str, Any]:
        """Plain data that a checkpoint keeps."""
        return {"tokenizer": self.tokenizer.spec(), "factbase": None, "setting": None}

    def train_dataloader(self) -> Any:
        """The endless training stream, from where a loaded state says."""
        _ = self.model_looks_both_ways  # refuses a model that does
        generator = self._generator(0, *self.rank_and_world)
        state = self.resume_state()
        if state is not None:
            generator.load_state_dict(state)
        return make_loader(generator, self.num_workers)

    def val_dataloader(self) -> Any:
        """Fixed batches that training never draws."""
        rank, world = self.rank_and_world
        return HeldOut(self._generator(1, rank, world), self.val_batches)
