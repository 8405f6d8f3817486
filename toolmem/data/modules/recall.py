"""Synthetic tasks, without any text: recall (MQAR), and MAD's."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from toolmem.data.mad import MADGenerator, MADSizes, MADTask
from toolmem.data.modules.base import HeldOut, StatefulDataModule
from toolmem.data.recall import RecallGenerator
from toolmem.data.stream import IndexedBatches, make_loader
from toolmem.data.tokenizers import SymbolTokenizer, Tokenizer
from toolmem.errors import ToolmemError


class SyntheticDataModule(StatefulDataModule):
    """Numbered symbols that are drawn as they are needed.

    Args:
        vocab_size: symbols.
        seq_len: tokens in a row.
        batch_size: rows in a batch, over all devices.
        val_batches: batches in validation.
        seed: of everything.
        num_workers: processes that make batches.

    Raises:
        ToolmemError: for no batches in validation.
    """

    wants_accuracy = True  # validation counts right answers: there is one to each question

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        batch_size: int,
        val_batches: int,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        if val_batches < 1:
            raise ToolmemError("data.init_args.val_batches must be at least 1")
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.val_batches = val_batches
        self.seed = seed
        self.num_workers = num_workers
        self.tokenizer: Tokenizer = SymbolTokenizer(vocab_size)

    @abstractmethod
    def generator(self, stream: int, rank: int = 0, world_size: int = 1) -> IndexedBatches:
        """The stream of a number: 0 trains, 1 validates."""

    def checkpoint_info(self) -> dict[str, Any]:
        """Plain data that a checkpoint keeps."""
        return {"tokenizer": self.tokenizer.spec(), "factbase": None, "setting": None}

    def train_dataloader(self) -> Any:
        """The endless training stream, from where a loaded state says."""
        _ = self.model_looks_both_ways  # refuses a model that does
        generator = self.generator(0, *self.rank_and_world)
        state = self.resume_state()
        if state is not None:
            generator.load_state_dict(state)
        return make_loader(generator, self.num_workers)

    def val_dataloader(self) -> Any:
        """Fixed batches that training never draws."""
        rank, world = self.rank_and_world
        return HeldOut(self.generator(1, rank, world), self.val_batches)


class RecallDataModule(SyntheticDataModule):
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
        super().__init__(vocab_size, seq_len, batch_size, val_batches, seed, num_workers)
        self.n_pairs = n_pairs
        self.power_a = power_a
        self.random_non_queries = random_non_queries
        self.generator(0)  # refuses early what cannot work

    def generator(self, stream: int, rank: int = 0, world_size: int = 1) -> RecallGenerator:
        """The stream of a number: 0 trains, 1 validates."""
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


class MADDataModule(SyntheticDataModule):
    """One of MAD's synthetic tasks (arXiv 2403.17844): every batch is new.

    Args:
        task: ``in_context_recall``, ``noisy_recall``, ``fuzzy_recall``, ``selective_copy``,
            ``compression`` or ``memorization``.
        vocab_size: symbols, signs and noise included.
        seq_len: tokens in a row; odd for compression.
        batch_size: rows in a batch, over all devices.
        motif_len: the most tokens of a fuzzy key or value.
        noise_fraction: how likely a pair's place holds noise, in noisy recall.
        noise_vocab_size: symbols of noise, out of vocab_size.
        n_copied: symbols to copy, in selective copy.
        val_batches: batches in validation.
        seed: of everything; memorisation's dictionary too.
        num_workers: processes that make batches.

    Raises:
        ToolmemError: for rows that the task cannot have, naming the option.
    """

    def __init__(
        self,
        task: MADTask = "in_context_recall",
        vocab_size: int = 16,
        seq_len: int = 128,
        batch_size: int = 64,
        motif_len: int = 3,
        noise_fraction: float = 0.2,
        noise_vocab_size: int = 8,
        n_copied: int = 16,
        val_batches: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(vocab_size, seq_len, batch_size, val_batches, seed, num_workers)
        self.task = task
        self.motif_len = motif_len
        self.noise_fraction = noise_fraction
        self.noise_vocab_size = noise_vocab_size
        self.n_copied = n_copied
        self.generator(0)  # refuses early what cannot work

    def generator(self, stream: int, rank: int = 0, world_size: int = 1) -> MADGenerator:
        """The stream of a number: 0 trains, 1 validates."""
        sizes = MADSizes(
            self.vocab_size,
            self.seq_len,
            self.motif_len,
            self.noise_fraction,
            self.noise_vocab_size,
            self.n_copied,
            self.seed,
        )
        return MADGenerator(
            self.task, sizes, self.batch_size, stream=stream, rank=rank, world_size=world_size
        )

    def signature(self) -> dict[str, Any]:
        """What decides which batch is the n-th."""
        keys = "task vocab_size seq_len batch_size motif_len noise_fraction noise_vocab_size n_copied seed"
        return {key: getattr(self, key) for key in keys.split()}
