"""Speculation, always lossless: drafts of the next tokens, which one forward pass checks all at once.

A drafter proposes a tree of tokens behind the last token of a lane. The engine runs the tree through the
model, lets the lane choose at each node as it would have without drafts (by its own uniform number for
that place), and goes on along the child that was chosen, as far as there is one. So what a lane writes
is what it would have written, whether it takes the likeliest token or samples; only the number of
forward passes hangs on the drafts. (Leviathan et al., arXiv 2211.17192, accept by chance instead, which
gives the same distribution, but other samples than plain decoding with the same seed.)

``PromptLookup`` copies from the dialogue, ``DraftModel`` asks a smaller model, ``DraftHeads`` the heads of
a model that has some (Medusa, EAGLE).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.generation.paging import Branch, NoRoom, Pager

if TYPE_CHECKING:
    from toolmem.generation.lanes import Lane, Lanes
    from toolmem.models.drafting import Drafting
    from toolmem.models.language_model import LanguageModel


class Draft(NamedTuple):
    """Proposed tokens.

    Args:
        tokens: a tree's, parents before children.
        parents: the node that each stands behind, -1 for the lane's last token.
    """

    tokens: list[int]
    parents: list[int]

    @property
    def is_chain(self) -> bool:
        """Whether each stands behind the one before."""
        return self.parents == list(range(-1, len(self.parents) - 1))


def chain(tokens: Sequence[int]) -> Draft:
    """Tokens that follow each other."""
    return Draft(list(tokens), list(range(-1, len(tokens) - 1)))


class Drafter(Protocol):
    """Where drafts come from.

    Args:
        max_tokens: the most tokens that a path of a draft has.
        window: how many of a lane's last features it wants to see; 0 for none.
    """

    max_tokens: int
    window: int

    def propose(self, lanes: Sequence[Lane], columns: Lanes, limits: Sequence[int]) -> list[Draft]:
        """A draft for each lane, which may be empty.

        Args:
            lanes: that are to write.
            columns: hold their tokens.
            limits: the most tokens that a path of each may have.
        """

    def forget(self, lane: Lane | None) -> None:
        """Let go of what is kept of a lane; of all when None, since weights have changed."""


EMPTY = Draft([], [])


class PromptLookup:
    """What followed where the lane's last tokens stood before, most lately (Saxena 2023, n-gram).

    Args:
        max_tokens: drafted at a time.
        max_ngram: tokens at the end that are looked for, at first.
        min_ngram: and at last.
    """

    window = 0

    def __init__(self, max_tokens: int = 8, max_ngram: int = 4, min_ngram: int = 2) -> None:
        if not 1 <= min_ngram <= max_ngram or max_tokens < 1:
            raise ToolmemError("max_tokens must be at least 1, and 1 <= min_ngram <= max_ngram")
        self.max_tokens = max_tokens
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    def propose(self, lanes: Sequence[Lane], columns: Lanes, limits: Sequence[int]) -> list[Draft]:
        """As ``Drafter.propose``: all lanes are searched at once."""
        index = np.fromiter((lane.index for lane in lanes), np.int64, len(lanes))
        lengths = columns.length[index]
        tokens = columns.tokens[index, : int(lengths.max())]
        places = np.arange(tokens.shape[1])
        # same[i, j]: the tokens that end at j are those that end the dialogue
        same = places < lengths[:, None] - 1
        found = np.full(len(lanes), -1)
        for n in range(1, self.max_ngram + 1):
            back = n - 1
            last = tokens[np.arange(len(lanes)), np.maximum(lengths - n, 0)]
            moved = np.zeros_like(same)
            moved[:, back:] = tokens[:, : tokens.shape[1] - back] == last[:, None]
            same &= moved & (lengths > n)[:, None]
            if n >= self.min_ngram:
                latest = np.where(same, places, -1).max(axis=1)
                found = np.where(latest >= 0, latest, found)
        drafts = []
        for at, (place, limit) in enumerate(zip(found.tolist(), limits, strict=True)):
            stop = min(place + 1 + limit, int(lengths[at]))
            drafts.append(chain(tokens[at, place + 1 : stop].tolist()) if place >= 0 else EMPTY)
        return drafts

    def forget(self, lane: Lane | None) -> None:
        """It keeps nothing."""


class DraftModel:
    """A smaller model of the same vocabulary that goes on greedily.

    Args:
        model: drafts.
        max_tokens: drafted at a time.
        max_lanes: of the engine.
        page_size: tokens of a page of its own state.
        memory_limit: bytes of that state; lanes for which it has no room are not drafted for.
    """

    window = 0

    def __init__(
        self,
        model: LanguageModel,
        max_tokens: int = 4,
        *,
        max_lanes: int = 128,
        page_size: int = 16,
        memory_limit: int = 2**30,
    ) -> None:
        if max_tokens < 1:
            raise ToolmemError(f"max_tokens is {max_tokens}: it must be at least 1")
        if model.attention_mask == "prefix":
            raise ToolmemError(
                "a draft model must be causal: attention_mask prefix reads whole spans"
            )
        self.model = model
        self.max_tokens = max_tokens
        self.pager = Pager(
            model, max_active=max_lanes, page_size=page_size, memory_limit=memory_limit
        )
        self._branches: dict[Lane, Branch] = {}

    @torch.no_grad()
    def propose(self, lanes: Sequence[Lane], columns: Lanes, limits: Sequence[int]) -> list[Draft]:
        """As ``Drafter.propose``: reads what it has not read, then writes token by token."""
        drafts = [EMPTY] * len(lanes)
        places = [at for at, lane in enumerate(lanes) if limits[at] and self._activate(lane)]
        room = self.model.max_seq_len
        places = [at for at in places if columns.length[lanes[at].index] + limits[at] <= room]
        if not places:
            return drafts
        index = np.array([lanes[at].index for at in places])
        rows = np.array([self._branches[lanes[at]].row for at in places])
        fed, lengths = self.pager.lengths[rows].copy(), columns.length[index]
        chunks = [columns.tokens[i, a:b] for i, a, b in zip(index, fed, lengths, strict=True)]
        steps = max(limits[at] for at in places)
        written = np.zeros((len(places), 0), dtype=np.int64)
        try:
            self.pager.prepare(rows, lengths - fed)
            written = self._feed(rows, chunks)[:, None]
            certain = self.pager.snapshot(rows)
            for _ in range(steps - 1):
                self.pager.prepare(rows, np.ones(len(rows), dtype=np.int64))
                new = self._feed(rows, list(written[:, -1:]))
                written = np.concatenate((written, new[:, None]), axis=1)
        except NoRoom:
            pass
        if written.shape[1]:
            self.pager.rewind(rows, lengths, certain)
        for at, tokens in zip(places, written.tolist(), strict=True):
            drafts[at] = chain(tokens[: limits[at]])
        return drafts

    def _activate(self, lane: Lane) -> bool:
        branch = self._branches.get(lane)
        if branch is None:
            branch = self._branches[lane] = self.pager.new()
        try:
            self.pager.activate(branch)
        except NoRoom:
            return False
        return True

    def _feed(self, rows: np.ndarray, chunks: Sequence[np.ndarray]) -> np.ndarray:
        """Read chunks, and the likeliest token behind each."""
        counts = np.array([len(chunk) for chunk in chunks])
        pager, device = self.pager, self.pager.state.device
        order = np.argsort(-(-(pager.lengths[rows] + counts) // pager.page_size), kind="stable")
        padded = np.zeros((len(rows), int(counts.max())), dtype=np.int64)
        for at, i in enumerate(order):
            padded[at, : counts[i]] = chunks[i]
        even = bool((counts == counts.max()).all())
        hidden = self.model.hidden(
            torch.from_numpy(padded).to(device),
            cache=pager.cache(rows[order], counts[order]),
            counts=None if even else torch.from_numpy(counts[order]).to(device),
        )
        pager.lengths[rows] += counts
        last = torch.from_numpy(counts[order] - 1).to(device)
        best = self.model.logits(hidden[torch.arange(len(rows), device=device), last]).argmax(-1)
        chosen = np.empty(len(rows), dtype=np.int64)
        chosen[order] = best.cpu().numpy()
        return chosen

    def forget(self, lane: Lane | None) -> None:
        """As ``Drafter.forget``."""
        for one in list(self._branches) if lane is None else [lane]:
            branch = self._branches.pop(one, None)
            if branch is not None:
                self.pager.free(branch)


class DraftHeads:
    """The heads of a model that drafts for itself: Medusa's or EAGLE's.

    Args:
        model: the engine's own.
        tree: draft trees; else only the likeliest path, as for models whose state is of one size.
    """

    def __init__(self, model: Drafting, tree: bool = True) -> None:
        from toolmem.models.draft_trees import Topology

        self.model = model
        self.max_tokens = model.topology.depth
        self.window = model.window
        self.topologies = {
            limit: Topology.of(path for path in model.topology.paths if len(path) <= limit)
            if tree
            else Topology.chain(limit)
            for limit in range(1, self.max_tokens + 1)
        }

    @torch.no_grad()
    def propose(self, lanes: Sequence[Lane], columns: Lanes, limits: Sequence[int]) -> list[Draft]:
        """As ``Drafter.propose``."""
        drafts = [EMPTY] * len(lanes)
        for limit in sorted(set(limits) - {0}):
            places = [
                at
                for at, lane in enumerate(lanes)
                if limits[at] == limit and lane.features is not None
            ]
            if not places:
                continue
            features, tokens, counts = self._windows([lanes[at] for at in places], columns)
            found = self.model.draft(features, tokens, counts, self.topologies[limit])
            parents = found.parents.tolist()
            for at, row in zip(places, found.tokens.tolist(), strict=True):
                drafts[at] = Draft(row, parents)
        return drafts

    def _windows(self, lanes: Sequence[Lane], columns: Lanes) -> tuple[Tensor, Tensor, Tensor]:
        """The last features of lanes, and the token behind each."""
        kept = [lane.features for lane in lanes if lane.features is not None]
        width = max(len(one) for one in kept)
        features = kept[0].new_zeros(len(kept), width, kept[0].shape[-1])
        tokens = torch.zeros(len(kept), width, dtype=torch.int64)
        for at, (lane, one) in enumerate(zip(lanes, kept, strict=True)):
            features[at, width - len(one) :] = one
            stop = int(columns.length[lane.index])
            last = columns.tokens[lane.index, stop - len(one) : stop]
            tokens[at, width - len(one) :] = torch.from_numpy(last.copy())
        counts = torch.tensor([len(one) for one in kept], device=features.device)
        return features, tokens.to(features.device), counts

    def forget(self, lane: Lane | None) -> None:
        """It keeps nothing; the engine keeps the features."""


class Acceptance:
    """How drafts fared, and how long the next ones are to be.

    A lane's drafts get longer while all of their tokens are right and shorter when few are; one for which
    none were right for a while tries again now and then.

    Args:
        max_tokens: the longest path.
    """

    PATIENCE = 8  # passes without drafts between two tries, where they have failed

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.counts: Counter[tuple[int, int]] = Counter()  # (path's length, tokens right): passes

    def limit(self, lane: Lane) -> int:
        """The longest path to draft for a lane now."""
        if lane.draft_limit is None:
            lane.draft_limit = min(4, self.max_tokens)
        if lane.draft_limit:
            return lane.draft_limit
        lane.draft_pause += 1
        if lane.draft_pause >= self.PATIENCE:
            lane.draft_pause = 0
            lane.draft_limit = 1
        return lane.draft_limit

    def note(self, lane: Lane, drafted: int, right: int) -> None:
        """Learn from one pass.

        Args:
            lane: whose.
            drafted: tokens of the longest path; 0 tells nothing.
            right: that were accepted.
        """
        if not drafted:
            return
        self.counts[drafted, right] += 1
        limit = lane.draft_limit or 1
        if right == drafted >= limit:
            limit = min(self.max_tokens, 2 * limit)
        elif 2 * right < drafted:
            limit = min(limit, drafted) // 2
        lane.draft_limit = limit

    def histogram(self) -> dict[str, object]:
        """Plain data: passes by length of path and tokens accepted, and tokens per pass."""
        passes = sum(self.counts.values())
        accepted = sum(right * n for (_, right), n in self.counts.items())
        return {
            "passes": passes,
            "accepted": accepted,
            "tokens_per_pass": 1 + accepted / passes if passes else 1.0,
            "by_length": {
                str(drafted): {
                    str(right): n
                    for (other, right), n in sorted(self.counts.items())
                    if other == drafted
                }
                for drafted in sorted({drafted for drafted, _ in self.counts})
            },
        }


def trunk(draft: Draft) -> Draft:
    """The path of first children: of a tree by rank, the likeliest."""
    tokens, at = [], -1
    while at in draft.parents:
        at = draft.parents.index(at)
        tokens.append(draft.tokens[at])
    return chain(tokens)


def depths(draft: Draft) -> list[int]:
    """By how much each node stands behind the lane's last token."""
    found: list[int] = []
    for parent in draft.parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return found


def ancestors(draft: Draft) -> np.ndarray:
    """(1 + nodes, 1 + nodes) bool: what each token of the chunk sees of it; the first is the lane's last."""
    n = len(draft.tokens)
    sees = np.eye(n + 1, dtype=bool)
    for node, parent in enumerate(draft.parents):
        sees[node + 1] |= sees[parent + 1]
    return sees


def follow(draft: Draft, chosen: Sequence[int]) -> list[int]:
    """The nodes that plain decoding would have written.

    Args:
        draft: the tree.
        chosen: what is chosen behind the lane's last token, and behind each node.
    """
    children: dict[tuple[int, int], int] = {}
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        children.setdefault((parent, token), node)
    path, at = [], -1
    while (at, chosen[at + 1]) in children:
        at = children[at, chosen[at + 1]]
        path.append(at)
    return path
