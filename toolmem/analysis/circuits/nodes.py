"""Places that can be patched or removed: heads, neurons, whole branches, the embedding.

Shapes: b batch, s seq.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolmem.analysis.circuits.points import check_points, hook_points
from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel
from toolmem.models.layers import Block


@dataclass(frozen=True)
class Node:
    """A hook point, or one head or neuron of it.

    Args:
        point: its name (``points.py``).
        index: of the head or neuron; None for all of the point.
    """

    point: str
    index: int | None = None

    @property
    def label(self) -> str:
        """A short name: ``1.0`` for head 0 of block 1, ``1.n7`` for its neuron 7."""
        words = self.point.split(".")
        if words[0] != "blocks":
            return self.point
        part = ".".join(words[2:])
        if self.index is None:
            short = {"feed_forward.output": "feed-forward", "mixer.output": "mixer"}
            return f"{words[1]} {short.get(part, part)}"
        if part == "feed_forward.hidden":
            return f"{words[1]}.n{self.index}"
        return f"{words[1]}.{self.index}" + ("" if part == "mixer.heads" else f" {words[-1]}")

    @property
    def by_head(self) -> bool:
        """Is the point's second axis that of heads, the third of positions?"""
        part = self.point.rpartition(".")[2]
        return part in ("queries", "keys", "values", "scores", "weights", "heads")

    def part(self, x: Tensor) -> Tensor:
        """What of the point's value is this place's: a view, (b, s, ...) but for heads all together."""
        if self.index is None:
            return x
        return x.select(1 if self.by_head else -1, self.index)

    def put(self, x: Tensor, value: Tensor, where: Tensor | None = None) -> Tensor:
        """The point's value with this place's replaced.

        Args:
            x: what passes the point.
            value: what ``part`` of another such is, or what broadcasts to it.
            where: (b, s) bool, the positions at which it is replaced; None for all.
        """
        y = x.clone()
        mine = self.part(y)
        value = value.to(y.dtype)
        if where is not None:
            if self.by_head and self.index is None:
                where = where[:, None]
            where = where.reshape(where.shape + (1,) * (mine.ndim - where.ndim))
            value = torch.where(where, value, mine)
        mine.copy_(value.expand_as(mine))
        return y


def head(layer: int, index: int) -> Node:
    """A head, by what it hands to the output projection."""
    return Node(f"blocks.{layer}.mixer.heads", index)


def neuron(layer: int, index: int) -> Node:
    """A hidden unit of a feed-forward, after the activation."""
    return Node(f"blocks.{layer}.feed_forward.hidden", index)


def heads(model: LanguageModel) -> list[Node]:
    """Every head of a model, block after block."""
    points = hook_points(model)
    return [
        head(layer, index)
        for layer, block in enumerate(model.blocks)
        if f"blocks.{layer}.mixer.heads" in points
        for index in range(block.mixer.n_heads)
    ]


def neurons(model: LanguageModel) -> list[Node]:
    """Every neuron of a model's plain feed-forwards, block after block."""
    points = hook_points(model)
    return [
        neuron(layer, index)
        for layer, block in enumerate(model.blocks)
        if f"blocks.{layer}.feed_forward.hidden" in points
        for index in range(block.feed_forward.down.in_features)
    ]


def branches(model: LanguageModel) -> list[Node]:
    """What adds to the stream: of each block its heads (else its mixer) and its feed-forward."""
    points = hook_points(model)
    found: list[Node] = []
    by_layer: dict[str, list[Node]] = {}
    for one in heads(model):
        by_layer.setdefault(one.point.split(".")[1], []).append(one)
    for layer, block in enumerate(model.blocks):
        if isinstance(block, Block):
            found += by_layer.get(str(layer), [Node(f"blocks.{layer}.mixer.output")])
            if (point := f"blocks.{layer}.feed_forward.output") in points:
                found.append(Node(point))
    return found


def check_nodes(model: LanguageModel, nodes: list[Node]) -> None:
    """Refuse, by name, a place that a model has not.

    Raises:
        ToolmemError: naming it, and how many there are.
    """
    check_points(model, [node.point for node in nodes])
    every = {*heads(model), *neurons(model)}
    for node in nodes:
        if node.index is None or node in every:
            continue
        part = node.point.rpartition(".")[2]
        if part in ("heads", "hidden") or node.index < 0:
            there = sum(other.point == node.point for other in every)
            raise ToolmemError(
                f"{node.point} has no number {node.index}: there are {there}, from 0 to {there - 1}"
            )
