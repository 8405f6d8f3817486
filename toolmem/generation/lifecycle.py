"""How lanes come to run, pause, and leave: admission, sharing, limits, and what it all is kept in."""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from toolmem.data.turn_format import turn_format
from toolmem.generation.acceptance import Acceptance
from toolmem.generation.lanes import Lane, Lanes
from toolmem.generation.paging import Pager
from toolmem.generation.pieces import NoRoom
from toolmem.generation.planning import draft_costs, pass_overhead
from toolmem.generation.prefixes import PrefixTree
from toolmem.generation.reference import Generated
from toolmem.generation.requests import Event
from toolmem.generation.speculative import Drafter
from toolmem.models.attention_kernels import own_kernels
from toolmem.models.compiled import CompiledDecoder
from toolmem.models.fused import FusedDecoder

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.generation.reference import FinishReason
    from toolmem.models.language_model import LanguageModel
    from toolmem.tools.dispatch import ToolCalls

log = logging.getLogger(__name__)


def describe(error: BaseException) -> str:
    """What was raised and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


@dataclass
class Stats:
    """Counts since the engine was made, and what it holds now.

    Args:
        lanes_running: dialogues that take part in steps.
        lanes_waiting: that wait for a place.
        lanes_calling: that wait for a tool.
        pages_used: pages in memory.
        pages_free: pages that there is room for.
        bytes_used: of pages and states in memory.
        bytes_peak: the most so far.
        pieces_paged_out: pages and states sent to host memory, so far.
        pieces_paged_in: and brought back.
        steps: so far, as all that follow.
        tokens_sampled: that the model wrote.
        tokens_forced: of tools' answers.
        tokens_prefilled: of prompts and answers that were read.
        tokens_shared: of prompts that needed no reading.
        tool_calls: made.
        tool_errors: of them answered by an error.
        requests_finished: neither cancelled nor failed.
        requests_cancelled: by who asked.
        requests_failed: something of their own raised (a sampler, a constraint, a tool's answer).
        compilations: graphs that were compiled.
        compile_seconds: that took.
    """

    lanes_running: int = 0
    lanes_waiting: int = 0
    lanes_calling: int = 0
    pages_used: int = 0
    pages_free: int = 0
    bytes_used: int = 0
    bytes_peak: int = 0
    pieces_paged_out: int = 0
    pieces_paged_in: int = 0
    steps: int = 0
    tokens_sampled: int = 0
    tokens_forced: int = 0
    tokens_prefilled: int = 0
    tokens_shared: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    requests_finished: int = 0
    requests_cancelled: int = 0
    requests_failed: int = 0
    compilations: int = 0
    compile_seconds: float = 0.0


class Lifecycle:
    """All lanes of an engine. One thread at a time.

    Args:
        model: on any device.
        tokenizer: has a form for dialogues.
        calls: where tool calls go; None without tools.
        max_lanes: that run at once.
        step_tokens: tokens that a step reads at most, beside one a lane.
        pager: owns the decoding state.
        prefix_sharing: let dialogues that begin alike read their beginning once.
        invariant: results do not hang on the batch.
        drafter: proposes tokens that the model then checks; None to read one at a time.
        row_independent: the model gives a row the same bits whatever stands beside it in a pass.
        compile: lanes that have one token to read do so by a compiled pass.
        wake: called, from any thread, when a tool has answered.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        calls: ToolCalls | None,
        *,
        max_lanes: int,
        step_tokens: int,
        pager: Pager,
        prefix_sharing: bool,
        invariant: bool,
        row_independent: bool,
        drafter: Drafter | None,
        compile: bool,
        wake: Callable[[], None],
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.calls = calls
        self.max_lanes = max_lanes
        self.step_tokens = step_tokens
        self.pager = pager
        self.invariant = invariant
        self.row_independent = row_independent
        self.drafter = drafter
        self.both_ways = model.attention_mask == "prefix"
        self.acceptance = Acceptance(drafter.max_tokens if drafter is not None else 0)
        self.wake = wake
        self.tree: PrefixTree | None = None
        if prefix_sharing and not invariant:
            exact = self.both_ways or bool(pager.bytes_each["slot"])
            self.tree = PrefixTree(pager, exact=exact)
        # A tree of drafts needs nothing but keys and values, which stay where they are.
        self._fused = None if invariant else FusedDecoder.of(model, pager.state)
        self.compiled: CompiledDecoder | None = None
        if compile:
            if self.fused is not None:
                log.warning(
                    "compile: without it this model is decoded by C, measured to be 1.1 to 3 times as "
                    "fast (docs/benchmarks.md, Compiled decoding)"
                )
            self.compiled = CompiledDecoder(model, pager.state, max_lanes)
        self._chains_only = self.both_ways or bool(pager.bytes_each["slot"])
        if drafter is not None:
            if self.fused is not None or self._chains_only:
                drafter.prefer_chains()
            drafting: Drafter = drafter
            self.draft_costs = functools.cache(lambda lanes: draft_costs(model, drafting, lanes))
            if not self.acceptance.may_pay(self.draft_costs(1)):
                log.warning(
                    "%s: drafting takes as long here as what it saves, so nothing is drafted",
                    type(drafter).__name__,
                )
        self.overhead = pass_overhead(model)
        self.lanes = Lanes(tokenizer, model.max_seq_len)
        self.device = model.embedding.weight.device
        self.counts = Stats()
        self.form = turn_format(tokenizer)
        self._end, self._database = self.form.end, self.form.call
        self.queue: deque[Lane] = deque()  # not begun
        self.ready: deque[Lane] = deque()  # answered, or made to pause
        self.running: list[Lane] = []
        self.calling: set[Lane] = set()
        self.following: set[Lane] = set()  # of the same prompt as one that is being read
        self.alive: set[Lane] = set()
        self._reading: dict[object, Lane] = {}
        self._held = 0  # steps for which lanes with much to read have waited for each other
        self._listened: set[Lane] = set()
        self._timed: set[Lane] = set()
        self._answered: SimpleQueue[Lane] = SimpleQueue()

    @property
    def fused(self) -> FusedDecoder | None:
        """Decoding by C, where the model can be decoded so and nothing else was chosen."""
        if self.compiled is not None or not own_kernels(self.model.attention_kernel):
            return None
        return self._fused

    def enter(self, lane: Lane) -> None:
        """Take in a lane with its branch."""
        self.lanes.add(lane)
        self.alive.add(lane)
        if lane.deadline is not None:
            self._timed.add(lane)
        if lane.handle.listening:
            self._listened.add(lane)
        if self.lanes.full(np.array([lane.index]))[0]:
            self.finish(lane, "length")
        else:
            self.queue.append(lane)

    def finish(self, lane: Lane, reason: FinishReason) -> None:
        """Bring a lane to its end, wherever it is."""
        lane.reason = reason
        if reason == "cancelled":
            self.counts.requests_cancelled += 1
        else:
            self.counts.requests_finished += 1
        self.drop(lane, self.lanes.generated(lane))

    def fail(self, lane: Lane, error: Exception) -> None:
        """End a lane by what failed of its own; all others go on."""
        if lane not in self.alive:
            return
        lane.reason = "error"
        self.counts.requests_failed += 1
        result = self.lanes.generated(lane)
        result.error = describe(error)
        self.drop(lane, result, error)

    def drop(
        self, lane: Lane, result: Generated | BaseException, error: Exception | None = None
    ) -> None:
        """Take a lane out of everything, and give its result.

        Args:
            lane: any that is alive.
            result: its dialogue, or what ended the engine's work.
            error: what failed of its own.
        """
        self._stop_reading(lane)
        self._leave(lane)
        good = isinstance(result, Generated) and error is None
        # Who listens may go on from here, as in a chat; of a batch only the prompts are kept in mind.
        if good and lane.handle.listening and lane.branch.length and self.tree is not None:
            self._remember(lane)
        if good and lane.keep:
            lane.handle.branch = lane.branch
        else:
            self.pager.free(lane.branch)
        self._tell(lane)
        self.alive.discard(lane)
        self._listened.discard(lane)
        self._timed.discard(lane)
        self.lanes.remove(lane)
        if self.drafter is not None:
            self.drafter.forget(lane, result.tokens if isinstance(result, Generated) else ())
        lane.handle.finish(result, error)

    def _leave(self, lane: Lane) -> None:
        """Take a lane from where it is."""
        if lane.branch.row is not None:
            self._deactivate(lane)
        elif lane in self.calling:
            self.calling.discard(lane)
            if lane.future is not None:
                lane.future.cancel()
        elif lane in self.following:
            self.following.discard(lane)
            assert lane.leader is not None
            lane.leader.followers.remove(lane)
        else:
            for waiting in (self.queue, self.ready):
                if lane in waiting:
                    waiting.remove(lane)

    def _remember(self, lane: Lane) -> None:
        assert self.tree is not None
        n = lane.branch.length
        tokens = self.lanes.tokens[lane.index, :n].tolist()
        spans = self.lanes.spans(lane, 0, n) if self.both_ways else None
        self.tree.remember(tokens, lane.branch, spans)

    def _tell(self, lane: Lane) -> None:
        """Give a lane's new tokens to who listens."""
        i, start, stop = lane.index, lane.told, int(self.lanes.length[lane.index])
        if start == stop or not lane.handle.listening:
            return
        lane.told = stop
        tokens = self.lanes.tokens[i, start:stop].tolist()
        roles = self.lanes.roles[i, start:stop].tolist()
        log_probs = self.lanes.log_probs[i, start:stop].tolist()
        lane.handle.tell([Event(*each) for each in zip(tokens, roles, log_probs, strict=True)])

    def expire(self) -> None:
        """Finish what has had its time."""
        if self._timed:
            now = time.perf_counter()
            for lane in [x for x in self._timed if x.deadline is not None and now >= x.deadline]:
                self.finish(lane, "seconds")

    def forget(self) -> None:
        """Drop all that was made with weights that have changed; it is read again."""
        if self.tree is not None:
            self.tree.clear()
        if self.drafter is not None:
            self.drafter.forget(None)
        for lane in self.alive:
            active = lane.branch.row is not None
            self.pager.free(lane.branch)
            lane.branch = self.pager.new()
            lane.hidden = lane.features = None
            lane.featured = 0
            if active:
                self.lanes.row[lane.index] = self.pager.activate(lane.branch)

    def _admit(self) -> None:
        """Let lanes run that wait for a place: first those that ran before."""
        while self.ready and len(self.running) < self.max_lanes:
            if not self._activate(self.ready[0]):
                return
            self.ready.popleft()
        put_aside: list[Lane] = []
        while self.queue and len(self.running) < self.max_lanes:
            if len(put_aside) >= self.max_lanes:
                break
            lane = self.queue.popleft()
            if self.tree is not None and not lane.branch.length and not self._share(lane):
                if lane not in self.following:
                    put_aside.append(lane)
            elif not self._activate(lane):
                self._stop_reading(lane)
                put_aside.append(lane)
                break
        self.queue.extendleft(reversed(put_aside))

    def _share(self, lane: Lane) -> bool:
        """Start a lane from what has been read already; False when it had better wait for others that
        are reading its prompt, or its next page.
        """
        assert self.tree is not None
        prompt = tuple(lane.request.prompt)
        leader = self._reading.get(prompt)
        if leader is not None:
            lane.leader = leader
            leader.followers.append(lane)
            self.following.add(lane)
            return False
        spans = self.lanes.spans(lane, 0, len(prompt)) if self.both_ways else None
        known = self.tree.match(prompt, spans)
        start = 0 if known is None else known.length
        stop = start + self.pager.page_size
        keys: list[object] = [prompt]
        if not self.tree.exact and stop < len(prompt):
            keys.append((prompt[:stop], "page"))
            if keys[-1] in self._reading:
                if known is not None:
                    self.pager.free(known)
                return False
        if known is not None:
            lane.branch = known
            self.counts.tokens_shared += start
        lane.reading = keys
        for key in keys:
            self._reading[key] = lane
        return True

    def _stop_reading(self, lane: Lane) -> None:
        """Its prompt is read, or will not be: nobody is to wait for it."""
        for key in lane.reading:
            self._reading.pop(key, None)
        lane.reading = []
        for follower in lane.followers:
            follower.leader = None
            self.following.discard(follower)
        self.queue.extendleft(reversed(lane.followers))
        lane.followers = []

    def _activate(self, lane: Lane) -> bool:
        """Let a lane run if memory has room for it, and for a page more of each that runs."""
        pager, branch = self.pager, lane.branch
        if self.running:
            n = pager.pages_for(int(self.lanes.length[lane.index]) + 1) - len(branch.pages)
            n += sum(not piece.pins for piece in branch.pages)
            n += len(self.running)
            if pager.bytes_each["page"] and n > pager.capacity["page"] - pager.pinned("page"):
                return False
            if pager.bytes_each["slot"] and pager.pinned("slot") >= pager.capacity["slot"]:
                return False
        try:
            self.lanes.row[lane.index] = pager.activate(branch)
        except NoRoom:
            return False
        self.running.append(lane)
        return True

    def _deactivate(self, lane: Lane) -> None:
        lane.draft = lane.before = lane.kept = None
        row, i = int(self.lanes.row[lane.index]), lane.index
        # it may have stopped within what was accepted
        self.pager.lengths[row] = min(self.pager.lengths[row], self.lanes.length[i])
        self.pager.deactivate(lane.branch)
        self.lanes.row[lane.index] = -1
        self.running.remove(lane)

    def _pause(self, lane: Lane) -> None:
        """Take a lane's place from it; it goes on when there is room."""
        self._stop_reading(lane)
        self._deactivate(lane)
        self.ready.appendleft(lane)
