"""Which token may see which: causal, blocked by document, and over a cache of keys.

Masks are bool, True where attention is allowed, and broadcast to (batch, heads, queries, keys).
Plain causal attention has none: ``scaled_dot_product_attention(is_causal=True)`` needs none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(seq: int, device: torch.device | None = None) -> Tensor:
    """(seq, seq) bool: each token sees itself and what came before it."""
    return torch.ones(seq, seq, dtype=torch.bool, device=device).tril()


def document_mask(documents: Tensor) -> Tensor:
    """Causal attention that stays within a document.

    Args:
        documents: (batch, seq) integer ids; a document's tokens share one and are adjacent.

    Returns:
        (batch, 1, seq, seq) bool.
    """
    same = documents[:, :, None] == documents[:, None, :]
    return (same & causal_mask(documents.shape[1], documents.device))[:, None]


def document_positions(documents: Tensor) -> Tensor:
    """Each token's position within its document, counted from 0.

    Args:
        documents: (batch, seq) integer ids; a document's tokens share one and are adjacent.

    Returns:
        (batch, seq) int64.
    """
    index = torch.arange(documents.shape[1], device=documents.device)
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)
    starts = torch.cat((first, documents[:, 1:] != documents[:, :-1]), dim=1)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def cache_mask(positions: Tensor, n_keys: int) -> Tensor:
    """Attention of new tokens over cached keys, key j being the lane's token at position j.

    Args:
        positions: (batch, seq) int64, the position of each new token in its lane.
        n_keys: how many keys are looked at.

    Returns:
        (batch, 1, seq, n_keys) bool.
    """
    return (torch.arange(n_keys, device=positions.device) <= positions[:, :, None])[:, None]
