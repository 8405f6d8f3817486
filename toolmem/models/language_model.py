"""The shell that every architecture shares: embed, blocks, norm, head.

An architecture is a subclass whose ``__init__`` makes a list of blocks and hands it over. A block
(``layers.Block`` serves most) is a module with

    forward(x, context, cache=None) -> x         x: (batch, seq, dim)
    new_cache(batch_size, max_len, device, dtype) -> its decoding state, or None

A module inside may say more of itself, by duck typing:

    parameter_group               where its parameters are counted (those of modules in it too, if
                                  it has ``whole_group = True``)
    inactive_parameters()         how many of them one token does not use (experts not chosen)
    after_optimizer_step(reduce)  called once a step of training (balancing of experts)
    counts_of_step                names of buffers that each rank adds to until then
    context.extras                takes terms of the loss and figures to log
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models import mup
from toolmem.models.attention import rotary_tables
from toolmem.models.attention_kernels import check_choice
from toolmem.models.cache import Cache
from toolmem.models.context import Context, Extras
from toolmem.models.initialization import initialize
from toolmem.models.kernel_choice import KernelChoice
from toolmem.models.layers import RMSNorm
from toolmem.models.masks import document_positions
from toolmem.models.multi_token import TokensAhead


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """An ``__init__`` that first notes its arguments in ``init_args``, defaults included."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: LanguageModel, *args: Any, **kwargs: Any) -> None:
        if (
            "init_args" not in self.__dict__
        ):  # a subclass's __init__ has been here before its parent's
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            recorded = dict(bound.arguments)
            recorded.pop(next(iter(signature.parameters)))
            for name, parameter in signature.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    recorded |= recorded.pop(name)
            self.__dict__["init_args"] = recorded
        init(self, *args, **kwargs)

    return wrapper


class LanguageModel(nn.Module):
    """A causal language model over token ids.

    Args:
        blocks: the layers, first to last.
        norm: the norm after the last block.
        vocab_size: number of token ids.
        dim: width of the residual stream.
        max_seq_len: longest sequence that it can take.
        rotary_dim: width of the heads that rotary positions turn; 0 without rotary positions.
        rope_base: RoPE's base.
        rope_scaling: makes it turn more slowly (``rope_scaling.py``).
        learned_positions: add a learned embedding of the position.
        tie_embeddings: the head is the embedding, transposed.
        embedding_scale: multiply embedded tokens by sqrt(dim) (arXiv 1706.03762), so that a tied
            table can be small enough for the head and large enough for the stream.
        embedding_norm: a norm on the embedded tokens, or None.
        logit_softcap: bound the logits to (-cap, cap) by a tanh (arXiv 2408.00118); 0 for none.
        attention_mask: ``causal``, or ``prefix``: attention looks both ways within each span of tokens
            that the model did not write (``spans`` of ``hidden``).
        dropout: probability, on the embedded tokens (blocks see to their own).
        initialization: a scheme of ``initialization.py``.
        mup_base_dim: the width at which the learning rate was tuned, for ``initialization: mup``.
        multi_token: predicts tokens beyond the next in training (``multi_token.py``), or None.
    """

    init_args: dict[str, Any]
    attention_kernel: KernelChoice = "auto"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        *,
        vocab_size: int,
        dim: int,
        max_seq_len: int,
        rotary_dim: int = 0,
        rope_base: float = 10_000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        learned_positions: bool = False,
        tie_embeddings: bool = False,
        embedding_scale: bool = False,
        embedding_norm: nn.Module | None = None,
        logit_softcap: float = 0.0,
        attention_mask: Literal["causal", "prefix"] = "causal",
        dropout: float = 0.0,
        initialization: str = "scaled",
        mup_base_dim: int | None = None,
        multi_token: TokensAhead | None = None,
    ) -> None:
        super().__init__()
        mup.check(initialization, mup_base_dim)
        self.mup_base_dim = mup_base_dim
        if attention_mask not in ("causal", "prefix"):
            raise ToolmemError(
                f"attention_mask: unknown {attention_mask!r}; choose causal or prefix"
            )
        self.attention_mask = attention_mask
        self.logit_softcap = logit_softcap
        self.vocab_size = vocab_size
        self.dim = dim
        self.max_seq_len = max_seq_len
        self.tie_embeddings = tie_embeddings
        self.scale = math.sqrt(dim) if embedding_scale else 1.0
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position_embedding = nn.Embedding(max_seq_len, dim) if learned_positions else None
        self.embedding_norm = embedding_norm
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = nn.Linear(dim, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.multi_token = multi_token
        self.rotary = rotary_dim > 0
        if self.rotary:
            cos, sin = rotary_tables(rotary_dim, max_seq_len, rope_base, rope_scaling)
            # Not kept in checkpoints: a few numbers of the recipe decide them.
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        self.logit_scale = 1.0
        if self.mup_base_dim is not None:
            mup.parametrize(self)
        initialize(self, initialization)

    rotary_cos: Tensor
    rotary_sin: Tensor

    def hidden(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
        spans: Tensor | None = None,
        tree: tuple[Tensor, Tensor] | None = None,
        extras: Extras | None = None,
    ) -> Tensor:
        """What the head reads: the last block's output after the final norm.

        Args:
            tokens: (batch, seq) int64; rows are padded on the right, if at all.
            documents: (batch, seq) integer ids; attention stays within equal ids and positions
                restart at each. Not with a cache.
            cache: decoding state that ``tokens`` continue; it takes them in.
            counts: (batch,) int64, how many tokens of each row are real, only with a cache; None
                when all are. What comes out at padding means nothing.
            spans: (batch, seq) int64, ids (0 and up, unlike those of the row's other spans) of the spans
                that the model did not write, -1 elsewhere. A model of ``attention_mask: prefix`` looks
                both ways within each; with a cache, a span must come in one chunk. Others ignore it.
            tree: of drafts, only with a cache: (batch, seq) int64 depths, by how much each token stands
                behind the first, and (batch, seq, seq) bool, which tokens of the chunk each sees. For
                models that keep nothing but keys and values of all tokens (no window, no state).
            extras: takes terms of the loss and figures to log.

        Returns:
            (batch, seq, dim).

        Raises:
            ToolmemError: for a sequence longer than ``max_seq_len``, or than the cache.
        """
        if self.attention_mask == "causal":
            spans = None
        if cache is None:
            context = self.context(tokens, documents, spans)
        else:
            if documents is not None:
                raise ToolmemError("documents cannot be given with a cache: one lane, one document")
            context = self._cached_context(tokens, cache, counts, spans, tree)
        context.extras = extras
        x = self.enter(tokens, context.positions)
        for index, block in enumerate(self.blocks):
            x = block(x, context, None if cache is None else cache.layers[index])
        if cache is not None:
            cache.advance(counts, tokens.shape[1])
        return self.norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embedded tokens, (..., dim), without positions."""
        x = self.embedding(tokens)
        return x if self.scale == 1.0 else x * self.scale

    def enter(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads, (..., dim).

        Args:
            tokens: (...) int64.
            positions: int64 that broadcast to them; looked at by learned positions alone.
        """
        x = self.embed(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return x if self.dropout is None else self.dropout(x)

    def logits(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """The head: (..., dim) to (..., vocab_size).

        Args:
            hidden: what it reads.
            weight: (vocab_size, dim), of another head in place of the model's own.
        """
        x = hidden if self.logit_scale == 1.0 else hidden * self.logit_scale
        logits = self.head(x) if weight is None else F.linear(x, weight)
        if self.logit_softcap:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    def forward(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
        spans: Tensor | None = None,
        extras: Extras | None = None,
    ) -> Tensor:
        """Logits of the next token, (batch, seq, vocab_size); arguments as ``hidden``."""
        return self.logits(
            self.hidden(
                tokens, documents=documents, cache=cache, counts=counts, spans=spans, extras=extras
            )
        )

    def use_attention(self, kernel: KernelChoice) -> None:
        """Choose what runs attention: training, decoding and pages alike (``attention_kernels.py``).

        Args:
            kernel: ``auto``, ``sdpa``, ``flex`` (FlexAttention), ``flash`` (flash-attn) or ``plain``
                (the reference).

        Raises:
            ToolmemError: for one that is not installed, or cannot run this model.
        """
        check_choice(kernel, self)
        self.attention_kernel = kernel

    def after_optimizer_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Let the modules that want to do something once a step of training do it.

        Args:
            reduce: sums a tensor over all ranks.
        """
        for module in self._hooked:
            module.after_optimizer_step(reduce)  # type: ignore[operator]

    @functools.cached_property
    def _hooked(self) -> list[nn.Module]:
        return [
            module
            for module in self.modules()
            if module is not self and hasattr(module, "after_optimizer_step")
        ]

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Cache:
        """Empty decoding state.

        Args:
            batch_size: number of lanes.
            max_len: tokens that a lane can hold.
            device: the model's own when None.
            dtype: the model's own when None.
        """
        weight = self.embedding.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        layers = [
            block.new_cache(batch_size, max_len, device, dtype)  # type: ignore[operator]
            for block in self.blocks
        ]
        return Cache(layers, batch_size, max_len, device, spans=self.attention_mask == "prefix")

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters by group; a tied table is counted once, as embedding."""
        groups: dict[int, str] = {}
        counts = dict.fromkeys(("embedding", "attention", "feed_forward", "norm", "head"), 0)
        self._collect_groups(self, "other", groups)
        for parameter in self.parameters():
            group = groups[id(parameter)]
            counts[group] = counts.get(group, 0) + parameter.numel()
        assert sum(counts.values()) == sum(p.numel() for p in self.parameters())
        return counts

    def active_parameters(self) -> int:
        """Number of parameters that one token uses: all but those of experts not chosen."""
        unused = sum(
            module.inactive_parameters()  # type: ignore[operator]
            for module in self.modules()
            if hasattr(module, "inactive_parameters")
        )
        return sum(p.numel() for p in self.parameters()) - unused

    def _collect_groups(self, module: nn.Module, group: str, groups: dict[int, str]) -> None:
        """Note each parameter's group, by the nearest module around it that names one."""
        if isinstance(module, nn.Embedding):
            group = "embedding"
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            group = "norm"
        elif module is self.head:
            group = "head"
        else:
            group = getattr(module, "parameter_group", group)
        whole = getattr(module, "whole_group", False)
        for parameter in module.parameters(recurse=whole):
            groups.setdefault(id(parameter), group)
        for child in module.children():
            self._collect_groups(child, group, groups)

    def _check_length(self, length: int) -> None:
        if length > self.max_seq_len:
            raise ToolmemError(
                f"a sequence of {length} tokens is longer than the model's max_seq_len "
                f"{self.max_seq_len}: raise max_seq_len, or cut the sequences"
            )

    def context(self, tokens: Tensor, documents: Tensor | None, spans: Tensor | None) -> Context:
        """The context of whole rows."""
        seq = tokens.shape[1]
        self._check_length(seq)
        kernel = self.attention_kernel
        if documents is None:
            index = torch.arange(seq, device=tokens.device)
            context = Context(index, spans=spans, kernel=kernel)
            if self.rotary:
                context.rotary = (self.rotary_cos[:seq], self.rotary_sin[:seq])
            return context
        positions = document_positions(documents)
        context = Context(positions, documents=documents, spans=spans, kernel=kernel)
        if self.rotary:
            context.rotary = (self.rotary_cos[positions], self.rotary_sin[positions])
        return context

    def _cached_context(
        self,
        tokens: Tensor,
        cache: Cache,
        counts: Tensor | None,
        spans: Tensor | None,
        tree: tuple[Tensor, Tensor] | None = None,
    ) -> Context:
        """The context of a chunk that continues the cache's lanes."""
        seq = tokens.shape[1]
        index = torch.arange(seq, device=tokens.device)
        positions = cache.lengths[:, None] + index
        longest = cache.longest + seq if counts is None else int((cache.lengths + counts).max())
        if not cache.lengths_checked:
            self._check_length(longest)
            cache.check_room(longest)
        slots = positions
        if counts is not None:
            # Padding goes to the slot that nothing looks at, and takes a position that exists.
            slots = torch.where(index < counts[:, None], positions, cache.max_len)
            positions = positions.clamp(max=self.max_seq_len - 1)
        if tree is not None:
            positions = (cache.lengths[:, None] + tree[0]).clamp(max=self.max_seq_len - 1)
        key_spans = None
        if self.attention_mask == "prefix":
            spans = torch.full_like(tokens, -1) if spans is None else spans
            if counts is not None:
                spans = torch.where(index < counts[:, None], spans, -1)
            key_spans = cache.key_spans(slots, spans)
        context = Context(
            positions,
            counts=counts,
            slots=slots,
            spans=spans,
            key_spans=key_spans,
            kernel=self.attention_kernel,
        )
        if cache.longest or tree is not None:
            context.n_keys = (
                longest  # else the chunk is all there is, and plain causal attention serves
            )
        if tree is not None:
            context.tree = cache.lengths, tree[1]
        if self.rotary:
            context.rotary = (self.rotary_cos[positions], self.rotary_sin[positions])
        return context
