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
from toolmem.models.lora import adapted

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
# Where ``auto`` leaves it to torch, measured on one core with AVX-512 (16 rows go by together), 72 tokens a
# row: a step of 32 rows took torch 2.1 times as long at dim 64, 1.7 times at 96 and 1.5 times at 128, one of
# 4 rows at dim 64 two thirds.
WIDEST = 128
FEWEST_ROWS = 8
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in SIZES]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_float) for name in ("mixer_eps", "feed_eps", "scale")),
        ("rope", ctypes.c_long),
    ]


class Rooms:
    """Memory, aligned as C wants it, that passes use one after another.

    Asking the system for it anew would cost a page fault each 4 KiB.
    """

    def __init__(self) -> None:
        self.free: list[Tensor] = []

    def take(self, numbers: int) -> Room:
        """Room for so many numbers."""
        while self.free:
            tensor = self.free.pop()
            if tensor.numel() >= numbers:
                return Room(self, tensor)
        return Room(self, torch.empty(numbers))


class Room:
    """Taken by a pass; given back when its graph is gone."""

    def __init__(self, owner: Rooms, tensor: Tensor) -> None:
        self.owner = owner
        self.tensor = tensor

    def __del__(self) -> None:
        if len(self.owner.free) < 2:
            self.owner.free.append(self.tensor)


class _Plan:
    """What C is told of a model, for as long as its weights stay where they are.

    Args:
        model: of which ``why_not`` has nothing to say.
    """

    def __init__(self, model: LanguageModel) -> None:
        parts, blocks = parts_of(model), model.blocks
        h, k, d, hidden, kind, conv = parts[0].shape
        assert isinstance(model.norm, RMSNorm)
        self.eps = model.norm.eps
        self.weights = [*_weights(parts, blocks), model.norm.weight]
        self.given = [t for t in self.weights if t is not None]
        self.there = [t is not None for t in self.weights]
        self.addresses = [t.data_ptr() for t in self.given]
        rotary = model.rotary_cos.shape[-1] if model.rotary else 0
        self.shape = (
            len(parts), model.dim, h, k, d, rotary, hidden, kind, conv, _width(blocks[0].mixer_conv),
        )  # fmt: skip
        self.constants = [
            (
                one.mixer_norm.eps,
                one.feed_norm.eps,
                one.mixer.scale,
                one.mixer.rope and model.rotary,
            )
            for one in parts
        ]
        self.layers = self.at(self.addresses)
        # Where every module and parameter is kept, and every dict of hooks: looked at in each pass.
        modules = list(model.modules())
        self.children = [(m._modules, n, c) for m in modules for n, c in m._modules.items()]
        self.parameters = [(m._parameters, n, p) for m in modules for n, p in m._parameters.items()]
        self.hooks = [getattr(m, name) for m in modules for name in HOOKS]

    def at(self, addresses: list[int]) -> Any:
        """The layers, their weights being there."""
        places = iter(addresses)
        layers = (_Layer * len(self.constants))()
        there = iter(self.there)
        for layer, constants in zip(layers, self.constants, strict=True):
            for name in POINTERS:
                setattr(layer, name, next(places) if next(there) else None)
            layer.mixer_eps, layer.feed_eps, layer.scale, layer.rope = constants
        return layers

    def holds(self) -> bool:
        """Whether modules and weights are those that it was made of, where they were."""
        return (
            [t.data_ptr() for t in self.given] == self.addresses
            and all(owner.get(name) is child for owner, name, child in self.children)
            and all(owner.get(name) is kept for owner, name, kept in self.parameters)
        )


class _Pass:
    """What one pass tells C, kept for its backward half.

    Args:
        plan: of the model.
        size: rows, and tokens of each.
        rotary: cosines and sines, or None.
        rooms: where memory comes from.
    """

    def __init__(
        self,
        plan: _Plan,
        size: torch.Size,
        rotary: tuple[Tensor, Tensor] | None,
        rooms: Rooms,
    ) -> None:
        self.plan, self.rotary = plan, rotary
        self.shape = _Shape(*size, *plan.shape, torch.get_num_threads())
        room, gradients = ctypes.c_long(), ctypes.c_long()
        built = library()
        assert built is not None
        self.built = built
        built.train_sizes(ctypes.byref(self.shape), ctypes.byref(room), ctypes.byref(gradients))
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
    def forward(ctx: Any, x: Tensor, one: _Pass, *weights: Tensor) -> Tensor:
        x = x.contiguous()
        y, plan = torch.empty_like(x), one.plan
        one.built.train_forward(
            ctypes.byref(one.shape), plan.layers, plan.addresses[-1], plan.eps, *one.tables(),
            x.data_ptr(), y.data_ptr(), one.room.tensor.data_ptr(),
        )  # fmt: skip
        ctx.save_for_backward(*weights)
        ctx.one = one
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        weights, one = ctx.saved_tensors, ctx.one  # which says so if a weight has changed since
        addresses, layers = [t.data_ptr() for t in weights], one.plan.layers
        if addresses != one.plan.addresses:
            layers = one.plan.at(addresses)
        dy = dy.contiguous()
        dx, gradients = torch.empty_like(dy), dy.new_empty(one.gradients)
        one.built.train_backward(
            ctypes.byref(one.shape), layers, addresses[-1], *one.tables(),
            dy.data_ptr(), dx.data_ptr(), one.room.tensor.data_ptr(), gradients.data_ptr(),
        )  # fmt: skip
        sizes = [t.numel() for t in weights]
        found = gradients[: sum(sizes)].split(sizes)
        return dx, None, *(g.view(t.shape) for g, t in zip(found, weights, strict=True))


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
        if adapted(model):
            return "it has adapters (model.lora)"
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
    if model.dropout is not None or any(block.dropout is not None for block in blocks):
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


def watched() -> bool:
    """Whether somebody has to see a pass's own operations: a compiler, FLOP counting, transforms, hooks."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch_modules._has_any_global_hook()
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
        self._rooms = Rooms()
        self._plan: _Plan | None = None
        if self.required and (reason := why_not(model)) is not None:
            raise _refusal(reason)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "required": self.required}  # addresses are of this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _rooms=Rooms(), _plan=None)

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
        pays = self.required or (len(tokens) >= FEWEST_ROWS and model.dim <= WIDEST)
        if pays and torch.is_grad_enabled() and tokens.ndim == 2 and not watched():
            reason = self._why_not_now(documents)
            plan = self._plan
            if plan is not None and reason is None:
                if not any(plan.hooks):
                    return self._run(tokens, plan)
            elif self.required and reason is not None:
                raise _refusal(reason)
        return model.hidden(tokens, documents=documents, spans=spans, extras=extras)

    def _why_not_now(self, documents: Tensor | None) -> str | None:
        if documents is not None:
            return "documents within a row are kept apart"
        if torch.is_autocast_enabled("cpu"):
            return "trainer.precision is mixed"
        kernel = self.model.attention_kernel
        if self._plan is not None and own_kernels(kernel) and self._plan.holds():
            return None
        reason = why_not(self.model)
        self._plan = _Plan(self.model) if reason is None else None
        return reason

    def _run(self, tokens: Tensor, plan: _Plan) -> Tensor:
        context = self.model.context(tokens, None, None)
        x = self.model.enter(tokens, context.positions)
        one = _Pass(plan, tokens.shape, context.rotary, self._rooms)
        y: Tensor = _Blocks.apply(x, one, *plan.given)
        return y


def _refusal(reason: str) -> ToolmemError:
    return ToolmemError(
        f"model.fused is true, but this model cannot train by the fused kernels: {reason}; "
        "set model.fused: auto"
    )
