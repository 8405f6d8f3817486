"""Decoding state: what each layer remembers of the tokens that it has seen, one lane a dialogue.

A layer's state is an object of its own (keys and values here; an SSM's or an RNN's state is another
class with the members of ``LayerCache``), and ``Cache`` holds one a layer beside the lanes'
lengths. Lanes are ragged: each has its own length, and a chunk of new tokens says by ``counts``
how many of each row are real. Padding is neither attended to nor kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from toolmem.errors import ToolmemError


class LayerCache(Protocol):
    """What one layer remembers. How it is written is the affair of the layer that made it."""

    def gather(self, lanes: Tensor) -> None:
        """Keep the lanes of these indices (n,) int64, in this order; a lane may be repeated."""

    def reserve(self, max_len: int) -> None:
        """Make room for lanes of ``max_len`` tokens; nothing to do for a state of fixed size."""

    def size_in_bytes(self) -> int:
        """Memory held."""


class Cache:
    """The decoding state of a whole model.

    Args:
        layers: one state a block, None for a block that remembers nothing.
        batch_size: number of lanes.
        max_len: tokens that a lane can hold.
        device: where the lengths live.
    """

    lengths: Tensor  # (batch,) int64: tokens that each lane holds

    def __init__(
        self,
        layers: Sequence[LayerCache | None],
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
    ) -> None:
        self.layers = list(layers)
        self.max_len = max_len
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.longest = 0  # the lengths' maximum, kept on the host

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

    def reserve(self, max_len: int) -> None:
        """Let lanes grow to ``max_len`` tokens, keeping what they hold."""
        if max_len > self.max_len:
            for layer in self.layers:
                if layer is not None:
                    layer.reserve(max_len)
            self.max_len = max_len

    def size_in_bytes(self) -> int:
        """Memory held by all layers."""
        return sum(layer.size_in_bytes() for layer in self.layers if layer is not None)

    def __len__(self) -> int:
        return self.lengths.shape[0]


class AttentionCache:
    """Keys and values of one attention layer, and the tail that its convolution looks back on.

    Each lane has ``max_len`` slots and one more, which nothing ever looks at: padding goes there.

    Args:
        batch_size: number of lanes.
        max_len: tokens that a lane can hold.
        n_kv_heads: key/value heads.
        head_dim: width of a head.
        tail: earlier tokens that the convolution looks back on (its width - 1).
        channels: channels that the convolution runs over.
    """

    def __init__(
        self,
        batch_size: int,
        max_len: int,
        n_kv_heads: int,
        head_dim: int,
        tail: int = 0,
        channels: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Heads before slots: the layout in which attention reads them, slot after slot.
        shape = (batch_size, n_kv_heads, max_len + 1, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.tail = torch.zeros(batch_size, tail, channels, device=device, dtype=dtype)

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Store new keys and values.

        Args:
            keys: (batch, seq, n_kv_heads, head_dim).
            values: (batch, seq, n_kv_heads, head_dim).
            slots: (batch, seq) int64, where each goes.
        """
        lanes = torch.arange(slots.shape[0], device=slots.device)[:, None]
        self.keys[lanes, :, slots] = keys.to(self.keys.dtype)
        self.values[lanes, :, slots] = values.to(self.values.dtype)

    def gather(self, lanes: Tensor) -> None:
        """Keep the lanes of these indices (n,) int64, in this order; a lane may be repeated."""
        self.keys = self.keys.index_select(0, lanes)
        self.values = self.values.index_select(0, lanes)
        self.tail = self.tail.index_select(0, lanes)

    def reserve(self, max_len: int) -> None:
        """Lengthen every lane to ``max_len`` slots (and the one for padding)."""
        more = (0, 0, 0, max_len + 1 - self.keys.shape[2])
        self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)

    def size_in_bytes(self) -> int:
        """Memory held."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values, self.tail))
