"""The dialogues that the engine has under way, as columns: a lane is a row of every array.

A step touches all running lanes, and most of them only add a token. So what a step reads and writes
lies in arrays, and a lane's object holds the rest: its request, its state's pages, its tool calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from toolmem.data.turn_format import turn_format
from toolmem.generation.reference import FinishReason, Generated, foreign_spans
from toolmem.generation.requests import Handle, Request
from toolmem.generation.sampling import History, Sampler
from toolmem.generation.turns import ASSISTANT, DATABASE

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.generation.paging import Branch
    from toolmem.generation.speculative import Draft
    from toolmem.tools.base import Answer

# Uniform numbers that a dialogue's generator gives at a time.
BLOCK = 32


class Lane:
    """A dialogue under way.

    Args:
        handle: of its request.
        order: how many came before it.
        keep: hand its decoding state out with the result, instead of freeing it.
    """

    index: int  # its row in the columns
    branch: Branch  # its decoding state

    def __init__(self, handle: Handle, order: int, keep: bool = False) -> None:
        self.handle = handle
        self.request: Request = handle.request
        self.order = order
        self.keep = keep
        self.generator: torch.Generator | None = None
        self.tool_calls: list[tuple[str, Answer]] = []
        self.future: Future[Answer] | None = None  # of the call that it waits for
        self.query = ""
        self.reason: FinishReason | None = None
        self.reading: list[
            object
        ] = []  # names of the prefixes that it reads, for others to wait for
        self.followers: list[Lane] = []  # of the same prompt: they share what it reads
        self.leader: Lane | None = None  # whom it follows
        self.hidden: Tensor | None = None  # (dim,), what the head is to read, where that is known
        self.draft: Draft | None = None  # being checked in this step
        self.before: tuple[int, list[Tensor]] | None = None  # its state of one size, without them
        self.kept: tuple[Tensor, int] | None = (
            None  # or that behind every row, and its last certain row
        )
        self.drafted: tuple[float, float] | None = None  # tokens right, of tokens tried, fading
        self.draft_pause = 0  # passes for which drafts would not have paid
        self.features: Tensor | None = None  # (window, dim), what the head read last, for drafters
        self.featured = 0  # tokens up to where they go
        self.told = 0  # tokens that its handle has been told of
        self.deadline: float | None = None
        if self.request.max_seconds is not None:
            self.deadline = handle.submitted + self.request.max_seconds


class Lanes:
    """The columns.

    Args:
        tokenizer: has a form for dialogues.
        max_seq_len: tokens that a dialogue can have.
    """

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int) -> None:
        self.tokenizer = tokenizer
        self.form = turn_format(tokenizer)
        self._reopens = self.form.reopens
        self.max_seq_len = max_seq_len
        n, width = 16, min(256, max_seq_len)
        self.tokens = np.zeros((n, width), dtype=np.int64)
        self.roles = np.zeros((n, width), dtype=np.int8)
        self.log_probs = np.full((n, width), np.nan, dtype=np.float64)
        self.length = np.zeros(n, dtype=np.int64)
        self.written = np.zeros(n, dtype=np.int64)
        self.max_written = np.zeros(n, dtype=np.int64)
        self.turn_start = np.zeros(n, dtype=np.int64)  # of the assistant's text
        self.row = np.full(n, -1, dtype=np.int64)  # in the pager's tables, while running
        self.sampler = np.zeros(n, dtype=np.int64)  # its number among ``samplers``
        self.uniform = np.zeros((n, BLOCK), dtype=np.float64)
        self.drawn = np.zeros(n, dtype=np.int64)  # numbers of the block that are used
        self.stops = np.zeros(n, dtype=bool)  # it has stop tokens or strings
        self.samplers: list[Sampler] = []
        self.objects: list[Lane] = [None] * n  # type: ignore[list-item]  # by row
        self._free = list(range(n - 1, -1, -1))

    def add(self, lane: Lane) -> None:
        """Give a lane its row, and its prompt."""
        request = lane.request
        prompt = np.asarray(request.prompt, dtype=np.int64)
        listed, n = prompt.tolist(), len(prompt)
        roles, turn_start = self.form.codes(listed), self.form.turn_start(listed)
        if request.sampler.random:
            lane.generator = torch.Generator().manual_seed(request.seed)
        sampler = self._sampler_number(request.sampler)
        if not self._free:  # nothing from here on may fail
            self._more_rows()
        i = lane.index = self._free.pop()
        self.objects[i] = lane
        self.reserve(n)
        self.tokens[i, :n] = prompt
        self.roles[i, :n] = roles
        self.log_probs[i, :n] = np.nan
        self.length[i] = n
        self.written[i] = 0
        self.max_written[i] = request.max_new_tokens
        self.turn_start[i] = turn_start
        self.row[i] = -1
        self.sampler[i] = sampler
        self.stops[i] = bool(request.stop_tokens or request.stop_strings)
        self.drawn[i] = BLOCK
        lane.told = n

    def _sampler_number(self, sampler: Sampler) -> int:
        # the newest first: callers mostly use one, and equal ones share a number
        for number in range(len(self.samplers) - 1, -1, -1):
            if self.samplers[number] is sampler or self.samplers[number] == sampler:
                return number
        self.samplers.append(sampler)
        return len(self.samplers) - 1

    def remove(self, lane: Lane) -> None:
        """Take the row back."""
        self._free.append(lane.index)
        if len(self._free) == len(self.length):
            self.samplers.clear()  # nobody's any more

    def _more_rows(self) -> None:
        n = len(self.length)
        for name, column in vars(self).items():
            if isinstance(column, np.ndarray):
                setattr(self, name, np.concatenate((column, np.zeros_like(column))))
        self.objects += [None] * n  # type: ignore[list-item]
        self._free += range(2 * n - 1, n - 1, -1)

    def reserve(self, width: int) -> None:
        """Make room for so many tokens a lane."""
        have = self.tokens.shape[1]
        if width <= have:
            return
        more = min(self.max_seq_len, max(width, 2 * have)) - have
        self.tokens = np.pad(self.tokens, ((0, 0), (0, more)))
        self.roles = np.pad(self.roles, ((0, 0), (0, more)))
        self.log_probs = np.pad(self.log_probs, ((0, 0), (0, more)), constant_values=np.nan)

    def write(self, lanes: np.ndarray, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        """Add a token that the model wrote to each of some lanes.

        Args:
            lanes: (n,) int64, different rows.
            tokens: (n,) int64.
            log_probs: (n,) in nats.
        """
        places = self.length[lanes]
        self.reserve(int(places.max()) + 1)
        self.tokens[lanes, places] = tokens
        self.roles[lanes, places] = ASSISTANT
        self.log_probs[lanes, places] = log_probs
        self.length[lanes] = places + 1
        self.written[lanes] += 1
        new_turn = lanes[tokens == self._reopens]
        self.turn_start[new_turn] = self.length[new_turn]

    def write_many(self, lane: Lane, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        """Add tokens that the model wrote to one lane.

        Args:
            lane: any.
            tokens: (n,) int64.
            log_probs: (n,) in nats.
        """
        i, start = lane.index, int(self.length[lane.index])
        stop = start + len(tokens)
        self.reserve(stop)
        self.tokens[i, start:stop] = tokens
        self.roles[i, start:stop] = ASSISTANT
        self.log_probs[i, start:stop] = log_probs
        self.length[i] = stop
        self.written[i] += len(tokens)
        turns = np.flatnonzero(tokens == self._reopens)
        if len(turns):
            self.turn_start[i] = start + turns[-1] + 1

    def force(self, lane: Lane, tokens: Sequence[int]) -> None:
        """Add what a tool answered, with the marks around it, to where the assistant goes on."""
        i, start = lane.index, int(self.length[lane.index])
        stop = start + len(tokens)
        self.reserve(stop)
        self.tokens[i, start:stop] = tokens
        self.roles[i, start:stop] = DATABASE
        self.log_probs[i, start:stop] = np.nan
        self.length[i] = self.turn_start[i] = stop

    def sketch(self, lane: Lane, tokens: Sequence[int]) -> None:
        """Put drafts behind a lane's tokens, where the next pass finds them; they are not its own."""
        i, start = lane.index, int(self.length[lane.index])
        self.reserve(start + len(tokens))
        self.tokens[i, start : start + len(tokens)] = tokens
        self.roles[i, start : start + len(tokens)] = ASSISTANT

    def full(self, lanes: np.ndarray) -> np.ndarray:
        """(n,) bool: which lanes may not write another token."""
        return (self.length[lanes] >= self.max_seq_len) | (
            self.written[lanes] >= self.max_written[lanes]
        )

    def numbers(self, lanes: Sequence[Lane], extra: int = 0) -> np.ndarray:
        """The next uniform numbers of lanes, (n, 1 + extra); ``used`` says how many were taken.

        Args:
            lanes: any; those without a generator get zeros.
            extra: numbers beyond the next one.
        """
        index = np.fromiter((lane.index for lane in lanes), dtype=np.int64, count=len(lanes))
        if 1 + extra > BLOCK:
            raise ValueError(f"at most {BLOCK} numbers at a time")
        for lane in lanes:
            i = lane.index
            at = int(self.drawn[i])
            if at + 1 + extra > BLOCK and lane.generator is not None:
                new = torch.rand(at, generator=lane.generator, dtype=torch.float64).numpy()
                self.uniform[i] = np.concatenate((self.uniform[i, at:], new))
                self.drawn[i] = 0
        first = np.minimum(self.drawn[index], BLOCK - 1 - extra)
        return self.uniform[index[:, None], first[:, None] + np.arange(1 + extra)]

    def used(self, lanes: np.ndarray, counts: np.ndarray | int = 1) -> None:
        """Note how many uniform numbers lanes have used up."""
        self.drawn[lanes] = np.minimum(self.drawn[lanes] + counts, BLOCK)

    def history(self, lane: Lane, drafts: Sequence[int] = ()) -> History:
        """What a lane holds, for samplers that look at it.

        Args:
            lane: any.
            drafts: tokens taken to be written behind it.
        """
        i, n = lane.index, int(self.length[lane.index])
        tokens, roles = self.tokens[i, :n].tolist(), self.roles[i, :n].tolist()
        if drafts:
            tokens += drafts
            roles += [ASSISTANT] * len(drafts)
        return History(tokens, roles, len(lane.request.prompt))

    def spans(self, lane: Lane, start: int, stop: int) -> list[int]:
        """Which span that the model did not write each token is in; -1 where it wrote."""
        return foreign_spans(self.roles[lane.index, :stop].tolist())[start:]

    def turn_text(self, lane: Lane, tail: int | None = None) -> str:
        """What the assistant has said in the turn under way.

        Args:
            lane: any.
            tail: of how many tokens at its end; None for all.
        """
        start, stop = int(self.turn_start[lane.index]), int(self.length[lane.index])
        if tail is not None:
            start = max(start, stop - tail)
        return self.tokenizer.decode(self.tokens[lane.index, start:stop].tolist())

    def call_text(self, lane: Lane) -> str | None:
        """What the turn that it has just ended asks a tool; None where its text says that it asks none."""
        start, stop = int(self.turn_start[lane.index]), int(self.length[lane.index])
        text = self.tokenizer.decode(self.tokens[lane.index, start : stop - 1].tolist())
        return self.form.query(text)

    def generated(self, lane: Lane) -> Generated:
        """A finished dialogue."""
        assert lane.reason is not None
        i, n = lane.index, int(self.length[lane.index])
        return Generated(
            self.tokens[i, :n].tolist(),
            self.roles[i, :n].tolist(),
            self.log_probs[i, :n].tolist(),
            lane.reason,
            lane.tool_calls,
            len(lane.request.prompt),
        )
