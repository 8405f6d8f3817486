"""Activation patching and path patching: which part carries what makes the model say the right thing.

    clean       ... A B ... A      goes on with B
    corrupted   ... A C ... A      goes on with C

The corrupted row is run with one part's activation taken from the clean one. What that restores of the
difference between the two answers' logits is the part's effect: 1 for all of it, 0 for none.

Shapes: b batch, s seq, v vocab.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toolmem.analysis.circuits.dialogues import Told, side_by_side
from toolmem.analysis.circuits.hooks import Tap, recording, tapped
from toolmem.analysis.circuits.nodes import Node, check_nodes
from toolmem.analysis.circuits.points import hook_points
from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable

SMALLEST = 1e-3  # difference of logits below which there is nothing to restore


@dataclass(frozen=True)
class Contrast:
    """Pairs of rows that differ in what the model is to say next.

    Args:
        clean: (b, s) int64.
        corrupted: (b, s) int64, position for position beside it.
        at: (b,) int64, after which token the model says it.
        right: (b,) int64, the token that goes on the clean row.
        wrong: (b,) int64, the one that goes on the corrupted.
        spans: (b, s) int64, as ``LanguageModel.hidden`` takes them; None for none.
    """

    clean: Tensor
    corrupted: Tensor
    at: Tensor
    right: Tensor
    wrong: Tensor
    spans: Tensor | None = None

    def difference(self, logits: Tensor) -> Tensor:
        """Right minus wrong token's logit, (b,).

        Args:
            logits: (b, s, v).
        """
        row = torch.arange(len(logits), device=logits.device)
        here = logits[row, self.at]
        return here[row, self.right] - here[row, self.wrong]

    def to(self, device: torch.device) -> Contrast:
        """The same on a device."""
        spans = None if self.spans is None else self.spans.to(device)
        rows = (self.clean, self.corrupted, self.at, self.right, self.wrong)
        clean, corrupted, at, right, wrong = (x.to(device) for x in rows)
        return Contrast(clean, corrupted, at, right, wrong, spans)

    @property
    def differ(self) -> Tensor:
        """Where the two rows differ, (b, s) bool."""
        return self.clean != self.corrupted


def contrast_copies(told: Sequence[Told], what: str) -> Contrast:
    """Dialogues beside the same with another text where the assistant copies from, up to its first token.

    Each takes the other text from the next dialogue whose own is of as many tokens and begins with
    another; a dialogue for which there is none is left out.

    Args:
        told: dialogues.
        what: which copy (``dialogues.Copy``).

    Raises:
        ToolmemError: when nothing is left.
    """
    chosen: list[Told] = []
    clean, corrupted, at, right, wrong = [], [], [], [], []
    first = [next((copy for copy in one.copies if copy.what == what), None) for one in told]
    for number, (one, copy) in enumerate(zip(told, first, strict=True)):
        for step in range(1, len(told)) if copy is not None else ():
            place = (number + step) % len(told)
            other = first[place]
            if other is None or copy is None or len(other.target) != len(copy.target):
                continue
            theirs = told[place].tokens[list(other.target)]
            if theirs[0] == one.tokens[copy.target[0]]:
                continue
            row = one.tokens.clone()
            for source in copy.sources:
                row[list(source)] = theirs
            chosen.append(one)
            clean.append(one.tokens)
            corrupted.append(row)
            at.append(copy.target[0] - 1)
            right.append(int(one.tokens[copy.target[0]]))
            wrong.append(int(theirs[0]))
            break
    if not chosen:
        raise ToolmemError(
            f"no two of {len(told)} dialogues have a {what!r} to copy of the same length: give more"
        )
    stop = max(at) + 1
    rows = [
        torch.nn.utils.rnn.pad_sequence(x, batch_first=True)[:, :stop] for x in (clean, corrupted)
    ]
    spans = side_by_side(chosen).spans[:, :stop]
    one_each = [torch.tensor(x) for x in (at, right, wrong)]
    return Contrast(rows[0], rows[1], one_each[0], one_each[1], one_each[2], spans)


@torch.no_grad()
def patch_effects(
    model: LanguageModel,
    contrast: Contrast,
    nodes: Iterable[Node],
    where: Tensor | None = None,
) -> dict[Node, float]:
    """Activation patching: what each node, taken from the clean row, restores in the corrupted one.

    Args:
        model: any architecture.
        contrast: the rows.
        nodes: what is patched, one at a time.
        where: (b, s) bool, at which positions; None for all.

    Returns:
        (patched - corrupted) / (clean - corrupted) of the mean difference of logits, by node.

    Raises:
        ToolmemError: for a node that the model has not, or rows that it tells alike.
    """
    nodes = list(nodes)
    check_nodes(model, nodes)
    contrast = contrast.to(model.embedding.weight.device)
    clean = _run(model, contrast, contrast.clean, keep=[node.point for node in nodes])
    corrupted = _run(model, contrast, contrast.corrupted)
    effect = _normalised(clean.difference, corrupted.difference)
    found = {}
    for node in nodes:
        put = _from(node, clean.kept[node.point], where)
        found[node] = effect(
            _run(model, contrast, contrast.corrupted, {node.point: put}).difference
        )
    return found


@torch.no_grad()
def path_effect(
    model: LanguageModel,
    contrast: Contrast,
    sender: Node,
    receivers: Sequence[Node] | None = None,
    *,
    feed_forwards: bool = False,
    where: Tensor | None = None,
) -> float:
    """Path patching: what goes from a sender straight to receivers (arXiv 2211.00593, 2304.05969).

    The corrupted row is run with the sender from the clean one and all that adds to the stream in
    other places held as it was, and what reaches the receivers is kept; then it is run as it was but for
    the receivers.

    Args:
        model: any architecture.
        contrast: the rows.
        sender: what adds to the stream: a head, a branch, or the embedding.
        receivers: places that read: queries, keys or values of a head, or the input of a branch. Heads of
            keys and values are those shared (GQA). None for the logits.
        feed_forwards: let feed-forwards work on what they are given instead of holding them, so that
            paths through them count.
        where: (b, s) bool, at which positions the sender is changed; None for all.

    Returns:
        the effect, as of ``patch_effects``.

    Raises:
        ToolmemError: for a node that the model has not, or rows that it tells alike.
    """
    check_nodes(model, [sender, *(receivers or [])])
    contrast = contrast.to(model.embedding.weight.device)
    held = [node for node in _adders(model) if node.point != sender.point]
    if feed_forwards:
        held = [node for node in held if ".feed_forward." not in node.point]
    clean = _run(model, contrast, contrast.clean, keep=[sender.point])
    keep = [sender.point, *(node.point for node in held)]
    corrupted = _run(model, contrast, contrast.corrupted, keep=keep)
    effect = _normalised(clean.difference, corrupted.difference)
    own = corrupted.kept[sender.point]
    mixed = sender.put(own, sender.part(clean.kept[sender.point]), where)
    changes: dict[str, Tap] = {
        node.point: partial(_instead, corrupted.kept[node.point]) for node in held
    }
    changes[sender.point] = partial(_instead, mixed)
    direct = _run(
        model, contrast, contrast.corrupted, changes, [node.point for node in receivers or []]
    )
    if receivers is None:
        return effect(direct.difference)
    taps: dict[str, Tap] = {}
    for node in receivers:  # several of one point: one after the other
        one = _from(node, direct.kept[node.point], None)
        taps[node.point] = _then(taps[node.point], one) if node.point in taps else one
    return effect(_run(model, contrast, contrast.corrupted, taps).difference)


@dataclass(frozen=True)
class _Ran:
    difference: Tensor
    kept: dict[str, Tensor]


def _run(
    model: LanguageModel,
    contrast: Contrast,
    tokens: Tensor,
    changes: Mapping[str, Tap] | None = None,
    keep: Iterable[str] = (),
) -> _Ran:
    with tapped(model, changes or {}), recording(model, keep) as kept:
        logits = model(tokens, spans=contrast.spans)
    return _Ran(contrast.difference(logits.float() if logits.dtype.itemsize < 4 else logits), kept)


def _normalised(clean: Tensor, corrupted: Tensor) -> Callable[[Tensor], float]:
    whole = float(clean.mean() - corrupted.mean())
    if not abs(whole) > SMALLEST:
        raise ToolmemError(
            f"the model tells clean and corrupted rows alike (a difference of logits of {whole:.2g}): "
            "there is no effect to share out; train it longer, or corrupt something that it uses"
        )
    return lambda patched: float(patched.mean() - corrupted.mean()) / whole


def _adders(model: LanguageModel) -> list[Node]:
    """What adds to the stream, whole points: heads where there are, else mixers; feed-forwards."""
    points = hook_points(model)
    found = []
    for name in points:
        here, _, part = name.rpartition(".")
        branch = part == "output" and here.endswith(("feed_forward", "mixer"))
        if part == "heads" or (branch and f"{here}.heads" not in points):
            found.append(Node(name))
    return found


def _from(node: Node, source: Tensor, where: Tensor | None) -> Tap:
    return lambda x: node.put(x, node.part(source), where)


def _instead(value: Tensor, x: Tensor) -> Tensor:
    return value


def _then(first: Tap, second: Tap) -> Tap:
    def both(x: Tensor) -> Tensor | None:
        y = first(x)
        return second(x if y is None else y)

    return both
