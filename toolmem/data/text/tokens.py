"""Documents as rows of tokens for language modelling: packed without padding, without a mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from toolmem.data.batch import Batch
from toolmem.data.text.documents import DocumentSource, Placed
from toolmem.data.tokenizers import Tokenizer
from toolmem.errors import ToolmemError


class TokenGenerator(IterableDataset):
    """An endless stream of batches of ``batch_size`` full rows.

    Documents stand end to end, each followed by the ``end`` token, and are cut in rows of
    ``seq_len`` wherever that falls; each row's last target is the next row's first token. Every
    process and every DataLoader worker reads its own documents.

    Where a stream stands is the place of the document that its next row begins in, and how many of
    that document's tokens are behind it. With workers every batch tells its own worker's state;
    `merge_state` puts them together, and a state taken after any batch continues exactly there.

    Args:
        documents: where they come from.
        tokenizer: with an ``end`` role token.
        seq_len: tokens in a row.
        batch_size: rows in a batch of this process.
        block_documents: attention stays within a document (`Batch.documents`).
        rank: this process's number.
        world_size: number of processes.
        num_workers: DataLoader workers that will read it.
    """

    def __init__(
        self,
        documents: DocumentSource,
        tokenizer: Tokenizer,
        seq_len: int,
        batch_size: int,
        *,
        block_documents: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if seq_len < 1 or batch_size < 1:
            raise ToolmemError("seq_len and batch_size must be at least 1")
        self.documents = documents
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.block_documents = block_documents
        self.rank = rank
        self.world_size = world_size
        self.readers = max(1, num_workers)
        self.state: dict[str, Any] = {"next": 0, "readers": {}}

    def state_dict(self) -> dict[str, Any]:
        """Where iteration begins: the reader that is next, and the state of each that has read."""
        return {"next": self.state["next"], "readers": dict(self.state["readers"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin where ``state`` (of `merge_state`, or `state_dict`) says."""
        if set(state.get("readers", {})) - {str(r) for r in range(self.readers)}:
            raise ToolmemError(
                f"the state is of {len(state['readers'])} workers, this run has {self.readers}: "
                "set num_workers as it was"
            )
        self.state = {"next": state["next"], "readers": dict(state["readers"])}

    def merge_state(self, state: dict[str, Any], batch_state: dict[str, Any]) -> dict[str, Any]:
        """The state after a batch, from the state before it and the `Batch.state` it carries."""
        reader = int(batch_state["reader"])
        readers = {**state.get("readers", {}), str(reader): batch_state["place"]}
        return {"next": (reader + 1) % self.readers, "readers": readers}

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is None:
            if self.readers > 1:
                raise ToolmemError(f"this stream is made for {self.readers} DataLoader workers")
            yield from self._read(0)
            return
        # the DataLoader asks worker 0 first: it takes over the reader whose turn it is
        yield from self._read((worker.id + self.state["next"]) % self.readers)

    def _read(self, reader: int) -> Iterator[Batch]:
        shard = self.rank * self.readers + reader
        source = self.documents.shard(shard, self.world_size * self.readers)
        place = self.state["readers"].get(str(reader))
        skip = 0 if place is None else place["token"]
        pieces = self._pieces(source.iterate(None if place is None else place["document"]), skip)
        need = self.batch_size * self.seq_len + 1
        held: list[tuple[np.ndarray, dict[str, Any], int]] = []  # tokens, place, tokens before
        count = 0
        while True:
            while count < need:
                held.append(next(pieces))
                count += len(held[-1][0])
            # only the last piece reaches beyond what is needed (a whole book, maybe: not copied)
            used = [tokens for tokens, _, _ in held]
            used[-1] = used[-1][: need - (count - len(used[-1]))]
            flat = np.concatenate(used)
            number = np.repeat(np.arange(len(used)), [len(tokens) for tokens in used])
            # all but the last token are used up; it, in the last piece, begins the next batch
            left = count - (need - 1)
            tokens, where, before = held[-1]
            gone = len(tokens) - left
            held = [(tokens[gone:], where, before + gone)]
            count = left
            state = {"reader": reader, "place": {"document": where, "token": before + gone}}
            yield self._batch(flat, number[: need - 1], state)

    def _pieces(
        self, documents: Iterator[Placed], skip: int
    ) -> Iterator[tuple[np.ndarray, dict[str, Any], int]]:
        """Each document's tokens with ``end``; of the first, those after ``skip``."""
        end = self.tokenizer.role_ids["end"]
        while True:
            some = [next(documents) for _ in range(16)]
            for ids, placed in zip(
                self.tokenizer.encode_batch([placed.text for placed in some]), some, strict=True
            ):
                tokens = np.array([*ids, end], np.int64)
                yield tokens[skip:], placed.place, skip
                skip = 0

    def _batch(self, flat: np.ndarray, number: np.ndarray, state: dict[str, Any]) -> Batch:
        shape = (self.batch_size, self.seq_len)
        documents = None
        if self.block_documents:
            rows = number.reshape(shape)
            documents = torch.from_numpy((rows - rows[:, :1]).astype(np.int32))
        return Batch(
            tokens=torch.from_numpy(flat[:-1].reshape(shape)),
            targets=torch.from_numpy(flat[1:].reshape(shape)),
            loss_mask=torch.ones(shape, dtype=torch.bool),
            documents=documents,
            n_tokens=flat.size - 1,
            state=state,
        )


def held_out_batches(
    documents: DocumentSource,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    *,
    block_documents: bool = False,
    max_batches: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Documents for validation as one stream of tokens, each document once.

    Args:
        documents: the held-out ones, unsharded: every rank reads all, and takes its rows later.
        tokenizer: with an ``end`` role token.
        seq_len: tokens in a row.
        batch_size: rows in a batch.
        block_documents: unused tokens' documents are numbered all the same.
        max_batches: stop reading after this many batches' worth; None reads all.

    Returns:
        (n,) int64 tokens and (n,) int64 number of each one's document.
    """
    end = tokenizer.role_ids["end"]
    limit = None if max_batches is None else max_batches * batch_size * seq_len + 1
    flat: list[np.ndarray] = []
    total = 0
    for text in documents.once():
        flat.append(np.array([*tokenizer.encode(text), end], np.int64))
        total += len(flat[-1])
        if limit is not None and total >= limit:
            break
    if not flat:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    number = np.repeat(np.arange(len(flat)), [len(tokens) for tokens in flat])
    return np.concatenate(flat)[:limit], number[:limit]
