"""Sums and roots of sums that ``norms.py`` makes its figures of: they add up over layers and ranks."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from toolmem.models import LanguageModel

ALL = "all"  # the layer and the kind of a row that is of many

# float32 adds no more numbers than this: torch's own norm of ten million is 4e-4 off.
CHUNK = 1024


class Row(NamedTuple):
    """One figure of one layer, of one kind of layers (layer ``all``), or of the model (both ``all``)."""

    layer: str
    kind: str
    measure: str
    value: float


def layer_of(name: str) -> str:
    """The layer of a parameter or module: of a list's member its part, else the top-level module.

    ``blocks.0.mixer.qkv.weight`` is of ``blocks.0.mixer``, ``embedding.weight`` of ``embedding``.
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return parts[0] if number is None else ".".join(parts[: number + 2])


class Parameters:
    """A model's parameters, each with its layer and its kind.

    Args:
        model: any architecture. Its ``parameter_counts`` has the same kinds.
    """

    def __init__(self, model: LanguageModel) -> None:
        groups: dict[int, str] = {}
        model._collect_groups(model, "other", groups)
        named = list(model.named_parameters())
        self.tensors = [parameter for _, parameter in named]
        # A parameter that lies in a block itself, in no part of it, is the block's.
        self.layers = [layer_of(name.rpartition(".")[0]) for name, _ in named]
        self.kinds = [groups[id(parameter)] for parameter in self.tensors]
        self.layer_kinds = self._main_kinds()

    def _main_kinds(self) -> dict[str, str]:
        """The kind of most of a layer's parameters, by layer."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for tensor, layer, kind in zip(self.tensors, self.layers, self.kinds, strict=True):
            counts[layer][kind] += tensor.numel()
        return {layer: found.most_common(1)[0][0] for layer, found in counts.items()}

    def figures(
        self, measure: str, above: Sequence[float], below: Sequence[float] | None = None
    ) -> list[Row]:
        """Roots of sums, or of quotients of sums, over the parameters of each layer and kind.

        Args:
            measure: what it is.
            above: of each parameter, a sum of squares.
            below: what the sums are divided by; 1 when None.
        """
        places = list(zip(self.layers, self.kinds, strict=True))
        return figures(measure, self.layer_kinds, places, above, below, math.sqrt)


def figures(
    measure: str,
    layer_kinds: dict[str, str],
    places: Sequence[tuple[str, str]],
    above: Sequence[float],
    below: Sequence[float] | None,
    finish: Callable[[float], float],
) -> list[Row]:
    """A measure of the model, of each kind, and of each layer, from sums that add up.

    Args:
        measure: what it is.
        layer_kinds: the kind that a layer is known as.
        places: layer and kind of each pair of sums.
        above: the sums.
        below: what they are divided by once added; 1 when None. Where it is 0 there is no figure.
        finish: makes the figure of the quotient.
    """
    sums: dict[tuple[str, str], list[float]] = {(ALL, ALL): [0.0, 0.0]}
    bottom = below if below is not None else [0.0] * len(above)
    for (layer, kind), a, b in zip(places, above, bottom, strict=True):
        for row in ((ALL, ALL), (ALL, kind), (layer, layer_kinds[layer])):
            total = sums.setdefault(row, [0.0, 0.0])
            total[0] += a
            total[1] += b
    rows = []
    for (layer, kind), (a, b) in sums.items():
        if below is None:
            rows.append(Row(layer, kind, measure, finish(a)))
        elif b:
            rows.append(Row(layer, kind, measure, finish(a / b)))
    return rows


def accumulator(device: torch.device) -> torch.dtype:
    """The widest float that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of a tensor's squares: a scalar, float64 where the device has it."""
    flat = x.detach().reshape(-1)
    wide = accumulator(x.device)
    if flat.dtype == torch.float64:
        return flat.square().sum()
    flat = flat.float()
    whole = len(flat) // CHUNK * CHUNK
    parts = [flat[:whole].view(-1, CHUNK), flat[whole:].view(1, -1)]
    norms = torch.cat([torch.linalg.vector_norm(part, dim=1) for part in parts])
    return norms.to(wide).square().sum()


def sums_of_squares(tensors: Iterable[Tensor | None]) -> list[float]:
    """Of each tensor, its sum of squares; 0 for None. The host waits for the device once."""
    found = [None if tensor is None else sum_of_squares(tensor) for tensor in tensors]
    there = [value for value in found if value is not None]
    values = iter(torch.stack(there).tolist() if there else [])
    return [0.0 if value is None else next(values) for value in found]


def changes(after: Iterable[Tensor], before: Iterable[Tensor]) -> Iterator[Tensor]:
    """Differences of tensors, one after another, so that no more than one is there at a time."""
    for new, old in zip(after, before, strict=True):
        yield new.detach() - old
