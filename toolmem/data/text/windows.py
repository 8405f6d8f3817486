"""One long sequence of tokens, cut in windows: what a single text file is trained on."""

from __future__ import annotations

import numpy as np
import torch

from toolmem.data.batch import Batch
from toolmem.data.stream import IndexedBatches
from toolmem.errors import ToolmemError


class WindowGenerator(IndexedBatches):
    """Batches of windows of a sequence.

    Shuffled, an epoch cuts the sequence from a random offset on into windows end to end and gives
    them in random order; batches are full, so a few windows of an epoch may stay out. In order,
    every token but the first is a target exactly once, and the last rows are padded.

    Args:
        tokens: (n,) token ids of any integer type; may be a memory map.
        seq_len: tokens in a window.
        batch_size: windows in a batch, over all ranks.
        numbers: (n,) number of the document of each token: attention stays within it.
        shuffle: False gives the windows in order.
        seed: of the order.
        rank: this process's number; it gets every ``world_size``-th window of a batch.
        world_size: number of processes.
        source: what the tokens are, for messages.

    Raises:
        ToolmemError: when the sequence is too short for one window.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        batch_size: int,
        *,
        numbers: np.ndarray | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        source: str = "the text",
    ) -> None:
        super().__init__(seed=seed, rank=rank, world_size=world_size)
        if seq_len < 1 or batch_size < 1:
            raise ToolmemError("seq_len and batch_size must be at least 1")
        self.tokens = tokens
        self.numbers = numbers
        self.seq_len = seq_len
        self.shuffle = shuffle
        # shuffled: what is left of the sequence after the largest offset
        self.n_windows = (len(tokens) - seq_len) // seq_len
        if not shuffle:
            self.n_windows = -(-(len(tokens) - 1) // seq_len)
        if self.n_windows < 1:
            raise ToolmemError(
                f"{source} has {len(tokens)} tokens, too few for windows of seq_len {seq_len}: use "
                "more text, a smaller seq_len or, if these are the held-out ones, a larger val_fraction"
            )
        self.batch_size = min(batch_size, self.n_windows)
        if shuffle and self.batch_size < world_size:
            raise ToolmemError(
                f"batches of {self.batch_size} windows cannot be shared by {world_size} processes: "
                "raise batch_size or use more text"
            )
        self.batches_per_epoch = self.n_windows // self.batch_size
        if not shuffle:
            self.batches_per_epoch = -(-self.n_windows // self.batch_size)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._steps = np.arange(seq_len + 1)

    def _starts(self, epoch: int) -> np.ndarray:
        """(n_windows,) where the windows of an epoch begin, in their order."""
        if self._epoch[0] != epoch:
            starts = np.arange(self.n_windows) * self.seq_len
            if self.shuffle:
                rng = np.random.default_rng([self.seed, epoch])
                starts = rng.permutation(starts) + rng.integers(self.seq_len)
            self._epoch = (epoch, starts)
        return self._epoch[1]

    def batch_at(self, index: int) -> Batch:
        """The share of this rank of batch number ``index``."""
        epoch, within = divmod(index, self.batches_per_epoch)
        first = within * self.batch_size
        starts = self.share(self._starts(epoch)[first : first + self.batch_size])
        state = {"batch": index + 1, "epoch": (index + 1) // self.batches_per_epoch}
        return cut_rows(self.tokens, self.numbers, starts, self._steps, state)


def cut_rows(
    tokens: np.ndarray,
    numbers: np.ndarray | None,
    starts: np.ndarray,
    steps: np.ndarray,
    state: dict[str, int],
) -> Batch:
    """A batch of the rows that begin at ``starts``; cells past the sequence's end bear no loss.

    Without any start it is one row of padding: a rank that has no share still takes part in what
    all ranks do together.
    """
    if not len(starts):
        starts = np.array([len(tokens)])
    places = starts[:, None] + steps
    inside = places[:, 1:] < len(tokens)
    rows = tokens.take(places, mode="clip").astype(np.int64)
    rows[:, 1:] *= inside
    rows[:, 0] *= inside[:, 0]
    documents = None
    if numbers is not None:
        which = numbers.take(places[:, :-1], mode="clip")
        documents = torch.from_numpy(np.where(inside, which - which[:, :1], -1).astype(np.int32))
    return Batch(
        tokens=torch.from_numpy(rows[:, :-1] * inside),
        targets=torch.from_numpy(rows[:, 1:].copy()),
        loss_mask=torch.from_numpy(inside),
        documents=documents,
        n_tokens=int(inside.sum()),
        state=state,
    )
