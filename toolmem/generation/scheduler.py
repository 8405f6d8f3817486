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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolmem.generation.lanes import BLOCK, Lane, Lanes
from toolmem.generation.paging import NoRoom, Pager
from toolmem.generation.planning import Pass, budgeted, pass_overhead, passes
from toolmem.generation.prefixes import PrefixTree
from toolmem.generation.reference import Generated
from toolmem.generation.requests import Event
from toolmem.generation.sampling import History, choose
from toolmem.generation.speculative import (
    Acceptance,
    Draft,
    Drafter,
    ancestors,
    depths,
    follow,
    trunk,
)
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


class Read(NamedTuple):
    """What came of a pass.

    Args:
        lanes: that have read all of theirs, and are to write.
        rows: by lane, how many rows of ``hidden`` are its own: its last token, and each of its draft.
        hidden: (sum of rows, dim), what the head reads there.
    """

    lanes: list[Lane]
    rows: list[int]
    hidden: Tensor


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
        drafter: proposes tokens that the model then checks; None to read one at a time.
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
        drafter: Drafter | None,
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
        self.acceptance = Acceptance(drafter.max_tokens if drafter is not None else 0)
        self.wake = wake
        self.both_ways = model.attention_mask == "prefix"
        self.tree: PrefixTree | None = None
        if prefix_sharing and not invariant:
            exact = self.both_ways or bool(pager.bytes_each["slot"])
            self.tree = PrefixTree(pager, exact=exact)
        # A tree of drafts needs nothing but keys and values, which stay where they are.
        self._chains_only = self.both_ways or bool(pager.bytes_each["slot"])
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
        if self.drafter is not None:
            self.drafter.forget(lane)
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
        written: list[Read] = []
        known = [lane for lane in self.running if lane.hidden is not None]
        if known:
            states = [lane.hidden for lane in known if lane.hidden is not None]
            written.append(Read(known, [1] * len(known), torch.stack(states)))
            for lane in known:
                lane.hidden = None
        # room for all passes first: making it may cost lanes their place
        for group in [self._make_room(*group) for group in list(self._plan())]:
            written.append(self._read(group))
        self._write(written)
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
        lane.draft = lane.before = None
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
            if self.drafter is not None:
                counts = counts + self._draft(index, waiting)
            yield from passes(index[counts > 0], counts[counts > 0], self.overhead)

    def _draft(self, index: np.ndarray, waiting: np.ndarray) -> np.ndarray:
        """Draft for the lanes that are about to write; (n,) int64, how many tokens of each."""
        assert self.drafter is not None
        lanes, most = self.lanes, self.drafter.max_tokens
        # a token that is written without a draft is left at the end of either limit
        left = np.minimum(
            lanes.max_written[index] - lanes.written[index],
            self.model.max_seq_len - lanes.length[index],
        )
        may = (waiting <= 1 + most) & (left > 1)
        if self.pager.bytes_each["slot"]:
            may &= ~lanes.stops[index]  # where it would stop its state could not be gone back to
        places = np.flatnonzero(may).tolist()
        drafted = np.zeros(len(index), dtype=np.int64)
        if not places:
            return drafted
        objects = [lanes.objects[index[at]] for at in places]
        limits = [
            min(self.acceptance.limit(lane), int(left[at]) - 1, BLOCK - 1)
            for at, lane in zip(places, objects, strict=True)
        ]
        drafts = self.drafter.propose(objects, lanes, limits)
        for at, lane, draft in zip(places, objects, drafts, strict=True):
            if self._chains_only and not draft.is_chain:
                draft = trunk(draft)
            if draft.tokens:
                room = self.model.max_seq_len - int(lanes.length[lane.index])
                if len(draft.tokens) > room:
                    continue
                lane.draft = draft
                lanes.sketch(lane, draft.tokens)
                drafted[at] = len(draft.tokens)
        return drafted

    def _invariant_passes(self, index: np.ndarray, waiting: np.ndarray) -> Iterator[Pass]:
        one = index[waiting == 1]
        for start in range(0, len(one), self._tile):
            part = one[start : start + self._tile]
            yield Pass(part, np.ones(len(part), dtype=np.int64))
        most = self.model.max_seq_len if self.both_ways else CHUNK
        for i, count in zip(index.tolist(), waiting.tolist(), strict=True):
            if count > 1:
                yield Pass(np.array([i]), np.array([min(count, most)]))

    def _read(self, group: Pass) -> Read:
        """Run tokens through the model."""
        lanes, pager = self.lanes, self.pager
        here = lanes.row[group.lanes] >= 0
        index, counts = group.lanes[here], group.counts[here]
        if not len(index):
            return Read([], [], torch.empty(0, self.model.dim, device=self.device))
        rows = lanes.row[index]
        ends = -(-(pager.lengths[rows] + counts) // pager.page_size)
        order = np.argsort(ends, kind="stable")  # lanes over equally many pages stand together
        index, counts, rows = index[order], counts[order], rows[order]
        objects = [lanes.objects[i] for i in index.tolist()]
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
        drafting = [lane for lane in objects if lane.draft is not None]
        if drafting:
            self._keep_states(drafting)
        hidden = self.model.hidden(
            torch.from_numpy(chunk).to(self.device),
            cache=pager.cache(run_rows, run_counts),
            counts=None if real.all() else torch.from_numpy(counts).to(self.device),
            spans=self._spans(index, fed, counts, width) if self.both_ways else None,
            tree=self._trees(objects, width) if drafting else None,
        )
        pager.lengths[rows] = fed + counts
        drafts = np.array([len(lane.draft.tokens) if lane.draft else 0 for lane in objects])
        self.counts.tokens_prefilled += int((counts - drafts)[counts - drafts > 1].sum())
        if self.drafter is not None and self.drafter.window:
            self._keep_features(objects, hidden[padding:], fed, counts - drafts)
        done = np.flatnonzero(fed + counts - drafts == lanes.length[index])
        at = np.repeat(done, 1 + drafts[done]) + padding
        column = np.concatenate(
            [np.arange(counts[i] - 1 - drafts[i], counts[i]) for i in done]
            or [np.zeros(0, np.int64)]
        )
        states = hidden[
            torch.from_numpy(at).to(self.device), torch.from_numpy(column).to(self.device)
        ]
        return self._with_followers(
            Read([objects[i] for i in done], (1 + drafts[done]).tolist(), states)
        )

    def _keep_states(self, lanes: list[Lane]) -> None:
        """Note what has one size before drafts are read, for when some are not accepted."""
        if self.pager.bytes_each["slot"]:
            rows = self.lanes.row[[lane.index for lane in lanes]]
            snapshot = self.pager.snapshot(rows)
            for at, (lane, row) in enumerate(zip(lanes, rows.tolist(), strict=True)):
                before = [tensor[at : at + 1] for tensor in snapshot]
                lane.before = int(self.pager.lengths[row]), before

    def _keep_features(
        self, lanes: list[Lane], hidden: Tensor, fed: np.ndarray, counts: np.ndarray
    ) -> None:
        """Keep what the head read at the last certain tokens of each lane."""
        columns = (fed.tolist(), counts.tolist())
        for at, (lane, start, count) in enumerate(zip(lanes, *columns, strict=True)):
            known = max(0, lane.featured - start)  # read before, and again after a draft failed
            self._add_features(lane, hidden[at, known:count], start + count)

    def _add_features(self, lane: Lane, new: Tensor, stop: int) -> None:
        assert self.drafter is not None
        if len(new):
            kept = new if lane.features is None else torch.cat((lane.features, new))
            lane.features, lane.featured = kept[-self.drafter.window :].clone(), stop

    def _trees(self, lanes: list[Lane], width: int) -> tuple[Tensor, Tensor] | None:
        """Depths, and what sees what, of a pass with drafts; None where all are chains."""
        if all(lane.draft is None or lane.draft.is_chain for lane in lanes):
            return None
        offsets = np.tile(np.arange(width), (len(lanes), 1))
        sees = np.tile(np.tri(width, dtype=bool), (len(lanes), 1, 1))
        for at, lane in enumerate(lanes):
            draft = lane.draft
            if draft is not None and not draft.is_chain:
                row = int(self.lanes.row[lane.index])
                waiting = int(self.lanes.length[lane.index] - self.pager.lengths[row])
                start, stop = waiting - 1, waiting + len(draft.tokens)
                sees[at, waiting:stop] = False
                sees[at, waiting:stop, :waiting] = True
                sees[at, start:stop, start:stop] = ancestors(draft)
                offsets[at, waiting:stop] = start + np.array(depths(draft))
        return torch.from_numpy(offsets).to(self.device), torch.from_numpy(sees).to(self.device)

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

    def _with_followers(self, read: Read) -> Read:
        """Let lanes of the same prompt share what one has read."""
        lanes, rows, hidden = read
        if not any(lane.reading for lane in lanes):
            return read
        first = np.cumsum([0, *rows]).tolist()
        more, sources = [], []
        for lane, at in zip(lanes, first, strict=False):
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
                follower.features, follower.featured = lane.features, lane.featured
                self.counts.tokens_shared += lane.branch.length
                if len(self.running) < self.max_lanes and self._activate(follower):
                    more.append(follower)
                    sources.append(at)
                else:
                    follower.hidden = hidden[at]
                    self.ready.append(follower)
        if more:
            hidden = torch.cat((hidden, hidden[torch.tensor(sources, device=hidden.device)]))
        return Read([*lanes, *more], [*rows, *([1] * len(more))], hidden)

    # Writing

    def _write(self, read: list[Read]) -> None:
        """Let each lane that has read all of its tokens write the next one, and those drafted right."""
        lanes = [lane for part in read for lane in part.lanes]
        if not lanes:
            return
        rows = np.array([n for part in read for n in part.rows], dtype=np.int64)
        index = np.fromiter((lane.index for lane in lanes), np.int64, len(lanes))
        hidden = torch.cat([part.hidden for part in read])
        tokens, log_probs = self._choose(lanes, index, rows, self._logits(hidden))
        if rows.max() == 1:
            self.lanes.used(index)
            self._put(lanes, index, tokens, log_probs)
            return
        starts = np.cumsum(rows) - rows
        accepted = []
        for lane, start, n in zip(lanes, starts.tolist(), rows.tolist(), strict=True):
            accepted.append([start, *(self._accept(lane, tokens[start : start + n], start))])
        if self.drafter is not None and self.drafter.window:
            for lane, path in zip(lanes, accepted, strict=True):
                new = hidden[torch.tensor(path[1:], dtype=torch.int64, device=hidden.device)]
                self._add_features(lane, new, lane.featured + len(new))
        longest = max(len(path) for path in accepted)
        for depth in range(longest):
            some = [at for at, path in enumerate(accepted) if len(path) > depth]
            some = [
                at for at in some if lanes[at] in self.alive and lanes[at].branch.row is not None
            ]
            if not some:  # they have stopped
                break
            at_depth = np.array([accepted[at][depth] for at in some], dtype=np.int64)
            self.lanes.used(index[some])
            self._put(
                [lanes[at] for at in some], index[some], tokens[at_depth], log_probs[at_depth]
            )

    def _accept(self, lane: Lane, chosen: np.ndarray, start: int) -> list[int]:
        """Go along a lane's draft as far as it is what the lane writes; keep nothing of the rest.

        Args:
            lane: its draft has been read.
            chosen: (1 + nodes,) int64, what it writes behind its last token, and behind each node.
            start: where these stand among all of this step.

        Returns:
            the places of what it writes behind the nodes that it goes along.
        """
        draft, lane.draft = lane.draft, None
        if draft is None:
            return []
        path = follow(draft, chosen.tolist())
        self.acceptance.note(lane, max(depths(draft)), len(path))
        for at, node in enumerate(path):  # a turn's end is the last thing that is read of a draft
            if draft.tokens[node] in (self._end, self._database):
                path = path[:at]
                break
        self._settle(lane, draft, path)
        return [start + 1 + node for node in path]

    def _settle(self, lane: Lane, draft: Draft, path: list[int]) -> None:
        """Leave in a lane's state what it goes along, and only that."""
        row, length = int(self.lanes.row[lane.index]), int(self.lanes.length[lane.index])
        lane_rows = np.array([row])
        if self.pager.bytes_each["slot"]:
            before, lane.before = lane.before, None
            assert before is not None
            if len(path) < len(
                draft.tokens
            ):  # what it goes along is read again with the next token
                self.pager.rewind(lane_rows, np.array([before[0]]), before[1])
            return
        if path != list(range(len(path))):
            sources = length + np.array(path, dtype=np.int64)
            targets = length + np.arange(len(path))
            self.pager.move(np.full(len(path), row), sources, targets)
        self.pager.lengths[row] = length + len(path)

    def _put(
        self, lanes: list[Lane], index: np.ndarray, tokens: np.ndarray, log_probs: np.ndarray
    ) -> None:
        """Add a token to each of some lanes, and do what follows from it."""
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
        self, lanes: list[Lane], index: np.ndarray, rows: np.ndarray, logits: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """What lanes write behind their last token and behind each of their drafts.

        Args:
            lanes: any.
            index: (n,) int64, theirs.
            rows: (n,) int64, how many rows of logits each has.
            logits: (sum of rows, vocab) float32.

        Returns:
            tokens, and the model's own log-probability of each, (sum of rows,).
        """
        samplers = [self.lanes.samplers[number] for number in np.unique(self.lanes.sampler[index])]
        deep = [depths(lane.draft) if lane.draft else [] for lane in lanes]
        uniform = histories = None
        if any(sampler.random for sampler in samplers):
            numbers = self.lanes.numbers(lanes, max((max(d) for d in deep if d), default=0))
            depth = np.concatenate([[0, *d] for d in deep])
            uniform = torch.from_numpy(numbers[np.repeat(np.arange(len(lanes)), rows), depth])
        if any(getattr(sampler, "needs_history", False) for sampler in samplers):
            histories = [history for lane in lanes for history in self._histories(lane)]
        each = samplers[0]
        if len(samplers) > 1:
            owners = zip(lanes, rows.tolist(), strict=True)
            each = [lane.request.sampler for lane, n in owners for _ in range(n)]
        chosen = choose(each, logits, uniform, histories)
        log_probs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
        return chosen.cpu().numpy(), log_probs.cpu().numpy()

    def _histories(self, lane: Lane) -> Iterator[History]:
        """What a lane holds, and what it would hold at each of its drafts."""
        yield self.lanes.history(lane)
        paths: list[list[int]] = []
        for token, parent in zip(*lane.draft, strict=True) if lane.draft else ():
            paths.append([*(paths[parent] if parent >= 0 else []), token])
            yield self.lanes.history(lane, paths[-1])

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
