"""What lanes write in a step: tokens, the drafts that were right, ends, and calls to tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Empty
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from toolmem.data.turn_format import NO_TOKEN
from toolmem.generation.lanes import Lane
from toolmem.generation.reading import Read, Reading
from toolmem.generation.reference import forced_answer
from toolmem.generation.sampling import Greedy, History, choose
from toolmem.generation.speculative import (
    Draft,
    depths,
    follow,
)
from toolmem.models.kernels.functions import likeliest
from toolmem.tools.base import extract_query

if TYPE_CHECKING:
    from concurrent.futures import Future

    from toolmem.tools.base import Answer


class Writing(Reading):
    """The second half of a step."""

    def _write(self, read: list[Read]) -> None:
        """Let each lane that has read all of its tokens write the next one, and those drafted right."""
        lanes = [lane for part in read for lane in part.lanes]
        if not lanes:
            return
        rows = np.array([n for part in read for n in part.rows], dtype=np.int64)
        index = np.fromiter((lane.index for lane in lanes), np.int64, len(lanes))
        hidden = torch.cat([part.hidden for part in read])
        logits = self._logits(hidden)
        try:
            tokens, log_probs = self._choose(lanes, index, rows, logits)
        except Exception:  # whose is it?
            good = self._that_choose(lanes, index, rows, logits)
            keep = np.repeat(good, rows)
            lanes = [lane for lane, fine in zip(lanes, good.tolist(), strict=True) if fine]
            if not lanes:
                return
            index, rows, hidden = index[good], rows[good], hidden[torch.from_numpy(keep)]
            tokens, log_probs = self._choose(lanes, index, rows, logits[torch.from_numpy(keep)])
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
        for at, path in enumerate(accepted):
            # Drafts hold no end of a turn but at their own: what is before it needs no looking at,
            # where nothing else could stop a lane.
            if len(path) > 1 and not self.lanes.stops[index[at]]:
                many = np.array(path[:-1])
                self.lanes.used(index[at], len(many))
                self.lanes.write_many(lanes[at], tokens[many], log_probs[many])
                self.counts.tokens_sampled += len(many)
                del path[:-1]
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
        kept, lane.kept = lane.kept, None
        if kept is not None:
            assert self.fused is not None
            if len(path) < len(draft.tokens):
                self.fused.go_back(int(self.pager.slots[row]), kept[0], kept[1] + len(path))
            self.pager.lengths[row] = length + len(path)
            return
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
            if ended[at] and (asks := self._asks(lane)) is not False:
                if asks:
                    callers.append(lane)
            elif ended[at]:
                self.finish(lane, "end")
            elif (stopped := self._stopped(lane, int(tokens[at]))) is None:
                continue
            elif stopped:
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
        numbers = set(self.lanes.sampler[index].tolist())
        samplers = [self.lanes.samplers[number] for number in numbers]
        if all(type(sampler) is Greedy for sampler in samplers):
            return likeliest(logits)
        deep = [depths(lane.draft) if lane.draft else [] for lane in lanes]
        uniform = histories = None
        if any(sampler.random for sampler in samplers):
            drawn = self.lanes.numbers(lanes, max((max(d) for d in deep if d), default=0))
            depth = np.concatenate([[0, *d] for d in deep])
            uniform = torch.from_numpy(drawn[np.repeat(np.arange(len(lanes)), rows), depth])
        if any(getattr(sampler, "needs_history", False) for sampler in samplers):
            histories = [history for lane in lanes for history in self._histories(lane)]
        each = samplers[0]
        if len(samplers) > 1:
            owners = zip(lanes, rows.tolist(), strict=True)
            each = [lane.request.sampler for lane, n in owners for _ in range(n)]
        chosen = choose(each, logits, uniform, histories)
        log_probs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
        return chosen.cpu().numpy(), log_probs.cpu().numpy()

    def _that_choose(
        self, lanes: list[Lane], index: np.ndarray, rows: np.ndarray, logits: Tensor
    ) -> np.ndarray:
        """(n,) bool: which lanes' samplers choose by themselves; the others end by what they raise."""
        good = np.ones(len(lanes), dtype=bool)
        stops = np.cumsum(rows).tolist()
        for at, lane in enumerate(lanes):
            own = slice(at, at + 1)
            mine = logits[stops[at] - int(rows[at]) : stops[at]]
            try:
                self._choose([lane], index[own], rows[own], mine)
            except Exception as error:
                good[at] = False
                self.fail(lane, error)
        return good

    def _histories(self, lane: Lane) -> Iterator[History]:
        """What a lane holds, and what it would hold at each of its drafts."""
        yield self.lanes.history(lane)
        paths: list[list[int]] = []
        for token, parent in zip(*lane.draft, strict=True) if lane.draft else ():
            paths.append([*(paths[parent] if parent >= 0 else []), token])
            yield self.lanes.history(lane, paths[-1])

    def _stopped(self, lane: Lane, token: int) -> bool | None:
        """Whether what it wrote last is one of its stop tokens, or ends one of its stop strings.

        None where that cannot be told: it has failed.
        """
        request = lane.request
        if token in request.stop_tokens:
            return True
        if not request.stop_strings or token == self._database:
            return False
        # a token of text has a byte at least, and those of a character may be cut at the front
        try:
            longest = max(len(string.encode(errors="replace")) for string in request.stop_strings)
            # of a prompt without marks of turns, what stands there is not the assistant's
            tail = min(longest + 4, int(self.lanes.written[lane.index]))
            said = self.lanes.turn_text(lane, tail)
            return any(string in said for string in request.stop_strings)
        except Exception as error:
            self.fail(lane, error)
            return None

    def _asks(self, lane: Lane) -> bool | None:
        """Whether the turn that it has just ended is a call by its text, and not by how it ends.

        None where that cannot be told: it has failed.
        """
        if self._database != NO_TOKEN:
            return False
        try:
            return self.lanes.call_text(lane) is not None
        except Exception as error:
            self.fail(lane, error)
            return None

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
        allowed, texts = self._each(allowed, self.lanes.call_text)
        if not allowed or self.calls is None:
            return
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

    def _each(
        self, lanes: list[Lane], ask: Callable[[Lane], str | None]
    ) -> tuple[list[Lane], list[str]]:
        """A text of each lane, and the lanes; those for which asking raises end by it."""
        good, texts = [], []
        for lane in lanes:
            try:
                texts.append(ask(lane) or "")
                good.append(lane)
            except Exception as error:
                self.fail(lane, error)
        return good, texts

    def _encoded(self, lanes: list[Lane]) -> Iterator[tuple[Lane, Answer, list[int]]]:
        """The answer of each lane's tool with its token ids; a lane whose answer has none ends by it."""
        lanes, texts = self._each(lanes, lambda lane: _answer(lane).text)
        try:
            encoded = self.tokenizer.encode_batch(texts)
        except Exception:  # whose is it?
            encoded = []
            for lane, text in zip(list(lanes), texts, strict=True):
                try:
                    encoded += self.tokenizer.encode_batch([text])
                except Exception as error:
                    lanes.remove(lane)
                    self.fail(lane, error)
        for lane, ids in zip(lanes, encoded, strict=True):
            yield lane, _answer(lane), ids

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
        for lane, answer, ids in list(self._encoded(lanes)):
            lane.tool_calls.append((lane.query, answer))
            lane.future = None
            self.counts.tool_errors += answer.error
            forced = forced_answer(ids, self.form)
            if int(self.lanes.length[lane.index]) + len(forced) > self.model.max_seq_len:
                self.finish(lane, "length")
                continue
            self.lanes.force(lane, forced)
            self.counts.tokens_forced += len(forced)
            if self.lanes.full(np.array([lane.index]))[0]:
                self.finish(lane, "length")


def _answer(lane: Lane) -> Answer:
    assert lane.future is not None
    return lane.future.result()
