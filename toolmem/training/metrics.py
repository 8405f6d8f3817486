"""Sums and counts that are right over ranks, over accumulation, and after resuming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMean(Metric):
    """The mean of something over tokens, each token weighing the same whatever batch it came in.

    Sums are kept in float64 where the device has it: thousands of tokens' losses are added up.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: int | Tensor) -> None:
        """Add ``total``, a sum over ``count`` tokens."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """The mean so far; nan when there was no token."""
        return self.total / self.count


class TokenCount(Metric):
    """A number of tokens, added up over batches and ranks."""

    full_state_update = False
    is_differentiable = False
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, count: int | Tensor) -> None:
        """Add ``count`` tokens."""
        self.count += count

    def compute(self) -> Tensor:
        """The number so far."""
        return self.count.clone()


class NamedMeans:
    """Means over tokens by name, names coming up as they please."""

    def __init__(self) -> None:
        self.means: dict[str, TokenMean] = {}
        self.process_group: Any = None  # ranks that read different data; None for all

    def update(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add means over ``count`` tokens."""
        for name, value in values.items():
            if name not in self.means:
                self.means[name] = self._new().to(value.device)
            self.means[name].update(value.detach() * count, count)

    def _new(self) -> TokenMean:
        return TokenMean(process_group=self.process_group)

    def take(self) -> dict[str, float]:
        """The means by name, and begin anew."""
        values = {name: mean.compute().item() for name, mean in self.means.items()}
        for mean in self.means.values():
            mean.reset()
        return values

    def saved_state(self) -> dict[str, dict[str, float | int]]:
        """All sums, as plain numbers; every rank must call it."""
        return {name: saved_state(mean) for name, mean in self.means.items()}

    def restore_state(
        self, state: Mapping[str, dict[str, float | int]], rank: int, device: torch.device
    ) -> None:
        """Put back what ``saved_state`` returned."""
        for name, one in state.items():
            self.means[name] = self._new().to(device)
            restore_state(self.means[name], one, rank)


def saved_state(metric: Metric) -> dict[str, float | int]:
    """A metric's sums over all ranks, as plain numbers; every rank must call it."""
    with metric.sync_context():
        return {name: value.item() for name, value in metric.metric_state.items()}  # type: ignore[union-attr]


def restore_state(metric: Metric, state: dict[str, float | int], rank: int) -> None:
    """Put back what ``saved_state`` returned: rank zero holds it all, so that it counts once."""
    metric.reset()
    if rank == 0:
        for name, value in state.items():
            getattr(metric, name).fill_(value)
        metric._update_count = 1  # else torchmetrics warns that nothing was ever added
