"""What lanes read in a step: which tokens in which passes, drafts behind them, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolmem.generation.lanes import BLOCK, Lane
from toolmem.generation.lifecycle import Lifecycle
from toolmem.generation.pieces import NoRoom
from toolmem.generation.planning import HELD_STEPS, Pass, budgeted, hold_back, passes
from toolmem.generation.speculative import (
    ancestors,
    depths,
    trunk,
)
from toolmem.models import kernels

# In invariant mode every pass has one of two shapes, so that no sum's order hangs on the batch.
TILE = 16  # lanes of a decoding pass
CHUNK = 32  # tokens of a reading pass, of one lane
# Tokens of a pass, and of a lane in it, up to which the C code is faster than padded matmuls, for models
# so small that what a pass costs is mostly its calls.
FUSED_ROWS, FUSED_TOKENS = 1024, 128
MANY_CALLS = 32  # a pass's overhead in tokens, from which on a model is so small


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (sizes[0] of them), starts[1], ..."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


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


class Reading(Lifecycle):
    """The first half of a step."""

    def _plan(self) -> Iterator[Pass]:
        """The passes of this step."""
        index = np.fromiter((lane.index for lane in self.running), np.int64, len(self.running))
        waiting = self.lanes.length[index] - self.pager.lengths[self.lanes.row[index]]
        index, waiting = index[waiting > 0], waiting[waiting > 0]
        if self.invariant:
            yield from self._invariant_passes(index, waiting)
        elif len(index):
            hold = not self._ragged and hold_back(waiting, self.overhead)
            if hold and self._held < HELD_STEPS:
                self._held += 1
                index, waiting = index[waiting == 1], waiting[waiting == 1]
            else:
                self._held = 0
            counts = budgeted(waiting, self.step_tokens, self.both_ways)
            if self.drafter is not None:
                counts = counts + self._draft(index, waiting)
            index, counts = index[counts > 0], counts[counts > 0]
            if self._ragged and int(counts.sum()) <= FUSED_ROWS and counts.max() <= FUSED_TOKENS:
                yield Pass(index, counts)
            else:
                yield from passes(index, counts, self.overhead)

    @property
    def _ragged(self) -> bool:
        """Whether passes cost so little beside their calls that all lanes had better share one."""
        return self.fused is not None and self.overhead >= MANY_CALLS

    def _draft(self, index: np.ndarray, waiting: np.ndarray) -> np.ndarray:
        """Draft for the lanes that are about to write; (n,) int64, how many tokens of each."""
        assert self.drafter is not None
        lanes, most = self.lanes, self.drafter.max_tokens
        drafted = np.zeros(len(index), dtype=np.int64)
        costs = self.draft_costs(len(index))
        if not self.acceptance.may_pay(costs):
            return drafted
        # a token that is written without a draft is left at the end of either limit
        left = np.minimum(
            lanes.max_written[index] - lanes.written[index],
            self.model.max_seq_len - lanes.length[index],
        )
        may = (waiting <= 1 + most) & (left > 1)
        if self.pager.bytes_each["slot"]:
            may &= ~lanes.stops[index]  # where it would stop its state could not be gone back to
        places = np.flatnonzero(may).tolist()
        if not places:
            return drafted
        objects = [lanes.objects[index[at]] for at in places]
        limits = [
            min(self.acceptance.limit(lane, costs), int(left[at]) - 1, BLOCK - 1)
            for at, lane in zip(places, objects, strict=True)
        ]
        if not any(limits):
            return drafted
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
        drafting = [lane for lane in objects if lane.draft is not None]
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
        drafts = np.zeros(len(objects), dtype=np.int64)
        if drafting:
            drafts[:] = [len(lane.draft.tokens) if lane.draft else 0 for lane in objects]
        certain = counts - drafts
        done = np.flatnonzero(fed + certain == lanes.length[index])
        ready, own = [objects[i] for i in done.tolist()], 1 + drafts[done]
        if self.fused is not None and self._by_fused(counts, drafting):
            kept = (
                self.fused.room_to_keep(int(counts.sum())) if drafting and self.fused.conv else None
            )
            hidden = self.fused.step(chunk[real], *pager.each_token(rows, counts), kept)
            last = np.cumsum(counts)[done] - 1
            if kept is not None:
                for lane, row in zip(ready, (last - drafts[done]).tolist(), strict=True):
                    if lane.draft is not None:
                        lane.kept = kept, row
            states = hidden[torch.from_numpy(_ranges(last - drafts[done], own))]
            self._has_read(rows, fed, counts, certain)
            if self.drafter is not None and self.drafter.window:
                self._keep_features(objects, hidden.split(counts.tolist()), fed, certain)
            return self._with_followers(Read(ready, own.tolist(), states))
        if drafting:
            self._keep_states(drafting)
        if self.compiled is not None and width == 1:
            table = pager.pages[rows]
            hidden = self.compiled.step(chunk[:, 0], table, fed, pager.slots[rows])[:, None]
        else:
            hidden = self.model.hidden(
                torch.from_numpy(chunk).to(self.device),
                cache=pager.cache(run_rows, run_counts),
                counts=None if real.all() else torch.from_numpy(counts).to(self.device),
                spans=self._spans(index, fed, counts, width) if self.both_ways else None,
                tree=self._trees(objects, width) if drafting else None,
            )
        self._has_read(rows, fed, counts, certain)
        if self.drafter is not None and self.drafter.window:
            self._keep_features(objects, hidden[padding:].unbind(), fed, certain)
        at = torch.from_numpy(np.repeat(done, own) + padding).to(self.device)
        column = torch.from_numpy(_ranges(certain[done] - 1, own)).to(self.device)
        return self._with_followers(Read(ready, own.tolist(), hidden[at, column]))

    def _has_read(
        self, rows: np.ndarray, fed: np.ndarray, counts: np.ndarray, certain: np.ndarray
    ) -> None:
        self.pager.lengths[rows] = fed + counts
        self.counts.tokens_prefilled += int(certain[certain > 1].sum())

    def _by_fused(self, counts: np.ndarray, drafting: list[Lane]) -> bool:
        """Whether the C code runs a pass, token by token, with no padding."""
        if self.both_ways:
            return False
        chains = all(lane.draft is None or lane.draft.is_chain for lane in drafting)
        most = FUSED_ROWS if self._ragged else kernels.MANY_ROWS
        return chains and int(counts.sum()) <= most and int(counts.max()) <= FUSED_TOKENS

    def _keep_states(self, lanes: list[Lane]) -> None:
        """Note what has one size before drafts are read, for when some are not accepted."""
        if self.pager.bytes_each["slot"]:
            rows = self.lanes.row[[lane.index for lane in lanes]]
            snapshot = self.pager.snapshot(rows)
            for at, (lane, row) in enumerate(zip(lanes, rows.tolist(), strict=True)):
                before = [tensor[at : at + 1] for tensor in snapshot]
                lane.before = int(self.pager.lengths[row]), before

    def _keep_features(
        self, lanes: list[Lane], hidden: Sequence[Tensor], fed: np.ndarray, counts: np.ndarray
    ) -> None:
        """Keep what the head read at the last certain tokens of each lane, of its rows of a pass."""
        if not self.acceptance.may_pay(self.draft_costs(len(self.running))):
            for lane in lanes:  # nothing is drafted with so many, and a gap cannot be filled later
                lane.features, lane.featured = None, 0
            return
        columns = (hidden, fed.tolist(), counts.tolist())
        for lane, own, start, count in zip(lanes, *columns, strict=True):
            known = max(0, lane.featured - start)  # read before, and again after a draft failed
            self._add_features(lane, own[known:count], start + count)

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
