"""What a step of training holds in memory and sends between devices, worked out on paper.

Bytes of one device, at the moment when most is held: after a forward pass, before the gradients of the
step before are let go (Lightning does so between the passes). What a pass keeps for its backward pass is
counted by running the model on tensors without numbers; the rest is arithmetic:

===========  ===================================================================================
parameters   4 bytes each; FSDP2 keeps a share, and gathers two blocks and what is in no block
gradients    4 bytes each, like parameters; DDP has buckets of the same size beside them
optimizer    AdamW 8 bytes a parameter, Muon 4 a number of a matrix
activations  what operations keep; tensor parallelism splits the inside of mixers and feed-forwards
logits       of the tokens that bear loss: their softmax and gradients, float32; of many, a chunk's
===========  ===================================================================================

Not counted: what Python, torch and CUDA hold themselves (0.3 GB on a CPU, 0.5 to 1 GB on a GPU), and what
the allocator cannot use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel
from toolmem.models.activation_memory import BodyActivations, body_activations
from toolmem.models.chunked_loss import rows_at_once
from toolmem.models.recompute import (
    ActivationCheckpointing,
    checkpoint_blocks,
    release_blocks,
)
from toolmem.training.muon import STACK_LIMIT
from toolmem.training.optimizers import OptimizerConfig
from toolmem.training.parallel.plans import Sharing
from toolmem.training.parallel.tensor import plans, stacks

FLOAT = 4  # bytes
LOGITS = 3  # of the size of the logits: their softmax, its gradient, and theirs
CHUNKS = 2  # of the size of a chunk's logits, where the loss is by chunks: they become gradients in place
PASSING = 2  # of the size of the largest tensor that is kept: an operation's result and a gradient
MUON_STACKS = 5  # of momenta that Newton-Schulz works on, and its products


@dataclass(frozen=True)
class Layout:
    """How devices share the work.

    Args:
        data: devices, or groups of them, that read different rows.
        tensor: devices that share each layer.
        sharded: parameters are spread over ``data`` (FSDP2), not copied (DDP).
        checkpointing: mode of activation checkpointing.
        sequence_parallel: the stream is split over tokens between ``tensor`` devices.
    """

    data: int = 1
    tensor: int = 1
    sharded: bool = False
    checkpointing: str = "none"
    sequence_parallel: bool = False

    @property
    def name(self) -> str:
        """As a table has it."""
        parts = [f"TP {self.tensor}"] if self.tensor > 1 else []
        if self.data > 1:
            parts.append(f"{'FSDP2' if self.sharded else 'DDP'} {self.data}")
        return " x ".join(parts) or "1 device"


@dataclass(frozen=True)
class Step:
    """What is done in a step.

    Args:
        rows: of a micro-batch, over all devices.
        seq: tokens in a row.
        loss_tokens: tokens of a micro-batch that bear loss, over all devices.
        micro_batches: gathered before the optimizer steps.
        dtype: of autocast (``16-mixed``, ``bf16-mixed``); None for float32.
        param_dtype: what FSDP2 gathers parameters in; float32 when None.
        documents: rows are packed with documents.
    """

    rows: int
    seq: int
    loss_tokens: int
    micro_batches: int = 1
    dtype: torch.dtype | None = None
    param_dtype: torch.dtype | None = None
    documents: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes that one device holds, by what they are for."""

    parameters: float
    gathered: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    passing: float
    stepping: float

    @property
    def lasting(self) -> float:
        """What is held between steps too."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """At the moment when most is held: in the passes, or while the optimizer steps."""
        # logits are gone before the last block's gradients are
        passes = self.gathered + self.activations + max(self.logits, self.passing)
        return self.lasting + max(passes, self.stepping)


@dataclass(frozen=True)
class _Held:
    """One parameter.

    Args:
        numel: numbers in it.
        cut: tensor parallelism splits it.
        block: the index of its block; None outside of blocks.
        states: numbers that the optimizer keeps for each of its own.
        matrix: Muon's.
    """

    numel: int
    cut: bool
    block: int | None
    states: int
    matrix: bool


class MemoryPlan:
    """The memory and communication of a model's training step under any layout.

    Args:
        model: in training mode; only its shapes are looked at, so it may have been made on fake tensors.
        optimizer: what trains it.
        step: what is done in a step.
    """

    def __init__(self, model: LanguageModel, optimizer: OptimizerConfig, step: Step) -> None:
        self.model = model
        self.step = step
        self.built: Any = optimizer.build(model)
        self._activations: dict[str, BodyActivations] = {}
        self._held: dict[int, list[_Held]] = {}

    def share(self, layout: Layout) -> float:
        """The part of a micro-batch's rows that one device has, at least one row."""
        return math.ceil(self.step.rows / layout.data) / self.step.rows

    def activations(self, mode: str) -> BodyActivations:
        """What the body keeps of a micro-batch on one device, checkpointed as ``mode`` says."""
        if mode not in self._activations:
            step = self.step
            model = self.model
            if mode != "none":
                checkpoint_blocks(model, ActivationCheckpointing(mode))  # type: ignore[arg-type]
            try:
                found = body_activations(
                    model, step.rows, step.seq, step.documents, dtype=step.dtype
                )
            finally:
                release_blocks(model)
            self._activations[mode] = found
        return self._activations[mode]

    def held(self, tensor: int) -> list[_Held]:
        """Every parameter, as ``tensor`` devices share layers.

        Raises:
            ToolmemError: for layers that cannot be shared so, naming the key.
        """
        if tensor not in self._held:
            cut: set[int] = set()
            if tensor > 1:
                for branch, plan in plans(self.model, Sharing(0, tensor)).items():
                    named = dict(branch.named_parameters())
                    cut |= {
                        id(named[name]) for name, how in plan.cuts.items() if how.dim is not None
                    }
                if self.model.vocab_size % tensor == 0:
                    cut |= {id(self.model.embedding.weight), id(self.model.head.weight)}
            blocks = [block for stack in stacks(self.model) for block in stack]
            of_block = {
                id(parameter): index
                for index, block in enumerate(blocks)
                for parameter in block.parameters()
            }
            self._held[tensor] = [
                _Held(
                    parameter.numel(),
                    id(parameter) in cut,
                    of_block.get(id(parameter)),
                    1 if (matrix := group.get("kind") == "muon") else 2,
                    matrix,
                )
                for group in self.built.param_groups
                for parameter in group["params"]
            ]
        return self._held[tensor]

    def memory(self, layout: Layout) -> Memory:
        """Bytes of one device.

        Raises:
            ToolmemError: for layers that cannot be shared so, naming the key.
        """
        step, tensor = self.step, layout.tensor
        held = self.held(tensor)
        spread = layout.data if layout.sharded else 1

        def own(one: _Held) -> float:
            return one.numel / (tensor if one.cut else 1)

        numbers = sum(own(one) for one in held)
        states = sum(own(one) * one.states for one in held)
        copies = 2 if layout.data > 1 and not layout.sharded else 1  # DDP's buckets
        narrow = FLOAT if step.param_dtype is None else step.param_dtype.itemsize
        gathered = 0.0
        if spread > 1:
            blocks = self._by_block(held, tensor)
            outside = numbers - sum(blocks)
            # two blocks, of which one is on its way; and gradients of one before they are spread
            gathered = narrow * (outside + 2 * max(blocks, default=0.0))
            gathered += FLOAT * max(outside, max(blocks, default=0.0))
        body, share = self.activations(layout.checkpointing), self.share(layout)
        stream = body.stream / (tensor if layout.sequence_parallel else 1)
        kept = stream + body.branches / tensor
        passing: float = PASSING * body.largest
        if layout.checkpointing != "none":  # one block is run again
            plain = self.activations("none")
            passing += (plain.stream + plain.branches / tensor) / max(len(self.model.blocks), 1)
        return Memory(
            parameters=FLOAT * numbers / spread,
            gathered=gathered,
            gradients=FLOAT * copies * numbers / spread,
            optimizer=FLOAT * states / spread,
            activations=share * kept,
            logits=self._logits(layout, share * step.loss_tokens),
            passing=share * passing,
            stepping=self._stepping(held, spread, tensor),
        )

    def _logits(self, layout: Layout, rows: float) -> float:
        """What the loss of a device's rows holds: of many, a chunk's logits and what is made of them."""
        vocab = self.model.vocab_size
        split = layout.sharded or layout.tensor > 1
        chunk = 0 if split else rows_at_once(math.ceil(rows), vocab)
        return FLOAT * vocab * (CHUNKS * chunk if chunk else LOGITS * rows)

    def _by_block(self, held: Sequence[_Held], tensor: int) -> list[float]:
        sizes: dict[int, float] = {}
        for one in held:
            if one.block is not None:
                share = one.numel / (tensor if one.cut else 1)
                sizes[one.block] = sizes.get(one.block, 0.0) + share
        return list(sizes.values())

    def _stepping(self, held: Sequence[_Held], spread: int, tensor: int) -> float:
        """What Muon works on beside its states: whole matrices, some at once."""
        matrices = [one.numel for one in held if one.matrix]
        if not matrices:
            return 0.0
        at_once = max(max(matrices), min(STACK_LIMIT, sum(matrices)))
        return FLOAT * MUON_STACKS * at_once

    def communication(self, layout: Layout) -> float:
        """Bytes that one device sends in a step, rings assumed.

        Raises:
            ToolmemError: for layers that cannot be shared so, naming the key.
        """
        step, data, tensor = self.step, layout.data, layout.tensor
        held = self.held(tensor)
        blocks = self._by_block(held, tensor)
        numbers = sum(one.numel / (tensor if one.cut else 1) for one in held)
        sent = 0.0
        if data > 1 and not layout.sharded:
            sent += 2 * FLOAT * numbers * (data - 1) / data
        elif data > 1:
            narrow = FLOAT if step.param_dtype is None else step.param_dtype.itemsize
            # blocks are gathered for each pass, the rest once; gradients are spread once
            each = narrow * (numbers + sum(blocks)) + FLOAT * numbers
            sent += step.micro_batches * each * (data - 1) / data
        if tensor > 1:
            wide = FLOAT if step.dtype is None else step.dtype.itemsize
            stream = self.share(layout) * wide * step.rows * step.seq * self.model.dim
            branches = len(plans(self.model, Sharing(0, tensor)))
            # what each branch adds is summed over devices, and so is the gradient of what it is given;
            # the same of embedded tokens and of what the head is given, and logits are put together
            sums = 2 * branches + 2
            logits = self.share(layout) * wide * step.loss_tokens * self.model.vocab_size
            each = 2 * sums * stream + 2 * logits
            sent += step.micro_batches * each * (tensor - 1) / tensor
        return sent

    def most_rows(self, layout: Layout, memory: float) -> int:
        """The most rows of a micro-batch, over all devices, that devices of ``memory`` bytes hold; 0 for
        none.
        """
        found = self.memory(layout)
        fixed = found.lasting + found.gathered
        if found.lasting + found.stepping > memory:
            return 0
        by_row = (found.activations + max(found.logits, found.passing)) / (
            self.share(layout) * self.step.rows
        )
        return layout.data * max(0, int((memory - fixed) / by_row))


def layouts(model: LanguageModel, devices: int) -> tuple[list[Layout], dict[int, str]]:
    """Ways to share a model over so many devices, and why some are not among them.

    Args:
        model: the model.
        devices: their number.

    Returns:
        the layouts, and the reasons by ``tensor_parallel_size``.
    """
    found = [Layout(devices)]
    refused: dict[int, str] = {}
    if devices > 1:
        found.append(Layout(devices, sharded=True))
    for tensor in range(2, devices + 1):
        if devices % tensor:
            continue
        try:
            plans(model, Sharing(0, tensor))
        except ToolmemError as error:
            refused[tensor] = str(error)
            continue
        found.append(Layout(devices // tensor, tensor, sharded=devices > tensor))
    return found, refused


def with_checkpointing(found: Sequence[Layout]) -> list[Layout]:
    """Each of them without and with activation checkpointing."""
    return [
        replace(layout, checkpointing=mode)
        for layout in found
        for mode in ("none", "selective", "blocks")
    ]


def cache_bytes(model: LanguageModel, rows: int, seq: int) -> int:
    """Bytes of the decoding state of ``rows`` lanes of ``seq`` tokens, in float32."""
    return int(model.new_cache(rows, seq, device="meta", dtype=torch.float32).size_in_bytes())
