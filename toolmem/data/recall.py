"""Multi-query associative recall (MQAR), the synthetic task of arXiv 2312.04927.

A row tells key-value pairs, then asks for some keys again, at distances that follow a power law; at
each key asked again, the target is its value::

    tokens     A 4 B 3 C 6 F 1 E 2   A . . C . F . . B .
    targets                          4     6   1     3
"""

from __future__ import annotations

import numpy as np
import torch

from toolmem.data.batch import Batch
from toolmem.data.stream import IndexedBatches
from toolmem.errors import ToolmemError


class RecallGenerator(IndexedBatches):
    """An endless stream of MQAR batches; every batch is new.

    As in the paper: keys are ids 1 to vocab_size / 2 - 1, values those from vocab_size / 2 on, each
    drawn without replacement within a row; every pair is asked once; the ``k``-th free place is
    taken with a weight of ``k ** (power_a - 1)``; the other places are filled with random ids, or
    with 0.

    Args:
        vocab_size: symbols.
        seq_len: tokens in a row, even.
        n_pairs: key-value pairs in a row.
        batch_size: rows in a batch, over all ranks.
        power_a: exponent of the distances' law; smaller asks sooner.
        random_non_queries: fill the other places with random ids.
        seed: of everything.
        stream: streams of different numbers draw different batches.
        rank: this process's number; it gets every ``world_size``-th row.
        world_size: number of processes.

    Raises:
        ToolmemError: when pairs and queries do not fit in a row, or the vocabulary is too small.
    """

    def __init__(
        self,
        vocab_size: int = 8192,
        seq_len: int = 64,
        n_pairs: int = 8,
        batch_size: int = 64,
        *,
        power_a: float = 0.01,
        random_non_queries: bool = True,
        seed: int = 0,
        stream: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(seed=seed, rank=rank, world_size=world_size)
        if seq_len % 2 or n_pairs < 1 or 4 * n_pairs > seq_len:
            raise ToolmemError(
                f"seq_len {seq_len} must be even and at least 4 x n_pairs ({n_pairs}, so "
                f"{4 * max(n_pairs, 1)}): each pair takes two tokens, and so does asking for it"
            )
        if vocab_size <= seq_len or vocab_size // 2 - 1 < n_pairs:
            raise ToolmemError(
                f"vocab_size {vocab_size} must exceed seq_len {seq_len}, its half n_pairs {n_pairs}"
            )
        if batch_size < world_size:
            raise ToolmemError(f"batch_size {batch_size} is smaller than {world_size} processes")
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.n_pairs = n_pairs
        self.batch_size = batch_size
        self.power_a = power_a
        self.stream = stream
        self.random_non_queries = random_non_queries

    def batch_at(self, index: int) -> Batch:
        """The rows of this rank of batch number ``index``."""
        rng = np.random.default_rng([self.seed, 1 + self.stream, 1 + index])
        n, pairs, middle = self.batch_size, self.n_pairs, self.vocab_size // 2
        keys = 1 + distinct(rng, n, middle - 1, pairs)
        values = middle + distinct(rng, n, self.vocab_size - middle, pairs)
        tokens = np.zeros((n, self.seq_len), np.int64)
        tokens[:, 0 : 2 * pairs : 2] = keys
        tokens[:, 1 : 2 * pairs : 2] = values
        # the largest (log weight + Gumbel noise) draw without replacement in proportion to weight
        space = (self.seq_len - 2 * pairs) // 2
        weights = (self.power_a - 1) * np.log(np.arange(1, space + 1))
        noisy = weights + rng.gumbel(size=(n, space))
        gaps = np.argsort(-noisy, axis=1, kind="stable")[:, :pairs]
        asked = 2 * pairs + 2 * gaps
        np.put_along_axis(tokens, asked, keys, axis=1)
        if self.random_non_queries:
            empty = tokens == 0
            tokens[empty] = rng.integers(self.vocab_size, size=int(empty.sum()))
        targets = np.zeros_like(tokens)
        np.put_along_axis(targets, asked, values, axis=1)
        bears_loss = np.zeros(tokens.shape, bool)
        np.put_along_axis(bears_loss, asked, True, axis=1)
        mine = slice(self.rank, None, self.world_size)
        return Batch(
            tokens=torch.from_numpy(tokens[mine].copy()),
            targets=torch.from_numpy(targets[mine].copy()),
            loss_mask=torch.from_numpy(bears_loss[mine].copy()),
            n_tokens=tokens[mine].size,
            state={"batch": index + 1},
        )


def distinct(rng: np.random.Generator, rows: int, choices: int, n: int) -> np.ndarray:
    """Numbers that are distinct within each row, uniform.

    Args:
        rng: draws them.
        rows: number of rows.
        choices: numbers are below it.
        n: numbers in a row.

    Returns:
        (rows, n) int64.
    """
    if choices <= 4 * n:
        return np.argsort(rng.random((rows, choices)), axis=1)[:, :n]
    drawn = rng.integers(choices, size=(rows, n))
    while True:  # draw rows with a repeat anew: few among many choices
        ordered = np.sort(drawn, axis=1)
        repeats = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if not len(repeats):
            return drawn
        drawn[repeats] = rng.integers(choices, size=(len(repeats), n))
