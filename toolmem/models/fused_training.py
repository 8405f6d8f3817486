"""Training a small plain Transformer on a CPU by one call of C each way (``kernels/train.c``).

A step of a tiny model has little to compute, and most of its time is the calls of some hundred small
operations, and attention in a kernel made for wider heads. Here all blocks and the last norm are one
autograd function, for models of the common kind: RMSNorm, attention to all earlier tokens (grouped heads,
rotary or no positions, short convolutions), an MLP; float32, no biases. Gradients come out in the
parameters' own layouts, so that whatever comes after sees no difference. Other models, and passes that
somebody looks on at, take the model's own forward pass, which this one equals to rounding.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_modules

from toolmem.errors import ToolmemError
from toolmem.models.attention_kernels import own_kernels
from toolmem.models.fused import Parts, embeds_and_runs_plainly, fits, parts_of
from toolmem.models.kernels.build import library
from toolmem.models.layers import RMSNorm, ShortConvolution

if TYPE_CHECKING:
    from toolmem.models.context import Extras
    from toolmem.models.language_model import LanguageModel

FusedChoice = Literal["auto"] | bool

SIZES = (
    "batch", "seq", "layers", "dim", "heads", "kv_heads", "head_dim", "rotary_dim", "hidden", "kind",
    "conv", "residual", "threads",
)  # fmt: skip
POINTERS = (
    "mixer_norm", "mixer_taps", "qkv", "taps", "out", "feed_norm", "feed_taps", "up", "down",
)  # fmt: skip
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in SIZES]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_float) for name in ("mixer_eps", "feed_eps", "scale")),
        ("rope", ctypes.c_long),
    ]


class _Rooms:
    """Memory that passes use one after another: asking the system anew costs a page fault each 4 KiB."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []

    def take(self, numbers: int) -> _Room:
        """Room for so many numbers."""
        while self.free:
            tensor = self.free.pop()
            if tensor.numel() >= numbers:
                return _Room(self, tensor)
        return _Room(self, torch.empty(numbers))


class _Room:
    """Taken by a pass; given back when its graph is gone."""

    def __init__(self, owner: _Rooms, tensor: Tensor) -> None:
        self.owner = owner
        self.tensor = tensor

    def __del__(self) -> None:
        if len(self.owner.free) < 2:
            self.owner.free.append(self.tensor)


class _Pass:
    """What one pass tells C, kept for its backward half.

    Args:
        shape: of model and batch.
        layers: what each layer is, weights left open.
        eps: the last norm's epsilon.
        rotary: cosines and sines, or None.
        rooms: where memory comes from.
    """

    def __init__(
        self,
        shape: _Shape,
        layers: Any,
        eps: float,
        rotary: tuple[Tensor, Tensor] | None,
        rooms: _Rooms,
    ) -> None:
        self.shape, self.layers, self.eps, self.rotary = shape, layers, eps, rotary
        self.built = library()
        room, gradients = ctypes.c_long(), ctypes.c_long()
        assert self.built is not None
        self.built.train_sizes(ctypes.byref(shape), ctypes.byref(room), ctypes.byref(gradients))
        self.room = rooms.take(room.value)
        self.gradients = gradients.value

    def tables(self) -> tuple[int | None, int | None]:
        """Addresses of the rotary tables."""
        if self.rotary is None:
            return None, None
        return self.rotary[0].data_ptr(), self.rotary[1].data_ptr()


class _Blocks(torch.autograd.Function):
    """All blocks and the last norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, one: _Pass, *weights: Tensor | None) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        addresses = [None if weight is None else weight.data_ptr() for weight in weights]
        for i, layer in enumerate(one.layers):
            for j, name in enumerate(POINTERS):
                setattr(layer, name, addresses[i * len(POINTERS) + j])
        assert one.built is not None
        one.built.train_forward(
            ctypes.byref(one.shape), one.layers, addresses[-1], one.eps, *one.tables(),
            x.data_ptr(), y.data_ptr(), one.room.tensor.data_ptr(),
        )  # fmt: skip
        ctx.save_for_backward(*weights)
        ctx.one = one
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        weights, one = ctx.saved_tensors, ctx.one  # which says so if a weight has changed since
        dy = dy.contiguous()
        dx, gradients = torch.empty_like(dy), dy.new_empty(one.gradients)
        one.built.train_backward(
            ctypes.byref(one.shape), one.layers, weights[-1].data_ptr(), *one.tables(),
            dy.data_ptr(), dx.data_ptr(), one.room.tensor.data_ptr(), gradients.data_ptr(),
        )  # fmt: skip
        found: list[Tensor | None] = []
        at = 0
        for weight in weights:
            if weight is None:
                found.append(None)
                continue
            found.append(gradients.narrow(0, at, weight.numel()).view_as(weight))
            at += weight.numel()
        return dx, None, *found


def _taps(conv: object) -> nn.Parameter | None:
    return conv.taps if isinstance(conv, ShortConvolution) else None


def _width(conv: object) -> int:
    return conv.width if isinstance(conv, ShortConvolution) else 0


def _weights(parts: list[Parts], blocks: nn.ModuleList) -> list[Tensor | None]:
    """Of every block in the order of ``POINTERS``."""
    found: list[Tensor | None] = []
    for block, (mixer_norm, mixer, feed_norm, mlp) in zip(blocks, parts, strict=True):
        found += [
            mixer_norm.weight, _taps(block.mixer_conv), mixer.qkv.weight, _taps(mixer.conv),
            mixer.out.weight, feed_norm.weight, _taps(block.feed_forward_conv), mlp.up.weight,
            mlp.down.weight,
        ]  # fmt: skip
    return found


def why_not(model: LanguageModel) -> str | None:
    """Why training cannot run by C, whatever the batch; None where it can.

    Args:
        model: any.
    """
    if not embeds_and_runs_plainly(model):
        return f"{type(model).__name__} has a forward pass of its own"
    if model.attention_mask != "causal":
        return f"attention_mask is {model.attention_mask}: it has to be causal"
    if not own_kernels(model.attention_kernel):
        return f"attention_kernel is {model.attention_kernel}: it has to be auto or sdpa"
    if type(model.norm) is not RMSNorm or not all(fits(block, True) for block in model.blocks):
        return (
            "its blocks are not of the plain kind: RMSNorm before attention over all earlier tokens "
            "and before a feed-forward, and none of qk_norm, window, value_residual, sandwich_norm, "
            "attention: mla"
        )
    parts, blocks = parts_of(model), model.blocks
    if not blocks or len({one.shape for one in parts}) != 1:
        return "its blocks differ in shape"
    if len({(_width(b.mixer_conv), _width(b.feed_forward_conv)) for b in blocks}) != 1 or _width(
        blocks[0].mixer_conv
    ) != _width(blocks[0].feed_forward_conv):
        return "its convolutions differ in width"
    if any(one.mixer.softcap for one in parts):
        return "attention_softcap is on"
    if any(
        linear.bias is not None
        for _, mixer, _, mlp in parts
        for linear in (mixer.qkv, mixer.out, mlp.up, mlp.down)
    ):
        return "bias is on"
    if model.training and (model.dropout is not None or any(b.dropout is not None for b in blocks)):
        return "dropout is on"
    weights = [*_weights(parts, blocks), model.norm.weight]
    if any(t is not None and type(t) is not nn.Parameter for t in weights):
        return "its weights are not plain parameters"
    given = [t for t in weights if t is not None]
    if any(t.device.type != "cpu" for t in given):
        return "it is not on a CPU"
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in given):
        return "its weights are not float32 (trainer.precision: 32-true)"
    if library() is None:
        return "there is no C compiler, or TOOLMEM_KERNELS=0"
    return None


def watched(model: LanguageModel) -> bool:
    """Whether somebody has to see a pass's own operations: hooks, FLOP counting, a compiler, transforms."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch_modules._has_any_global_hook()
        or any(getattr(module, name) for module in model.modules() for name in HOOKS)
    )


class FusedBlocks:
    """A model's ``hidden`` for training, by C wherever that gives the same.

    Args:
        model: any.
        choice: ``auto``, or True to be told where it does not serve.

    Raises:
        ToolmemError: of True, for a model that the C code does not know.
    """

    def __init__(self, model: LanguageModel, choice: FusedChoice = "auto") -> None:
        self.model = model
        self.required = choice is True
        self._rooms = _Rooms()
        if self.required and (reason := why_not(model)) is not None:
            raise _refusal(reason)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedBlocks:
        import copy

        return FusedBlocks(copy.deepcopy(self.model, memo), True if self.required else "auto")

    def __call__(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        spans: Tensor | None = None,
        extras: Extras | None = None,
    ) -> Tensor:
        """What the head reads, (batch, seq, dim); arguments as ``LanguageModel.hidden``."""
        model = self.model
        if torch.is_grad_enabled() and tokens.ndim == 2 and not watched(model):
            reason = self._why_not_now(documents)
            if reason is None:
                return self._run(tokens)
            if self.required:
                raise _refusal(reason)
        return model.hidden(tokens, documents=documents, spans=spans, extras=extras)

    def _why_not_now(self, documents: Tensor | None) -> str | None:
        if documents is not None:
            return "documents within a row are kept apart"
        if torch.is_autocast_enabled("cpu"):
            return "trainer.precision is mixed"
        return why_not(self.model)

    def _run(self, tokens: Tensor) -> Tensor:
        model = self.model
        batch, seq = tokens.shape
        context = model.context(tokens, None, None)
        x = model.enter(tokens, context.positions)
        parts, blocks = parts_of(model), model.blocks
        h, k, d, hidden, kind, conv = parts[0].shape
        layers = (_Layer * len(parts))()
        for layer, (mixer_norm, mixer, feed_norm, _) in zip(layers, parts, strict=True):
            layer.mixer_eps, layer.feed_eps = mixer_norm.eps, feed_norm.eps
            layer.scale, layer.rope = mixer.scale, mixer.rope and model.rotary
        rotary = context.rotary
        shape = _Shape(
            batch, seq, len(parts), model.dim, h, k, d, 0 if rotary is None else rotary[0].shape[-1],
            hidden, kind, conv, _width(blocks[0].mixer_conv), torch.get_num_threads(),
        )  # fmt: skip
        assert isinstance(model.norm, RMSNorm)
        one = _Pass(shape, layers, model.norm.eps, rotary, self._rooms)
        y: Tensor = _Blocks.apply(x, one, *_weights(parts, blocks), model.norm.weight)
        return y


def _refusal(reason: str) -> ToolmemError:
    return ToolmemError(
        f"model.fused is true, but this model cannot train by the fused kernels: {reason}; "
        "set model.fused: auto"
    )
