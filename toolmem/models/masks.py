"""Which token may see which: causal, blocked by document, over a window, over a cache, by spans.

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


def attention_mask(
    positions: Tensor,
    *,
    n_keys: int = 0,
    documents: Tensor | None = None,
    spans: Tensor | None = None,
    key_spans: Tensor | None = None,
    window: int = 0,
) -> Tensor | None:
    """The mask of one forward pass, or None where plain causal attention does.

    Args:
        positions: (batch, seq) or (seq,) int64, each token's position in its document or lane.
        n_keys: cached keys that are looked at, key j being the lane's token at position j; 0 when the
            tokens look at each other alone.
        documents: (batch, seq) ids within which attention stays; not with cached keys.
        spans: (batch, seq) int64: tokens that share an id of 0 and up see each other both ways; -1
            elsewhere.
        key_spans: (batch, at least n_keys) int64: the same of the cached keys.
        window: how many tokens back, itself included; 0 for all. A span is seen within it both ways.

    Returns:
        bool, (seq, seq) or (batch, 1, seq, keys).
    """
    seq = positions.shape[-1]
    if not n_keys and documents is None and spans is None and not 0 < window < seq:
        return None
    if n_keys:
        queries = positions[..., :, None]
        keys = torch.arange(n_keys, device=positions.device)
    else:  # within a row, places serve as well as positions: documents are told apart below
        index = torch.arange(seq, device=positions.device)
        queries, keys = index[:, None], index
    distance = queries - keys
    allowed = distance >= 0
    if spans is not None:
        of_keys = key_spans[:, :n_keys] if n_keys and key_spans is not None else spans
        allowed = allowed | ((spans[:, :, None] == of_keys[:, None, :]) & (spans >= 0)[:, :, None])
    if window:
        allowed = allowed & (distance.abs() < window)
    if documents is not None:
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])
    return allowed if allowed.ndim == 2 else allowed[:, None]


def tree_mask(lengths: Tensor, ancestors: Tensor, n_keys: int) -> Tensor:
    """Attention of a tree of drafted tokens over a cache: to all before the tree, and to its own path.

    Args:
        lengths: (batch,) int64, tokens of each lane before the tree; its nodes' keys follow them.
        ancestors: (batch, nodes, nodes) bool, which nodes each sees, itself among them.
        n_keys: cached keys that are looked at.

    Returns:
        (batch, 1, nodes, n_keys) bool.
    """
    index = torch.arange(n_keys, device=lengths.device)
    node = (index - lengths[:, None]).clamp(0, ancestors.shape[2] - 1)
    inside = (index >= lengths[:, None]) & (index < lengths[:, None] + ancestors.shape[2])
    own = ancestors.gather(2, node[:, None, :].expand(-1, ancestors.shape[1], -1))
    return torch.where(inside[:, None], own, index < lengths[:, None, None])[:, None]


def ring_mask(
    positions: Tensor,
    key_positions: Tensor,
    window: int,
    spans: Tensor | None = None,
    key_spans: Tensor | None = None,
) -> Tensor:
    """Attention over keys that lie in any order, each known by its position.

    Args:
        positions: (batch, seq) int64, of the queries.
        key_positions: (batch, keys) int64; -1 where there is no key.
        window: how many tokens back, itself included.
        spans: (batch, seq) int64 ids of the queries' spans, -1 for none; None for causal attention.
        key_spans: (batch, keys) int64, of the keys'.

    Returns:
        (batch, 1, seq, keys) bool.
    """
    distance = positions[:, :, None] - key_positions[:, None, :]
    allowed = distance >= 0
    if spans is not None and key_spans is not None:
        same = spans[:, :, None] == key_spans[:, None, :]
        allowed = allowed | (same & (spans >= 0)[:, :, None])
    exists = (key_positions >= 0)[:, None, :]
    return (allowed & (distance.abs() < window) & exists)[:, None]
