"""Gradients of parameters that are split over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from toolmem.training.parallel.layout import local


def copies(tensor: Tensor) -> int:
    """On how many ranks each number of a tensor is; 1 for one that is not split."""
    if not isinstance(tensor, DTensor):
        return 1
    held = 1
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            held *= tensor.device_mesh.size(dim)
    return held


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Gradients, of those that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def norm_over_ranks(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all of them together, wherever their pieces are; every rank must call it.

    Args:
        gradients: ``DTensor``s of meshes that have every rank.
    """
    pieces = [local(gradient) for gradient in gradients]
    norms = torch.stack(torch._foreach_norm(pieces)).double()
    shares = torch.tensor([1 / copies(gradient) for gradient in gradients], dtype=torch.float64)
    total = (norms.square() * shares.to(norms.device)).sum()
    dist.all_reduce(total)
    return total.sqrt()


def clip_by_norm(parameters: Iterable[Tensor], largest: float) -> None:
    """Scale gradients down so that their norm together is at most ``largest``; every rank must call it.

    Args:
        parameters: whose gradients they are.
        largest: as of ``torch.nn.utils.clip_grad_norm_``.
    """
    gradients = gradients_of(parameters)
    if gradients:
        factor = (largest / (norm_over_ranks(gradients) + 1e-6)).clamp(max=1.0)
        scale(gradients, factor)


def scale(gradients: list[Tensor], factor: float | Tensor) -> None:
    """Multiply gradients, in place."""
    if isinstance(factor, Tensor):
        factor = factor.float() if factor.device.type == "mps" else factor
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)


def sums_of_squares_over_ranks(
    tensors: Iterable[Tensor | None], square: Callable[[Tensor], Tensor]
) -> list[float]:
    """Of each tensor as a whole, its sum of squares; 0 for None. Every rank must call it.

    Args:
        tensors: ``DTensor``s of meshes that have every rank.
        square: the sum of squares of one piece, a scalar.
    """
    shares = [
        None if tensor is None else square(local(tensor)) / copies(tensor) for tensor in tensors
    ]
    there = [value for value in shares if value is not None]
    if not there:
        return [0.0] * len(shares)
    total = torch.stack(there)
    dist.all_reduce(total)
    values = iter(total.tolist())
    return [0.0 if value is None else next(values) for value in shares]
