"""Who owns which page: references, copies on write, a limit of memory, and the way out and back.

A ``Branch`` is the decoding state of one dialogue, or of a node of a tree of dialogues: pages of tokens
and, where the model keeps something of one size (windows, recurrent states), a slot. Forking a branch
copies nothing: pages and slot gain a reference, and what is shared is copied when one of the owners
writes to it.

A branch is *active* while a forward pass may run over it: its pages and slot are in the model's arenas
(``toolmem.models.paged``) and stay there. Those of others may be sent to host memory, and beyond
``host_limit`` to a file, the longest idle first, when an active branch needs their place; they come back
when their branch is activated again. So no limit is ever passed, and nothing is lost.

Paged attention: arXiv 2309.06180. Sharing prefixes by a tree: arXiv 2312.07104 (``prefixes.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.generation.pieces import NoRoom, Piece, PieceStore
from toolmem.models.paged import PagedCache

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel


class Branch:
    """The decoding state of a dialogue; made and changed by ``Pager`` alone."""

    __slots__ = ("_length", "pager", "pages", "row", "slot")

    def __init__(self, pager: Pager) -> None:
        self.pager = pager
        self.pages: list[Piece] = []
        self.slot: Piece | None = None
        self.row: int | None = None  # of the pager's tables, while active
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens that it holds."""
        return self._length if self.row is None else int(self.pager.lengths[self.row])

    def pieces(self) -> list[Piece]:
        """All that it owns."""
        return self.pages if self.slot is None else [*self.pages, self.slot]


class Pager(PieceStore):
    """All decoding state of one model.

    Args:
        model: whose.
        max_active: branches that may be active at once.
        page_size: tokens of a page.
        memory_limit: bytes of pages and slots where the model is.
        host_limit: bytes of them in host memory besides; beyond it they go to a file.
        folder: where that file is made; the system's folder for temporary files when None. It has no
            name, so that nothing is left of it.

    Raises:
        ToolmemError: for limits that cannot hold a single page.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_active: int,
        page_size: int = 16,
        memory_limit: int = 2 * 2**30,
        host_limit: int = 2 * 2**30,
        folder: str | Path | None = None,
    ) -> None:
        if page_size < 1 or max_active < 1:
            raise ToolmemError("page_size and max_lanes must be at least 1")
        super().__init__(model, page_size, memory_limit, host_limit, folder)
        # The tables: a row an active branch.
        width = self.pages_for(model.max_seq_len)
        self.pages = np.zeros((max_active, width + 1), dtype=np.int64)
        self.lengths = np.zeros(max_active, dtype=np.int64)
        self.slots = np.zeros(max_active, dtype=np.int64)
        self._owned = np.zeros(max_active, dtype=np.int64)  # pages that it may write its tokens to
        self._shared = np.zeros(max_active, dtype=bool)  # the last page or the slot may be shared
        self._branches: list[Branch | None] = [None] * max_active
        self._free_rows = list(range(max_active - 1, -1, -1))

    # Branches

    def new(self) -> Branch:
        """A branch without tokens."""
        return Branch(self)

    def fork(self, branch: Branch) -> Branch:
        """Another branch of the same tokens; what they share is copied when either writes to it."""
        new = Branch(self)
        new._length = branch.length
        new.pages = branch.pages[: self.pages_for(new._length)]
        new.slot = branch.slot
        for piece in new.pieces():
            piece.refs += 1
        if branch.row is not None:
            self._shared[branch.row] = True
        return new

    def free(self, branch: Branch) -> None:
        """Give up a branch, active or not."""
        if branch.row is not None:
            self.deactivate(branch)
        for piece in branch.pieces():
            self.release(piece)
        branch.pages, branch.slot, branch._length = [], None, 0

    def adopt(self, pages: Sequence[Piece], slot: Piece | None, length: int) -> Branch:
        """A branch over pieces that somebody else owns too."""
        new = Branch(self)
        new.pages, new.slot, new._length = list(pages), slot, length
        for piece in new.pieces():
            piece.refs += 1
        return new

    def touched(self, branch: Branch) -> None:
        """Note that somebody else has taken a reference to the last page or the slot."""
        if branch.row is not None:
            self._shared[branch.row] = True

    def activate(self, branch: Branch) -> int:
        """Bring a branch in and keep it there.

        Returns:
            its row in the tables.

        Raises:
            NoRoom: when there is no place for it; the branch is as it was.
        """
        if branch.row is not None:
            return branch.row
        if not self._free_rows:
            raise NoRoom
        pinned: list[Piece] = []
        try:
            for piece in branch.pieces():
                self._pin(piece)
                pinned.append(piece)
        except NoRoom:
            for piece in pinned:
                self._unpin(piece)
            raise
        row = self._free_rows.pop()
        branch.row = row
        self._branches[row] = branch
        self.lengths[row] = branch._length
        self._owned[row] = len(branch.pages)
        self.pages[row] = 0
        self.pages[row, : len(branch.pages)] = [piece.index for piece in branch.pages]
        self.slots[row] = 0 if branch.slot is None else branch.slot.index
        self._shared[row] = True  # looked at once, before it is written to
        return row

    def deactivate(self, branch: Branch) -> None:
        """Let the pieces of a branch be sent away when others need their place."""
        row = branch.row
        if row is None:
            return
        length = int(self.lengths[row])
        spare = branch.pages[self.pages_for(length) :]  # of drafts that were not accepted
        branch.pages = branch.pages[: self.pages_for(length)]
        branch._length, branch.row = length, None
        self._branches[row] = None
        self._free_rows.append(row)
        for piece in reversed(branch.pieces()):  # the first pages, which others may share, go last
            self._unpin(piece)
        for piece in spare:
            self._unpin(piece)
            self.release(piece)

    def send_away(self, branch: Branch) -> None:
        """Move what no active branch uses to host memory now (a tool takes long, a branch is cold)."""
        self.deactivate(branch)
        for piece in branch.pieces():
            if piece.place is not None and not piece.pins:
                self._page_out(piece)

    # Forward passes

    def prepare(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Make room to write: pages for new tokens, own copies of what is shared.

        Args:
            rows: (n,) int64 of active branches.
            counts: (n,) int64, new tokens of each.

        Raises:
            NoRoom: when there is not enough; what rows have got so far they keep.
        """
        need = -(-(self.lengths[rows] + counts) // self.page_size)
        if not self.bytes_each["page"]:
            need[:] = 0
        wanting = (need > self._owned[rows]) | self._shared[rows]
        for row, pages in zip(rows[wanting].tolist(), need[wanting].tolist(), strict=True):
            branch = self._branches[row]
            assert branch is not None
            if self._shared[row]:
                self._own(branch, row)
            while len(branch.pages) < pages:
                piece = self._new("page")
                self.pages[row, len(branch.pages)] = piece.index
                branch.pages.append(piece)
                self._owned[row] = len(branch.pages)

    def _own(self, branch: Branch, row: int) -> None:
        """Copy on write: the page that the next token goes to, and the slot."""
        first = int(self.lengths[row]) // self.page_size
        for index in range(first, len(branch.pages)):
            branch.pages[index] = piece = self._unshared(branch.pages[index])
            self.pages[row, index] = piece.index
        if self.bytes_each["slot"]:
            if branch.slot is None:
                branch.slot = self._new("slot")
                self.state.reset(branch.slot.index)
            else:
                branch.slot = self._unshared(branch.slot)
            self.slots[row] = branch.slot.index
        self._shared[row] = False

    def _unshared(self, piece: Piece) -> Piece:
        if piece.refs == 1:
            return piece
        try:
            new = self._new(piece.kind)
        except NoRoom:
            if piece.droppable is not None:
                piece.droppable()  # shared with a mere cache, which gives way
                if piece.refs == 1:
                    return piece
            if piece.pins > 1:
                raise
            # The other owners wait: theirs goes to the host, and what lies here becomes our own.
            place = piece.index
            self._unpin(piece)
            self._page_out(piece)
            self.release(piece)
            new = self._new(piece.kind)
            assert new.place == place
            return new
        self.state.copy(piece.kind, piece.index, new.index)
        self._unpin(piece)
        self.release(piece)
        return new

    def cache(self, rows: np.ndarray, counts: np.ndarray) -> PagedCache:
        """The cache of a forward pass over active branches that ``prepare`` has seen to.

        Args:
            rows: (n,) int64; rows that need equally many pages stand together. -1 for a row of padding.
            counts: (n,) int64, new tokens of each.
        """
        lengths = np.where(rows < 0, 0, self.lengths[rows])
        ends = -(-(lengths + counts) // self.page_size)
        width = int(ends.max())
        pages = np.zeros((len(rows), width + 1), dtype=np.int64)
        if self.bytes_each["page"]:
            pages[:, :width] = np.where(
                (np.arange(width) < ends[:, None]) & (rows >= 0)[:, None],
                self.pages[rows, :width],
                0,
            )
        breaks = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(rows)]
        groups = [
            (slice(start, stop), int(ends[start])) for start, stop in itertools.pairwise(breaks)
        ]
        device = self.state.device
        slots = None
        if self.bytes_each["slot"]:
            slots = torch.from_numpy(np.where(rows < 0, 0, self.slots[rows])).to(device)
        return self.state.cache(
            torch.from_numpy(pages).to(device),
            torch.from_numpy(lengths).to(device),
            int(lengths.max()),
            groups,
            slots,
        )

    def each_token(
        self, rows: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where each token of a pass goes that ``prepare`` has seen to, as ``FusedDecoder.step`` takes it.

        Args:
            rows: (n,) int64 of active branches.
            counts: (n,) int64, new tokens of each.

        Returns:
            by token: its branch's pages, the tokens before it, and its branch's slot.
        """
        own = np.repeat(rows, counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        lengths = self.lengths[own] + np.arange(len(own)) - first
        most = int(lengths.max()) // self.page_size + 1
        return self.pages[own, :most], lengths, self.slots[own]

    def snapshot(self, rows: np.ndarray) -> list[Tensor]:
        """Copies of what has one size, of active branches, for ``rewind``; nothing where all grows."""
        slots = torch.from_numpy(self.slots[rows])
        return [
            arena.index_select(0, slots.to(arena.device)) for arena in self.state.arenas("slot")
        ]

    def rewind(self, rows: np.ndarray, lengths: np.ndarray, snapshot: Sequence[Tensor]) -> None:
        """Forget tokens behind ``lengths``; what has one size is put back from a snapshot.

        Args:
            rows: (n,) int64 of active branches.
            lengths: (n,) int64, tokens to keep.
            snapshot: rows of ``snapshot`` of these branches, taken at these lengths.
        """
        self.lengths[rows] = lengths
        slots = torch.from_numpy(self.slots[rows])
        for arena, copy in zip(self.state.arenas("slot"), snapshot, strict=True):
            arena.index_copy_(0, slots.to(arena.device), copy)

    def move(self, rows: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy tokens of active branches to other places of theirs.

        Args:
            rows: (n,) int64.
            sources: (n,) int64, which token of the branch.
            targets: (n,) int64, the place that it is to have.
        """

        def where(tokens: np.ndarray) -> tuple[Tensor, Tensor]:
            pages, offsets = self.pages[rows, tokens // self.page_size], tokens % self.page_size
            device = self.state.device
            return torch.from_numpy(pages).to(device), torch.from_numpy(offsets).to(device)

        self.state.move(where(sources), where(targets))

    # What fits

    def fits(self, tokens: int) -> bool:
        """Whether one dialogue of so many tokens could lie in memory, alone."""
        return not self.bytes_each["page"] or self.pages_for(tokens) <= self.capacity["page"]

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page_size) if self.bytes_each["page"] else 0
