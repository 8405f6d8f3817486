"""Trees of drafted tokens: a fixed sparse shape, and the tokens that a draft fills it with.

A node is a path of ranks from the root: (0, 2) is the third likeliest token after the likeliest one.
Which paths are worth a place is decided beforehand, by how often the token of each rank is right at
each depth (Medusa's sparse trees, arXiv 2401.10774, section 2.3.3). Parents stand before children.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from toolmem.errors import ToolmemError


class Tree(NamedTuple):
    """Drafted tokens for each lane of a batch, all trees of one shape.

    Args:
        tokens: (batch, nodes) int64; the token that was sampled last, the root, is not among them.
        parents: (nodes,) int64, -1 for the root's children; parents stand before children.
        log_probs: (batch, nodes) float32, the draft's log-probability of each token after its parent.
    """

    tokens: Tensor
    parents: Tensor
    log_probs: Tensor


class Level(NamedTuple):
    """The nodes of one depth.

    Args:
        nodes: their numbers.
        parents: places of their parents among the nodes with children of the depth before.
        ranks: which of their parent's likeliest tokens they are.
        inner: places, among ``nodes``, of those that have children.
    """

    nodes: list[int]
    parents: list[int]
    ranks: list[int]
    inner: list[int]


@dataclass(frozen=True)
class Topology:
    """The shape of a tree of drafts.

    Args:
        paths: each node's ranks from the root, in an order in which parents come first.
    """

    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, paths: Iterable[Sequence[int]]) -> Topology:
        """The tree of these paths, ordered by depth, then by rank.

        Raises:
            ToolmemError: for a path that is empty, negative, twice there, or without its parent.
        """
        given = [tuple(path) for path in paths]
        found = set(given)
        for path in given:
            if not path or min(path) < 0:
                raise ToolmemError(
                    f"tree: {list(path)} is no path: give the rank, from 0, of the token at each depth"
                )
            if len(path) > 1 and path[:-1] not in found:
                raise ToolmemError(
                    f"tree: {list(path)} hangs on nothing: {list(path[:-1])} is not there; add it"
                )
        if not given or len(found) < len(given):
            raise ToolmemError("tree: it has no path, or one of them twice: give each path once")
        return cls(tuple(sorted(found, key=lambda path: (len(path), path))))

    @classmethod
    def chain(cls, depth: int) -> Topology:
        """The likeliest token at each of ``depth`` places, and no other."""
        return cls.of([0] * n for n in range(1, depth + 1))

    @classmethod
    def from_accuracies(cls, accuracies: Sequence[Sequence[float]], n_nodes: int) -> Topology:
        """The tree with the most tokens expected to be right (arXiv 2401.10774, section 2.3.3).

        A path is right as often as the product of its accuracies says; the likeliest path that hangs
        on those taken is added until there are enough.

        Args:
            accuracies: by depth, by rank: how often that token is right where all before it were.
            n_nodes: nodes to take; fewer where there are no more.
        """
        waiting: list[tuple[float, tuple[int, ...]]] = []

        def add(parent: tuple[int, ...], share: float) -> None:
            if len(parent) < len(accuracies):
                for rank, accuracy in enumerate(accuracies[len(parent)]):
                    heapq.heappush(waiting, (-share * accuracy, (*parent, rank)))

        add((), 1.0)
        taken: list[tuple[int, ...]] = []
        while waiting and len(taken) < n_nodes:
            share, path = heapq.heappop(waiting)
            taken.append(path)
            add(path, -share)
        return cls.of(taken)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return len(self.paths[-1])

    @property
    def width(self) -> int:
        """How many of a node's likeliest tokens are ever asked for."""
        return 1 + max(path[-1] for path in self.paths)

    @functools.cached_property
    def depths(self) -> Tensor:
        """(nodes,) int64: places after the root, from 1."""
        return torch.tensor([len(path) for path in self.paths])

    @functools.cached_property
    def ranks(self) -> Tensor:
        """(nodes,) int64: which of its parent's likeliest tokens a node is."""
        return torch.tensor([path[-1] for path in self.paths])

    @functools.cached_property
    def parents(self) -> Tensor:
        """(nodes,) int64: each node's parent, -1 for the root's children."""
        number = {path: index for index, path in enumerate(self.paths)} | {(): -1}
        return torch.tensor([number[path[:-1]] for path in self.paths])

    @functools.cached_property
    def ancestors(self) -> Tensor:
        """(nodes, nodes) bool: which nodes lie on a node's path, itself included; attention's mask."""
        return torch.tensor(
            [[path[: len(other)] == other for other in self.paths] for path in self.paths]
        )

    @functools.cached_property
    def levels(self) -> tuple[Level, ...]:
        """The nodes by depth."""
        number = {path: index for index, path in enumerate(self.paths)}
        has_children = {path[:-1] for path in self.paths}
        found: list[Level] = []
        before: list[tuple[int, ...]] = [()]
        for depth in range(1, self.depth + 1):
            here = [path for path in self.paths if len(path) == depth]
            inner = [place for place, path in enumerate(here) if path in has_children]
            found.append(
                Level(
                    [number[path] for path in here],
                    [before.index(path[:-1]) for path in here],
                    [path[-1] for path in here],
                    inner,
                )
            )
            before = [here[place] for place in inner]
        return tuple(found)


def guessed(depth: int) -> Topology:
    """A tree for a draft of which nothing is known yet: three nodes for each depth.

    It takes the likeliest token to be right 7 times of 10, and each further rank a third as often.
    """
    return Topology.from_accuracies([[0.7 / 3**rank for rank in range(4)]] * depth, 3 * depth)
