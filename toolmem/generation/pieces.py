"""Pages and slots, wherever they are: in the model's arenas, in host memory, in a file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.generation.spill import SpillFile
from toolmem.models.paged import PagedState, state_sizes

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel

Kind = Literal["page", "slot"]
KINDS: tuple[Kind, Kind] = ("page", "slot")
# Pages for one slot, where a model needs both: as for dialogues of 16 pages.
PAGES_A_SLOT = 16


class NoRoom(Exception):  # noqa: N818 - a state of affairs, which callers see to
    """Everything in memory is in use by active branches."""


class Piece:
    """A page or a slot, wherever it is at the moment.

    Args:
        kind: which of them.
        place: where it lies in the arenas; None while it is elsewhere.
    """

    __slots__ = ("copies", "droppable", "kind", "pins", "place", "refs", "spilled")

    def __init__(self, kind: Kind, place: int) -> None:
        self.kind = kind
        self.place: int | None = place
        self.refs = 1  # owners: branches, and the tree of prefixes
        self.pins = 0  # active branches among them
        self.copies: list[Tensor] | None = None  # on the host
        self.spilled: int | None = None  # where in the file
        self.droppable: Callable[[], None] | None = None  # how a mere cache lets go of it

    @property
    def index(self) -> int:
        """Where it lies in the arenas: only while it does."""
        assert self.place is not None
        return self.place


class PieceStore:
    """Pieces in the arenas up to a limit, others sent away and brought back.

    Args:
        model: whose decoding state they hold.
        page_size: tokens of a page.
        memory_limit: bytes of pages and slots where the model is.
        host_limit: bytes of them in host memory besides; beyond it they go to a file.
        folder: where that file is made; the system's folder for temporary files when None.

    Raises:
        ToolmemError: for limits that cannot hold a single page.
    """

    def __init__(
        self,
        model: LanguageModel,
        page_size: int,
        memory_limit: int,
        host_limit: int,
        folder: str | Path | None,
    ) -> None:
        self.page_size = page_size
        page_bytes, slot_bytes = state_sizes(model, page_size)
        self.capacity = _capacity(memory_limit, page_bytes, slot_bytes)
        self.state = PagedState(
            model, self.capacity["page"] + 1, self.capacity["slot"] + 1, page_size
        )
        self.bytes_each = {"page": page_bytes, "slot": slot_bytes}
        self.memory_limit = memory_limit
        self.host_limit = host_limit
        self.host_bytes = 0
        self._folder = folder
        self._files: dict[Kind, SpillFile] = {}
        self._fresh = dict.fromkeys(KINDS, 1)  # 0 is padding's
        self._free: dict[Kind, list[int]] = {kind: [] for kind in KINDS}
        self._idle: dict[Kind, OrderedDict[Piece, None]] = {kind: OrderedDict() for kind in KINDS}
        self._host: OrderedDict[Piece, None] = OrderedDict()
        self.live = dict.fromkeys(KINDS, 0)  # pieces that anybody owns, wherever they are
        self.paged_out = self.paged_in = 0  # pieces, so far

    def _new(self, kind: Kind) -> Piece:
        """A pinned piece of its own."""
        piece = Piece(kind, self._place(kind))
        piece.pins = 1
        self.live[kind] += 1
        return piece

    def release(self, piece: Piece) -> None:
        """Give up a reference."""
        piece.refs -= 1
        if piece.refs:
            return
        assert not piece.pins, "a page was freed while a forward pass may use it"
        self.live[piece.kind] -= 1
        self._forget_elsewhere(piece)
        if piece.place is not None:
            self._idle[piece.kind].pop(piece, None)
            self._free[piece.kind].append(piece.place)
            piece.place = None

    def _forget_elsewhere(self, piece: Piece) -> None:
        if piece.copies is not None:
            piece.copies = None
            self._host.pop(piece, None)
            self.host_bytes -= self.bytes_each[piece.kind]
        if piece.spilled is not None:
            self._files[piece.kind].free(piece.spilled)
            piece.spilled = None

    def _place(self, kind: Kind) -> int:
        """A free place in the arenas, made free if need be."""
        if self._free[kind]:
            return self._free[kind].pop()
        if self._fresh[kind] <= self.capacity[kind]:
            self._fresh[kind] += 1  # pieces that were never used: the peak grows with them
            return self._fresh[kind] - 1
        while not self._free[kind]:
            if not self._idle[kind]:
                raise NoRoom
            piece = next(iter(self._idle[kind]))
            if piece.droppable is not None and piece.refs == 1:
                piece.droppable()  # a mere cache: it is made again when it is wanted
            else:
                self._page_out(piece)
        return self._free[kind].pop()

    def _pin(self, piece: Piece) -> None:
        if piece.place is None:
            self._page_in(piece)
        self._idle[piece.kind].pop(piece, None)
        piece.pins += 1

    def _unpin(self, piece: Piece) -> None:
        piece.pins -= 1
        if not piece.pins and piece.place is not None:
            self._idle[piece.kind][piece] = None

    def _page_out(self, piece: Piece) -> None:
        assert piece.place is not None and not piece.pins
        size = self.bytes_each[piece.kind]
        copies = self.state.take(piece.kind, piece.place)
        if size > self.host_limit:
            self._spill(piece, copies)
        else:
            while self.host_bytes + size > self.host_limit:
                oldest = next(iter(self._host))
                assert oldest.copies is not None
                self._spill(oldest, oldest.copies)
                oldest.copies = None
                self._host.pop(oldest)
                self.host_bytes -= self.bytes_each[oldest.kind]
            piece.copies = copies
            self._host[piece] = None
            self.host_bytes += size
        self._idle[piece.kind].pop(piece, None)
        self._free[piece.kind].append(piece.place)
        piece.place = None
        self.paged_out += 1

    def _spill(self, piece: Piece, copies: list[Tensor]) -> None:
        if piece.kind not in self._files:
            self._files[piece.kind] = SpillFile(self._folder)
        piece.spilled = self._files[piece.kind].write(copies)

    def _page_in(self, piece: Piece) -> None:
        place = self._place(piece.kind)
        copies = piece.copies
        if copies is None:
            assert piece.spilled is not None
            like = [arena[0] for arena in self.state.arenas(piece.kind)]
            copies = self._files[piece.kind].read(piece.spilled, like)
        self.state.put(piece.kind, place, copies)
        self._forget_elsewhere(piece)
        piece.place = place
        self.paged_in += 1

    def used(self, kind: Kind) -> int:
        """Pieces that lie in the arenas."""
        return self._fresh[kind] - 1 - len(self._free[kind])

    def pinned(self, kind: Kind) -> int:
        """Pieces of active branches."""
        return self.used(kind) - len(self._idle[kind])

    def spilled_bytes(self) -> int:
        """Bytes in the file."""
        return sum(file.used_bytes for file in self._files.values())

    def bytes_used(self) -> int:
        """Memory of the pieces that lie in the arenas."""
        return sum(self.used(kind) * self.bytes_each[kind] for kind in KINDS)

    def bytes_peak(self) -> int:
        """The most memory that pieces have taken at once, of the arenas."""
        return sum((self._fresh[kind] - 1) * self.bytes_each[kind] for kind in KINDS)

    def close(self) -> None:
        """Let go of the file."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _capacity(memory_limit: int, page_bytes: int, slot_bytes: int) -> dict[Kind, int]:
    """How many pages and slots a limit of memory holds."""
    together = PAGES_A_SLOT * page_bytes + slot_bytes
    if not together:
        return {"page": 0, "slot": 0}
    slots = memory_limit // together if slot_bytes else 0
    if slot_bytes and not slots:  # small limits: one slot, and pages with the rest
        slots = memory_limit // slot_bytes and 1
    pages = (memory_limit - slots * slot_bytes) // page_bytes if page_bytes else 0
    if (page_bytes and pages < 1) or (slot_bytes and slots < 1):
        raise ToolmemError(
            f"memory_limit is {memory_limit:,} bytes: it must hold at least a page of "
            f"{page_bytes:,} bytes and a state of {slot_bytes:,}; raise it, or lower page_size"
        )
    return {"page": pages, "slot": slots}
