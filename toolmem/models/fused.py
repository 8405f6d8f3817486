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
    "page_size", "pages", "slots", "threads", "vocab",
)  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_float) for name in ("mixer_eps", "feed_eps", "scale", "softcap")),
        ("rope", ctypes.c_long),
    ]


class _Ends(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("embedding", "norm")),
        *((name, ctypes.c_float) for name in ("scale", "eps")),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in SIZES]


def _plain_linear(layer: nn.Module) -> bool:
    return type(layer) in (nn.Linear, FastLinear, InvariantLinear)


def fits(block: nn.Module, residual_conv: bool = False) -> bool:
    """Whether the C code computes what this block does.

    Args:
        block: of a model.
        residual_conv: the code has convolutions on the branches' inputs.
    """
    if type(block) is not Block or type(block.mixer) is not Attention:
        return False
    mixer, mlp = block.mixer, block.feed_forward
    extras: list[object] = [block.mixer_post_norm, block.feed_forward_post_norm]
    extras += [mixer.q_norm, mixer.value_mix]
    if not residual_conv:
        extras += [block.mixer_conv, block.feed_forward_conv]
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


def embeds_and_runs_plainly(model: LanguageModel) -> bool:
    """Whether the model's class leaves it to ``LanguageModel`` what comes before and between blocks."""
    return not any(name in vars(own) for own in _between(model) for name in ("hidden", "embed"))


def parts_of(model: LanguageModel) -> list[Parts]:
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
        self.parts = parts_of(model)
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
            state.page_size, len(self._keys[0]), slots, 1, model.vocab_size,
        )  # fmt: skip
        self.room = model.dim + 2 * max((h + 2 * k) * d, (2 if kind == 0 else 1) * hidden)
        self.layers = (_Layer * len(model.blocks))()
        self.ends = _Ends()
        self._places: list[tuple[dict[str, nn.Parameter | None], str, object]] = []
        self._weights: list[Tensor | None] = []
        self._addresses: list[int] | None = None
        self._embeds = self._norms = False  # whether the C code embeds, and norms at the end

    @classmethod
    def of(cls, model: LanguageModel, state: PagedState) -> FusedDecoder | None:
        """A decoder, where there is a compiler and the model is of the common kind."""
        weight = model.embedding.weight
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        if (
            weight.device.type != "cpu"
            or weight.dtype != torch.float32
            or model.attention_mask != "causal"
            or not embeds_and_runs_plainly(model)
            or hooked
            or not all(fits(block) for block in model.blocks)
            or len({parts.shape for parts in parts_of(model)}) != 1
            or library() is None
        ):
            return None
        if any(not isinstance(layer, BlockState) for layer in state.layers):
            return None
        return cls(model, state)

    def _refresh(self) -> None:
        """Find the weights where they are now."""
        if [0 if t is None else t.data_ptr() for t in self._weights] == self._addresses and all(
            owner[name] is kept for owner, name, kept in self._places
        ):
            return
        model, blocks = self.model, [t for parts in self.parts for t in parts.weights()]
        # Parameters may be exchanged for others: where each is kept in its module is looked at too.
        self._places = [
            (module._parameters, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
        ]
        simple = model.position_embedding is None and model.embedding_norm is None
        self._embeds = simple
        norm = model.norm if type(model.norm) is RMSNorm else None
        self._norms = norm is not None
        self._weights = [*blocks, model.embedding.weight, norm.weight if norm is not None else None]
        if any(
            t is not None and not (t.is_contiguous() and t.dtype == torch.float32)
            for t in self._weights
        ):
            raise ToolmemError("the engine's model has changed its dtype: make a new Engine")
        self._addresses = [0 if t is None else t.data_ptr() for t in self._weights]
        n = len(blocks) // len(self.parts)
        for i, (layer, parts) in enumerate(zip(self.layers, self.parts, strict=True)):
            here = self._addresses[i * n : (i + 1) * n]
            for name, address in zip(POINTERS, here, strict=False):
                setattr(layer, name, address or None)
            layer.keys, layer.values = self._keys[i].data_ptr(), self._values[i].data_ptr()
            layer.tail = self._tails[i].data_ptr() if self._tails else None
            layer.mixer_eps, layer.feed_eps = parts.mixer_norm.eps, parts.feed_norm.eps
            layer.scale, layer.softcap = parts.mixer.scale, parts.mixer.softcap
            layer.rope = parts.mixer.rope and model.rotary
        self.ends.embedding = self._addresses[-2] if simple else None
        self.ends.scale = model.scale
        self.ends.norm = self._addresses[-1] or None
        self.ends.eps = norm.eps if norm is not None else 0.0

    @torch.no_grad()
    def step(
        self,
        tokens: np.ndarray,
        pages: np.ndarray,
        lengths: np.ndarray,
        slots: np.ndarray | None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Read one token a row, and what the head reads there.

        Args:
            tokens: (n,) int64.
            pages: (n, most) int64, of each row's lane.
            lengths: (n,) int64, tokens of the lane before this one. Rows of one lane stand in order.
            slots: (n,) int64, where the lanes' convolutions keep their inputs; None for models without.
            kept: of ``room_to_keep``, for ``go_back``; None where no row will be taken back.

        Returns:
            (n, dim) float32.
        """
        model, built = self.model, library()
        assert built is not None
        self._refresh()
        n = len(tokens)
        tokens = np.ascontiguousarray(tokens, dtype=np.int64)
        if self._embeds:
            x = torch.empty(n, model.dim)
        else:
            x = model.enter(torch.from_numpy(tokens), torch.from_numpy(lengths)).contiguous()
        room = torch.empty(n * self.room)
        tables = np.ascontiguousarray(pages, dtype=np.int32)
        before = np.ascontiguousarray(lengths, dtype=np.int32)
        places = None
        if self.conv:
            assert slots is not None
            places = np.ascontiguousarray(slots, dtype=np.int64)
        self.shape.threads = torch.get_num_threads()
        failed = built.decode_blocks(
            ctypes.byref(self.shape),
            self.layers,
            ctypes.byref(self.ends),
            tokens.ctypes.data,
            x.data_ptr(),
            n,
            model.rotary_cos.data_ptr() if model.rotary else None,
            model.rotary_sin.data_ptr() if model.rotary else None,
            tables.ctypes.data,
            tables.shape[1],
            before.ctypes.data,
            None if places is None else places.ctypes.data,
            room.data_ptr(),
            None if kept is None else kept.data_ptr(),
        )
        if failed == 1:
            raise MemoryError("attention over pages found no memory for its scores")
        assert failed != 3, "a token that is not in the vocabulary"
        assert not failed, "a lane's table names a page that there is not"
        return x if self._norms else model.norm(x)

    def room_to_keep(self, rows: int) -> Tensor:
        """Room for what a step leaves behind each of its rows: (layers, rows, conv_width - 1, channels)."""
        return torch.empty(len(self._tails), rows, *self._tails[0].shape[1:])

    def go_back(self, slot: int, kept: Tensor, row: int) -> None:
        """Leave a lane's convolutions as they were behind a row.

        Args:
            slot: the lane's.
            kept: of the step.
            row: of the step, the lane's last that is not taken back.
        """
        for tail, layer in zip(self._tails, kept, strict=True):
            tail[slot] = layer[row]
