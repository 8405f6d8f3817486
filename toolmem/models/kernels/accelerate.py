"""Let a model's linear layers run by the kernels while it is used for inference."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from types import TracebackType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.models.kernels.functions import fast_linear, linear

_lock = threading.Lock()
# By layer: how many want it as it is now, of each kind.
_wanted: weakref.WeakKeyDictionary[nn.Module, Counter[type[nn.Linear]]] = (
    weakref.WeakKeyDictionary()
)


class FastLinear(nn.Linear):
    """``nn.Linear`` by ``fast_linear``."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return fast_linear(input, self.weight, self.bias)


class InvariantLinear(nn.Linear):
    """``nn.Linear`` by ``linear``: a row's bits do not depend on its neighbours."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return F.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


class accelerate:  # noqa: N801 - used as a function
    """Run a model's linear layers by the kernels, until ``close`` or the end of a ``with``.

    Weights are neither copied nor packed: each call reads them as they then are. Layers that are not
    plainly ``nn.Linear`` stay as they are, and whatever wants a gradient goes to ``F.linear``.

    Args:
        model: whose layers.
        invariant: by ``linear``, whatever the number of rows, instead of ``fast_linear``.
    """

    def __init__(self, model: nn.Module, invariant: bool = False) -> None:
        self._kind: type[nn.Linear] = InvariantLinear if invariant else FastLinear
        self._layers: list[nn.Linear] = [
            layer
            for layer in model.modules()
            if isinstance(layer, nn.Linear)
            and type(layer) in (nn.Linear, FastLinear, InvariantLinear)
        ]
        with _lock:
            for layer in self._layers:
                _wanted.setdefault(layer, Counter())[self._kind] += 1
                _choose(layer)

    def close(self) -> None:
        """Give the layers back; again is no harm."""
        with _lock:
            for layer in self._layers:
                _wanted[layer][self._kind] -= 1
                _choose(layer)
            self._layers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _choose(layer: nn.Linear) -> None:
    """The class that serves all who use the layer: where two differ, the one that promises more."""
    wanted = _wanted[layer]
    for kind in (InvariantLinear, FastLinear):
        if wanted[kind] > 0:
            layer.__class__ = kind
            return
    layer.__class__ = nn.Linear
    del _wanted[layer]
