"""Drafts that are copies: of the dialogue itself, and of those before it (n-gram lookup).

In-tool answers copy names and values, and dialogues of one task share their phrases, so what followed the
last tokens before is a good guess at what follows now. Saxena 2023 looks in the prompt alone; the pool of
what other requests have said is TensorRT-LLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolmem.errors import ToolmemError
from toolmem.generation.speculative import EMPTY, Draft, chain

if TYPE_CHECKING:
    from toolmem.generation.lanes import Lane, Lanes


class NgramIndex:
    """Where each n-gram of a growing text stood last.

    Args:
        lengths: of the n-grams, the longest first.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.tokens: list[int] = []
        # by the hash of an n-gram, the place behind it: two of one hash cost a bad draft, no more
        self.places: dict[int, int] = {}

    def extend(self, new: Sequence[int]) -> None:
        """Add tokens at the end."""
        tokens, places = self.tokens, self.places
        start = len(tokens)
        tokens.extend(new)
        for end in range(max(start, 1), len(tokens)):
            for n in self.lengths:
                if n <= end:
                    places[hash(tuple(tokens[end - n : end]))] = end

    def find(self, context: Sequence[int]) -> tuple[int, int]:
        """Length and place of the longest n-gram that ends a context; (0, 0) when it has none."""
        for n in self.lengths:
            if n <= len(context):
                place = self.places.get(hash(tuple(context[-n:])))
                if place is not None:
                    return n, place
        return 0, 0


class PromptLookup:
    """What followed where the lane's last tokens stood before, most lately.

    N-grams of ``max_ngram`` tokens are looked for, then of half as many, down to ``min_ngram``: in the
    dialogue itself, and in the pool of dialogues that have ended, there from ``2 * min_ngram`` tokens on.
    The longer match wins, the dialogue's own of two that are equally long.

    Args:
        max_tokens: drafted at a time.
        max_ngram: tokens at the end that are looked for, at first.
        min_ngram: and at last.
        pool_tokens: the tokens of ended dialogues that are kept, at most, the latest; 0 for none.

    Raises:
        ToolmemError: for sizes that make no sense.
    """

    window = 0
    width = 1.0

    def __init__(
        self,
        max_tokens: int = 16,
        max_ngram: int = 8,
        min_ngram: int = 2,
        pool_tokens: int = 2**16,
    ) -> None:
        if not 1 <= min_ngram <= max_ngram or max_tokens < 1 or pool_tokens < 0:
            raise ToolmemError(
                "max_tokens must be at least 1, 1 <= min_ngram <= max_ngram, and pool_tokens at least 0"
            )
        self.max_tokens = max_tokens
        self.max_ngram = max_ngram
        self.pool_tokens = pool_tokens
        self._lengths = [max_ngram]
        while self._lengths[-1] > min_ngram:
            self._lengths.append(max(min_ngram, self._lengths[-1] // 2))
        self._pool_lengths = [n for n in self._lengths if n >= 2 * min_ngram] or [max_ngram]
        # The newer half of the pool grows, and becomes the older one.
        self._pool = [NgramIndex(self._pool_lengths)]
        self._own: dict[Lane, NgramIndex] = {}

    def seconds(self, lanes: int) -> tuple[float, float]:
        """As ``Drafter.seconds``: looking up costs next to nothing."""
        return 0.0, 0.0

    def prefer_chains(self) -> None:
        """It drafts nothing else."""

    def propose(self, lanes: Sequence[Lane], columns: Lanes, limits: Sequence[int]) -> list[Draft]:
        """As ``Drafter.propose``."""
        drafts = []
        for lane, limit in zip(lanes, limits, strict=True):
            own = self._own.get(lane)
            if own is None:
                own = self._own[lane] = NgramIndex(self._lengths)
            i = lane.index
            own.extend(columns.tokens[i, len(own.tokens) : int(columns.length[i])].tolist())
            drafts.append(self._draft(own, limit) if limit else EMPTY)
        return drafts

    def _draft(self, own: NgramIndex, limit: int) -> Draft:
        context = own.tokens[-self.max_ngram :]
        longest, place = own.find(context)
        source = own
        for half in self._pool:
            if longest == self.max_ngram:
                break
            n, there = half.find(context)
            if n > longest:
                longest, place, source = n, there, half
        return chain(source.tokens[place : place + limit]) if longest else EMPTY

    def forget(self, lane: Lane | None, tokens: Sequence[int] = ()) -> None:
        """As ``Drafter.forget``; text does not hang on weights, and stays when they change."""
        if lane is None:
            return
        self._own.pop(lane, None)
        if self.pool_tokens and len(tokens):
            if len(self._pool[0].tokens) + len(tokens) > self.pool_tokens // 2:
                self._pool = [NgramIndex(self._pool_lengths), self._pool[0]]
            self._pool[0].extend(tokens[: self.pool_tokens // 2])
