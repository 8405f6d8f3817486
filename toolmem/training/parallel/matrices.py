"""Whole matrices, of optimizers that look at them as such, put together from the ranks' pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from toolmem.training.parallel.layout import cut


def holds_whole_matrices(tensor: DTensor) -> bool:
    """Whether a rank's piece of a stack (..., m, n) is a stack of whole matrices."""
    return all(
        placement.is_replicate() or placement.dim < tensor.ndim - 2  # type: ignore[attr-defined]
        for placement in tensor.placements
    )


def gathered(pieces: Sequence[Tensor], like: DTensor) -> Tensor:
    """The tensors that pieces are of, stacked, on every rank: one collective for each dimension of the mesh.

    Args:
        pieces: this rank's, of tensors that are split as ``like`` is.
        like: one of them, or of their shape.
    """
    stack = DTensor.from_local(
        torch.stack(list(pieces)),
        like.device_mesh,
        _of_stack(like.placements),
        run_check=False,
        shape=torch.Size((len(pieces), *like.shape)),
        stride=(like.numel(), *like.stride()),
    )
    return stack.full_tensor()


def own_pieces(stack: Tensor, like: DTensor) -> list[Tensor]:
    """The way back from ``gathered``; nothing is sent."""
    return list(cut(stack.contiguous(), like.device_mesh, _of_stack(like.placements)).unbind(0))


def _of_stack(placements: Sequence[Placement]) -> list[Placement]:
    """Placements of a stack of such tensors."""
    moved: list[Placement] = []
    for placement in placements:
        if isinstance(placement, _StridedShard):
            moved.append(_StridedShard(placement.dim + 1, split_factor=placement.split_factor))
        else:
            moved.append(Shard(placement.dim + 1) if isinstance(placement, Shard) else placement)
    return moved
