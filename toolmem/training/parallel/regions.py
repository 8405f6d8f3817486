"""Parts of a model that compute with what their rank holds of the parameters.

A region is a module whose ``forward`` sees, in place of its parameters, which are ``DTensor``s, this rank's
pieces: plain tensors, so that any kernel takes them. Gradients come back as ``DTensor``s. A region that is
split enters and leaves by ``collectives.py``; one that is not does the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from toolmem.training.parallel.collectives import SEQ, enter, join, leave, part

Use = Literal["own", "shared", "added"]


@dataclass(frozen=True)
class Cut:
    """How one parameter is split, and what a rank computes with.

    Args:
        dim: where it is cut; None keeps all of it on each rank.
        order: of its rows, as they are kept (``layout.py``).
        use: ``own``: the rank's piece, or all of it where every rank does the same with it. ``shared``:
            each rank's gradient is a part of the sum. ``added``: the same of a bias of what is summed over
            ranks, of which each adds its share.
        rows: of a parameter that all ranks keep, the rows that this one computes with; None for all.
    """

    dim: int | None = None
    order: Tensor | None = None
    use: Use = "own"
    rows: Tensor | None = None


@dataclass
class Stream:
    """The residual stream of one stack of blocks.

    Args:
        group: the tensor-parallel ranks.
        by_tokens: it is split over tokens outside of regions (sequence parallelism).
        seq: tokens of a row in the pass that goes on.
    """

    group: ProcessGroup
    by_tokens: bool = False
    seq: int = field(default=0, init=False)

    def begin(self, x: Tensor) -> Tensor:
        """What the first block reads, of what every rank has."""
        self.seq = x.shape[SEQ]
        return part(x, SEQ, self.group, sum_up=False) if self.by_tokens else x

    def end(self, x: Tensor) -> Tensor:
        """What every rank has after the last block."""
        return join(x, SEQ, self.seq, self.group, sum_up=False) if self.by_tokens else x

    def enter(self, x: Tensor, split: bool) -> Tensor:
        """What a branch reads."""
        if self.by_tokens:
            return join(x, SEQ, self.seq, self.group, sum_up=split)
        return enter(x, self.group) if split else x

    def leave(self, x: Tensor, split: bool) -> Tensor:
        """What a branch adds."""
        if self.by_tokens:
            return part(x, SEQ, self.group, sum_up=split)
        return leave(x, self.group) if split else x


class Region:
    """Lets a module compute with this rank's pieces while its ``forward`` runs.

    Args:
        module: the region.
        cuts: by the parameter's name in it; those left out are whole and used alike by every rank.
        group: the tensor-parallel ranks.
        children: modules in it are of the region too.
    """

    def __init__(
        self, module: nn.Module, cuts: dict[str, Cut], group: ProcessGroup, children: bool = True
    ) -> None:
        self.group = group
        self.entries = [
            (owner, own_name, cuts.get(f"{prefix}.{own_name}" if prefix else own_name, Cut()))
            for prefix, owner in (module.named_modules() if children else [("", module)])
            for own_name, parameter in owner._parameters.items()
            if parameter is not None
        ]
        self.recurrent = [m for m in module.modules() if isinstance(m, nn.RNNBase)]
        self._kept: list[list[Any]] = []
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end, always_call=True)

    def _begin(self, *_: Any) -> None:
        kept: list[Any] = [owner._parameters[name] for owner, name, _ in self.entries]
        self._kept.append(kept)
        for (owner, name, cut), parameter in zip(self.entries, kept, strict=True):
            owner._parameters[name] = self._used(parameter, cut)  # type: ignore[assignment]
        self._point_flat_weights()

    def _end(self, *_: Any) -> None:
        if self._kept:
            for entry, parameter in zip(self.entries, self._kept.pop(), strict=True):
                entry[0]._parameters[entry[1]] = parameter
            self._point_flat_weights()

    def _point_flat_weights(self) -> None:
        """Recurrent layers of torch's look for their weights in a list of their own."""
        for module in self.recurrent:
            module._flat_weights = [module._parameters[n] for n in module._flat_weights_names]

    def _used(self, parameter: Tensor, cut: Cut) -> Tensor:
        piece = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if cut.use == "own":
            return piece
        piece = enter(piece, self.group)
        if cut.rows is not None:
            return piece.index_select(0, cut.rows.to(piece.device))
        return piece / self.group.size() if cut.use == "added" else piece


def make_branch(module: nn.Module, stream: Stream, split: bool) -> None:
    """Let a branch of a block, called with (x, ...), read and add to ``stream``."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return stream.enter(args[0], split), *args[1:]

    def after(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return stream.leave(y, split)

    if split or stream.by_tokens:
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def make_stack(blocks: Sequence[nn.Module], stream: Stream) -> None:
    """Let the first block begin ``stream``, and the last one end it."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return stream.begin(args[0]), *args[1:]

    def after(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return stream.end(y)

    if stream.by_tokens:
        blocks[0].register_forward_pre_hook(before)
        blocks[-1].register_forward_hook(after)
