"""What happens in a step of the engine: lanes are let in, read, write, call tools, and leave.

    queue -> running -> (calling -> ready -> running)* -> finished

A lane runs while it has a row in the pager's tables. It reads what it has not read yet (its prompt, a
tool's answer, the token that it wrote last), and when nothing is left it writes a token. One that calls
a tool leaves its row to others until the answer is there. Where memory is short the youngest lane pauses.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from toolmem.generation.lanes import Lane, Lanes
from toolmem.generation.paging import NoRoom, Pager
from toolmem.generation.planning import Pass, budgeted, pass_overhead, passes
from toolmem.generation.prefixes import PrefixTree
from toolmem.generation.reference import Generated
from toolmem.generation.requests import Event
from toolmem.generation.sampling import choose
from toolmem.tools.base import extract_query

if TYPE_CHECKING:
    from concurrent.futures import Future

    from toolmem.data.tokenizers import Tokenizer
    from toolmem.generation.reference import FinishReason
    from toolmem.models.language_model import LanguageModel
    from toolmem.tools.base import Answer
    from toolmem.tools.dispatch import ToolCalls

# In invariant mode every pass has one of two shapes, so that no sum's order hangs on the batch.
TILE = 16  # lanes of a decoding pass
CHUNK = 32  # tokens of a reading pass, of one lane


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
        requests_finished: not cancelled.
        requests_cancelled: by who asked.
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


class Scheduler:
    """All lanes of an engine. One thread at a time.

    Args:
        model: on any device.
        tokenizer: has the role tokens.
        calls: where tool calls go; None without tools.
        max_lanes: that run at once.
        step_tokens: tokens that a step reads at most, beside one a lane.
        pager: owns the decoding state.
        prefix_sharing: let dialogues that begin alike read their beginning once.
        invariant: results do not hang on the batch.
        row_independent: the model gives a row the same bits whatever stands beside it in a pass.
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
        self.wake = wake
        self.both_ways = model.attention_mask == "prefix"
        self.tree: PrefixTree | None = None
        if prefix_sharing and not invariant:
            exact = self.both_ways or bool(pager.bytes_each["slot"])
            self.tree = PrefixTree(pager, exact=exact)
        self.overhead = pass_overhead(model)
        self.lanes = Lanes(tokenizer, model.max_seq_len)
        self.device = model.embedding.weight.device
        self.counts = Stats()
        self._end = tokenizer.role_ids["end"]
        self._database = tokenizer.role_ids["database"]
        self.queue: deque[Lane] = deque()  # not begun
        self.ready: deque[Lane] = deque()  # answered, or made to pause
        self.running: list[Lane] = []
        self.calling: set[Lane] = set()
        self.following: set[Lane] = set()  # of the same prompt as one that is being read
        self.alive: set[Lane] = set()
        self._reading: dict[object, Lane] = {}
        self._listened: set[Lane] = set()
        self._timed: set[Lane] = set()
        self._answered: SimpleQueue[Lane] = SimpleQueue()

    # Coming and going

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

    def drop(self, lane: Lane, result: Generated | BaseException) -> None:
        """Take a lane out of everything, and give its result."""
        self._stop_reading(lane)
        self._leave(lane)
        good = isinstance(result, Generated)
        if good and lane.branch.length and self.tree is not None:
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
        lane.handle.finish(result)

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
        for lane in self.alive:
            active = lane.branch.row is not None
            self.pager.free(lane.branch)
            lane.branch = self.pager.new()
            lane.hidden = None
            if active:
                self.lanes.row[lane.index] = self.pager.activate(lane.branch)

    # A step

    @torch.no_grad()
    def step(self) -> bool:
        """Move every lane on that can move; whether there was one."""
        self.expire()
        self._take_answers()
        self._admit()
        if not self.running:
            return False
        self.counts.steps += 1
        lanes = [lane for lane in self.running if lane.hidden is not None]
        states = [lane.hidden for lane in lanes if lane.hidden is not None]
        hidden = [torch.stack(states)] if states else []
        for lane in lanes:
            lane.hidden = None
        for group in self._plan():
            ready, at_last = self._read(group)
            lanes += ready
            hidden.append(at_last)
        if lanes:
            self._write(lanes, torch.cat(hidden))
        for lane in list(self._listened):
            self._tell(lane)
        return True

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
        self.pager.deactivate(lane.branch)
        self.lanes.row[lane.index] = -1
        self.running.remove(lane)

    def _pause(self, lane: Lane) -> None:
        """Take a lane's place from it; it goes on when there is room."""
        self._stop_reading(lane)
        self._deactivate(lane)
        self.ready.appendleft(lane)

    # Reading

    def _plan(self) -> Iterator[Pass]:
        """The passes of this step."""
        index = np.fromiter((lane.index for lane in self.running), np.int64, len(self.running))
        waiting = self.lanes.length[index] - self.pager.lengths[self.lanes.row[index]]
        index, waiting = index[waiting > 0], waiting[waiting > 0]
        if self.invariant:
            yield from self._invariant_passes(index, waiting)
        elif len(index):
            counts = budgeted(waiting, self.step_tokens, self.both_ways)
            yield from passes(index[counts > 0], counts[counts > 0], self.overhead)

    def _invariant_passes(self, index: np.ndarray, waiting: np.ndarray) -> Iterator[Pass]:
        one = index[waiting == 1]
        for start in range(0, len(one), self._tile):
            part = one[start : start + self._tile]
            yield Pass(part, np.ones(len(part), dtype=np.int64))
        most = self.model.max_seq_len if self.both_ways else CHUNK
        for i, count in zip(index.tolist(), waiting.tolist(), strict=True):
            if count > 1:
                yield Pass(np.array([i]), np.array([min(count, most)]))

    def _read(self, group: Pass) -> tuple[list[Lane], Tensor]:
        """Run tokens through the model.

        Returns:
            the lanes that have read all of theirs, and what the head reads at the last token of each,
            (n, dim).
        """
        lanes, pager = self.lanes, self.pager
        index, counts = self._make_room(*group)
        if not len(index):
            return [], torch.empty(0, self.model.dim, device=self.device)
        rows = lanes.row[index]
        ends = -(-(pager.lengths[rows] + counts) // pager.page_size)
        order = np.argsort(ends, kind="stable")  # lanes over equally many pages stand together
        index, counts, rows = index[order], counts[order], rows[order]
        fed, width, padding = pager.lengths[rows], int(counts.max()), 0
        columns = np.arange(width)
        real = columns < counts[:, None]
        places = np.where(real, fed[:, None] + columns, 0)
        chunk = np.where(real, lanes.tokens[index[:, None], places], 0)
        run_rows, run_counts = rows, counts
        if self.invariant and width == 1:
            padding = self._tile - len(rows)
            run_rows = np.concatenate((np.full(padding, -1), rows))
            run_counts = np.ones(self._tile, dtype=np.int64)
            chunk = np.concatenate((np.zeros((padding, 1), dtype=np.int64), chunk))
        spans = self._spans(index, fed, counts, width) if self.both_ways else None
        hidden = self.model.hidden(
            torch.from_numpy(chunk).to(self.device),
            cache=pager.cache(run_rows, run_counts),
            counts=None if real.all() else torch.from_numpy(counts).to(self.device),
            spans=spans,
        )
        pager.lengths[rows] = fed + counts
        self.counts.tokens_prefilled += int(counts[counts > 1].sum())
        done = np.flatnonzero(fed + counts == lanes.length[index])
        at = torch.from_numpy(done + padding).to(self.device)
        last = torch.from_numpy(counts[done] - 1).to(self.device)
        ready = [lanes.objects[i] for i in index[done].tolist()]
        return self._with_followers(ready, hidden[at, last])

    @property
    def _tile(self) -> int:
        return TILE if self.row_independent else 1

    def _spans(self, index: np.ndarray, fed: np.ndarray, counts: np.ndarray, width: int) -> Tensor:
        """Which span that the model did not write each token of a chunk is in."""
        spans = torch.full((len(index), width), -1, dtype=torch.int64)
        columns = (index.tolist(), fed.tolist(), counts.tolist())
        for at, (i, start, count) in enumerate(zip(*columns, strict=True)):
            numbers = self.lanes.spans(self.lanes.objects[i], start, start + count)
            spans[at, :count] = torch.tensor(numbers)
        return spans.to(self.device)

    def _make_room(self, index: np.ndarray, counts: np.ndarray) -> Pass:
        """See to pages for a pass, at the cost of the youngest lanes where memory is short."""
        while True:
            here = self.lanes.row[index] >= 0
            index, counts = index[here], counts[here]
            try:
                self.pager.prepare(self.lanes.row[index], counts)
                return Pass(index, counts)
            except NoRoom:
                if len(self.running) > 1:
                    self._pause(max(self.running, key=lambda lane: lane.order))
                else:
                    self.finish(self.running[0], "length")

    def _with_followers(self, ready: list[Lane], hidden: Tensor) -> tuple[list[Lane], Tensor]:
        """Let lanes of the same prompt share what one has read."""
        lanes, rows = list(ready), list(range(len(ready)))
        for at, lane in enumerate(ready):
            if not lane.reading:
                continue
            followers, lane.followers = lane.followers, []
            self._stop_reading(lane)
            if self.tree is not None and not self.tree.exact:
                self._remember(lane)
            for follower in followers:
                self.following.discard(follower)
                follower.leader = None
                follower.branch = self.pager.fork(lane.branch)
                self.counts.tokens_shared += lane.branch.length
                if len(self.running) < self.max_lanes and self._activate(follower):
                    lanes.append(follower)
                    rows.append(at)
                else:
                    follower.hidden = hidden[at]
                    self.ready.append(follower)
        if len(lanes) > len(ready):
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        return lanes, hidden

    # Writing

    def _write(self, lanes: list[Lane], hidden: Tensor) -> None:
        """Let each lane write its next token.

        Args:
            lanes: those that have read all of theirs.
            hidden: (lanes, dim), what the head reads at their last token.
        """
        # a lane may have had to pause for another's pages since it read
        if any(lane.branch.row is None for lane in lanes):
            here = [at for at, lane in enumerate(lanes) if lane.branch.row is not None]
            for at, lane in enumerate(lanes):
                if lane.branch.row is None and lane in self.alive:
                    lane.hidden = hidden[at]
            lanes = [lanes[at] for at in here]
            hidden = hidden[torch.tensor(here, dtype=torch.int64, device=hidden.device)]
            if not lanes:
                return
        index = np.fromiter((lane.index for lane in lanes), np.int64, len(lanes))
        tokens, log_probs = self._choose(lanes, index, self._logits(hidden))
        self.lanes.write(index, tokens, log_probs)
        self.counts.tokens_sampled += len(lanes)
        ended, called = tokens == self._end, tokens == self._database
        full = self.lanes.full(index)
        looked_at = ended | called | full | self.lanes.stops[index]
        callers = []
        for at in np.flatnonzero(looked_at).tolist():
            lane = lanes[at]
            if ended[at]:
                self.finish(lane, "end")
            elif self._stopped(lane, int(tokens[at])):
                self.finish(lane, "stop")
            elif called[at]:
                callers.append(lane)
            elif full[at]:
                self.finish(lane, "length")
        if callers:
            self._call(callers)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.invariant and self._tile == 1:
            return torch.cat([self.model.logits(row[None]) for row in hidden]).float()
        return self.model.logits(hidden).float()

    def _choose(
        self, lanes: list[Lane], index: np.ndarray, logits: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """The next token of each lane, and the model's own log-probability of it."""
        samplers = [self.lanes.samplers[number] for number in np.unique(self.lanes.sampler[index])]
        uniform = histories = None
        if any(sampler.random for sampler in samplers):
            uniform = torch.from_numpy(self.lanes.numbers(lanes)[:, 0])
            self.lanes.used(index)
        if any(getattr(sampler, "needs_history", False) for sampler in samplers):
            histories = [self.lanes.history(lane) for lane in lanes]
        each = samplers[0] if len(samplers) == 1 else [lane.request.sampler for lane in lanes]
        chosen = choose(each, logits, uniform, histories)
        log_probs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
        return chosen.cpu().numpy(), log_probs.cpu().numpy()

    def _stopped(self, lane: Lane, token: int) -> bool:
        """Whether what it wrote last is one of its stop tokens, or ends one of its stop strings."""
        request = lane.request
        if token in request.stop_tokens:
            return True
        if not request.stop_strings or token == self._database:
            return False
        # a token of text has a byte at least, and those of a character may be cut at the front
        longest = max(len(string.encode()) for string in request.stop_strings)
        said = self.lanes.turn_text(lane, longest + 4)
        return any(string in said for string in request.stop_strings)

    # Tools

    def _call(self, lanes: list[Lane]) -> None:
        """Hand the lanes' queries to their tools."""
        allowed = []
        for lane in lanes:
            request = lane.request
            may = self.calls is not None and request.use_tools
            if may and len(lane.tool_calls) < request.max_tool_calls:
                allowed.append(lane)
            else:
                self.finish(lane, "tool_calls")
        if not allowed or self.calls is None:
            return
        texts = [self.lanes.call_text(lane) for lane in allowed]
        self.counts.tool_calls += len(texts)
        at_once = []
        for lane, text, future in zip(allowed, texts, self.calls.submit(texts), strict=True):
            lane.query, lane.future = extract_query(text), future
            if future.done():
                at_once.append(lane)
            else:
                self._deactivate(lane)
                self.calling.add(lane)
                future.add_done_callback(self._note(lane))
        self._absorb(at_once)

    def _note(self, lane: Lane) -> Callable[[Future[Answer]], None]:
        def note(_: Future[Answer]) -> None:
            self._answered.put(lane)
            self.wake()

        return note

    def _take_answers(self) -> None:
        """Let lanes go on whose tools have answered."""
        lanes = []
        while True:
            try:
                lane = self._answered.get_nowait()
            except Empty:
                break
            if lane in self.calling:
                self.calling.discard(lane)
                lanes.append(lane)
        self._absorb(lanes)
        self.ready.extend(lane for lane in lanes if lane in self.alive)

    def _absorb(self, lanes: list[Lane]) -> None:
        """Force tools' answers into their dialogues."""
        if not lanes:
            return
        answers = [lane.future.result() for lane in lanes if lane.future is not None]
        encoded = self.tokenizer.encode_batch([answer.text for answer in answers])
        for lane, answer, ids in zip(lanes, answers, encoded, strict=True):
            lane.tool_calls.append((lane.query, answer))
            lane.future = None
            self.counts.tool_errors += answer.error
            forced = [*ids, self.tokenizer.role_ids["assistant"]]
            if int(self.lanes.length[lane.index]) + len(forced) > self.model.max_seq_len:
                self.finish(lane, "length")
                continue
            self.lanes.force(lane, forced)
            self.counts.tokens_forced += len(forced)
            if self.lanes.full(np.array([lane.index]))[0]:
                self.finish(lane, "length")
