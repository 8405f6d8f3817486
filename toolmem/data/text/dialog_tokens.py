"""Dialogues as batches, with loss where the assistant speaks.

An epoch shows every dialogue once, in batches whose sizes differ by at most one. Which dialogues
make batch ``i`` is a function of (seed, i) alone. All layouts of a batch give the same loss:

    rows       a dialogue a row, cut at the batch's longest
    bucketed   the same, and dialogues of about the same length meet in a batch (the default: hardly
               any padding, no attention wasted between dialogues)
    packed     several dialogues a row of up to ``seq_len`` tokens; ``Batch.documents`` says which
               tokens may attend to each other
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Literal, get_args

import numpy as np
import torch

from toolmem.data.batch import Batch
from toolmem.data.stream import IndexedBatches
from toolmem.data.text.token_table import ASSISTANT, NONE, TokenTable
from toolmem.errors import ToolmemError

Mask = Literal["assistant", "all"]
Layout = Literal["bucketed", "rows", "packed"]
_CACHE_LINE_BYTES = 64


class DialogTokenGenerator(IndexedBatches):
    """An endless stream of batches of dialogues.

    Args:
        table: the dialogues.
        batch_size: dialogues in a batch, over all ranks.
        mask: loss on what the assistant writes (``assistant``) or on every token (``all``).
        layout: ``bucketed``, ``rows`` or ``packed``.
        seq_len: ``packed`` only: tokens in a row at most.
        rows: (n,) numbers of the dialogues to draw from; None is all.
        window: ``bucketed`` only: batches among which dialogues are sorted by length. More wastes
            less on padding, fewer keeps batches more mixed.
        shuffle: False gives the dialogues in their order (layout ``rows``-like batches).
        with_spans: give each batch the spans that the assistant did not write (``Batch.spans``), for
            models that look both ways within them.
        with_dialogues: tell each batch which dialogues it has (``Batch.dialogues``), so that training tells
            their losses.
        seed: of the order.
        rank: this process's number; it gets every ``world_size``-th dialogue of a batch.
        world_size: number of processes.

    Raises:
        ToolmemError: when there are fewer dialogues than processes, or one is longer than
            ``seq_len``.
    """

    def __init__(
        self,
        table: TokenTable,
        batch_size: int = 128,
        *,
        mask: Mask = "assistant",
        layout: Layout = "bucketed",
        seq_len: int | None = None,
        rows: np.ndarray | None = None,
        window: int = 32,
        shuffle: bool = True,
        with_spans: bool = False,
        with_dialogues: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(seed=seed, rank=rank, world_size=world_size)
        for key, value, known in (
            ("mask", mask, get_args(Mask)),
            ("layout", layout, get_args(Layout)),
        ):
            if value not in known:
                raise ToolmemError(f"unknown {key} {value!r}: choose one of {', '.join(known)}")
        if with_spans and mask == "all":
            raise ToolmemError(
                "`mask: all` does not go with a model of `attention_mask: prefix`: within a span a token "
                "would see its own target. Use `mask: assistant`, or `attention_mask: causal`"
            )
        if batch_size < 1 or window < 1:
            raise ToolmemError("batch_size and window must be at least 1")
        self.table = table
        self.rows = np.arange(len(table)) if rows is None else np.asarray(rows, np.int64)
        if len(self.rows) < world_size:
            raise ToolmemError(
                f"{len(self.rows)} dialogues cannot be shared by {world_size} processes: use more "
                "people or fewer devices"
            )
        longest = int(table.lengths[self.rows].max())
        if layout == "packed" and (seq_len or 0) < longest - 1:
            raise ToolmemError(
                f"layout `packed` needs seq_len of at least {longest - 1}, the longest dialogue "
                f"(seq_len is {seq_len})"
            )
        self.batch_size = batch_size
        self.mask = mask
        self.layout = layout
        self.seq_len = longest - 1 if layout != "packed" else int(seq_len or 0)
        self.window = window
        self.shuffle = shuffle
        self.with_spans = with_spans
        self.with_dialogues = with_dialogues
        self.batches_per_epoch = max(1, -(-len(self.rows) // batch_size))
        if len(self.rows) // self.batches_per_epoch < world_size:
            raise ToolmemError(
                f"batch_size {batch_size} is smaller than the number of processes, {world_size}"
            )
        self._order: tuple[int, np.ndarray] = (-1, self.rows)
        self._window: tuple[int, int, list[np.ndarray]] = (-1, -1, [])
        self._steps = np.arange(longest)
        # what a dialogue's cells need, kept small: 1,000 and 131,072 people cost about the same
        self._starts, self._lengths = table.offsets[:-1], table.lengths
        self._line = _CACHE_LINE_BYTES // table.codes.itemsize

    # -- which dialogues

    def dialogues_at(self, index: int) -> np.ndarray:
        """(n,) numbers, within the table, of batch ``index``'s dialogues on all ranks."""
        epoch, within = divmod(index, self.batches_per_epoch)
        window, place = divmod(within, self.window)
        if self._window[:2] != (epoch, window):
            self._window = (epoch, window, self._make_window(epoch, window))
        return self._window[2][place]

    def _make_window(self, epoch: int, window: int) -> list[np.ndarray]:
        order = self._epoch_order(epoch)
        first = window * self.window
        last = min(first + self.window, self.batches_per_epoch)
        edges = np.arange(first, last + 1) * len(order) // self.batches_per_epoch
        chosen = order[edges[0] : edges[-1]]
        if self.layout == "bucketed" and self.shuffle:
            chosen = chosen[np.argsort(self._lengths[chosen], kind="stable")]
        batches = np.split(chosen, (edges - edges[0])[1:-1])
        if self.layout == "bucketed" and self.shuffle:
            rng = np.random.default_rng([self.seed, epoch, 1 + window])
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return self.rows
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, rng.permutation(self.rows))
        return self._order[1]

    # -- how they lie in a batch

    def batch_at(self, index: int) -> Batch:
        """The share of this rank of batch number ``index``."""
        chosen = self.share(self.dialogues_at(index))
        starts, lengths = self._starts[chosen], self._lengths[chosen].astype(np.int64)
        state = {"batch": index + 1, "epoch": (index + 1) // self.batches_per_epoch}
        if self.layout == "packed":
            return self._pack(chosen, starts, lengths, state)
        # one gather for tokens and roles; cells past a row's end read neighbours, then are zeroed
        steps = self._steps[: int(lengths.max())]
        # A large table lies far from the processor, and the gather would wait for each row's memory in
        # turn. A cell of each cache line, read first, asks for all of it at once.
        self.table.codes.take(starts[:, None] + steps[:: self._line], mode="clip")
        codes = self.table.codes.take(starts[:, None] + steps, mode="clip")
        codes *= steps < lengths[:, None]
        # (a shorter dialogue's last token stays as an input; its target is padding, without loss)
        return self._batch(codes[:, :-1], codes[:, 1:], None, lengths - 1, chosen, state)

    def _pack(
        self, chosen: np.ndarray, starts: np.ndarray, lengths: np.ndarray, state: dict[str, int]
    ) -> Batch:
        lengths = lengths - 1  # a dialogue fills as many cells as it has targets
        row_of, column_of = pack(lengths, self.seq_len)
        n_rows, width = int(row_of.max()) + 1, int((column_of + lengths).max())
        # the cells of dialogue d are row_of[d] * width + column_of[d] onwards
        total = int(lengths.sum())
        within = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        cells = np.repeat(row_of * width + column_of, lengths) + within
        source = np.repeat(starts, lengths) + within
        inputs = np.zeros((n_rows, width), self.table.codes.dtype)
        targets = np.zeros_like(inputs)
        documents = np.full((n_rows, width), -1, np.int32)
        inputs.ravel()[cells] = self.table.codes[source]
        targets.ravel()[cells] = self.table.codes[source + 1]
        numbers = np.empty(len(lengths), np.int32)  # counted within each row, from the left
        order = np.lexsort((column_of, row_of))
        firsts = np.searchsorted(row_of[order], np.arange(n_rows))
        numbers[order] = np.arange(len(order)) - firsts[row_of[order]]
        documents.ravel()[cells] = np.repeat(numbers, lengths)
        return self._batch(
            inputs, targets, torch.from_numpy(documents), lengths, chosen[order], state
        )

    def _batch(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        documents: torch.Tensor | None,
        lengths: np.ndarray,
        dialogues: np.ndarray,
        state: dict[str, int],
    ) -> Batch:
        ids, shift = self.table.codes.dtype.type(self.table.token_mask), self.table.role_shift
        roles = targets >> shift
        bears_loss = roles == ASSISTANT if self.mask == "assistant" else roles != 0
        return Batch(
            tokens=torch.from_numpy((inputs & ids).astype(np.int64)),
            targets=torch.from_numpy((targets & ids).astype(np.int64)),
            loss_mask=torch.from_numpy(bears_loss),
            documents=documents,
            spans=foreign_spans(inputs >> shift) if self.with_spans else None,
            n_tokens=int(lengths.sum()),
            lengths=torch.from_numpy(lengths),
            dialogues=torch.from_numpy(dialogues) if self.with_dialogues else None,
            state=state,
        )


def foreign_spans(roles: np.ndarray) -> torch.Tensor:
    """Number the spans of each row that the assistant did not write.

    Args:
        roles: (batch, seq) role codes; 0 is padding.

    Returns:
        (batch, seq) int64: tokens of a run of one role share a number of 0 and up; -1 where the
        assistant wrote, and at padding.
    """
    starts = np.zeros(roles.shape, np.int64)
    starts[:, 1:] = roles[:, 1:] != roles[:, :-1]
    foreign = (roles != ASSISTANT) & (roles != NONE)
    return torch.from_numpy(np.where(foreign, starts.cumsum(axis=1), -1))


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put pieces into as few rows as best-fit-decreasing finds.

    Args:
        lengths: (n,) cells that each piece needs, none above ``capacity``.
        capacity: cells in a row.

    Returns:
        (n,) the row and (n,) the first column of each piece.
    """
    rows, columns = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    free: list[tuple[int, int]] = []  # (cells left, row), sorted
    n_rows = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[piece])
        place = bisect_left(free, (size, -1))
        if place < len(free):
            left, row = free.pop(place)
        else:
            left, row, n_rows = capacity, n_rows, n_rows + 1
        rows[piece], columns[piece] = row, capacity - left
        insort(free, (left - size, row))
    return rows, columns
