"""Choosing the next token: small pure functions on logits (lanes, vocab).

Chance comes in as one uniform number a lane, drawn from the dialogue's own generator, so that what
a dialogue samples does not depend on its neighbours in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from toolmem.errors import ToolmemError


def greedy(logits: Tensor) -> Tensor:
    """The most probable token of each lane, the first of a tie: (lanes, vocab) to (lanes,)."""
    return logits.argmax(dim=-1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """``logits`` (lanes, vocab) with all but the k largest of each lane at -inf; ties are kept."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """``logits`` (lanes, vocab) with all but each lane's nucleus at -inf (arXiv 1904.09751).

    The nucleus is the smallest set of most probable tokens whose probabilities sum to ``p`` or
    more.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(outside, -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample by inverting the cumulative distribution.

    Args:
        logits: (lanes, vocab).
        uniform: (lanes,) numbers in [0, 1).

    Returns:
        (lanes,) int64.
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    threshold = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    return (cumulative <= threshold).sum(dim=-1).clamp(max=logits.shape[-1] - 1)


class Sampler(Protocol):
    """How the next tokens are chosen."""

    @property
    def random(self) -> bool:
        """Whether it needs the uniform numbers."""

    def __call__(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """Choose from (lanes, vocab) by (lanes,) numbers in [0, 1): (lanes,) int64."""


@dataclass(frozen=True)
class Greedy:
    """Always the most probable token."""

    random: bool = False

    def __call__(self, logits: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Choose from (lanes, vocab): (lanes,) int64."""
        return greedy(logits)


@dataclass(frozen=True)
class Sampling:
    """Sample after temperature, then top-k, then top-p.

    Args:
        temperature: divides the logits; above 0 (for 0 take ``Greedy``).
        top_k: keep the k most probable tokens; None for all.
        top_p: then keep the nucleus of this mass; None for all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    random: bool = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ToolmemError(
                f"temperature is {self.temperature}: it must be above 0 (greedy choice is 'Greedy')"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ToolmemError(f"top_k is {self.top_k}: it must be at least 1, or left out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ToolmemError(f"top_p is {self.top_p}: it must be above 0 and at most 1")

    def __call__(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """Choose from (lanes, vocab) by (lanes,) numbers in [0, 1): (lanes,) int64."""
        assert uniform is not None, "a random sampler needs uniform numbers"
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        return draw(logits, uniform)


def uniform_numbers(generators: list[torch.Generator]) -> Tensor:
    """One number in [0, 1) of each dialogue's generator: (lanes,) float64."""
    return torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
