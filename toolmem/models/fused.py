"""Decoding a plain Transformer on a CPU by one call of C for all blocks (``kernels/decode.c``).

A step of decoding has little to compute, and most of its time is the calls of some dozen operations a
layer. Here they are one call, for models of the common kind: RMSNorm, attention to all tokens (grouped
heads, rotary or no positions, a short convolution), an MLP; float32. Others, and passes of another kind,
take the model's own forward pass, which this one equals to rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.attention import Attention
from toolmem.models.kernels.accelerate import FastLinear, InvariantLinear
from toolmem.models.kernels.build import library
from toolmem.models.layers import Block, BlockState, FeedForward, RMSNorm

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel
    from toolmem.models.paged import PagedState

KINDS = {"swiglu": 0, "silu": 1, "gelu": 2, "relu2": 3}  # as in decode.c
POINTERS = (
    "mixer_norm", "qkv", "qkv_bias", "taps", "out", "out_bias",
    "feed_norm", "up", "up_bias", "down", "down_bias", "keys", "values", "tail",
)  # fmt: skip
SIZES = (
    "layers", "dim", "heads", "kv_heads", "head_dim", "rotary_dim", "hidden", "kind", "conv_width",
    "page_size", "pages", "slots", "threads",
)  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_float) for name in ("mixer_eps", "feed_eps", "scale", "softcap")),
        ("rope", ctypes.c_long),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in SIZES]


def _plain_linear(layer: nn.Module) -> bool:
    return type(layer) in (nn.Linear, FastLinear, InvariantLinear)


def _fits(block: nn.Module) -> bool:
    """Whether the C code computes what this block does."""
    if type(block) is not Block or type(block.mixer) is not Attention:
        return False
    mixer, mlp = block.mixer, block.feed_forward
    extras: list[object] = [block.mixer_conv, block.mixer_post_norm, block.feed_forward_conv]
    extras += [block.feed_forward_post_norm, mixer.q_norm, mixer.value_mix]
    return (
        type(mlp) is FeedForward
        and type(block.mixer_norm) is RMSNorm
        and type(block.feed_forward_norm) is RMSNorm
        and all(extra is None for extra in extras)
        and not mixer.window
        and all(_plain_linear(layer) for layer in (mixer.qkv, mixer.out, mlp.up, mlp.down))
    )


class Parts(NamedTuple):
    """What a block is made of, where it fits."""

    mixer_norm: RMSNorm
    mixer: Attention
    feed_norm: RMSNorm
    mlp: FeedForward

    @property
    def shape(self) -> tuple[int, ...]:
        """What all blocks of a model have to share."""
        mixer, mlp = self.mixer, self.mlp
        width = mixer.conv.width if mixer.conv is not None else 0
        heads = (mixer.n_heads, mixer.n_kv_heads, mixer.head_dim)
        return (*heads, mlp.down.in_features, KINDS[mlp.kind], width)

    def weights(self) -> list[Tensor | None]:
        """In the order of ``POINTERS``."""
        mixer, mlp = self.mixer, self.mlp
        return [
            self.mixer_norm.weight,
            mixer.qkv.weight,
            mixer.qkv.bias,
            None if mixer.conv is None else mixer.conv.taps,
            mixer.out.weight,
            mixer.out.bias,
            self.feed_norm.weight,
            mlp.up.weight,
            mlp.up.bias,
            mlp.down.weight,
            mlp.down.bias,
        ]


def _between(model: LanguageModel) -> Iterator[type]:
    """Classes of a model that may compute something else than a language model does."""
    for each in type(model).__mro__:
        if each.__module__ == "toolmem.models.language_model":
            return
        yield each


def _parts(model: LanguageModel) -> list[Parts]:
    """Of every block."""
    return [
        Parts(block.mixer_norm, block.mixer, block.feed_forward_norm, block.feed_forward)  # type: ignore[arg-type]
        for block in model.blocks
    ]


class FusedDecoder:
    """Decoding by C; ``FusedDecoder.of`` says whether a model can be decoded so.

    Args:
        model: of the kind told above.
        state: its decoding state.
    """

    def __init__(self, model: LanguageModel, state: PagedState) -> None:
        self.model = model
        self.state = state
        self.parts = _parts(model)
        h, k, d, hidden, kind, width = self.parts[0].shape
        self.conv = bool(width)
        attention = [block_state.mixer for block_state in state.layers]
        arenas = {(id(owner), name): arena for owner, name, arena in state.tokens + state.fixed}
        self._keys = [arenas[id(one), "keys"] for one in attention]
        self._values = [arenas[id(one), "values"] for one in attention]
        self._tails = [arenas[id(one), "tail"] for one in attention] if width else []
        rotary = model.rotary_cos.shape[-1] if model.rotary else 0
        slots = len(self._tails[0]) if width else 0
        self.shape = _Shape(
            len(model.blocks), model.dim, h, k, d, rotary, hidden, kind, width,
            state.page_size, len(self._keys[0]), slots, 1,
        )  # fmt: skip
        self.room = model.dim + 2 * max((h + 2 * k) * d, (2 if kind == 0 else 1) * hidden)
        self.layers = (_Layer * len(model.blocks))()
        self._addresses: list[int] = []

    @classmethod
    def of(cls, model: LanguageModel, state: PagedState) -> FusedDecoder | None:
        """A decoder, where there is a compiler and the model is of the common kind."""
        weight = model.embedding.weight
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        if (
            weight.device.type != "cpu"
            or weight.dtype != torch.float32
            or model.attention_mask != "causal"
            or any(name in vars(own) for own in _between(model) for name in ("hidden", "embed"))
            or hooked
            or not all(_fits(block) for block in model.blocks)
            or len({parts.shape for parts in _parts(model)}) != 1
            or library() is None
        ):
            return None
        if any(not isinstance(layer, BlockState) for layer in state.layers):
            return None
        return cls(model, state)

    def _refresh(self) -> None:
        """Find the weights where they are now."""
        tensors = [t for parts in self.parts for t in parts.weights()]
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        if addresses == self._addresses:
            return
        if any(
            t is not None and not (t.is_contiguous() and t.dtype == torch.float32) for t in tensors
        ):
            raise ToolmemError("the engine's model has changed its dtype: make a new Engine")
        n = len(tensors) // len(self.parts)
        for i, (layer, parts) in enumerate(zip(self.layers, self.parts, strict=True)):
            for name, address in zip(POINTERS, addresses[i * n : (i + 1) * n], strict=False):
                setattr(layer, name, address or None)
            layer.keys, layer.values = self._keys[i].data_ptr(), self._values[i].data_ptr()
            layer.tail = self._tails[i].data_ptr() if self._tails else None
            layer.mixer_eps, layer.feed_eps = parts.mixer_norm.eps, parts.feed_norm.eps
            layer.scale, layer.softcap = parts.mixer.scale, parts.mixer.softcap
            layer.rope = parts.mixer.rope and self.model.rotary
        self._addresses = addresses

    @torch.no_grad()
    def step(
        self,
        tokens: np.ndarray,
        pages: np.ndarray,
        lengths: np.ndarray,
        slots: np.ndarray | None,
    ) -> Tensor:
        """Read one token a row, and what the head reads there.

        Args:
            tokens: (n,) int64.
            pages: (n, most) int64, of each row's lane.
            lengths: (n,) int64, tokens of the lane before this one. Rows of one lane stand in order.
            slots: (n,) int64, where the lanes' convolutions keep their inputs; None without them.

        Returns:
            (n, dim) float32.
        """
        model, built = self.model, library()
        assert built is not None
        self._refresh()
        index = torch.from_numpy(lengths)
        x = model.embed(torch.from_numpy(tokens))
        if model.position_embedding is not None:
            x = x + model.position_embedding(index)
        if model.embedding_norm is not None:
            x = model.embedding_norm(x)
        x = x.contiguous()
        n = len(tokens)
        room = torch.empty(n * self.room)
        tables = np.ascontiguousarray(pages, dtype=np.int32)
        before = np.ascontiguousarray(lengths, dtype=np.int32)
        places = None if slots is None else np.ascontiguousarray(slots, dtype=np.int64)
        self.shape.threads = torch.get_num_threads()
        failed = built.decode_blocks(
            ctypes.byref(self.shape),
            self.layers,
            x.data_ptr(),
            n,
            model.rotary_cos.data_ptr() if model.rotary else None,
            model.rotary_sin.data_ptr() if model.rotary else None,
            tables.ctypes.data,
            tables.shape[1],
            before.ctypes.data,
            None if places is None else places.ctypes.data,
            room.data_ptr(),
        )
        if failed == 1:
            raise MemoryError("attention over pages found no memory for its scores")
        assert not failed, "a lane's table names a page that there is not"
        return model.norm(x)
