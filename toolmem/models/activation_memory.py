"""What a pass keeps in memory for its backward pass, found by shapes without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from toolmem.models.language_model import LanguageModel
from toolmem.models.model_flops import left_alone, shapes_only, stand_ins
from toolmem.models.recomputing import told


@dataclass
class Kept:
    """Tensors that were kept for a backward pass, each memory once.

    Args:
        known: memories that are there anyway: parameters, inputs.
        memories: the others, by identity.
    """

    known: set[int] = field(default_factory=set)
    memories: dict[int, Any] = field(default_factory=dict)

    def note(self, tensor: Tensor) -> Tensor:
        """Take in one that is kept."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.memories[storage._cdata] = storage  # held, so that its identity stays its own
        return tensor

    @property
    def n_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(storage.nbytes() for storage in self.memories.values())


@contextmanager
def kept_for_backward(*known: Tensor) -> Iterator[Kept]:
    """Notes what operations in here keep for their backward pass; offloaded tensors are not among it.

    Args:
        known: tensors that are in memory anyway.
    """
    kept = Kept({tensor.untyped_storage()._cdata for tensor in known})
    token = told.set(lambda result: kept.note(result) if isinstance(result, Tensor) else None)
    try:
        with saved_tensors_hooks(kept.note, lambda tensor: tensor):
            yield kept
    finally:
        told.reset(token)


def body_activations(model: LanguageModel, rows: int, seq: int, documents: bool = False) -> int:
    """Bytes that the body, all but the head, keeps for its backward pass.

    Args:
        model: in training mode, checkpointed or not (``recompute.py``), on any device.
        rows: number of rows.
        seq: tokens in a row.
        documents: rows are packed with documents.
    """

    def run(hidden: Callable[..., Tensor], like: Callable[..., Tensor]) -> int:
        tokens = like(rows, seq, dtype=torch.int64)
        ids = like(rows, seq, dtype=torch.int32) if documents else None
        known = (*model.parameters(), *model.buffers(), tokens)
        with kept_for_backward(*known) as kept:
            states = hidden(tokens, documents=ids)
            kept.note(states)  # the head's
        return kept.n_bytes

    return on_stand_ins(model, run)


def on_stand_ins(model: LanguageModel, run: Callable[..., Any]) -> Any:
    """Call ``run(model.hidden, like)`` while the model has stand-ins for its tensors.

    Args:
        model: left as it was.
        run: gets the body, and ``like(*shape, dtype=...)``, which makes inputs.
    """

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, like: Callable[..., Tensor]) -> Any:
            return run(self.model.hidden, like)

    caller = Caller()
    with left_alone(model):
        try:
            with shapes_only(model):
                return _call(caller, real=False)
        except RuntimeError:  # the model wants to see numbers
            return _call(caller, real=True)


def _call(caller: nn.Module, real: bool) -> Any:
    tensors, like, _ = stand_ins(caller, real)
    return torch.func.functional_call(caller, tensors, (like,))
