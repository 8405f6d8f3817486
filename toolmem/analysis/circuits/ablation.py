"""Ablation: what a model recalls without some of its heads or neurons.

Shapes: b batch, s seq.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolmem.analysis.circuits.dialogues import Told, side_by_side
from toolmem.analysis.circuits.hooks import Tap, record, tapped
from toolmem.analysis.circuits.nodes import Node, check_nodes
from toolmem.evaluation.recall import RecallResult, measure_recall
from toolmem.models import LanguageModel

if TYPE_CHECKING:
    from toolmem.data.dialogues import Dialogue
    from toolmem.data.tokenizers import Tokenizer


@contextmanager
def ablated(
    model: LanguageModel, nodes: Iterable[Node], means: Mapping[Node, Tensor] | None = None
) -> Iterator[None]:
    """In here some nodes give zero, or their mean, whatever they are given; also in generation.

    Args:
        model: any architecture.
        nodes: heads, neurons, or whole branches, removed all together.
        means: of each (``mean_activations``); None for zero.

    Raises:
        ToolmemError: for a node that the model has not.
    """
    nodes = list(nodes)
    check_nodes(model, nodes)
    by_point: dict[str, list[Node]] = {}
    for node in nodes:
        by_point.setdefault(node.point, []).append(node)

    def removing(removed: list[Node]) -> Tap:
        def tap(x: Tensor) -> Tensor:
            for node in removed:
                x = node.put(x, x.new_zeros(()) if means is None else means[node])
            return x

        return tap

    with tapped(model, {point: removing(removed) for point, removed in by_point.items()}):
        yield


def mean_activations(
    model: LanguageModel, told: Sequence[Told], nodes: Iterable[Node]
) -> dict[Node, Tensor]:
    """What each node gives on average over the tokens of some dialogues.

    Args:
        model: any architecture.
        told: dialogues.
        nodes: heads, neurons, or whole branches.

    Returns:
        by node a vector, or a number for a neuron.
    """
    nodes = list(nodes)
    check_nodes(model, nodes)
    rows = side_by_side(told, model.embedding.weight.device)
    found = record(model, rows.tokens, dict.fromkeys(n.point for n in nodes), spans=rows.spans)
    return {node: node.part(found[node.point])[rows.real].mean(0) for node in nodes}


@torch.no_grad()
def exactness(
    model: LanguageModel, told: Sequence[Told], batch_size: int = 128, **parts: Any
) -> dict[str, float]:
    """How often every token of a part is the likeliest, the right tokens before it given.

    Not recall: nothing is generated and no tool asked, so that it is quick, and a wrong query does not
    spoil the answer after it.

    Args:
        model: any architecture.
        told: dialogues.
        batch_size: dialogues at once.
        **parts: by name the positions of each dialogue's part; its ``query`` and ``answer`` when none are
            given.

    Returns:
        the fraction of dialogues by part, of those that have it; a part that none has is left out.
    """
    if not parts:
        parts = {"query": [one.query for one in told], "answer": [one.answer for one in told]}
    right: dict[str, list[bool]] = {name: [] for name in parts}
    for first in range(0, len(told), batch_size):
        some = told[first : first + batch_size]
        rows = side_by_side(some, model.embedding.weight.device)
        hit = model(rows.tokens, spans=rows.spans)[:, :-1].argmax(-1) == rows.tokens[:, 1:]
        hits = hit.cpu()
        for name, positions in parts.items():
            for row in range(len(some)):
                if at := positions[first + row]:
                    right[name].append(bool(hits[row, torch.tensor(at) - 1].all()))
    return {name: sum(found) / len(found) for name, found in right.items() if found}


def exactness_without(
    model: LanguageModel,
    told: Sequence[Told],
    nodes: Iterable[Node],
    means: Mapping[Node, Tensor] | None = None,
) -> dict[Node, dict[str, float]]:
    """``exactness`` with each node removed, one at a time.

    Args:
        model: any architecture.
        told: dialogues.
        nodes: what is removed.
        means: what each gives instead; None for zero.
    """
    found = {}
    for node in nodes:
        with ablated(model, [node], means):
            found[node] = exactness(model, told)
    return found


def recall_without(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[Dialogue],
    nodes: Iterable[Node],
    means: Mapping[Node, Tensor] | None = None,
    **options: Any,
) -> dict[Node, RecallResult]:
    """Recall with each node removed, one at a time: dialogues generated greedily, tools in the loop.

    Args:
        model: any architecture.
        tokenizer: the one that it was trained with.
        questions: expected dialogues.
        nodes: what is removed.
        means: what each gives instead; None for zero.
        **options: of ``measure_recall``: the toolbox, the batch size.
    """
    found = {}
    for node in nodes:
        with ablated(model, [node], means):
            found[node] = measure_recall(model, tokenizer, questions, **options)
    return found
