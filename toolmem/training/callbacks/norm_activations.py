"""What flows through a model, measured by hooks that are there for one forward pass.

Shapes: b batch, s seq, h heads, n keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolmem.data.batch import Batch
from toolmem.models import LanguageModel
from toolmem.models.attention import HeadMixing
from toolmem.models.layers import RMSNorm
from toolmem.training.callbacks.norm_measures import (
    ALL,
    Row,
    accumulator,
    figures,
    layer_of,
    sum_of_squares,
)

# A unit is dead when its largest magnitude over the batch is at most this share of the root mean square
# of all its layer's units: 0 for a ReLU, but also next to nothing for an activation that is smooth.
DEAD_BELOW = 1e-3

SCORES = 2**24  # of attention, at most that many at once, but for one row


def first_rows(batch: Batch, n: int) -> Batch:
    """The first ``n`` rows of a batch, without where the loader stands."""
    if n >= len(batch):
        return batch
    # where documents share rows, lengths are the documents': which row is whose is not kept
    lengths = None if batch.lengths is None or batch.documents is not None else batch.lengths[:n]
    return replace(
        batch,
        tokens=batch.tokens[:n],
        targets=batch.targets[:n],
        loss_mask=batch.loss_mask[:n],
        documents=None if batch.documents is None else batch.documents[:n],
        spans=None if batch.spans is None else batch.spans[:n],
        lengths=lengths,
        loss_positions=None,
    )


def real_tokens(batch: Batch) -> Tensor | None:
    """Which tokens are not padding, (b, s) bool; None when all are."""
    if batch.documents is not None:
        return batch.documents >= 0
    if batch.lengths is None:
        return None
    index = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return index < batch.lengths.to(index.device)[:, None]


@dataclass
class Activations:
    """What one forward pass left of its activations: sums, and maxima, over tokens that are real.

    Args:
        shape: (b, s) of the pass.
        real: (b, s) bool, which tokens are not padding; None when all are.
        sums: by measure and layer, [of values, number of them].
        maxima: by measure and layer, scalars; of units (``unit``), one number each, -1 for a unit that
            was given no token.
    """

    shape: tuple[int, ...]
    real: Tensor | None
    sums: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    maxima: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def note(self, layer: str, x: Tensor) -> None:
        """Take in a layer's output: (b, s, ...), or of some other tokens that are all real."""
        x = self._chosen(x)
        self._add("activation_rms", layer, sum_of_squares(x), x.numel())
        largest = x.abs().max() if x.numel() else x.new_tensor(-1)
        self._raise("activation_max", layer, largest)

    def note_units(self, layer: str, name: str, x: Tensor, ends: Tensor | None) -> None:
        """Take in what a feed-forward's last map is given.

        Args:
            layer: its layer.
            name: the map's own name.
            x: (b, s, units), or (rows, units) sorted by expert.
            ends: (experts,) int64, where each expert's rows end; None for the first form.
        """
        n = 1 if ends is None else len(ends)
        largest = x.new_full((n, x.shape[-1]), -1)
        if ends is None:
            x = self._chosen(x)
            if x.numel():
                largest = x.abs().amax(0)
        else:
            # an expert's units are its own; rows beyond the last end belong to nobody
            x = x[: int(ends[-1])]
            index = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
            largest.scatter_reduce_(0, index[:, None].expand_as(x), x.abs(), "amax")
        self._add(f"unit {name}", layer, sum_of_squares(x), x.numel())
        self._raise(f"unit {name}", layer, largest.flatten())

    def note_attention(self, layer: str, scores: Tensor, first: int) -> None:
        """Take in what attention's softmax is given.

        Args:
            layer: its layer.
            scores: (rows, h, s, n), -inf where it may not look.
            first: the first of these rows.
        """
        real = None if self.real is None else self.real[first : first + len(scores)]
        # in nats, of each query and head
        entropy = torch.special.entr(scores.softmax(dim=-1)).sum(-1).transpose(1, 2)
        largest = scores.amax(-1).transpose(1, 2)
        if real is not None:
            entropy, largest = entropy[real], largest[real]
        total = entropy.sum(dtype=accumulator(entropy.device))
        self._add("attention_entropy", layer, total, entropy.numel())
        if largest.numel():
            self._raise("attention_logit_max", layer, largest.max())
        else:
            self._raise("attention_logit_max", layer, largest.new_tensor(-math.inf))

    def join_units(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Let the units of ranks that hold some each be one layer's.

        Args:
            over_ranks: joins vectors of all those ranks.
        """
        for key, value in self.maxima.items():
            if key[0].startswith("unit "):
                self.maxima[key] = over_ranks(value)

    def reduce(self, over_ranks: Callable[[Tensor, str], Tensor]) -> None:
        """Put together what all ranks have.

        Args:
            over_ranks: ``sum`` or ``max`` of a tensor over ranks.
        """
        for found, how in ((self.sums, "sum"), (self.maxima, "max")):
            if found:
                flat = torch.cat([value.flatten() for value in found.values()])
                parts = over_ranks(flat, how).split([v.numel() for v in found.values()])
                found.update(zip(found, parts, strict=True))

    def rows(self, kinds: dict[str, str]) -> list[Row]:
        """The figures.

        Args:
            kinds: of layers that have parameters.
        """
        dead = self._dead_units()
        sums = {key: value for key, value in self.sums.items() if not key[0].startswith("unit ")}
        sums |= dead
        maxima = {key: v for key, v in self.maxima.items() if not key[0].startswith("unit ")}
        joined = [*sums.values(), *(v.flatten().to(accumulator(v.device)) for v in maxima.values())]
        numbers = iter(torch.cat(joined).tolist())  # the host waits for the device here only
        pairs = {key: (next(numbers), next(numbers)) for key in sums}
        single = {key: next(numbers) for key in maxima}
        found: list[Row] = []
        finishes = {"activation_rms": math.sqrt, "dead_units": float, "attention_entropy": float}
        for measure, finish in finishes.items():
            mine = {key[1]: pair for key, pair in pairs.items() if key[0] == measure}
            if mine:
                places = [(layer, kind_of(layer, kinds)) for layer in mine]
                above, below = zip(*mine.values(), strict=True)
                found += figures(measure, dict(places), places, above, below, finish)
        for measure, missing in (("activation_max", -1.0), ("attention_logit_max", -math.inf)):
            largest: dict[tuple[str, str], float] = {}
            for (name, layer), value in single.items():
                if name == measure and value != missing:
                    kind = kind_of(layer, kinds)
                    for row in ((ALL, ALL), (ALL, kind), (layer, kind)):
                        largest[row] = max(value, largest.get(row, -math.inf))
            found += [Row(*row, measure, value) for row, value in largest.items()]
        return found

    def _dead_units(self) -> dict[tuple[str, str], Tensor]:
        """[dead, all] units of each layer that has any; those that were given no token do not count."""
        found: dict[tuple[str, str], Tensor] = {}
        for (measure, layer), total in self.sums.items():
            if measure.startswith("unit "):
                largest = self.maxima[measure, layer]
                rms = (total[0] / total[1].clamp(min=1)).sqrt()
                seen = largest >= 0
                dead = seen & (largest <= DEAD_BELOW * rms)
                counts = torch.stack((dead.sum(), seen.sum())).to(total.dtype)
                key = ("dead_units", layer)
                found[key] = found[key] + counts if key in found else counts
        return found

    def _chosen(self, x: Tensor) -> Tensor:
        """The real tokens of an activation, (tokens, ...)."""
        if x.shape[:2] != self.shape:
            return x
        return x.flatten(0, 1) if self.real is None else x[self.real]

    def _add(self, measure: str, layer: str, total: Tensor, count: int) -> None:
        pair = torch.stack((total, total.new_tensor(count)))
        key = (measure, layer)
        self.sums[key] = self.sums[key] + pair if key in self.sums else pair

    def _raise(self, measure: str, layer: str, largest: Tensor) -> None:
        key, known = (measure, layer), self.maxima.get((measure, layer))
        largest = largest.to(torch.promote_types(largest.dtype, torch.float32))
        self.maxima[key] = largest if known is None else torch.maximum(known, largest)


def kind_of(layer: str, kinds: dict[str, str]) -> str:
    """A layer's kind: of its parameters, or of what flows there."""
    if layer.rpartition(".")[2].isdigit():
        return "stream"
    return kinds.get(layer, layer)


def measure_activations(model: LanguageModel, batch: Batch, rows: int) -> Activations:
    """Run the model's body and head over a batch's first rows, and measure what flows.

    Args:
        model: any architecture; what is attached to it for the pass is gone after it.
        batch: on the model's device.
        rows: how many of its rows.
    """
    batch = first_rows(batch, rows)
    found = Activations(tuple(batch.tokens.shape), real_tokens(batch))
    with attached(model, found):
        states = model.hidden(batch.tokens, documents=batch.documents, spans=batch.spans)
        found.note("head", model.logits(states[batch.loss_mask]))
    return found


@contextmanager
def attached(model: LanguageModel, found: Activations) -> Iterator[None]:
    """In here what flows through the model is noted; it runs attention that lets one see its scores."""
    handles = list(_hooks(model, found))
    kernel = model.attention_kernel
    model.attention_kernel = "sdpa"
    mixers = []
    for name, module in model.named_modules():
        if isinstance(module, HeadMixing):
            # on the instance, before the class's own: whatever calls it comes by here
            module.attend = partial(_attend, module, layer_of(name), found)  # type: ignore[method-assign]
            mixers.append(module)
    try:
        yield
    finally:
        model.attention_kernel = kernel
        for mixer in mixers:
            del mixer.attend
        for handle in handles:
            handle.remove()


def _hooks(model: LanguageModel, found: Activations) -> Iterator[Any]:
    """Hooks on what enters the first block, on branches, on blocks, on the last norm."""

    def output(layer: str, module: nn.Module, args: Any, y: Any) -> None:
        found.note(layer, y[0] if isinstance(y, tuple) else y)

    def stream(module: nn.Module, args: Any) -> None:
        found.note("embedding", args[0])

    def units(name: str, module: nn.Module, args: Any) -> None:
        grouped = getattr(module, "weight", torch.empty(0)).ndim == 3
        found.note_units(layer_of(name), name, args[0], args[1] if grouped else None)

    yield model.blocks[0].register_forward_pre_hook(stream)
    for index, block in enumerate(model.blocks):
        for name, part in block.named_children():
            if not isinstance(part, RMSNorm | nn.LayerNorm) and any(
                True for _ in part.parameters()
            ):
                yield part.register_forward_hook(partial(output, f"blocks.{index}.{name}"))
        yield block.register_forward_hook(partial(output, f"blocks.{index}"))
    yield model.norm.register_forward_hook(partial(output, "norm"))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "down":
            yield module.register_forward_pre_hook(partial(units, name))


def _attend(
    mixer: HeadMixing,
    layer: str,
    found: Activations,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Any,
) -> Tensor:
    """``HeadMixing.attend``, its scores noted, some rows at a time."""
    n_rows, n_heads, seq = queries.shape[:3]
    step = max(1, SCORES // (n_heads * seq * keys.shape[2]))
    with torch.autocast(queries.device.type, enabled=False):
        for first in range(0, n_rows, step):
            some = slice(first, first + step)
            own = mask[some] if mask is not None and mask.ndim == 4 and len(mask) > 1 else mask
            q, k = (x[some] if x.dtype.itemsize > 2 else x[some].float() for x in (queries, keys))
            found.note_attention(layer, mixer.scores(q, k, own), first)
    return type(mixer).attend(mixer, queries, keys, values, mask)
