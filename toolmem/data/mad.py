"""The synthetic tasks of MAD (arXiv 2403.17844): recall, copying, compression, memorisation.

Rows as the code makes them, ``.`` for no target; small letters are values::

    in-context recall   A x B y C z B y A x     targets  . . . . . . y . x .
    noisy recall        A x 7 9 B y A x 8 7     targets  . . . . . . x . . .
    fuzzy recall        A C x B y z A C x B     targets  . . . . . . . x . y
    selective copy      - B - - C A - > > >     targets  . . . . . . . B C A
    compression         C A B D | > > > >       targets  . . . . . C A B D
    memorisation        A ? C ? B ? D ?         targets  . x . z . y . x

Recall is asked at every key that the row has shown before. Compression measures what a recurrent state
holds; a model that may look back only copies. (MAD decodes it from one vector by a network of its own;
here every task is one of predicting tokens.) Memorisation asks for a dictionary that is the same in all
rows and is never shown.

Shapes: n rows, s tokens in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from toolmem.data.batch import Batch
from toolmem.data.recall import distinct
from toolmem.data.stream import IndexedBatches
from toolmem.errors import ToolmemError

MADTask = Literal[
    "in_context_recall",
    "noisy_recall",
    "fuzzy_recall",
    "selective_copy",
    "compression",
    "memorization",
]


class Rows(NamedTuple):
    """Rows of a task.

    Args:
        tokens: (n, s) int64.
        targets: (n, s) int64, 0 where nothing is asked.
        asked: (n, s) bool.
    """

    tokens: np.ndarray
    targets: np.ndarray
    asked: np.ndarray


@dataclass(frozen=True)
class MADSizes:
    """What a task's rows look like.

    Args:
        vocab_size: symbols, those of noise among them.
        seq_len: tokens in a row.
        motif_len: the most tokens of a fuzzy key or value.
        noise_fraction: how likely a place of a pair holds noise.
        noise_vocab_size: symbols of noise, the last of the vocabulary.
        n_copied: symbols to copy.
        seed: of what is the same in all rows.
    """

    vocab_size: int
    seq_len: int
    motif_len: int
    noise_fraction: float
    noise_vocab_size: int
    n_copied: int
    seed: int


def in_context_recall(rng: np.random.Generator, n: int, sizes: MADSizes) -> Rows:
    """Key-value pairs at random, a key's value being one throughout a row; keys are the lower half."""
    return _pairs(rng, n, sizes.seq_len // 2, sizes.vocab_size // 2)


def noisy_recall(rng: np.random.Generator, n: int, sizes: MADSizes) -> Rows:
    """The same, with places of pairs that hold two symbols of noise."""
    n_symbols = sizes.vocab_size - sizes.noise_vocab_size
    noise = rng.random((n, sizes.seq_len // 2)) < sizes.noise_fraction
    symbols = rng.integers(n_symbols, sizes.vocab_size, size=(n, sizes.seq_len))
    return _pairs(rng, n, sizes.seq_len // 2, n_symbols // 2, noise, symbols)


def _pairs(
    rng: np.random.Generator,
    n: int,
    n_pairs: int,
    n_keys: int,
    noise: np.ndarray | None = None,
    symbols: np.ndarray | None = None,
) -> Rows:
    keys = rng.integers(n_keys, size=(n, n_pairs))
    dictionary = n_keys + rng.integers(n_keys, size=(n, n_keys))
    values = np.take_along_axis(dictionary, keys, axis=1)
    numbers = keys if noise is None else np.where(noise, n_keys, keys)  # noise shows no key
    seen = _seen_before(numbers, n_keys + 1)
    tokens = np.stack((keys, values), axis=2).reshape(n, 2 * n_pairs)
    asked = np.zeros(tokens.shape, bool)
    asked[:, ::2] = seen
    if noise is not None and symbols is not None:
        hidden = np.repeat(noise, 2, axis=1)
        tokens = np.where(hidden, symbols, tokens)
        asked &= ~hidden
    return Rows(tokens, *_next(tokens, asked))


def _seen_before(numbers: np.ndarray, count: int) -> np.ndarray:
    """(n, k) bool: did the number come earlier in its row? Numbers are below ``count``."""
    first = np.full((len(numbers), count), numbers.shape[1])
    places = np.broadcast_to(np.arange(numbers.shape[1]), numbers.shape)
    np.minimum.at(first, (np.arange(len(numbers))[:, None], numbers), places)
    return places > np.take_along_axis(first, numbers, axis=1)


def _next(tokens: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets and mask where what is asked is the next token."""
    following = np.concatenate((tokens[:, 1:], np.zeros_like(tokens[:, :1])), axis=1)
    asked = asked.copy()
    asked[:, -1] = False
    return np.where(asked, following, 0), asked


def fuzzy_recall(rng: np.random.Generator, n: int, sizes: MADSizes) -> Rows:
    """Keys and values of one to ``motif_len`` symbols; where a known value goes on, each is asked.

    A row has as many keys as there are key symbols, as many of each length. Keys and values have
    symbols of their own, so a run of either is a whole key or value.
    """
    letters, longest = sizes.vocab_size // 2, sizes.motif_len
    key_lengths = 1 + np.arange(letters) % longest
    motifs = np.zeros((n, letters, 2 * longest), np.int64)
    for length in range(1, longest + 1):
        chosen = np.flatnonzero(key_lengths == length)
        if len(chosen):
            codes = distinct(rng, n, letters**length, len(chosen))
            digits = codes[:, :, None] // letters ** np.arange(length) % letters
            motifs[:, chosen, :length] = digits
    motifs[:, :, longest:] = letters + rng.integers(letters, size=(n, letters, longest))
    value_lengths = rng.integers(1, longest + 1, size=(n, letters))
    places = np.arange(longest)
    used = np.concatenate(
        (
            np.broadcast_to(places < key_lengths[:, None], (n, letters, longest)),
            places < value_lengths[:, :, None],
        ),
        axis=2,
    )
    shown = rng.integers(letters, size=(n, sizes.seq_len // 2))  # a pair takes two tokens at least
    seen = _seen_before(shown, letters)
    flat = (n, shown.shape[1] * 2 * longest)
    index = shown[:, :, None]
    tokens = np.take_along_axis(motifs, index, axis=1).reshape(flat)
    kept = np.take_along_axis(used, index, axis=1).reshape(flat)
    known = np.repeat(seen, 2 * longest, axis=1)
    order = np.argsort(~kept, axis=1, kind="stable")[:, : sizes.seq_len]
    tokens, known = (np.take_along_axis(array, order, axis=1) for array in (tokens, known))
    asked = np.zeros(tokens.shape, bool)
    asked[:, :-1] = (known & (tokens >= letters))[:, 1:]
    return Rows(tokens, *_next(tokens, asked))


def selective_copy(rng: np.random.Generator, n: int, sizes: MADSizes) -> Rows:
    """Symbols among blanks (the last but one), then as many signs to copy (the last)."""
    count, body = sizes.n_copied, sizes.seq_len - sizes.n_copied
    symbols = rng.integers(sizes.vocab_size - 2, size=(n, count))
    places = np.sort(distinct(rng, n, body, count), axis=1)
    tokens = np.full((n, sizes.seq_len), sizes.vocab_size - 2)
    np.put_along_axis(tokens, places, symbols, axis=1)
    tokens[:, body:] = sizes.vocab_size - 1
    return _answered(tokens, symbols)


def compression(rng: np.random.Generator, n: int, sizes: MADSizes) -> Rows:
    """Symbols, a sign (the last but one) that they are to be compressed, then they are asked in order."""
    count = sizes.seq_len // 2
    symbols = rng.integers(sizes.vocab_size - 2, size=(n, count))
    tokens = np.full((n, 2 * count + 1), sizes.vocab_size - 1)
    tokens[:, :count] = symbols
    tokens[:, count] = sizes.vocab_size - 2
    return _answered(tokens, symbols)


def _answered(tokens: np.ndarray, answers: np.ndarray) -> Rows:
    """Rows whose last tokens ask for the answers, one each."""
    targets, asked = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    targets[:, -answers.shape[1] :] = answers
    asked[:, -answers.shape[1] :] = True
    return Rows(tokens, targets, asked)


def memorization(rng: np.random.Generator, n: int, sizes: MADSizes) -> Rows:
    """Keys, each with a place (the last symbol) for its value, which no row shows."""
    n_keys = (sizes.vocab_size - 1) // 2
    fixed = np.random.default_rng([sizes.seed, 0])
    dictionary = n_keys + fixed.integers(n_keys, size=n_keys)
    keys = rng.integers(n_keys, size=(n, sizes.seq_len // 2))
    tokens = np.full((n, 2 * keys.shape[1]), sizes.vocab_size - 1)
    tokens[:, ::2] = keys
    targets, asked = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    targets[:, 1::2] = dictionary[keys]
    asked[:, 1::2] = True
    return Rows(tokens, targets, asked)


TASKS: dict[str, Callable[[np.random.Generator, int, MADSizes], Rows]] = {
    "in_context_recall": in_context_recall,
    "noisy_recall": noisy_recall,
    "fuzzy_recall": fuzzy_recall,
    "selective_copy": selective_copy,
    "compression": compression,
    "memorization": memorization,
}


def check_sizes(task: str, sizes: MADSizes) -> None:
    """Refuse rows that a task cannot have.

    Args:
        task: a key of ``TASKS``.
        sizes: of the rows.

    Raises:
        ToolmemError: naming the option.
    """
    if task not in TASKS:
        raise ToolmemError(f"task: unknown {task!r}; choose {', '.join(TASKS)}")
    odd = task == "compression"
    even = task not in ("compression", "fuzzy_recall", "selective_copy")
    if (odd and sizes.seq_len % 2 == 0) or (even and sizes.seq_len % 2):
        raise ToolmemError(f"seq_len {sizes.seq_len} must be {'odd' if odd else 'even'} for {task}")
    least = sizes.n_copied + 1 if task == "selective_copy" else 4
    if sizes.seq_len < least:
        raise ToolmemError(f"seq_len {sizes.seq_len} must be at least {least} for {task}")
    n_symbols = sizes.vocab_size - (sizes.noise_vocab_size if task == "noisy_recall" else 0)
    if n_symbols < 4:
        raise ToolmemError(
            f"vocab_size {sizes.vocab_size} leaves {n_symbols} symbols to {task}: it needs at least 4"
        )
    if task == "noisy_recall":
        if not 0 <= sizes.noise_fraction < 1:
            raise ToolmemError(
                f"noise_fraction is {sizes.noise_fraction}: it must be at least 0 and below 1"
            )
        if sizes.noise_vocab_size < 1:
            raise ToolmemError(
                f"noise_vocab_size is {sizes.noise_vocab_size}: it must be at least 1"
            )
    if task == "fuzzy_recall":
        if sizes.motif_len < 1:
            raise ToolmemError(f"motif_len is {sizes.motif_len}: it must be at least 1")
        if (sizes.vocab_size // 2) ** sizes.motif_len >= 2**62:
            raise ToolmemError(
                f"motif_len {sizes.motif_len} with vocab_size {sizes.vocab_size} has more keys than can "
                "be counted: make either smaller"
            )
    if task == "selective_copy":
        most = sizes.seq_len // 2
        if not 1 <= sizes.n_copied <= most:
            raise ToolmemError(
                f"n_copied is {sizes.n_copied}: it must be at least 1 and at most half of seq_len, {most}"
            )


class MADGenerator(IndexedBatches):
    """An endless stream of batches of one of MAD's tasks; every batch is new.

    Args:
        task: a key of ``TASKS``.
        sizes: of its rows.
        batch_size: rows in a batch, over all ranks.
        stream: streams of different numbers draw different batches.
        rank: this process's number; it gets every ``world_size``-th row.
        world_size: number of processes.

    Raises:
        ToolmemError: for rows that the task cannot have.
    """

    def __init__(
        self,
        task: MADTask,
        sizes: MADSizes,
        batch_size: int,
        *,
        stream: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(seed=sizes.seed, rank=rank, world_size=world_size)
        check_sizes(task, sizes)
        if batch_size < world_size:
            raise ToolmemError(f"batch_size {batch_size} is smaller than {world_size} processes")
        self.task = task
        self.sizes = sizes
        self.batch_size = batch_size
        self.stream = stream

    def batch_at(self, index: int) -> Batch:
        """The rows of this rank of batch number ``index``."""
        rng = np.random.default_rng([self.seed, 1 + self.stream, 1 + index])
        rows = TASKS[self.task](rng, self.batch_size, self.sizes)
        tokens, targets, asked = (
            torch.from_numpy(array[self.rank :: self.world_size].copy()) for array in rows
        )
        return Batch(
            tokens=tokens,
            targets=targets,
            loss_mask=asked,
            n_tokens=tokens.numel(),
            state={"batch": index + 1},
        )
