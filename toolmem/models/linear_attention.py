"""Linear attention with a memory that forgets: gated, and by the gated delta rule.

    gated          S_t = a_t S_{t-1} + b_t k_t v_t^T
    gated delta    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T
    y_t = S_t^T q_t

after arXiv 2312.06635 (here with one decay a head) and Gated DeltaNet, arXiv 2412.06464.
The delta rule takes the value that a key had out of the memory before it writes the new one. The memory is
a matrix a head, of fixed size whatever the length. Rows are taken chunk by chunk, and a chunk by matrix
products (the WY form of arXiv 2406.06484, section 3).

Shapes: b batch, s seq, h heads, k head_dim of keys, v head_dim of values, c tokens of a chunk.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.cache import LaneState
from toolmem.models.context import Context
from toolmem.models.flop_work import PairWork, token_work
from toolmem.models.flops import register_flops
from toolmem.models.language_model import LanguageModel
from toolmem.models.layers import (
    Block,
    FeedForward,
    FeedForwardKind,
    NormKind,
    ShortConvolution,
    make_norm,
)
from toolmem.models.rnn import document_starts, real_tokens, state_dtype
from toolmem.models.transformer import check_sizes

Rule = Literal["gated", "gated_delta"]


def sequential_memory(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor,
    strength: Tensor,
    *,
    delta: bool,
    starts: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule written plainly, token after token: the reference; arguments as ``chunked_memory``. A single
    token that is compiled goes by it.
    """
    b, s, h, k = keys.shape
    memory = values.new_zeros(b, h, k, values.shape[-1]) if initial is None else initial
    outputs = []
    for t in range(s):
        if starts is not None:
            memory = torch.where(starts[:, t, None, None, None], 0.0, memory)
        memory = memory * log_decay[:, t].exp()[..., None, None]
        key, value = keys[:, t], values[:, t]
        if delta:
            value = value - torch.einsum("bhk,bhkv->bhv", key, memory)
        memory = memory + torch.einsum("bh,bhk,bhv->bhkv", strength[:, t], key, value)
        outputs.append(torch.einsum("bhk,bhkv->bhv", queries[:, t], memory))
    return torch.stack(outputs, dim=1), memory


def _work(
    queries: Tensor, keys: Tensor, values: Tensor, *_: Any, delta: bool, **__: Any
) -> PairWork:
    """Of the rule written plainly, an operation on a number one FLOP, whatever the chunks. For each token,
    head and number of the memory: its decay, what is written and its sum, what is read 2; by the delta
    rule 2 to read what the key had. For each number of a value: its strength; by the delta rule the
    difference. For each token and head: the decay.
    """
    s, h, k = keys.shape[1:]
    v = values.shape[3]
    return token_work(h * ((7 * k * v + 2 * v if delta else 5 * k * v + v) + 1), seq=s)


# Compiled for all lengths, the number of chunks is a symbol, over which torch thinks for minutes: the
# products are large enough to be called one by one.
@register_flops(_work)
@torch.compiler.disable
def chunked_memory(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor,
    strength: Tensor,
    *,
    delta: bool,
    starts: Tensor | None = None,
    initial: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """What each token reads from the memory, and the memory at the end.

    Args:
        queries: (b, s, h, k).
        keys: (b, s, h, k).
        values: (b, s, h, v).
        log_decay: (b, s, h), at most 0.
        strength: (b, s, h), how much of a value is written; 0 writes nothing.
        delta: take out what the key had before.
        starts: (b, s) bool, tokens before which everything is forgotten.
        initial: (b, h, k, v), the memory before the first token; zeros when None.
        chunk_size: tokens of a chunk; it changes the time that is taken, and nothing else.

    Returns:
        (b, s, h, v), and the memory (b, h, k, v).
    """
    b, s, h, k = keys.shape
    memory = values.new_zeros(b, h, k, values.shape[-1]) if initial is None else initial
    c = min(chunk_size, s)
    padding = -s % c
    chunks = (s + padding) // c

    def by_chunk(x: Tensor) -> Tensor:
        """(b, s, h, ...) to (b, h, chunks, c, ...); what is added at the end writes and decays nothing."""
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding)).transpose(1, 2)
        return x.reshape(b, x.shape[1], chunks, c, *x.shape[3:])

    q, kk, v = by_chunk(queries), by_chunk(keys), by_chunk(values)
    total = by_chunk(log_decay).cumsum(-1)  # logarithm of the decay since the chunk's start
    written = by_chunk(strength)[..., None]
    index = torch.arange(c, device=keys.device)
    seen = index[:, None] >= index
    # exponents of pairs that do not see each other would be above 0: masked before exp, not after
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, -torch.inf)
    since_start, to_end = total, total[..., -1:] - total
    if starts is not None:
        # numbers of the runs between starts, counted from the chunk's first token; 0: what came before
        run = by_chunk(starts[:, :, None].long()).cumsum(-1)
        between = between.masked_fill(run[..., :, None] != run[..., None, :], -torch.inf)
        since_start = since_start.masked_fill(run > 0, -torch.inf)
        to_end = to_end.masked_fill(run != run[..., -1:], -torch.inf)
    between, since_start, to_end = between.exp(), since_start.exp()[..., None], to_end.exp()
    whole = since_start[..., -1, :, None]  # what is left of the memory at the chunk's end
    scores = (q @ kk.transpose(-1, -2)) * between
    new, read_before = written * v, None
    if delta:
        # what each token writes, given that those before it in the chunk wrote: (I + L) new = b v - ...
        lower = ((written * kk) @ kk.transpose(-1, -2) * between).tril(-1)
        sides = torch.cat((new, written * kk * since_start), dim=-1)
        sides = torch.linalg.solve_triangular(lower, sides, upper=False, unitriangular=True)
        new, read_before = sides[..., : v.shape[-1]], sides[..., v.shape[-1] :]
    q_before, k_after = q * since_start, (kk * to_end[..., None]).transpose(-1, -2)
    outputs = []
    for i in range(chunks):
        wrote = new[:, :, i]
        if read_before is not None:
            wrote = wrote - read_before[:, :, i] @ memory
        outputs.append(q_before[:, :, i] @ memory + scores[:, :, i] @ wrote)
        memory = whole[:, :, i] * memory + k_after[:, :, i] @ wrote
    y = torch.stack(outputs, dim=2).flatten(2, 3)[:, :, :s]
    return y.transpose(1, 2), memory


class MemoryState(LaneState):
    """What a layer of linear attention remembers.

    Args:
        memory: (batch, heads, head_dim of keys, head_dim of values).
    """

    tail: Tensor  # (batch, width - 1, channels), of the short convolution

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory


class _LinearAttention(nn.Module):
    """Linear attention: projections, short convolution, the memory, a gated norm.

    Args:
        dim: width of the residual stream.
        n_heads: heads.
        head_dim: width of a head's keys and values; dim / n_heads when None.
        conv_width: taps of the short convolution on queries, keys and values; 0 for none.
        chunk_size: tokens that are taken by one set of products; it changes the time that is taken only.
        norm_eps: epsilon of the norm of what each head reads.
    """

    parameter_group = "recurrence"
    delta: bool

    def __init__(
        self,
        dim: int,
        n_heads: int,
        head_dim: int | None = None,
        conv_width: int = 4,
        chunk_size: int = 64,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_sizes(n_heads=n_heads, head_dim=head_dim, chunk_size=chunk_size)
        if head_dim is None and dim % n_heads:
            raise ToolmemError(
                f"dim {dim} is not divisible by n_heads {n_heads}: change n_heads or dim, or set head_dim"
            )
        if conv_width < 0:
            raise ToolmemError(f"conv_width is {conv_width}: it must be 0 (off) or more")
        self.n_heads = n_heads
        self.head_dim = dim // n_heads if head_dim is None else head_dim
        self.chunk_size = chunk_size
        self.norm_eps = norm_eps
        inner = self.n_heads * self.head_dim
        # queries, keys, values, the output's gate
        self.inputs = nn.Linear(dim, 4 * inner, bias=False)
        self.rates = nn.Linear(dim, 2 * n_heads, bias=False)  # decay, strength
        self.conv = ShortConvolution(3 * inner, conv_width) if conv_width else None
        self.A_log = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())
        step = torch.exp(torch.empty(n_heads).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.norm_weight = nn.Parameter(torch.ones(self.head_dim))
        self.out = nn.Linear(inner, dim, bias=False)

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MemoryState:
        """Empty decoding state of this layer; its size does not depend on ``max_len``."""
        shape = (batch_size, self.n_heads, self.head_dim, self.head_dim)
        state = MemoryState(torch.zeros(shape, device=device, dtype=state_dtype(dtype)))
        if self.conv is not None:
            state.tail = self.conv.new_tail(batch_size, device, dtype)
        return state

    def forward(self, x: Tensor, context: Context, cache: MemoryState | None = None) -> Tensor:
        """Mix tokens.

        Args:
            x: (b, s, dim).
            context: documents, or how much of a chunk is real.
            cache: this layer's state, written to.
        """
        b, s, _ = x.shape
        inner = self.n_heads * self.head_dim
        mixed, gate = self.inputs(x).split((3 * inner, inner), dim=-1)
        if self.conv is not None:
            mixed = self.conv.run(mixed, context, cache, "tail")
        wide = state_dtype(x.dtype)
        heads = F.silu(mixed).view(b, s, 3, self.n_heads, self.head_dim).to(wide)
        queries, keys, values = heads.unbind(2)
        queries = F.normalize(queries, dim=-1) / math.sqrt(self.head_dim)
        keys = F.normalize(keys, dim=-1)
        decay, strength = self.rates(x).to(wide).chunk(2, dim=-1)
        log_decay = -self.A_log.exp() * F.softplus(decay + self.dt_bias)
        strength = torch.sigmoid(strength)
        real = real_tokens(x, context)
        if real is not None:  # padding neither decays nor writes
            log_decay = torch.where(real[:, :, None], log_decay, 0.0)
            strength = torch.where(real[:, :, None], strength, 0.0)
        starts = None if context.documents is None else document_starts(context.documents)
        initial = None if cache is None else cache.memory
        given = (queries, keys, values, log_decay.to(wide), strength)
        if s == 1 and torch.compiler.is_compiling():
            y, memory = sequential_memory(*given, delta=self.delta, starts=starts, initial=initial)
        else:
            y, memory = chunked_memory(
                *given,
                delta=self.delta,
                starts=starts,
                initial=initial,
                chunk_size=self.chunk_size,
            )
        if cache is not None:
            cache.memory = memory
        y = F.rms_norm(y, (self.head_dim,), self.norm_weight.to(y.dtype), self.norm_eps)
        return self.out(y.to(x.dtype).flatten(2) * F.silu(gate))


class GatedLinearAttention(_LinearAttention):
    """Linear attention whose memory fades by a number a head and token (arXiv 2312.06635, simplified so).

    Arguments as ``GatedDeltaNet``.
    """

    delta = False


class GatedDeltaNet(_LinearAttention):
    """Linear attention by the gated delta rule (arXiv 2412.06464).

    Args:
        dim: width of the residual stream.
        n_heads: heads.
        head_dim: width of a head's keys and values; dim / n_heads when None.
        conv_width: taps of the short convolution on queries, keys and values; 0 for none.
        chunk_size: tokens that are taken by one set of products; it changes the time that is taken only.
        norm_eps: epsilon of the norm of what each head reads.
    """

    delta = True


RULES: dict[str, type[_LinearAttention]] = {
    "gated": GatedLinearAttention,
    "gated_delta": GatedDeltaNet,
}


class LinearAttention(LanguageModel):
    """A language model of linear attention and a feed-forward in each block.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        n_layers: number of blocks.
        n_heads: heads of each.
        rule: ``gated`` or ``gated_delta``.
        head_dim: width of a head; dim / n_heads when None.
        hidden_dim: width inside the feed-forward; 4 * dim when None.
        max_seq_len: longest sequence.
        feed_forward: ``swiglu``, ``silu``, ``gelu`` or ``relu2``.
        conv_width: taps of the short convolution on queries, keys and values; 0 for none.
        residual_conv: taps of a short convolution on each branch's input; 0 for none.
        chunk_size: tokens that are taken by one set of products.
        norm: ``rms`` or ``layer``.
        norm_eps: epsilon of the norms.
        tie_embeddings: the head is the embedding, transposed.
        embedding_scale: multiply embedded tokens by sqrt(dim).
        dropout: probability, on embedded tokens and on what each branch adds to the stream.
        initialization: a scheme of ``initialization.py``.

    Raises:
        ToolmemError: for sizes that do not go together, naming the key.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        n_layers: int,
        n_heads: int,
        rule: Rule = "gated_delta",
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        max_seq_len: int = 1024,
        feed_forward: FeedForwardKind = "swiglu",
        conv_width: int = 4,
        residual_conv: int = 0,
        chunk_size: int = 64,
        norm: NormKind = "rms",
        norm_eps: float = 1e-5,
        tie_embeddings: bool = False,
        embedding_scale: bool = False,
        dropout: float = 0.0,
        initialization: str = "scaled",
    ) -> None:
        check_sizes(
            vocab_size=vocab_size,
            dim=dim,
            n_layers=n_layers,
            max_seq_len=max_seq_len,
            hidden_dim=hidden_dim,
        )
        if rule not in RULES:
            raise ToolmemError(f"rule: unknown {rule!r}; choose {', '.join(RULES)}")
        if not 0 <= dropout < 1:
            raise ToolmemError(f"dropout is {dropout}: it must be at least 0 and below 1")
        if residual_conv < 0:
            raise ToolmemError(f"residual_conv is {residual_conv}: it must be 0 (off) or more")

        def block() -> Block:
            return Block(
                dim,
                RULES[rule](dim, n_heads, head_dim, conv_width, chunk_size, norm_eps),
                FeedForward(dim, hidden_dim or 4 * dim, feed_forward),
                norm,
                norm_eps,
                dropout=dropout,
                residual_conv=residual_conv,
            )

        super().__init__(
            [block() for _ in range(n_layers)],
            make_norm(norm, dim, norm_eps),
            vocab_size=vocab_size,
            dim=dim,
            max_seq_len=max_seq_len,
            tie_embeddings=tie_embeddings,
            embedding_scale=embedding_scale,
            dropout=dropout,
            initialization=initialization,
        )
