"""Speculation, always lossless: drafts of the next tokens, which one forward pass checks all at once.

A drafter proposes a tree of tokens behind the last token of a lane. The engine runs the tree through the
model, lets the lane choose at each node as it would have without drafts (by its own uniform number for
that place), and goes on along the child that was chosen, as far as there is one. So what a lane writes
is what it would have written, whether it takes the likeliest token or samples; only the number of
forward passes hangs on the drafts. (Leviathan et al., arXiv 2211.17192, accept by chance instead, which
gives the same distribution, but other samples than plain decoding with the same seed.)

``PromptLookup`` (``lookup.py``) copies, ``DraftModel`` asks a smaller model, ``DraftHeads`` the heads of
a model that has some (Medusa, EAGLE).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.generation.paging import Branch, Pager
from toolmem.generation.pieces import NoRoom
from toolmem.generation.planning import SECONDS_A_DRAFT_CALL, model_seconds, pass_seconds
from toolmem.models.fused import FusedDecoder
from toolmem.models.kernels.functions import MANY_ROWS, likeliest

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
        width: tokens of a draft by depth, 1 for chains.
    """

    max_tokens: int
    window: int
    width: float

    def propose(self, lanes: Sequence[Lane], columns: Lanes, limits: Sequence[int]) -> list[Draft]:
        """A draft for each lane, which may be empty.

        Args:
            lanes: that are to write.
            columns: hold their tokens.
            limits: the most tokens that a path of each may have.
        """

    def seconds(self, lanes: int) -> tuple[float, float]:
        """What a draft takes for so many lanes together, and each of its tokens, as ``planning`` reckons."""

    def prefer_chains(self) -> None:
        """The engine checks chains much faster than trees: draft those, unless trees were asked for."""

    def forget(self, lane: Lane | None, tokens: Sequence[int] = ()) -> None:
        """Let go of what is kept of a lane; of what hangs on weights, for all, when None.

        Args:
            lane: that has ended; None when the weights have changed.
            tokens: its dialogue, where it came to its end.
        """


EMPTY = Draft([], [])


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
    width = 1.0

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
        self.fused = FusedDecoder.of(model, self.pager.state)
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
        if self.fused is not None and int(counts.sum()) <= MANY_ROWS:
            hidden = self.fused.step(np.concatenate(chunks), *pager.each_token(rows, counts))
            pager.lengths[rows] += counts
            return likeliest(self.model.logits(hidden[np.cumsum(counts) - 1]))[0]
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
        logits = self.model.logits(hidden[torch.arange(len(rows), device=device), last])
        chosen = np.empty(len(rows), dtype=np.int64)
        chosen[order] = likeliest(logits)[0]
        return chosen

    def seconds(self, lanes: int) -> tuple[float, float]:
        """As ``Drafter.seconds``: a pass of the smaller model a token."""
        calls = SECONDS_A_DRAFT_CALL / (4 if self.fused is not None else 1)
        return 0.0, calls + model_seconds(self.model, lanes)

    def prefer_chains(self) -> None:
        """It drafts nothing else."""

    def forget(self, lane: Lane | None, tokens: Sequence[int] = ()) -> None:
        """As ``Drafter.forget``."""
        for one in list(self._branches) if lane is None else [lane]:
            branch = self._branches.pop(one, None)
            if branch is not None:
                self.pager.free(branch)


class DraftHeads:
    """The heads of a model that drafts for itself: Medusa's or EAGLE's.

    Args:
        model: the engine's own.
        tree: draft trees; False for the likeliest path alone; None for whichever the engine checks
            faster.
    """

    def __init__(self, model: Drafting, tree: bool | None = None) -> None:
        self.model = model
        self.tree = tree
        self.max_tokens = model.topology.depth
        self.window = model.window
        self._shape(tree is not False)

    def _shape(self, tree: bool) -> None:
        from toolmem.models.draft_trees import Topology

        model = self.model
        self.width = len(model.topology) / self.max_tokens if tree else 1.0
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

    def prefer_chains(self) -> None:
        """As ``Drafter.prefer_chains``."""
        if self.tree is None:
            self._shape(tree=False)

    def seconds(self, lanes: int) -> tuple[float, float]:
        """As ``Drafter.seconds``."""
        call = SECONDS_A_DRAFT_CALL + pass_seconds(1, self.model.draft_weights(), lanes)
        return (call, 0.0) if self.model.drafts_at_once else (0.0, call)

    def forget(self, lane: Lane | None, tokens: Sequence[int] = ()) -> None:
        """It keeps nothing; the engine keeps the features."""


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
