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
        inside: which of them belong to the inside of a branch (``branches_told_apart``).
    """

    known: set[int] = field(default_factory=set)
    memories: dict[int, Any] = field(default_factory=dict)
    inside: set[int] = field(default_factory=set)
    stream: set[int] = field(default_factory=set)
    depth: int = 0

    def note(self, tensor: Tensor) -> Tensor:
        """Take in one that is kept."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.memories[key] = storage  # held, so that its identity stays its own
            if self.depth and key not in self.stream:
                self.inside.add(key)
        return tensor

    @property
    def n_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(storage.nbytes() for storage in self.memories.values())

    @property
    def n_bytes_inside(self) -> int:
        """Bytes of those inside of branches."""
        return sum(self.memories[key].nbytes() for key in self.inside)

    @property
    def largest(self) -> int:
        """Bytes of the largest."""
        return max((storage.nbytes() for storage in self.memories.values()), default=0)


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


@contextmanager
def branches_told_apart(model: LanguageModel, kept: Kept) -> Iterator[None]:
    """In here what mixers and feed-forwards keep, but for what they are given, is noted as inside.

    That is what tensor parallelism splits over ranks.
    """

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        if not kept.depth:
            kept.stream.add(args[0].untyped_storage()._cdata)
        kept.depth += 1

    def leave(*_: Any) -> None:
        kept.depth -= 1

    handles = []
    for block in model.blocks:
        for branch in (getattr(block, "mixer", None), getattr(block, "feed_forward", None)):
            if branch is not None:
                handles.append(branch.register_forward_pre_hook(enter))
                handles.append(branch.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class BodyActivations:
    """What the body, all but the head, keeps for its backward pass, in bytes.

    Args:
        stream: outside of mixers and feed-forwards, and what these are given.
        branches: inside of them.
        largest: of the tensors.
    """

    stream: int
    branches: int
    largest: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.stream + self.branches


def body_activations(
    model: LanguageModel,
    rows: int,
    seq: int,
    documents: bool = False,
    dtype: torch.dtype | None = None,
) -> BodyActivations:
    """What a pass through the body keeps for its backward pass.

    Args:
        model: in training mode, checkpointed or not (``recompute.py``), on any device.
        rows: number of rows.
        seq: tokens in a row.
        documents: rows are packed with documents.
        dtype: of autocast; None for none.
    """

    def run(hidden: Callable[..., Tensor], like: Callable[..., Tensor]) -> BodyActivations:
        tokens = like(rows, seq, dtype=torch.int64)
        ids = like(rows, seq, dtype=torch.int32) if documents else None
        known = (*model.parameters(), *model.buffers(), tokens)
        with kept_for_backward(*known) as kept, branches_told_apart(model, kept):
            # as Lightning's plugin has it: no copy of a weight is used twice
            with torch.autocast(
                tokens.device.type, dtype, enabled=dtype is not None, cache_enabled=False
            ):
                states = hidden(tokens, documents=ids)
            kept.note(states)  # the head's
        inside = kept.n_bytes_inside
        return BodyActivations(kept.n_bytes - inside, inside, kept.largest)

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
