"""A tree of what has been read before: dialogues that begin alike share its pages.

An edge is a page of tokens (a radix tree whose edges all have a page's length), so that a path from the
root spells a prefix, and each node owns a reference to the page that holds it. Where a model keeps
something of one size, or looks both ways within spans, a prefix can be gone on from only where somebody
stopped: such ends hang on the nodes with the tokens behind the last full page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from toolmem.generation.paging import Branch, Pager
from toolmem.generation.pieces import Piece

Key = tuple[tuple[int, ...], tuple[int, ...]]


class End(NamedTuple):
    """Where a dialogue stopped, behind a node's last full page."""

    page: Piece | None
    slot: Piece | None


class Node:
    """A prefix of full pages."""

    __slots__ = ("children", "ends", "key", "page", "parent")

    def __init__(self, parent: Node | None, key: Key, page: Piece | None) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.children: dict[Key, Node] = {}
        self.ends: dict[tuple[int, ...], End] = {}


class PrefixTree:
    """What the engine has read, for dialogues to come; it holds no memory that others want.

    Args:
        pager: owns the pages.
        exact: go on only where a dialogue stopped.
    """

    def __init__(self, pager: Pager, exact: bool) -> None:
        self.pager = pager
        self.exact = exact
        self.root = Node(None, ((), ()), None)

    def match(self, tokens: Sequence[int], spans: Sequence[int] | None = None) -> Branch | None:
        """A branch that holds as many of the first tokens as are known, the last never among them.

        Args:
            tokens: of a dialogue; the last has to be read again, for what the model says of it.
            spans: of each token, -1 for none, where the model looks both ways within them.
        """
        size = self.pager.page_size
        node = self.root
        pages: list[Piece] = []
        path = [node]
        for key in self._keys(tokens, spans):
            child = node.children.get(key)
            if child is None:
                break
            node = child
            path.append(node)
            if node.page is not None:
                pages.append(node.page)
        if not self.exact:
            return self.pager.adopt(pages, None, len(pages) * size) if pages else None
        for depth in range(len(path) - 1, -1, -1):
            rest = self._longest_end(path[depth], tokens, depth * size)
            if rest is not None:
                end = path[depth].ends[rest]
                owned = pages[:depth] if end.page is None else [*pages[:depth], end.page]
                return self.pager.adopt(owned, end.slot, depth * size + len(rest))
        return None

    def _longest_end(self, node: Node, tokens: Sequence[int], start: int) -> tuple[int, ...] | None:
        """The longest end of a node, which holds ``start`` tokens, that goes with these tokens."""
        for rest in sorted(node.ends, key=len, reverse=True):
            stop = start + len(rest)
            if stop < len(tokens) and tuple(tokens[start:stop]) == rest:
                return rest
        return None

    def remember(
        self,
        tokens: Sequence[int],
        branch: Branch,
        spans: Sequence[int] | None = None,
        stop: bool = True,
    ) -> None:
        """Take in what a branch holds.

        Args:
            tokens: its dialogue's, at least as many as it holds.
            branch: active or not.
            spans: of each token, where the model looks both ways within them.
            stop: whether it stops here, so that others may go on from here.
        """
        size, length = self.pager.page_size, branch.length
        node, owns = self.root, bool(self.pager.bytes_each["page"])
        full = length // size
        for index, key in zip(range(full), self._keys(tokens, spans, whole=True), strict=False):
            child = node.children.get(key)
            if child is None:
                page = branch.pages[index] if owns else None
                child = node.children[key] = Node(node, key, page)
                if page is not None:
                    self._hold(page, self._dropper(child))
            node = child
        rest = tuple(tokens[full * size : length])
        if self.exact and stop and length and rest not in node.ends:
            page = branch.pages[full] if owns and rest else None
            node.ends[rest] = end = End(page, branch.slot)
            for piece in end:
                if piece is not None:
                    self._hold(piece, self._forgetter(node, rest))
            self.pager.touched(branch)

    def _keys(
        self, tokens: Sequence[int], spans: Sequence[int] | None, whole: bool = False
    ) -> Iterator[Key]:
        """The edges of a dialogue; without ``whole`` the last token is left out.

        What a page holds hangs on its own tokens and, where attention looks both ways, on the rest of
        the span that goes on behind it.
        """
        size = self.pager.page_size
        last = len(tokens) if whole else len(tokens) - 1
        for stop in range(size, last + 1, size):
            ahead = stop
            if spans is not None and spans[stop - 1] >= 0:
                while ahead < len(tokens) and spans[ahead] == spans[stop - 1]:
                    ahead += 1
            yield tuple(tokens[stop - size : stop]), tuple(tokens[stop:ahead])

    def _hold(self, piece: Piece, drop: Callable[[], None]) -> None:
        piece.refs += 1
        piece.droppable = drop

    def _dropper(self, node: Node) -> Callable[[], None]:
        return lambda: self._drop(node)

    def _forgetter(self, node: Node, rest: tuple[int, ...]) -> Callable[[], None]:
        return lambda: self._forget(node, rest)

    def _forget(self, node: Node, rest: tuple[int, ...]) -> None:
        end = node.ends.pop(rest, None)
        for piece in end or ():
            if piece is not None:
                self._let_go(piece)

    def _drop(self, node: Node) -> None:
        """Let go of a node and all behind it."""
        if node.parent is not None:
            node.parent.children.pop(node.key, None)
        waiting = [node]
        while waiting:
            one = waiting.pop()
            waiting += one.children.values()
            for rest in list(one.ends):
                self._forget(one, rest)
            if one.page is not None:
                self._let_go(one.page)
            one.children = {}

    def _let_go(self, piece: Piece) -> None:
        piece.droppable = None
        self.pager.release(piece)

    def clear(self) -> None:
        """Let go of everything."""
        for rest in list(self.root.ends):
            self._forget(self.root, rest)
        for child in list(self.root.children.values()):
            self._drop(child)
