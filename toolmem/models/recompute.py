"""Activation checkpointing (arXiv 1604.06174), applied to a model's blocks from outside.

A block that is checkpointed keeps its input alone (or, ``selective``, also what is dear to compute:
arXiv 2205.05198), and is run again when its gradients are wanted. What a second run would do twice is
seen to: terms of the loss and figures that it hands out go nowhere, buffers that it writes to (loads of
experts) are put back, what earlier layers left for it is what the first run found, random numbers are
the same.

Only passes that want gradients are affected: evaluation and decoding run blocks as they are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from toolmem.errors import ToolmemError
from toolmem.models import grouped  # noqa: F401  (makes its operations)
from toolmem.models.context import Context, Extras
from toolmem.models.recomputing import deepen, tell_kept

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel

aten = torch.ops.aten
# What ``selective`` keeps, by the name of its kind. Convolutions count as matmuls.
OPERATIONS: dict[str, tuple[Any, ...]] = {
    "matmul": (
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
        aten.linear.default, aten.convolution.default,
        torch.ops.toolmem.grouped_product.default,
    ),
    "attention": (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_attention_math.default,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ActivationCheckpointing:
    """Which blocks keep little for the backward pass, and compute it again.

    Args:
        mode: ``none``; ``blocks`` keeps a block's input; ``selective`` also results of the kinds ``keep``.
        every: of so many blocks one is checkpointed, the first of each group; 1 for all.
        keep: for ``selective``, what is not computed again: ``matmul``, ``attention``.
        offload: keep what the blocks keep in the host's memory, pinned for a GPU, in place of the
            device's; without effect on a CPU.

    Raises:
        ToolmemError: for values that cannot be.
    """

    mode: Literal["none", "blocks", "selective"] = "none"
    every: int = 1
    keep: tuple[str, ...] = ("matmul", "attention")
    offload: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("none", "blocks", "selective"):
            raise ToolmemError(
                f"model.activation_checkpointing.mode is {self.mode!r}: choose none, blocks or selective"
            )
        if self.every < 1:
            raise ToolmemError(
                f"model.activation_checkpointing.every is {self.every}: it must be 1 (all blocks) or more"
            )
        for kind in self.keep:
            if kind not in OPERATIONS:
                raise ToolmemError(
                    f"model.activation_checkpointing.keep: unknown {kind!r}; choose of "
                    f"{', '.join(OPERATIONS)}"
                )

    @property
    def on(self) -> bool:
        """Does it change anything?"""
        return self.mode != "none" or self.offload

    def chooses(self, index: int) -> bool:
        """Is the block of this index checkpointed?"""
        return self.mode != "none" and index % self.every == 0

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What surrounds the first run of a block and the second: it keeps, and finds, what is dear."""
        if self.mode != "selective":
            return nullcontext(), nullcontext()
        kept = {operation for kind in self.keep for operation in OPERATIONS[kind]}

        def policy(run: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if operation not in kept:
                return CheckpointPolicy.PREFER_RECOMPUTE
            if not run.is_recompute:
                tell_kept(run.op_output)
            return CheckpointPolicy.MUST_SAVE

        return create_selective_checkpoint_contexts(policy)


def checkpoint_blocks(model: LanguageModel, how: ActivationCheckpointing) -> None:
    """Let the model's blocks keep less; parameters keep their names.

    Args:
        model: the model; what it computes stays the same.
        how: which blocks, and what they keep.
    """
    for index, block in enumerate(model.blocks):
        if how.offload or how.chooses(index):
            inner = block.__dict__.get("forward")  # compiled, perhaps
            block.checkpointing = how if how.chooses(index) else replace(how, mode="none")  # type: ignore[assignment]
            block.inner_forward = None if inner is None else inner.__func__  # type: ignore[assignment]
            # a bound method, which a copy of the block binds to itself
            block.forward = MethodType(_forward, block)


def release_blocks(model: LanguageModel) -> None:
    """Let the blocks keep again what their operations keep."""
    for block in model.blocks:
        how = block.__dict__.pop("checkpointing", None)
        if how is not None:
            inner = block.__dict__.pop("inner_forward")
            del block.forward
            if inner is not None:
                block.forward = MethodType(inner, block)


def _forward(self: Any, x: Tensor, context: Context, cache: Any = None) -> Tensor:
    """A block's forward pass that keeps little for the backward pass."""
    how: ActivationCheckpointing = self.checkpointing
    run = self.inner_forward or type(self).forward
    if cache is not None or not torch.is_grad_enabled():
        return run(self, x, context, cache)
    offload = save_on_cpu(pin_memory=x.is_cuda) if how.offload else nullcontext()
    with offload:
        if how.mode == "none":
            return run(self, x, context)
        runs = _Runs(self, run, context)
        return checkpoint(runs, x, use_reentrant=False, context_fn=runs.contexts)


class _Runs:
    """The first run of a block, and those after it.

    Args:
        block: the block.
        run: its own forward function.
        context: of the first run.
    """

    def __init__(self, block: Any, run: Any, context: Context) -> None:
        self.block = block
        self.run = run
        self.found = _copy(context)  # before the block has written to it
        self.context = context  # of the next run

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(self.block, x, self.context)

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What surrounds the first run, and those after it."""
        first, second = self.block.checkpointing.contexts()
        return first, _Again(self, second)


class _Again:
    """Surrounds a run that is not the first.

    Args:
        runs: of which.
        inner: what else surrounds it.
    """

    def __init__(self, runs: _Runs, inner: AbstractContextManager[Any]) -> None:
        self.runs = runs
        self.inner = inner

    def __enter__(self) -> None:
        # Copies are made before the inner one: within, every operation has to be one of the first run.
        self.runs.context = _copy(self.runs.found)
        self.before = [(buffer, buffer.clone()) for buffer in self.runs.block.buffers()]
        deepen(1)
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        # A run is broken off, by an exception, as soon as all is there that is wanted.
        self.inner.__exit__(*error)
        deepen(-1)
        with torch.no_grad():
            for buffer, value in self.before:
                buffer.copy_(value)


def _copy(context: Context) -> Context:
    """One of its own to write to; masks, which are the same for all, are shared."""
    extras = context.extras
    if extras is not None:
        losses = {name: loss.detach() for name, loss in extras.losses.items()}
        extras = Extras(losses, dict(extras.metrics))
    return replace(context, shared=dict(context.shared), extras=extras)
