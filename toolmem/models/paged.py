"""Decoding state in pages: what grows with the tokens lies in pages of a few tokens that any number of
dialogues may share, what has one size in slots, one a dialogue.

    pages of token tensors    keys (n_pages, n_kv_heads, page_size, head_dim), ...: one index, a page,
                              means the same tokens in every layer
    slots of the rest         windows, tails, recurrent states (n_slots, ...): likewise
    tables (lanes, n)         which pages hold a lane's tokens, in order

Page 0 and slot 0 are nobody's: padding is written there. Who owns which page is the affair of
``toolmem.generation.paging``; here they are read and written. Paged attention: arXiv 2309.06180.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.models import kernels
from toolmem.models.attention_kernels import own_kernels
from toolmem.models.cache import AttentionCache, Cache, LaneState, TokenState

if TYPE_CHECKING:
    from toolmem.models.attention import Attention
    from toolmem.models.context import Context
    from toolmem.models.language_model import LanguageModel


# Tokens of a lane at once up to which attention runs by the decoding kernel.
FEW_TOKENS = 8


class Tables:
    """Which pages the lanes of the forward pass under way own; one object, seen by every layer.

    Args:
        page_size: tokens of a page.
    """

    pages: Tensor  # (lanes, n + 1) int64, the last column 0: where padding goes
    lengths: Tensor  # (lanes,) int64, tokens before this pass
    groups: Sequence[
        tuple[slice, int]
    ]  # rows that end in a page of the same number, and that number

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._places: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def start(self, pages: Tensor, lengths: Tensor, groups: Sequence[tuple[slice, int]]) -> None:
        """Begin a forward pass."""
        self.pages, self.lengths, self.groups = pages, lengths, groups
        self._places = None
        self._for_kernel: tuple[Tensor, Tensor] | None = None

    def places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Page and offset of each token: worked out once for all layers."""
        if self._places is None or self._places[0] is not slots:
            pages = self.pages.gather(1, slots // self.page_size)
            self._places = slots, (pages, slots % self.page_size)
        return self._places[1]

    def for_kernel(self, seq: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pages and lengths of each token as the decoding kernel takes them, int32; -1 for padding."""
        if self._for_kernel is None:
            pages, lengths = self.pages.to(torch.int32), self.lengths.to(torch.int32)
            if seq > 1:
                index = torch.arange(seq, dtype=torch.int32, device=pages.device)
                lengths = lengths[:, None] + index
                if counts is not None:
                    lengths = torch.where(index < counts[:, None], lengths, -1)
                pages, lengths = pages.repeat_interleave(seq, 0), lengths.flatten()
            self._for_kernel = pages.contiguous(), lengths
        return self._for_kernel


class PagedTokens(TokenState):
    """A state whose token tensors are pages: (n_pages, ..., page_size, ...)."""

    tables: Tables

    def places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens go: pages, and offsets in them."""
        return self.tables.places(slots)

    def read(self, name: str, context: Context) -> Tensor:
        """The tensor of this name as far as any lane of this forward pass goes."""
        whole = self.gather_pages(name, slice(None), -(-context.n_keys // self.tables.page_size))
        return whole.narrow(self.token_dims[name], 0, context.n_keys)

    def gather_pages(self, name: str, rows: slice, n: int) -> Tensor:
        """The first ``n`` pages of some lanes, one after the other."""
        dim = self.token_dims[name]
        pages: Tensor = getattr(self, name)[self.tables.pages[rows, :n]]
        return pages.movedim(1, dim).flatten(dim, dim + 1)


class PagedAttention(PagedTokens, AttentionCache):
    """Keys and values in pages."""

    def attend(
        self, mixer: Attention, queries: Tensor, keys: Tensor, values: Tensor, context: Context
    ) -> Tensor:
        """As ``AttentionCache.attend``; each lane works over its own pages, none over padding."""
        own = own_kernels(context.kernel)
        plain = own and context.tree is None and context.spans is None
        if queries.shape[1] <= FEW_TOKENS and plain and kernels.usable(queries, self.keys):
            return self._by_kernel(mixer, queries, keys, values, context)
        if not own or not context.n_keys or len(self.tables.groups) == 1:
            return super().attend(mixer, queries, keys, values, context)
        self.write(context, keys=keys, values=values)
        queries, mask = queries.transpose(1, 2), context.mask(mixer.window)
        assert mask is not None
        outputs = []
        for rows, n in self.tables.groups:
            width = min(n * self.tables.page_size, context.n_keys)
            outputs.append(
                mixer.attend(
                    queries[rows],
                    self.gather_pages("keys", rows, n)[:, :, :width],
                    self.gather_pages("values", rows, n)[:, :, :width],
                    mask[rows, :, :, :width],
                )
            )
        return torch.cat(outputs)

    def _by_kernel(
        self, mixer: Attention, queries: Tensor, keys: Tensor, values: Tensor, context: Context
    ) -> Tensor:
        """Each token as a lane of its own, over the same pages: those of one lane one after the other."""
        batch, seq = queries.shape[:2]
        if seq > 1:  # the kernel writes them too, but not before another token may look
            self.write(context, keys=keys, values=values)
        y = kernels.paged_attention(
            queries.flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            self.keys,
            self.values,
            *self.tables.for_kernel(seq, context.counts),
            mixer.scale,
            mixer.softcap,
        )
        return y.unflatten(0, (batch, seq)).transpose(1, 2)


@functools.cache
def _paged_class(cls: type[TokenState]) -> type[PagedTokens]:
    """The same state with its tokens in pages."""
    if issubclass(cls, AttentionCache):
        return PagedAttention
    return type(f"Paged{cls.__name__}", (PagedTokens, cls), {})


class PagedCache(Cache):
    """The cache of one forward pass over some lanes of a ``PagedState``.

    Args:
        state: where they live.
        layers: its layers, made ready for these lanes.
        lengths: (lanes,) int64, tokens that each holds.
        longest: the largest of them.
        max_len: tokens for which each has pages.
        slots: (lanes,) int64, where what has one size is kept; None when nothing has.
    """

    def __init__(
        self,
        state: PagedState,
        layers: Sequence[Any],
        lengths: Tensor,
        longest: int,
        max_len: int,
        slots: Tensor | None,
    ) -> None:
        self.state = state
        self.layers = list(layers)
        self.max_len = max_len
        self.lengths = lengths
        self.longest = longest
        self.spans = None
        self.slots = slots

    def key_spans(self, slots: Tensor, spans: Tensor) -> Tensor:
        """Spans of all tokens; a span comes in one chunk, so those of earlier ones need no telling."""
        known = torch.full(
            (len(slots), self.max_len + 1), -1, dtype=torch.int64, device=slots.device
        )
        return known.scatter_(1, slots, spans)

    def advance(self, counts: Tensor | None, seq: int) -> None:
        """Note that every layer has taken in a chunk; what has one size goes back to its slots."""
        super().advance(counts, seq)
        if self.slots is not None:
            self.state.put_back(self.slots)


class PagedState:
    """Pages and slots for the decoding state of one model.

    Memory is asked of the system for all of them, and on a CPU used only as they are written.

    Args:
        model: whose state it is.
        n_pages: pages, page 0 among them.
        n_slots: slots, slot 0 among them.
        page_size: tokens of a page.
        device: the model's own when None.
        dtype: of what is kept; the model's own when None.

    Raises:
        ToolmemError: for a model whose layers keep their state in a way of their own.
    """

    def __init__(
        self,
        model: LanguageModel,
        n_pages: int,
        n_slots: int,
        page_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.page_size = page_size
        self.tables = Tables(page_size)
        prototype = model.new_cache(1, 0, device=device, dtype=dtype)
        self.device = prototype.device
        # (state, name, arena): of what grows with the tokens, and of what does not
        self.tokens: list[tuple[LaneState, str, Tensor]] = []
        self.fixed: list[tuple[LaneState, str, Tensor]] = []
        self.initial: list[Tensor] = []
        self.layers = [self._lay_out(layer, n_pages, n_slots) for layer in prototype.layers]
        none = torch.zeros(0, 1, dtype=torch.int64, device=self.device)
        self._nothing = none, none[:, 0], ()

    def _lay_out(self, state: Any, n_pages: int, n_slots: int) -> Any:
        if state is None:
            return None
        _check(state)
        new = copy.copy(state)
        if state.token_dims:
            new.__class__ = _paged_class(type(state))  # type: ignore[arg-type]
            new.tables = self.tables
        for name, child in state._states().items():
            setattr(new, name, self._lay_out(child, n_pages, n_slots))
        for name, tensor in state._tensors().items():
            if name in state.token_dims:
                shape = list(tensor.shape)
                shape[0], shape[state.token_dims[name]] = n_pages, self.page_size
                arena = _zeros(shape, tensor)
                self.tokens.append((new, name, arena))
                setattr(new, name, arena)
            else:
                arena = _zeros([n_slots, *tensor.shape[1:]], tensor)
                self.fixed.append((new, name, arena))
                self.initial.append(tensor)
        return new

    def cache(
        self,
        pages: Tensor,
        lengths: Tensor,
        longest: int,
        groups: Sequence[tuple[slice, int]],
        slots: Tensor | None = None,
    ) -> PagedCache:
        """Make ready a forward pass.

        Args:
            pages: (lanes, n + 1) int64, each lane's pages in order, 0 behind them.
            lengths: (lanes,) int64.
            longest: the largest of them.
            groups: consecutive rows, and how many pages the last tokens of this pass take them to.
            slots: (lanes,) int64; needed where ``slot_bytes`` is not 0.
        """
        self.tables.start(pages, lengths, groups)
        if not self.fixed:
            slots = None
        for state, name, arena in self.fixed:
            assert slots is not None
            setattr(state, name, arena.index_select(0, slots))
        max_len = (pages.shape[1] - 1) * self.page_size
        return PagedCache(self, self.layers, lengths, longest, max_len, slots)

    def put_back(self, slots: Tensor) -> None:
        """Keep what a forward pass has made of the states of one size."""
        for state, name, arena in self.fixed:
            arena.index_copy_(0, slots, getattr(state, name).to(arena.dtype))

    def let_go(self) -> None:
        """Keep nothing of the last forward pass but what it wrote to pages and slots."""
        for state, name, arena in self.fixed:
            setattr(state, name, arena)
        self.tables.start(*self._nothing)

    @functools.cached_property
    def page_bytes(self) -> int:
        """Memory of one page, over all layers; 0 where nothing grows with the tokens."""
        return sum(arena[0].numel() * arena.element_size() for _, _, arena in self.tokens)

    @functools.cached_property
    def slot_bytes(self) -> int:
        """Memory of one slot, over all layers; 0 where everything grows with the tokens."""
        return sum(arena[0].numel() * arena.element_size() for _, _, arena in self.fixed)

    def arenas(self, kind: str) -> Iterator[Tensor]:
        """The tensors of ``page`` or ``slot``."""
        for _, _, arena in self.tokens if kind == "page" else self.fixed:
            yield arena

    def copy(self, kind: str, source: int, target: int) -> None:
        """Copy a page or a slot."""
        for arena in self.arenas(kind):
            arena[target].copy_(arena[source])

    def move(self, sources: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> None:
        """Copy tokens from places to other places, each given by pages and offsets, (n,) int64."""
        for state, name, arena in self.tokens:
            places = arena.movedim(state.token_dims[name], 1)
            places[targets] = places[sources]

    def take(self, kind: str, place: int) -> list[Tensor]:
        """A copy of a page or slot on the host (pinned where the state is on CUDA)."""
        return [_to_host(arena[place]) for arena in self.arenas(kind)]

    def put(self, kind: str, place: int, copies: Sequence[Tensor]) -> None:
        """Write what ``take`` gave to a page or slot."""
        for arena, tensor in zip(self.arenas(kind), copies, strict=True):
            arena[place].copy_(tensor, non_blocking=True)

    def reset(self, slot: int) -> None:
        """Let a slot hold the state before the first token."""
        for (_, _, arena), initial in zip(self.fixed, self.initial, strict=True):
            arena[slot].copy_(initial[0])


def state_sizes(
    model: LanguageModel, page_size: int, dtype: torch.dtype | None = None
) -> tuple[int, int]:
    """Bytes of one page and of one slot of a model's state."""
    tiny = PagedState(model, 1, 1, page_size, dtype=dtype)
    return tiny.page_bytes, tiny.slot_bytes


def _check(state: Any) -> None:
    if not isinstance(state, LaneState):
        raise ToolmemError(
            f"the decoding state {type(state).__name__} cannot be laid in pages and slots: make it a "
            "toolmem.models.cache.LaneState"
        )


def _zeros(shape: list[int], like: Tensor) -> Tensor:
    """Zeros that take memory only where they are written, on a CPU."""
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    count = int(np.prod(shape))
    raw = np.zeros(count * like.element_size(), dtype=np.uint8)
    return torch.from_numpy(raw).view(like.dtype).view(shape)


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.is_cuda:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor)
    return tensor.clone()
