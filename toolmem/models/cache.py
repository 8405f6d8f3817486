"""Decoding state: what each layer remembers of the tokens that it has seen, one lane a dialogue.

A layer's state is an object of its own, mostly a ``LaneState``: keys and values, a window of them, an
SSM's or an RNN's state. ``Cache`` holds one a layer beside the lanes' lengths. Lanes are ragged: each
has its own length, and a chunk of new tokens says by ``counts`` how many of each row are real. Padding
is neither attended to nor kept.

What a layer keeps is of two kinds: what grows with the tokens (``token_dims`` names it: keys and values,
latents), and what has one size (windows, convolutions' tails, recurrent states). Here every lane has room
of its own for both; ``paged.py`` lays the first in pages that dialogues share, for the engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.models import flash
from toolmem.models.masks import ring_mask

if TYPE_CHECKING:
    from toolmem.models.attention import Attention
    from toolmem.models.context import Context


class LayerCache(Protocol):
    """What one layer remembers. How it is written is the affair of the layer that made it."""

    def gather(self, lanes: Tensor) -> None:
        """Keep the lanes of these indices (n,) int64, in this order; a lane may be repeated."""

    def detach(self, lanes: Tensor, device: torch.device | str) -> Self:
        """A copy of these lanes (n,) int64 on another device."""

    def append(self, other: Self) -> None:
        """Put another state's lanes after these."""

    def reserve(self, max_len: int) -> None:
        """Make room for lanes of ``max_len`` tokens; nothing to do for a state of fixed size."""

    def size_in_bytes(self) -> int:
        """Memory held."""


class LaneState:
    """A layer's state whose attributes are tensors with a lane in their first dimension, other such
    states, or plain values; and nothing more needs to be said.
    """

    # The tensors that grow with a lane's tokens, and the dimension in which they do.
    token_dims: ClassVar[Mapping[str, int]] = {}

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _states(self) -> dict[str, LaneState]:
        return {name: value for name, value in vars(self).items() if isinstance(value, LaneState)}

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for name, value in self._tensors().items():
            setattr(self, name, function(value))
        for state in self._states().values():
            state._map(function)

    def gather(self, lanes: Tensor) -> None:
        """Keep the lanes of these indices (n,) int64, in this order; a lane may be repeated."""
        self._map(lambda tensor: tensor.index_select(0, lanes))

    def detach(self, lanes: Tensor, device: torch.device | str) -> Self:
        """A copy of these lanes (n,) int64 on another device."""
        new = copy.copy(self)
        for name, state in self._states().items():
            setattr(new, name, state.detach(lanes, device))
        for name, value in self._tensors().items():
            setattr(new, name, value.index_select(0, lanes).to(device))
        return new

    def append(self, other: Self) -> None:
        """Put another state's lanes after these."""
        for name, value in self._tensors().items():
            setattr(self, name, torch.cat((value, getattr(other, name).to(value.device))))
        for name, state in self._states().items():
            state.append(getattr(other, name))

    def reserve(self, max_len: int) -> None:
        """Make room for lanes of ``max_len`` tokens."""
        for state in self._states().values():
            state.reserve(max_len)

    def size_in_bytes(self) -> int:
        """Memory held."""
        own = sum(x.numel() * x.element_size() for x in self._tensors().values())
        return own + sum(state.size_in_bytes() for state in self._states().values())


class Cache:
    """The decoding state of a whole model.

    Args:
        layers: one state a block, None for a block that remembers nothing.
        batch_size: number of lanes.
        max_len: tokens that a lane can hold.
        device: where the lengths live.
        spans: keep which span each token belongs to, for models whose attention looks both ways
            within spans.
    """

    lengths: Tensor  # (batch,) int64: tokens that each lane holds
    lengths_checked = False  # whoever made it has seen that lanes are not too long
    spans: (
        Tensor | None
    )  # (batch, max_len + 1) int64: each token's span, -1 for none; last: padding

    def __init__(
        self,
        layers: Sequence[LayerCache | None],
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        spans: bool = False,
    ) -> None:
        self.layers: list[Any] = list(layers)
        self.max_len = max_len
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.longest = 0  # the lengths' maximum, kept on the host
        self.spans = (
            torch.full((batch_size, max_len + 1), -1, dtype=torch.int64, device=device)
            if spans
            else None
        )

    def check_room(self, longest: int) -> None:
        """Raise ``ToolmemError`` when a lane would come to hold more tokens than the cache can."""
        if longest > self.max_len:
            raise ToolmemError(
                f"a dialogue of {longest} tokens does not fit a cache of max_len {self.max_len}: "
                "make the cache with a larger max_len"
            )

    def advance(self, counts: Tensor | None, seq: int) -> None:
        """Note that every layer has taken in a chunk.

        Args:
            counts: (batch,) int64, real tokens of each row; None when all ``seq`` are.
            seq: the chunk's width.
        """
        self.lengths = self.lengths + (seq if counts is None else counts)
        self.longest = self.longest + seq if counts is None else int(self.lengths.max())

    def gather(self, lanes: Tensor) -> None:
        """Keep the lanes of these indices (n,) int64, in this order; a lane may be repeated."""
        for layer in self.layers:
            if layer is not None:
                layer.gather(lanes)
        self.lengths = self.lengths.index_select(0, lanes)
        self.longest = int(self.lengths.max()) if len(lanes) else 0
        if self.spans is not None:
            self.spans = self.spans.index_select(0, lanes)

    def detach(self, lanes: Tensor, device: torch.device | str = "cpu") -> Cache:
        """A copy of some lanes elsewhere, to be put back by ``restore``.

        Args:
            lanes: (n,) int64.
            device: where the copy lives; the host by default.
        """
        new = copy.copy(self)
        new.layers = [layer and layer.detach(lanes, device) for layer in self.layers]
        new.lengths = self.lengths.index_select(0, lanes).to(device)
        new.longest = int(new.lengths.max()) if len(lanes) else 0
        if self.spans is not None:
            new.spans = self.spans.index_select(0, lanes).to(device)
        return new

    def restore(self, lanes: Cache) -> None:
        """Put detached lanes after this cache's own.

        Args:
            lanes: of the same model; what it holds is copied.
        """
        lanes = lanes.detach(torch.arange(len(lanes), device=lanes.lengths.device), lanes.device)
        room = max(self.max_len, lanes.max_len)
        self.reserve(room)
        lanes.reserve(room)
        for mine, theirs in zip(self.layers, lanes.layers, strict=True):
            if mine is not None:
                mine.append(theirs)
        self.lengths = torch.cat((self.lengths, lanes.lengths.to(self.device)))
        self.longest = max(self.longest, lanes.longest)
        if self.spans is not None and lanes.spans is not None:
            self.spans = torch.cat((self.spans, lanes.spans.to(self.device)))

    def key_spans(self, slots: Tensor, spans: Tensor) -> Tensor | None:
        """Note a chunk's spans, and give those of all tokens; None where none are kept.

        Args:
            slots: (batch, seq) int64, where the chunk's tokens go.
            spans: (batch, seq) int64, -1 for none.
        """
        if self.spans is not None:
            self.spans.scatter_(1, slots, spans)
        return self.spans

    @property
    def device(self) -> torch.device:
        """Where the lengths live."""
        return self.lengths.device

    def reserve(self, max_len: int) -> None:
        """Let lanes grow to ``max_len`` tokens, keeping what they hold."""
        if max_len > self.max_len:
            for layer in self.layers:
                if layer is not None:
                    layer.reserve(max_len)
            if self.spans is not None:
                self.spans = F.pad(self.spans, (0, max_len - self.max_len), value=-1)
            self.max_len = max_len

    def size_in_bytes(self) -> int:
        """Memory held by all layers."""
        return sum(layer.size_in_bytes() for layer in self.layers if layer is not None)

    def __len__(self) -> int:
        return self.lengths.shape[0]


class TokenState(LaneState):
    """A state with tensors that grow with the tokens (``token_dims``), each lane's in a row of its own.

    The last slot of a row is where padding is written; nothing looks at it.
    """

    def write(self, context: Context, **new: Tensor) -> None:
        """Keep new tokens.

        Args:
            context: of the forward pass.
            new: by name, (batch, seq, ...): as the tensor, its lanes and tokens first.
        """
        assert context.slots is not None
        rows, slots = self.places(context.slots)
        for name, value in new.items():
            tensor: Tensor = getattr(self, name)
            # Not through a view: where heads are one, inductor of torch 2.13 copies all of what a view
            # is written to (2 GB of pages, a second a step).
            between = [slice(None)] * (self.token_dims[name] - 1)
            index: tuple[Any, ...] = (rows, *between, slots)
            tensor[index] = value.to(tensor.dtype)

    def places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens go: indices into the first and the token dimension.

        Args:
            slots: (batch, seq) int64, places in the lanes.
        """
        return torch.arange(slots.shape[0], device=slots.device)[:, None], slots

    def read(self, name: str, context: Context) -> Tensor:
        """The tensor of this name as far as any lane of this forward pass goes."""
        tensor: Tensor = getattr(self, name)
        return tensor.narrow(self.token_dims[name], 0, context.n_keys)

    def reserve(self, max_len: int) -> None:
        """Lengthen every lane to ``max_len`` slots (and the one for padding)."""
        for name, dim in self.token_dims.items():
            tensor: Tensor = getattr(self, name)
            more = [0, 0] * (tensor.ndim - 1 - dim) + [0, max_len + 1 - tensor.shape[dim]]
            setattr(self, name, F.pad(tensor, more))


class AttentionCache(TokenState):
    """Keys and values of one attention layer.

    Args:
        batch_size: number of lanes.
        max_len: tokens that a lane can hold.
        n_kv_heads: key/value heads.
        head_dim: width of a head.
        device: where it lives.
        dtype: of keys and values.
    """

    token_dims = {"keys": 2, "values": 2}
    tail: Tensor  # (batch, width - 1, channels): the short convolution's last inputs, where there is one

    def __init__(
        self,
        batch_size: int,
        max_len: int,
        n_kv_heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Heads before slots: the layout in which attention reads them, slot after slot.
        shape = (batch_size, n_kv_heads, max_len + 1, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def attend(
        self, mixer: Attention, queries: Tensor, keys: Tensor, values: Tensor, context: Context
    ) -> Tensor:
        """Keep new tokens, and let their queries look at all that they may.

        Args:
            mixer: the layer.
            queries: (batch, seq, n_heads, head_dim).
            keys: (batch, seq, n_kv_heads, head_dim).
            values: the same.
            context: of the forward pass.

        Returns:
            (batch, n_heads, seq, head_dim).
        """
        self.write(context, keys=keys, values=values)
        if context.n_keys:
            keys, values = self.read("keys", context), self.read("values", context)
        else:  # the chunk is all there is
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        mask = context.kernel_mask(mixer.window)
        return mixer.attend(queries.transpose(1, 2), keys, values, mask)


class WindowCache(AttentionCache):
    """The last ``window`` keys and values of a sliding-window attention layer, as a ring.

    Args:
        batch_size: number of lanes.
        window: tokens that a query looks back on, itself included.
        n_kv_heads: key/value heads.
        head_dim: width of a head.
        device: where it lives.
        dtype: of keys and values.
    """

    token_dims = {}  # a ring has one size

    def __init__(
        self,
        batch_size: int,
        window: int,
        n_kv_heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(batch_size, window, n_kv_heads, head_dim, device, dtype)
        self.window = window
        shape = (batch_size, window + 1)
        self.positions = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.spans = torch.full(shape, -1, dtype=torch.int64, device=device)

    def attend(
        self, mixer: Attention, queries: Tensor, keys: Tensor, values: Tensor, context: Context
    ) -> Tensor:
        """As ``AttentionCache.attend``: the window before the chunk, and the chunk itself."""
        positions, spans = context.positions, context.spans
        queries = queries.transpose(1, 2)
        keys, values, key_positions, key_spans = self.take_in(
            keys, values, positions, context.counts, spans
        )
        if context.kernel == "flash":
            ring = key_positions[:, : -positions.shape[1]]
            keys, values, before = flash.in_order(ring, positions, keys, values)
            seen = context.kernel_mask(self.window)
            assert isinstance(seen, flash.Seen)
            seen = seen._replace(before=before, padded=False)
            return mixer.attend(queries, keys, values, seen)
        mask = ring_mask(positions, key_positions, self.window, spans, key_spans)
        return mixer.attend(queries, keys, values, context.mask_in_form(mask))

    def take_in(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        counts: Tensor | None,
        spans: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Store a chunk and say what it may look at: the window before it, and itself.

        Args:
            keys: (batch, seq, n_kv_heads, head_dim).
            values: (batch, seq, n_kv_heads, head_dim).
            positions: (batch, seq) int64.
            counts: (batch,) int64, real tokens of each row; None when all are.
            spans: (batch, seq) int64, or None.

        Returns:
            keys and values (batch, n_kv_heads, window + 1 + seq, head_dim), positions (-1: no key) and
            spans (batch, window + 1 + seq).
        """
        seq = keys.shape[1]
        index = torch.arange(seq, device=keys.device)
        spans = torch.full_like(positions, -1) if spans is None else spans
        length = torch.full_like(positions[:, 0], seq) if counts is None else counts
        real = index < length[:, None]
        all_keys = torch.cat((self.keys.to(keys.dtype), keys.transpose(1, 2)), dim=2)
        all_values = torch.cat((self.values.to(values.dtype), values.transpose(1, 2)), dim=2)
        all_positions = torch.cat((self.positions, torch.where(real, positions, -1)), dim=1)
        all_spans = torch.cat((self.spans, spans), dim=1)
        # of a chunk longer than the window only its end is kept; the rest goes where padding goes
        kept = real & (index >= length[:, None] - self.window)
        slots = torch.where(kept, positions % self.window, self.window)
        lanes = torch.arange(len(slots), device=slots.device)[:, None]
        self.keys[lanes, :, slots] = keys.to(self.keys.dtype)
        self.values[lanes, :, slots] = values.to(self.values.dtype)
        self.positions[lanes, slots] = torch.where(kept, positions, -1)
        self.spans[lanes, slots] = torch.where(kept, spans, -1)
        return all_keys, all_values, all_positions, all_spans

    def reserve(self, max_len: int) -> None:
        """Nothing: its size does not depend on the length."""
