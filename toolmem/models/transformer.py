"""A decoder-only Transformer.

Unusual about it: query, key and value come from one projection, and may pass through a causal
convolution of a few tokens (Canon layers), which makes learning to copy reliable; the gated
feed-forward has one input projection. Everything else is Llama's (or, by options, GPT-2's).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.cache import AttentionCache
from toolmem.models.language_model import LanguageModel
from toolmem.models.layers import (
    Attention,
    Context,
    FeedForward,
    FeedForwardKind,
    NormKind,
    make_norm,
)


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalised input and added to the stream.

    Args:
        attention: the mixer over tokens.
        feed_forward: the mixer over channels.
        attention_norm: before the first.
        feed_forward_norm: before the second.
        dropout: probability, on what each adds.
    """

    def __init__(
        self,
        attention: Attention,
        feed_forward: FeedForward,
        attention_norm: nn.Module,
        feed_forward_norm: nn.Module,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, x: Tensor, context: Context, cache: AttentionCache | None = None) -> Tensor:
        """(batch, seq, dim) to (batch, seq, dim)."""
        y = self.attention(self.attention_norm(x), context, cache)
        x = x + (y if self.dropout is None else self.dropout(y))
        y = self.feed_forward(self.feed_forward_norm(x))
        return x + (y if self.dropout is None else self.dropout(y))

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionCache:
        """Empty decoding state of this layer."""
        return self.attention.new_cache(batch_size, max_len, device, dtype)


class Transformer(LanguageModel):
    """A decoder-only Transformer, Llama's shape by default.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        n_layers: number of blocks.
        n_heads: query heads of each.
        n_kv_heads: key/value heads (GQA); n_heads when None.
        hidden_dim: width inside the feed-forward; 4 * dim when None.
        head_dim: width of a head; dim / n_heads when None.
        max_seq_len: longest sequence.
        norm: ``rms`` or ``layer``.
        position: ``rope``, ``learned`` or ``none``.
        rope_base: RoPE's base.
        qk_norm: RMS-normalise query and key heads.
        feed_forward: ``swiglu``, ``silu``, ``gelu`` or ``relu2``.
        tie_embeddings: the head is the embedding, transposed.
        embedding_scale: multiply embedded tokens by sqrt(dim).
        dropout: probability, on embedded tokens and on what each branch adds to the stream.
        conv_width: taps of the short causal convolution on query, key and value; 0 for none.
        initialization: ``scaled``, ``gpt2`` or ``llama`` (``initialization.py``).
        norm_eps: epsilon of the norms.
        bias: biases in projections and layer norms.

    Raises:
        ToolmemError: for sizes that do not go together, naming the key.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        head_dim: int | None = None,
        max_seq_len: int = 1024,
        norm: NormKind = "rms",
        position: Literal["rope", "learned", "none"] = "rope",
        rope_base: float = 10_000.0,
        qk_norm: bool = False,
        feed_forward: FeedForwardKind = "swiglu",
        tie_embeddings: bool = False,
        embedding_scale: bool = False,
        dropout: float = 0.0,
        conv_width: int = 0,
        initialization: str = "scaled",
        norm_eps: float = 1e-5,
        bias: bool = False,
    ) -> None:
        sizes = {"vocab_size": vocab_size, "dim": dim, "n_layers": n_layers, "n_heads": n_heads}
        sizes |= {"max_seq_len": max_seq_len}
        optional = {"n_kv_heads": n_kv_heads, "hidden_dim": hidden_dim, "head_dim": head_dim}
        sizes |= {name: value for name, value in optional.items() if value is not None}
        for name, value in sizes.items():
            if value < 1:
                raise ToolmemError(f"{name} is {value}: it must be at least 1")
        if head_dim is None and dim % n_heads:
            raise ToolmemError(
                f"dim {dim} is not divisible by n_heads {n_heads}: change n_heads or dim, or set "
                "head_dim"
            )
        kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads % kv_heads:
            raise ToolmemError(
                f"n_heads {n_heads} is not divisible by n_kv_heads {kv_heads}: change n_kv_heads"
            )
        width = dim // n_heads if head_dim is None else head_dim
        if position not in ("rope", "learned", "none"):
            raise ToolmemError(f"position: unknown {position!r}; choose rope, learned or none")
        if position == "rope" and width % 2:
            raise ToolmemError(
                f"head_dim {width} is odd, and position: rope turns pairs of numbers: make "
                "head_dim (dim / n_heads) even, or choose another position"
            )
        if not 0 <= dropout < 1:
            raise ToolmemError(f"dropout is {dropout}: it must be at least 0 and below 1")
        if conv_width < 0:
            raise ToolmemError(f"conv_width is {conv_width}: it must be 0 (off) or more")
        if norm_eps <= 0 or rope_base <= 0:
            raise ToolmemError("norm_eps and rope_base must be above 0")

        def block() -> Block:
            return Block(
                Attention(dim, n_heads, kv_heads, width, qk_norm, norm_eps, conv_width, bias),
                FeedForward(dim, hidden_dim or 4 * dim, feed_forward, bias),
                make_norm(norm, dim, norm_eps, bias),
                make_norm(norm, dim, norm_eps, bias),
                dropout,
            )

        super().__init__(
            [block() for _ in range(n_layers)],
            make_norm(norm, dim, norm_eps, bias),
            vocab_size=vocab_size,
            dim=dim,
            max_seq_len=max_seq_len,
            rotary_dim=width if position == "rope" else 0,
            rope_base=rope_base,
            learned_positions=position == "learned",
            tie_embeddings=tie_embeddings,
            embedding_scale=embedding_scale,
            dropout=dropout,
            initialization=initialization,
        )
