"""How training runs a model's body: as it is, fused, compiled, or with checkpointed activations."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel
from toolmem.models.fused_training import FusedBlocks, FusedChoice
from toolmem.models.recompute import ActivationCheckpointing, checkpoint_blocks

CompileChoice = bool | Literal["blocks"]

# Lengths are symbols in what is compiled, so a body takes a graph or two, blocks some for each kind.
MOST_GRAPHS = 16


def training_body(
    model: LanguageModel,
    compile: CompileChoice,
    fused: FusedChoice,
    checkpointing: ActivationCheckpointing,
) -> Callable[..., Tensor]:
    """The model's ``hidden`` for training; names of its parameters stay as they are.

    Args:
        model: the model.
        compile: all of it (true), or each block by itself (``blocks``).
        fused: all blocks by one call of C.
        checkpointing: which blocks keep little for the backward pass.

    Raises:
        ToolmemError: for options that do not go together.
    """
    if compile and fused is True:
        raise ToolmemError("model.compile and model.fused are both true: leave one of them out")
    if checkpointing.on and fused is True:
        raise ToolmemError(
            "model.fused is true and model.activation_checkpointing is on: the fused kernel keeps its own "
            "activations; leave one of them out"
        )
    if checkpointing.on and compile is True:
        raise ToolmemError(
            "model.compile is true and model.activation_checkpointing is on: use model.compile: blocks"
        )
    if compile == "blocks":
        compile_blocks(model)
    if checkpointing.on:
        checkpoint_blocks(model, checkpointing)
    if compile is True:
        return torch.compile(model.hidden, dynamic=True)
    if fused and not compile and not checkpointing.on:
        return FusedBlocks(model, fused)
    return model.hidden


def compile_blocks(model: LanguageModel) -> None:
    """Compile blocks one by one, those of a kind once: tens of layers take the time of one.

    Args:
        model: the model; copies of a block run the same compiled code on their own parameters.
    """
    compiled: dict[type, Any] = {}
    for block in model.blocks:
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, dynamic=True)
        block.forward = MethodType(compiled[kind], block)


class Compilations:
    """How many graphs were compiled in this process since training began.

    Each takes seconds to minutes, so a count that goes on growing is worth a warning.
    """

    def __init__(self) -> None:
        self.began = _graphs()
        self._warned = False

    def metrics(self) -> dict[str, float]:
        """``compile/graphs``."""
        graphs = _graphs() - self.began
        if graphs > MOST_GRAPHS and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"model.compile: {graphs} graphs were compiled by now, each for seconds to minutes: "
                "something of the batches or the model changes from step to step (TORCH_LOGS=recompiles "
                "says what); model.compile: blocks, or false, may be quicker"
            )
        return {"compile/graphs": graphs}


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
