"""What the ranks of one tensor-parallel group say to each other, forward and backward.

A region of a model is split when each rank works out a part of it. Its input is the same on every rank
and its output a sum over ranks, so that (Megatron-LM, arXiv 1909.08053)

    enter   hands the input on; its gradients, one part on each rank, are summed
    leave   sums the parts of the output; the gradient is handed on

With sequence parallelism (arXiv 2205.05198) the stream outside of regions is split over tokens:

    enter   gathers the tokens; gradients are summed, and each rank keeps those of its own tokens
    leave   sums the parts, and each rank keeps its own tokens; gradients are gathered

All are plain blocking collectives on a process group: gloo and NCCL alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

SEQ = 1  # the dimension of tokens in (batch, seq, dim)


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over ranks, a new tensor."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def joined(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """All ranks' tensors of one shape, one after the other along ``dim``."""
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def own_part(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The own part of a tensor along ``dim``, the last one filled up with zeros."""
    size = -(-x.shape[dim] // group.size())
    missing = size * group.size() - x.shape[dim]
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 1 - dim % x.ndim) + (0, missing))
    return x.narrow(dim, group.rank() * size, size)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return summed(gradient, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Join(torch.autograd.Function):
    """Gathers forward; backward keeps the own part, of the sum over ranks or of what every rank has."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, size: int, sum_up: bool, group: ProcessGroup
    ) -> Tensor:
        ctx.dim, ctx.sum_up, ctx.group = dim, sum_up, group
        return joined(x, dim, group).narrow(dim, 0, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.sum_up:
            gradient = summed(gradient, ctx.group)
        return own_part(gradient, ctx.dim, ctx.group).contiguous(), None, None, None, None


class _Part(torch.autograd.Function):
    """Keeps the own part forward, of the sum over ranks or of what every rank has; gathers backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sum_up: bool, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.size, ctx.group = dim, x.shape[dim], group
        if sum_up:
            x = summed(x, group)
        return own_part(x, dim, group).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        whole = joined(gradient, ctx.dim, ctx.group).narrow(ctx.dim, 0, ctx.size)
        return whole, None, None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def enter(x: Tensor, group: ProcessGroup) -> Tensor:
    """What every rank has, into a region that is split."""
    return _Enter.apply(x, group)


def leave(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of what the ranks' parts of a region put out."""
    return _Leave.apply(x, group)


def pass_on(x: Tensor, group: ProcessGroup) -> Tensor:
    """A sum over ranks within a region, which each rank goes on with by itself."""
    return enter(leave(x, group), group)


def join(x: Tensor, dim: int, size: int, group: ProcessGroup, *, sum_up: bool) -> Tensor:
    """All ranks' parts along ``dim``.

    Args:
        x: this rank's part, as large as the others'.
        dim: where it is split.
        size: of the whole; what is beyond it was filled up.
        group: the ranks.
        sum_up: each rank goes on with the whole by itself, so that gradients are parts of a sum; else all
            ranks do the same with it.
    """
    return _Join.apply(x, dim, size, sum_up, group)


def part(x: Tensor, dim: int, group: ProcessGroup, *, sum_up: bool) -> Tensor:
    """The own part along ``dim``, filled up with zeros where the whole does not divide.

    Args:
        x: the whole, or a part of a sum.
        dim: where to split it.
        group: the ranks.
        sum_up: sum it over ranks first.
    """
    return _Part.apply(x, dim, sum_up, group)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``, its gradient multiplied."""
    return _ScaleGradient.apply(x, factor)
