"""A Transformer whose feed-forward is a mixture of experts.

Unusual about it: nothing is padded and no token is dropped, unless a capacity is asked for. Pairs of
token and expert are sorted by expert, each expert's tokens go through its matrices as one product of
whatever size (``grouped.py``), and the results go back to their tokens. So a step costs what the active
parameters cost, however many experts there are.

Shapes: b batch, s seq, n tokens (b * s), e experts, k experts a token.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.attention import Attention
from toolmem.models.context import Context
from toolmem.models.grouped import GroupedLinear
from toolmem.models.language_model import LanguageModel
from toolmem.models.layers import (
    Block,
    FeedForward,
    FeedForwardKind,
    NormKind,
    activate,
    check_feed_forward_kind,
    make_norm,
)
from toolmem.models.routing import Router, ScoreFunction, log_mean
from toolmem.models.transformer import check_sizes, head_sizes, rotary_width, window_pattern


class Dispatch(NamedTuple):
    """Pairs of token and expert, sorted by expert.

    Args:
        order: (n * k,) int64, the pair in each row, token after token; dropped pairs come last.
        rows: (n * k,) int64, the row of each pair.
        ends: (e,) int32, where each expert's rows end.
    """

    order: Tensor
    rows: Tensor
    ends: Tensor


def dispatch(experts: Tensor, n_experts: int, capacity: int = 0) -> Dispatch:
    """Sort a batch's pairs of token and expert.

    Args:
        experts: (n, k) int64.
        n_experts: number of experts.
        capacity: the most pairs that an expert takes, first come first served; 0 for no limit.
    """
    pairs = experts.flatten()
    chosen, order = pairs.sort(stable=True)
    numbers = torch.arange(n_experts, device=pairs.device)
    ends = torch.searchsorted(chosen, numbers, right=True)
    index = torch.arange(len(pairs), device=pairs.device)
    if capacity:
        sizes = ends.diff(prepend=ends.new_zeros(1))
        above = index - (ends - sizes)[chosen] >= capacity
        order = order[above.int().sort(stable=True).indices]
        ends = sizes.clamp(max=capacity).cumsum(0)
    rows = torch.empty_like(order).scatter_(0, order, index)
    return Dispatch(order, rows, ends.int())


class MixtureOfExperts(nn.Module):
    """A feed-forward of many experts, of which each token uses k: y = sum_i w_i E_i(x) + shared(x).

    Token choice (arXiv 1701.06538) with shared experts that every token uses (DeepSeekMoE,
    arXiv 2401.06066). Experts have no biases.

    Args:
        dim: width of the residual stream.
        hidden_dim: width inside each expert.
        n_experts: experts to choose from.
        top_k: how many of them a token goes to.
        n_shared_experts: experts that every token goes to; they are one feed-forward of that many
            times the width.
        kind: ``swiglu``, ``silu``, ``gelu`` or ``relu2``.
        score: ``softmax`` or ``sigmoid``.
        normalize_weights: make the weights of a token's experts add up to 1.
        weight_scale: multiplies the weights.
        bias_update_rate: of balancing without auxiliary loss; 0 for none.
        balance_loss: coefficient of the load-balancing loss; 0 for none.
        z_loss: coefficient of the router's z-loss; 0 for none.
        capacity_factor: in training an expert takes at most this many times its even share of a batch,
            n k / e, in the order of the tokens; the others pass it by. 0 for no limit. Outside of
            training there is none, since tokens of other rows would change the answer.

    Raises:
        ToolmemError: for options that do not go together, naming the key.
    """

    parameter_group = "feed_forward"

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        n_experts: int,
        top_k: int = 2,
        n_shared_experts: int = 0,
        kind: str = "swiglu",
        score: ScoreFunction = "softmax",
        normalize_weights: bool = True,
        weight_scale: float = 1.0,
        bias_update_rate: float = 1e-3,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
        capacity_factor: float = 0.0,
    ) -> None:
        super().__init__()
        check_feed_forward_kind(kind)
        for name, value in {
            "n_shared_experts": n_shared_experts,
            "capacity_factor": capacity_factor,
        }.items():
            if value < 0:
                raise ToolmemError(f"{name} is {value}: it must be 0 (none) or more")
        self.n_experts = n_experts
        self.top_k = top_k
        self.kind = kind
        self.capacity_factor = capacity_factor
        self.router = Router(
            dim,
            n_experts,
            top_k,
            score,
            normalize_weights,
            weight_scale,
            bias_update_rate,
            balance_loss,
            z_loss,
        )
        self.up = GroupedLinear(n_experts, dim, hidden_dim * (2 if kind == "swiglu" else 1))
        self.down = GroupedLinear(n_experts, hidden_dim, dim)
        self.shared = (
            FeedForward(dim, n_shared_experts * hidden_dim, kind) if n_shared_experts else None
        )

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(b, s, dim) to (b, s, dim)."""
        tokens = x.flatten(0, 1)
        routing = self.router(tokens, context)
        n_pairs = routing.experts.numel()
        capacity = self.capacity(len(tokens)) if self.training else 0
        order, rows, ends = dispatch(routing.experts, self.n_experts, capacity)
        if capacity and context is not None:
            log_mean(context, "moe/dropped_fraction", 1 - ends[-1] / n_pairs)
        sorted_tokens = tokens.index_select(0, order // self.top_k)
        y = self.down(activate(self.up(sorted_tokens, ends), self.kind), ends)
        y = y.index_select(0, rows).view(-1, self.top_k, x.shape[-1])
        y = (y * routing.weights.to(y.dtype)[:, :, None]).sum(1).view(x.shape)
        return y if self.shared is None else y + self.shared(x)

    def capacity(self, n_tokens: int) -> int:
        """The most tokens of a batch that an expert takes in training; 0 for no limit."""
        return math.ceil(self.capacity_factor * n_tokens * self.top_k / self.n_experts)

    def inactive_parameters(self) -> int:
        """Parameters of the experts that one token does not use."""
        expert = (self.up.weight.numel() + self.down.weight.numel()) // self.n_experts
        return (self.n_experts - self.top_k) * expert


class MoETransformer(LanguageModel):
    """A decoder-only Transformer with a mixture of experts in place of the feed-forward.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        n_layers: number of blocks.
        n_heads: query heads of each.
        n_kv_heads: key/value heads (GQA); n_heads when None.
        hidden_dim: width inside each expert; 4 * dim when None.
        head_dim: width of a head; dim / n_heads when None.
        n_experts: experts of a layer to choose from.
        top_k: how many of them a token goes to.
        n_shared_experts: experts that every token goes to.
        dense_layers: how many of the first layers have a plain feed-forward (DeepSeek-V3 has 3).
        dense_hidden_dim: its width; that of a token's experts together when None.
        score: ``softmax`` over the experts, or ``sigmoid`` of each.
        normalize_weights: make the weights of a token's experts add up to 1.
        weight_scale: multiplies the weights.
        bias_update_rate: of balancing by a bias on the scores, without auxiliary loss
            (arXiv 2412.19437); 0 for none.
        balance_loss: coefficient of the load-balancing loss (arXiv 2101.03961); 0 for none.
        z_loss: coefficient of the router's z-loss (arXiv 2202.08906); 0 for none.
        capacity_factor: in training an expert takes at most this many times its even share of a
            batch's tokens; 0 for no limit.
        max_seq_len: longest sequence.
        norm: ``rms`` or ``layer``.
        position: ``rope``, ``learned`` or ``none``.
        rope_base: RoPE's base.
        qk_norm: RMS-normalise query and key heads.
        window: how many tokens back a layer looks, itself included; a list is a pattern repeated over
            the layers, 0 for all.
        attention_mask: ``causal``, or ``prefix``: attention looks both ways within each span that the
            model did not write.
        feed_forward: ``swiglu``, ``silu``, ``gelu`` or ``relu2``, of every expert.
        tie_embeddings: the head is the embedding, transposed.
        embedding_scale: multiply embedded tokens by sqrt(dim).
        logit_softcap: bound the logits to (-cap, cap) by a tanh; 0 for none.
        dropout: probability, on embedded tokens and on what each branch adds to the stream.
        conv_width: taps of the short causal convolution on query, key and value; 0 for none.
        residual_conv: taps of one on each branch's input; 0 for none.
        sandwich_norm: normalise also what each branch adds to the stream.
        initialization: a scheme of ``initialization.py``.
        mup_base_dim: the width at which the learning rate was tuned, for ``initialization: mup``.
        norm_eps: epsilon of the norms.
        bias: biases in attention, layer norms and dense layers; experts have none.

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
        n_experts: int = 8,
        top_k: int = 2,
        n_shared_experts: int = 0,
        dense_layers: int = 0,
        dense_hidden_dim: int | None = None,
        score: ScoreFunction = "softmax",
        normalize_weights: bool = True,
        weight_scale: float = 1.0,
        bias_update_rate: float = 1e-3,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
        capacity_factor: float = 0.0,
        max_seq_len: int = 1024,
        norm: NormKind = "rms",
        position: Literal["rope", "learned", "none"] = "rope",
        rope_base: float = 10_000.0,
        qk_norm: bool = False,
        window: int | list[int] = 0,
        attention_mask: Literal["causal", "prefix"] = "causal",
        feed_forward: FeedForwardKind = "swiglu",
        tie_embeddings: bool = False,
        embedding_scale: bool = False,
        logit_softcap: float = 0.0,
        dropout: float = 0.0,
        conv_width: int = 0,
        residual_conv: int = 0,
        sandwich_norm: bool = False,
        initialization: str = "scaled",
        mup_base_dim: int | None = None,
        norm_eps: float = 1e-5,
        bias: bool = False,
    ) -> None:
        check_sizes(
            vocab_size=vocab_size,
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            max_seq_len=max_seq_len,
            n_kv_heads=n_kv_heads,
            hidden_dim=hidden_dim,
            head_dim=head_dim,
            dense_hidden_dim=dense_hidden_dim,
        )
        kv_heads, width = head_sizes(dim, n_heads, n_kv_heads, head_dim)
        if not 0 <= dense_layers < n_layers:
            raise ToolmemError(
                f"dense_layers is {dense_layers}: it must be at least 0 and below n_layers, {n_layers}"
            )
        if not 0 <= dropout < 1:
            raise ToolmemError(f"dropout is {dropout}: it must be at least 0 and below 1")
        windows = window_pattern(window, n_layers)
        expert_dim = hidden_dim or 4 * dim
        dense_dim = dense_hidden_dim or (top_k + n_shared_experts) * expert_dim

        def feed_forward_of(index: int) -> FeedForward | MixtureOfExperts:
            if index < dense_layers:
                return FeedForward(dim, dense_dim, feed_forward, bias)
            return MixtureOfExperts(
                dim,
                expert_dim,
                n_experts,
                top_k,
                n_shared_experts,
                feed_forward,
                score,
                normalize_weights,
                weight_scale,
                bias_update_rate,
                balance_loss,
                z_loss,
                capacity_factor,
            )

        def block(index: int) -> Block:
            attention = Attention(
                dim,
                n_heads,
                kv_heads,
                width,
                qk_norm,
                norm_eps,
                conv_width,
                bias,
                window=windows[index],
            )
            return Block(
                dim,
                attention,
                feed_forward_of(index),
                norm,
                norm_eps,
                bias,
                dropout,
                sandwich_norm,
                residual_conv,
            )

        super().__init__(
            [block(index) for index in range(n_layers)],
            make_norm(norm, dim, norm_eps, bias),
            vocab_size=vocab_size,
            dim=dim,
            max_seq_len=max_seq_len,
            rotary_dim=rotary_width(width, position),
            rope_base=rope_base,
            learned_positions=position == "learned",
            tie_embeddings=tie_embeddings,
            embedding_scale=embedding_scale,
            logit_softcap=logit_softcap,
            attention_mask=attention_mask,
            dropout=dropout,
            initialization=initialization,
            mup_base_dim=mup_base_dim,
        )
