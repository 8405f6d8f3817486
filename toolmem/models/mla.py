"""Multi-head latent attention (MLA, arXiv 2405.04434): keys and values from one small vector a token.

A token is kept as a latent c of ``kv_rank`` numbers and a key k_R of ``rope_dim`` numbers that carries
its position and serves all heads:

    c = norm(W_DKV x)    k_R = RoPE(W_KR x)    q = W_UQ norm(W_DQ x) = [q_C ; RoPE(q_R)]
    k = [W_UK c ; k_R]   v = W_UV c            scores = q k / sqrt(head_dim + rope_dim)

The cache holds c and k_R, and neither keys nor values are made of it again: W_UK is absorbed into the
query, since q_C (W_UK c) = (W_UK^T q_C) c, and W_UV is applied to the mean of latents. A token then
costs rank + rope_dim numbers a layer, where grouped heads cost 2 n_kv_heads head_dim.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.attention import HeadMixing, head_sizes, rotate
from toolmem.models.cache import TokenState
from toolmem.models.context import Context
from toolmem.models.layers import RMSNorm, ShortConvolution

if TYPE_CHECKING:
    from toolmem.models.attention_kernels import Mask


def rope_width(head_dim: int, rope_dim: int | None) -> int:
    """``rope_dim``, or DeepSeek-V2's choice when None: half a head, made even."""
    return max(2, head_dim // 4 * 2) if rope_dim is None else rope_dim


class LatentCache(TokenState):
    """Latents and position keys of one layer; the last slot is where padding is written.

    Args:
        batch_size: number of lanes.
        max_len: tokens that a lane can hold.
        width: kv_rank + rope_dim.
        device: where it lives.
        dtype: of what is kept.
    """

    token_dims = {"latents": 1}
    tail: Tensor  # (batch, taps - 1, channels): the short convolution's last inputs, where there is one

    def __init__(
        self,
        batch_size: int,
        max_len: int,
        width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.latents = torch.zeros(batch_size, max_len + 1, width, device=device, dtype=dtype)


class LatentAttention(HeadMixing):
    """Causal self-attention over latents (MLA).

    Args:
        dim: width of the residual stream.
        n_heads: heads.
        head_dim: width of a head's value, and of the part of its query and key without position;
            dim / n_heads when None.
        kv_rank: width of the latent that keys and values are made of; 4 * head_dim when None.
        rope_dim: width of the part with position; half of head_dim when None. The model's rotary
            tables must be as wide.
        q_rank: width of the latent that queries are made of; 0 makes them of the stream itself.
        norm_eps: epsilon of the latents' norms.
        conv_width: taps of a short convolution on latents and queries (Canon B of arXiv 2512.17351);
            0 for none.
        bias: biases in the first and the last projection.
        window: how many tokens back a token looks, itself included; 0 for all. All are kept.
        rope: turn the part with position, where the model has rotary positions.
        softcap: bound attention's logits to (-softcap, softcap) by a tanh; 0 for none.

    Raises:
        ToolmemError: for a width that cannot be, by name.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        head_dim: int | None = None,
        kv_rank: int | None = None,
        rope_dim: int | None = None,
        q_rank: int = 0,
        norm_eps: float = 1e-5,
        conv_width: int = 0,
        bias: bool = False,
        window: int = 0,
        rope: bool = True,
        softcap: float = 0.0,
    ) -> None:
        _, head_dim = head_sizes(dim, n_heads, None, head_dim)
        kv_rank = 4 * head_dim if kv_rank is None else kv_rank
        rope_dim = rope_width(head_dim, rope_dim)
        if kv_rank < 1 or q_rank < 0:
            raise ToolmemError(
                f"latent attention: kv_rank is {kv_rank}, q_rank {q_rank}: give 1 or more, and 0 (no "
                "latent of queries) or more"
            )
        if rope_dim < 0 or rope_dim % 2:
            raise ToolmemError(f"latent attention: rope_dim is {rope_dim}: it must be even, or 0")
        super().__init__(1 / math.sqrt(head_dim + rope_dim), softcap)
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.kv_rank = kv_rank
        self.rope_dim = rope_dim
        self.rotary_dim = rope_dim if rope else 0
        self.window = window
        self.rope = rope
        query_width = n_heads * (head_dim + rope_dim)
        self.widths = (q_rank or query_width, kv_rank, rope_dim)
        self.compress = nn.Linear(dim, sum(self.widths), bias=bias)
        self.conv = ShortConvolution(sum(self.widths), conv_width) if conv_width else None
        self.q_norm = RMSNorm(q_rank, norm_eps) if q_rank else None
        self.queries = nn.Linear(q_rank, query_width, bias=False) if q_rank else None
        self.kv_norm = RMSNorm(kv_rank, norm_eps)
        self.keys_values = nn.Linear(kv_rank, n_heads * 2 * head_dim, bias=False)
        self.out = nn.Linear(n_heads * head_dim, dim, bias=bias)

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LatentCache:
        """Empty decoding state of this layer."""
        cache = LatentCache(batch_size, max_len, self.kv_rank + self.rope_dim, device, dtype)
        if self.conv is not None:
            cache.tail = self.conv.new_tail(batch_size, device, dtype)
        return cache

    def compressed(
        self, x: Tensor, context: Context, cache: LatentCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries (b, s, h, head_dim + rope_dim), and what is kept of each token (b, s, kv_rank +
        rope_dim).
        """
        y = self.compress(x)
        if self.conv is not None:
            y = self.conv.run(y, context, cache, "tail")
        queries, latents, position_key = y.split(self.widths, dim=-1)
        if self.queries is not None and self.q_norm is not None:
            queries = self.queries(self.q_norm(queries))
        queries = queries.unflatten(-1, (self.n_heads, self.head_dim + self.rope_dim))
        if self.rope_dim and self.rope and context.rotary is not None:
            content, place = queries.split((self.head_dim, self.rope_dim), dim=-1)
            queries = torch.cat((content, rotate(place, context.rotary)), dim=-1)
            position_key = rotate(position_key[:, :, None], context.rotary)[:, :, 0]
        return queries, torch.cat((self.kv_norm(latents), position_key), dim=-1)

    def project(
        self, x: Tensor, context: Context, cache: LatentCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (b, s, h, head_dim + rope_dim) and values (b, s, h, head_dim) of new tokens,
        ready to be compared, as those of ``Attention``.
        """
        queries, kept = self.compressed(x, context, cache)
        return queries, *self.expanded(kept)

    def expanded(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (b, n, h, ...) of what is kept (b, n, kv_rank + rope_dim)."""
        latents, position_key = kept.split((self.kv_rank, self.rope_dim), dim=-1)
        heads = self.keys_values(latents).unflatten(-1, (self.n_heads, 2 * self.head_dim))
        keys, values = heads.chunk(2, dim=-1)
        shared = position_key[:, :, None].expand(-1, -1, self.n_heads, -1)
        return torch.cat((keys, shared), dim=-1), values

    def forward(self, x: Tensor, context: Context, cache: LatentCache | None = None) -> Tensor:
        """Attend.

        Args:
            x: (b, s, dim).
            context: masks and positions.
            cache: this layer's state, written to.
        """
        queries, kept = self.compressed(x, context, cache)
        if cache is not None:
            cache.write(context, latents=kept)
        if cache is not None and context.n_keys:
            kept = cache.read("latents", context).to(queries.dtype)
            return self.absorbed(queries, kept, context.kernel_mask(self.window))
        keys, values = self.expanded(kept)
        y = self.attend(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            context.kernel_mask(self.window),
        )
        return self.out(y.transpose(1, 2).flatten(2))

    def absorbed(self, queries: Tensor, kept: Tensor, mask: Mask) -> Tensor:
        """The same without making keys or values: one shared head, of which each value is the latent.

        Args:
            queries: (b, s, h, head_dim + rope_dim).
            kept: (b, n, kv_rank + rope_dim).
            mask: as of ``attend``.

        Returns:
            (b, s, dim).
        """
        weight = self.keys_values.weight.view(self.n_heads, 2, self.head_dim, self.kv_rank)
        of_keys, of_values = weight[:, 0], weight[:, 1]
        content, place = queries.split((self.head_dim, self.rope_dim), dim=-1)
        content = torch.einsum("bshd,hdr->bhsr", content, of_keys)
        y = self.attend(
            torch.cat((content, place.transpose(1, 2)), dim=-1),
            kept[:, None],
            kept[:, None, :, : self.kv_rank],
            mask,
        )
        y = torch.einsum("bhsr,hdr->bshd", y, of_values)
        return self.out(y.flatten(2))
