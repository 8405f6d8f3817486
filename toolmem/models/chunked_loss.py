"""Cross-entropy without all logits at once: head, softmax and gradients, some rows at a time.

With a vocabulary of 49,152 the logits of 4,096 tokens are 0.8 GB, and plain training holds them about three
times. Here a chunk's logits become its losses and, in the same pass, the gradients of what the head read and
of the head, so nothing is computed twice (as in arXiv 2410.10989; recomputing instead is arXiv 2411.09009).
This serves for the *sum* of the losses, whose gradient is the same for each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# More logits than these are not held at once: a quarter of a GB in float32; a chunk has a quarter of them.
MANY_LOGITS = 1 << 26
FEWEST_ROWS = 64


def rows_at_once(rows: int, vocab_size: int) -> int:
    """How many rows' logits to hold at once where nobody says; 0 for all.

    Args:
        rows: that bear loss.
        vocab_size: logits of a row.
    """
    if rows * vocab_size <= MANY_LOGITS:
        return 0
    return max(MANY_LOGITS // (4 * vocab_size), FEWEST_ROWS)


def summed_cross_entropy(
    states: Tensor, weight: Tensor, targets: Tensor, chunk: int, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of a linear head, and that of each row.

    Products are in the dtype of ``states``, or autocast's; all else in float32 or wider.

    Args:
        states: (rows, dim), what the head reads.
        weight: (vocab_size, dim), the head's.
        targets: (rows,) int64.
        chunk: rows at a time.
        softcap: bound logits to (-softcap, softcap) by a tanh (arXiv 2408.00118); 0 for none.

    Returns:
        The sum, which has gradients, and (rows,), which has none; in nats.
    """
    wants = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    if wants:
        total, losses = _Summed.apply(states, weight, targets, chunk, softcap, dtype)
        return total, losses
    with torch.no_grad():
        losses, _, _ = _by_chunks(states, weight, targets, chunk, softcap, dtype, (False, False))
        return losses.sum(), losses


class _Summed(torch.autograd.Function):
    """Gradients are made in the forward pass, and multiplied by the sum's own in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        softcap: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        losses, of_states, of_weight = _by_chunks(
            states, weight, targets, chunk, softcap, dtype, wanted
        )
        ctx.save_for_backward(of_states, of_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: nobody else has them, and the head's is as large as the head.
        found = [
            None if one is None else one.mul_(of_sum.to(one.dtype)) for one in ctx.saved_tensors
        ]
        return (*found, None, None, None, None)


def _by_chunks(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    softcap: float,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses, and gradients of their sum by ``states`` and ``weight`` where they are wanted."""
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(states.device.type, enabled=False):
        head = weight.to(dtype)
        losses = states.new_empty(len(states), dtype=wide)
        of_states = torch.empty_like(states) if wanted[0] else None
        # The sum over chunks is in the parameter's own dtype, which is float32 under autocast.
        of_weight = torch.zeros_like(weight) if wanted[1] else None
        for begin in range(0, len(states), chunk):
            rows = slice(begin, begin + chunk)
            read, answers = states[rows].to(dtype), targets[rows, None]
            logits = F.linear(read, head).to(wide)
            if softcap:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            norm = logits.logsumexp(1, keepdim=True)
            losses[rows] = (norm - logits.gather(1, answers)).squeeze(1)
            if not any(wanted):
                continue
            slope = (1 - (logits / softcap).square_()) if softcap else None
            gradient = logits.sub_(norm).exp_()
            gradient.scatter_add_(1, answers, gradient.new_full(answers.shape, -1.0))
            if slope is not None:
                gradient.mul_(slope)
            gradient = gradient.to(dtype)
            if of_states is not None:
                of_states[rows] = gradient @ head
            if of_weight is not None:
                if of_weight.dtype == dtype:
                    of_weight.addmm_(gradient.T, read)
                else:
                    of_weight.add_(gradient.T @ read)
        return losses, of_states, of_weight
