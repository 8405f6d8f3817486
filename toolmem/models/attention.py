"""Self-attention: grouped heads, rotary positions, windows, caches.

Shapes: b batch, s seq, h query heads, k key/value heads, d head_dim, n keys looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models import flash, flex
from toolmem.models.attention_kernels import Plain
from toolmem.models.cache import AttentionCache, WindowCache
from toolmem.models.context import Context
from toolmem.models.flops import PairWork, attention_work, register_flops
from toolmem.models.layers import RMSNorm, ShortConvolution
from toolmem.models.masks import causal_mask
from toolmem.models.rope_scaling import scaled_frequencies

if TYPE_CHECKING:
    from toolmem.models.attention_kernels import Mask


def head_sizes(
    dim: int, n_heads: int, n_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int]:
    """The number of key/value heads and the width of a head, defaults filled in.

    Raises:
        ToolmemError: when heads do not divide what they share.
    """
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
    return kv_heads, dim // n_heads if head_dim is None else head_dim


def rotary_tables(
    head_dim: int, max_seq_len: int, base: float, scaling: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (RoPE, arXiv 2104.09864), in Llama's layout of halves.

    The sines carry the sign of ``rotate``'s swap, so that rotating is two products and a sum.

    Args:
        head_dim: width of a head, even.
        max_seq_len: number of positions.
        base: the slowest pair turns by 1/base^((d-2)/d) radians a token.
        scaling: makes pairs turn more slowly (``rope_scaling.py``).

    Returns:
        two float32 tensors (max_seq_len, 1, head_dim).
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    frequencies = scaled_frequencies(frequencies, scaling)
    angles = torch.arange(max_seq_len, dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each head by its position; of a head wider than the tables the first numbers alone.

    Args:
        x: (b, s, h, d).
        rotary: cosines and signed sines that broadcast to it (``rotary_tables``).
    """
    cos, sin = (table.to(x.dtype) for table in rotary)
    width = cos.shape[-1]
    if width < x.shape[-1]:
        x, still = x[..., :width], x[..., width:]
        return torch.cat((torch.addcmul(x * cos, x.roll(width // 2, -1), sin), still), dim=-1)
    return torch.addcmul(x * cos, x.roll(width // 2, -1), sin)


def repeated(heads: Tensor, n_heads: int) -> Tensor:
    """Key/value heads (b, k, n, d), one for each of ``n_heads`` query heads."""
    share = n_heads // heads.shape[1]
    return heads if share == 1 else heads.repeat_interleave(share, dim=1)


def _attention_work(
    mixer: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: object
) -> PairWork:
    return attention_work(queries, values, getattr(mixer, "window", 0))


class HeadMixing(nn.Module):
    """The middle of every attention: heads compare queries with keys and take means of values.

    Args:
        scale: what products of queries and keys are multiplied by.
        softcap: bound them to (-softcap, softcap) by a tanh (arXiv 2408.00118); 0 for none.
    """

    parameter_group = "attention"

    def __init__(self, scale: float, softcap: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.softcap = softcap

    @register_flops(_attention_work)
    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
        """Weighted means of values.

        Args:
            queries: (b, h, s, d).
            keys: (b, k, n, d).
            values: (b, k, n, v).
            mask: bool, broadcasting to (b, h, s, n); None for plain causal attention; or in the form
                of another kernel, which then it is (``Context.kernel_mask``).

        Returns:
            (b, h, s, v).
        """
        n_heads = queries.shape[1]
        if isinstance(mask, Plain):
            return self.weights(queries, keys, mask.mask) @ repeated(values, n_heads)
        if isinstance(mask, flash.Seen):
            return flash.attend(queries, keys, values, mask, self.scale, self.softcap)
        if not (mask is None or isinstance(mask, Tensor)):
            return flex.attend(queries, keys, values, mask, self.scale, self.softcap)
        if self.softcap:
            return self.weights(queries, keys, mask) @ repeated(values, n_heads)
        # The flash kernel also for tiny heads: at (128, 2, 70, 16) forward and backward took 13 ms
        # on one core, 25 ms by the math kernel and 16 ms by two bmm and a softmax.
        return F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=n_heads != keys.shape[1],
        )

    def weights(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Attention's weights, written plainly, (b, h, s, n); arguments as ``attend``.

        Padding that may look nowhere has none, as by ``scaled_dot_product_attention``.
        """
        weights = self.scores(queries, keys, mask).softmax(dim=-1)
        return weights if mask is None else weights.masked_fill(~mask.any(-1, keepdim=True), 0)

    def scores(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """What attention's softmax is given, (b, h, s, n), -inf where it may not look."""
        scores = queries @ repeated(keys, queries.shape[1]).transpose(-1, -2) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is None:
            mask = causal_mask(queries.shape[2], queries.device)
        return scores.masked_fill(~mask, float("-inf"))


class Attention(HeadMixing):
    """Causal self-attention with grouped key/value heads (GQA, arXiv 2305.13245).

    Args:
        dim: width of the residual stream.
        n_heads: query heads.
        n_kv_heads: key/value heads; each serves n_heads / n_kv_heads query heads; n_heads when None.
        head_dim: width of a head; dim / n_heads when None.
        qk_norm: RMS-normalise each query and key head before rotation (arXiv 2302.05442).
        norm_eps: epsilon of those norms.
        conv_width: taps of a short convolution over queries, keys and values (Canon B of
            arXiv 2512.17351); 0 for none.
        bias: biases in both projections.
        window: how many tokens back a token looks, itself included (arXiv 2004.05150); 0 for all.
        rope: turn queries and keys by their positions, where the model has rotary positions. A head
            wider than the model's rotary tables turns its first numbers only (arXiv 2204.06745).
        value_residual: mix the first layer's values into this layer's (arXiv 2410.17897), by two
            learned weights that start at one half.
        softcap: bound attention's logits to (-softcap, softcap) by a tanh (arXiv 2408.00118); 0 for
            none.
        scale: what products of queries and keys are multiplied by; 1 / sqrt(head_dim) when None.
        qkv_bias: a bias on the first projection, whatever ``bias`` says.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        conv_width: int = 0,
        bias: bool = False,
        window: int = 0,
        rope: bool = True,
        value_residual: bool = False,
        softcap: float = 0.0,
        scale: float | None = None,
        qkv_bias: bool = False,
    ) -> None:
        n_kv_heads, head_dim = head_sizes(dim, n_heads, n_kv_heads, head_dim)
        super().__init__(1 / math.sqrt(head_dim) if scale is None else scale, softcap)
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.window = window
        self.rope = rope
        self.rotary_dim = head_dim if rope else 0  # what it expects of the model's tables, at most
        channels = (n_heads + 2 * n_kv_heads) * head_dim
        self.qkv = nn.Linear(dim, channels, bias=bias or qkv_bias)
        self.out = nn.Linear(n_heads * head_dim, dim, bias=bias)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.conv = ShortConvolution(channels, conv_width) if conv_width else None
        self.value_mix = nn.Parameter(torch.full((2,), 0.5)) if value_residual else None

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionCache:
        """Empty decoding state of this layer."""
        make, length = (WindowCache, self.window) if self.window else (AttentionCache, max_len)
        cache = make(batch_size, length, self.n_kv_heads, self.head_dim, device, dtype)
        if self.conv is not None:
            cache.tail = self.conv.new_tail(batch_size, device, dtype)
        return cache

    def project(
        self, x: Tensor, context: Context, cache: AttentionCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, s, h, d), keys and values (b, s, k, d) of new tokens, ready to be compared."""
        b, s, _ = x.shape
        h, k = self.n_heads, self.n_kv_heads
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv = self.conv.run(qkv, context, cache, "tail")
        heads = qkv.view(b, s, h + 2 * k, self.head_dim)
        # Queries and keys turn together, as one tensor: half the operations.
        queries_keys, values = heads[:, :, : h + k], heads[:, :, h + k :]
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = queries_keys[:, :, :h], queries_keys[:, :, h:]
            queries_keys = torch.cat((self.q_norm(queries), self.k_norm(keys)), dim=2)
        if self.rope and context.rotary is not None:
            queries_keys = rotate(queries_keys, context.rotary)
        if self.value_mix is not None:
            first = context.shared.setdefault("values", values)
            if first is not values:
                values = self.value_mix[0] * first + self.value_mix[1] * values
        return queries_keys[:, :, :h], queries_keys[:, :, h:], values

    def forward(self, x: Tensor, context: Context, cache: AttentionCache | None = None) -> Tensor:
        """Attend.

        Args:
            x: (b, s, dim).
            context: masks and positions.
            cache: this layer's state, written to.
        """
        queries, keys, values = self.project(x, context, cache)
        if cache is not None:
            y = cache.attend(self, queries, keys, values, context)
        else:
            mask = context.kernel_mask(self.window)
            y = self.attend(
                queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), mask
            )
        return self.out(y.transpose(1, 2).flatten(2))
