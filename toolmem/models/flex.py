"""Masked attention on a GPU by FlexAttention (arXiv 2412.05496), which passes over what no query sees.

Elsewhere the mask is materialised: (batch, seq, seq) bool for torch's own kernels. On a GPU that is
slow for long rows, and it keeps torch from its fastest kernel; FlexAttention takes the rule instead,
and leaves out blocks of 128 x 128 in which nothing is allowed: documents of others, and what lies
beyond a window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def mask_rule(
    documents: Tensor | None, spans: Tensor | None, window: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """What ``masks.attention_mask`` says, as a function of (row, head, query, key).

    Args:
        documents: (batch, seq) ids within which attention stays, or None.
        spans: (batch, seq) int64: tokens that share an id of 0 and up see each other both ways; None
            for causal attention.
        window: how many tokens back, itself included; 0 for all. A span is seen within it both ways.
    """

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if spans is not None:
            mine = spans[row, query]
            seen = seen | ((mine == spans[row, key]) & (mine >= 0))
        if window:
            seen = seen & ((query - key).abs() < window)
        if documents is not None:
            seen = seen & (documents[row, query] == documents[row, key])
        return seen

    return allowed


def block_mask(
    seq: int,
    device: torch.device,
    documents: Tensor | None = None,
    spans: Tensor | None = None,
    window: int = 0,
) -> BlockMask:
    """FlexAttention's mask for whole rows; arguments as ``mask_rule``."""
    from torch.nn.attention.flex_attention import create_block_mask

    ids = documents if documents is not None else spans
    return create_block_mask(
        mask_rule(documents, spans, window),
        B=None if ids is None else ids.shape[0],
        H=None,
        Q_LEN=seq,
        KV_LEN=seq,
        device=device,
    )


def from_mask(mask: Tensor) -> BlockMask:
    """FlexAttention's mask that says what a materialised one says.

    Args:
        mask: bool, (queries, keys) or (batch, 1, queries, keys).
    """
    from torch.nn.attention.flex_attention import create_block_mask

    rows = mask.reshape(-1, *mask.shape[-2:])

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rows[row, query, key]

    return create_block_mask(
        allowed,
        B=len(rows) if len(rows) > 1 else None,
        H=None,
        Q_LEN=rows.shape[1],
        KV_LEN=rows.shape[2],
        device=mask.device,
    )


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it materialises the scores of every head.
    return torch.compile(flex_attention)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: BlockMask, scale: float, softcap: float
) -> Tensor:
    """Weighted means of values, (b, h, s, v), as ``HeadMixing.attend``.

    Args:
        queries: (b, h, s, d).
        keys: (b, k, n, d), each of the k heads for h / k query heads.
        values: (b, k, n, v).
        mask: of ``block_mask`` or ``from_mask``.
        scale: what products of queries and keys are multiplied by.
        softcap: bound them to (-softcap, softcap) by a tanh; 0 for none.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    # Inside a compiled model it is compiled with the rest.
    apart = queries.is_cuda and not torch.compiler.is_compiling()
    kernel: Callable[..., Tensor] = _compiled() if apart else flex_attention  # type: ignore[assignment]
    # Contiguous: with views of one computed tensor (queries and keys turn together), inductor of
    # torch 2.13 was seen to give wrong results on a CPU.
    return kernel(
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        score_mod=capped if softcap else None,
        block_mask=mask,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
