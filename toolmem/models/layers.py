"""Parts that architectures are put together from: norms, rotary positions, attention, feed-forward.

Shapes: b batch, s seq, h heads, k key/value heads, d head_dim, c channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.cache import AttentionCache

NormKind = Literal["rms", "layer"]
FeedForwardKind = Literal["swiglu", "silu", "gelu", "relu2"]


@dataclass
class Context:
    """What a block may need to know of the tokens that it is given; made once a forward pass.

    Args:
        documents: (b, s) ids within which attention and convolution stay, or None.
        mask: bool, broadcasting to (b, h, s, keys), True where attention is allowed; None for plain
            causal attention.
        rotary: cosines and sines, each (s, 1, d) or (b, s, 1, d); None without rotary positions.
        counts: (b,) int64, real tokens of each row of a cached chunk; None when all are.
        slots: (b, s) int64, where each new token goes in a cache; None without one.
        n_keys: cached keys to look at; 0 when the chunk is all there is.
    """

    documents: Tensor | None = None
    mask: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    counts: Tensor | None = None
    slots: Tensor | None = None
    n_keys: int = 0


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain (arXiv 1910.07467).

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def make_norm(kind: str, dim: int, eps: float, bias: bool = False) -> nn.Module:
    """A norm by name: ``rms`` or ``layer``."""
    if kind == "rms":
        return RMSNorm(dim, eps)
    if kind == "layer":
        return nn.LayerNorm(dim, eps=eps, bias=bias)
    raise ToolmemError(f"norm: unknown {kind!r}; choose rms or layer")


def rotary_tables(head_dim: int, max_seq_len: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (RoPE, arXiv 2104.09864), in Llama's layout of halves.

    The sines carry the sign of ``rotate``'s swap, so that rotating is two products and a sum.

    Args:
        head_dim: width of a head, even.
        max_seq_len: number of positions.
        base: the slowest pair turns by 1/base^((d-2)/d) radians a token.

    Returns:
        two float32 tensors (max_seq_len, 1, head_dim).
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(max_seq_len, dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each head by its position.

    Args:
        x: (b, s, h, d).
        rotary: cosines and signed sines that broadcast to it (``rotary_tables``).
    """
    cos, sin = (table.to(x.dtype) for table in rotary)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class ShortConvolution(nn.Module):
    """Causal convolution of a few tokens, each channel by itself: y_t = x_t + sum_j w_j x_{t-j}.

    The taps start at zero around a residual connection, so it is the identity at the start, and
    weight decay pulls it there (Canon layers, arXiv 2512.17351).

    Args:
        channels: size of the last dimension.
        width: number of taps.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.width = width
        # Flat, not (width, channels): it is a bundle of filters, and nothing that treats matrices
        # as linear maps (Muon, low-rank adapters, quantisers) should take it for one.
        self.taps = nn.Parameter(torch.zeros(width * channels))

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """Convolve, seeing zeros before the first token.

        Args:
            x: (b, s, c).
            documents: (b, s) ids; a tap that would reach into another document sees zero.
        """
        # Shifted products: measured faster than F.conv1d with groups, forward and backward (9.6 ms
        # against 14.9 ms at (128, 70, 96) on one core, 0.9 against 2.5 ms at (32, 70, 48)).
        taps = self.taps.view(self.width, self.channels)
        first, seq = self.width - 1, x.shape[1]
        padded = F.pad(x, (0, 0, first, 0))
        ids = None if documents is None else F.pad(documents, (first, 0))
        y = x * (1 + taps[0])
        for j in range(1, self.width):
            shifted = slice(first - j, first - j + seq)
            earlier = padded[:, shifted]
            if documents is not None and ids is not None:
                earlier = earlier * (documents == ids[:, shifted])[:, :, None]
            y = torch.addcmul(y, earlier, taps[j])
        return y

    def step(self, x: Tensor, tail: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve a chunk that continues each lane.

        Args:
            x: (b, s, c), padded on the right.
            tail: (b, width - 1, c), the inputs before it.
            counts: (b,) int64, real tokens of each row; None when all are.

        Returns:
            the output (b, s, c), and the next chunk's tail.
        """
        joined = torch.cat((tail.to(x.dtype), x), dim=1)
        y = self.forward(joined)[:, self.width - 1 :]
        if counts is None:
            return y, joined[:, joined.shape[1] - self.width + 1 :]
        index = counts[:, None] + torch.arange(self.width - 1, device=x.device)
        return y, joined.gather(1, index[:, :, None].expand(-1, -1, self.channels))


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (GQA, arXiv 2305.13245).

    Args:
        dim: width of the residual stream.
        n_heads: query heads.
        n_kv_heads: key/value heads; each serves n_heads / n_kv_heads query heads.
        head_dim: width of a head.
        qk_norm: RMS-normalise each query and key head before rotation (arXiv 2302.05442).
        norm_eps: epsilon of those norms.
        conv_width: taps of a short convolution over queries, keys and values; 0 for none.
        bias: biases in both projections.
    """

    parameter_group = "attention"

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        conv_width: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        channels = (n_heads + 2 * n_kv_heads) * head_dim
        self.qkv = nn.Linear(dim, channels, bias=bias)
        self.out = nn.Linear(n_heads * head_dim, dim, bias=bias)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.conv = ShortConvolution(channels, conv_width) if conv_width else None

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionCache:
        """Empty decoding state of this layer."""
        return AttentionCache(
            batch_size,
            max_len,
            self.n_kv_heads,
            self.head_dim,
            tail=self.conv.width - 1 if self.conv else 0,
            channels=self.conv.channels if self.conv else 0,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, context: Context, cache: AttentionCache | None = None) -> Tensor:
        """Attend.

        Args:
            x: (b, s, dim).
            context: masks and positions.
            cache: this layer's state, written to.
        """
        b, s, _ = x.shape
        h, k = self.n_heads, self.n_kv_heads
        qkv = self.qkv(x)
        if self.conv is not None:
            if cache is None:
                qkv = self.conv(qkv, context.documents)
            else:
                qkv, cache.tail = self.conv.step(qkv, cache.tail, context.counts)
        heads = qkv.view(b, s, h + 2 * k, self.head_dim)
        # Queries and keys turn together, as one tensor: half the operations.
        queries_keys, values = heads[:, :, : h + k], heads[:, :, h + k :]
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = queries_keys[:, :, :h], queries_keys[:, :, h:]
            queries_keys = torch.cat((self.q_norm(queries), self.k_norm(keys)), dim=2)
        if context.rotary is not None:
            queries_keys = rotate(queries_keys, context.rotary)
        queries, keys = queries_keys[:, :, :h], queries_keys[:, :, h:]
        if cache is not None and context.slots is not None:
            cache.write(keys, values, context.slots)
        if cache is not None and context.n_keys:
            keys_, values_ = (
                cache.keys[:, :, : context.n_keys],
                cache.values[:, :, : context.n_keys],
            )
        else:
            keys_, values_ = keys.transpose(1, 2), values.transpose(1, 2)
        # The flash kernel also for tiny heads: at (128, 2, 70, 16) forward and backward took 13 ms
        # on one core, 25 ms by the math kernel and 16 ms by two bmm and a softmax.
        y = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys_,
            values_,
            attn_mask=context.mask,
            is_causal=context.mask is None,
            enable_gqa=h != k,
        )
        return self.out(y.transpose(1, 2).reshape(b, s, h * self.head_dim))


class FeedForward(nn.Module):
    """Two-layer perceptron on each token.

    ``swiglu`` is gated (arXiv 2002.05202), ``relu2`` is the squared ReLU (arXiv 2109.08668).

    Args:
        dim: width of the residual stream.
        hidden_dim: width inside; the gated form has two inputs of that width, in one projection.
        kind: ``swiglu``, ``silu``, ``gelu`` or ``relu2``.
        bias: biases in both projections.
    """

    parameter_group = "feed_forward"

    def __init__(self, dim: int, hidden_dim: int, kind: str = "swiglu", bias: bool = False) -> None:
        super().__init__()
        if kind not in ("swiglu", "silu", "gelu", "relu2"):
            raise ToolmemError(
                f"feed_forward: unknown {kind!r}; choose swiglu, silu, gelu or relu2"
            )
        self.kind = kind
        self.up = nn.Linear(dim, hidden_dim * (2 if kind == "swiglu" else 1), bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, dim) to (b, s, dim)."""
        x = self.up(x)
        if self.kind == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        elif self.kind == "silu":
            x = F.silu(x)
        elif self.kind == "gelu":
            x = F.gelu(x)
        else:
            x = F.relu(x).square()
        return self.down(x)
