"""Which tensors of another program's are which of ours, read in both directions.

A rule says of one of our tensors which of theirs it is made of, one below the other (query, key and value
are one projection here, three there), and what is done to the whole. Every rule can be undone, so one list
of rules serves reading and writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Rule:
    """One tensor of ours.

    Args:
        ours: its name in our model's ``state_dict``.
        theirs: names of the tensors that it is made of, first row to last.
        rows: how many rows of it each of them has; needed where there are several.
        take: makes ours of theirs, put together.
        give: the inverse.
        shape: of theirs, where it is not the shape of ours (and then there is only one).
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    take: Callable[[Tensor], Tensor] = _as_it_is
    give: Callable[[Tensor], Tensor] = _as_it_is
    shape: tuple[int, ...] | None = None

    def parts(self, ours: Tensor) -> dict[str, Tensor]:
        """Theirs, by name, of ours."""
        whole = self.give(ours)
        if len(self.theirs) == 1:
            return {self.theirs[0]: whole}
        return dict(zip(self.theirs, whole.split(list(self.rows)), strict=True))

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """Ours, of theirs in the order of ``theirs``."""
        import torch

        return self.take(parts[0] if len(parts) == 1 else torch.cat(list(parts)))


class Lazy(Protocol):
    """A tensor that is read when it is asked for."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype."""

    def read(self) -> Tensor:
        """Its elements."""


@dataclass(frozen=True)
class Whole:
    """A tensor of ours that is put together when it is read.

    Args:
        rule: says how.
        parts: what it is made of.
        shape: of ours.
    """

    rule: Rule
    parts: tuple[Lazy, ...]
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The widest of its parts'."""
        import functools

        import torch

        return functools.reduce(torch.promote_types, (part.torch_dtype for part in self.parts))

    def read(self) -> Tensor:
        """Its elements."""
        whole = self.rule.whole([part.read().to(self.torch_dtype) for part in self.parts])
        return whole.reshape(self.shape)


@dataclass(frozen=True)
class Part:
    """A tensor of theirs that is cut out of ours when it is read.

    Args:
        rule: says how.
        name: theirs.
        source: ours.
        shape: of theirs.
    """

    rule: Rule
    name: str
    source: Lazy
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of ours."""
        return self.source.torch_dtype

    def read(self) -> Tensor:
        """Its elements."""
        return self.rule.parts(self.source.read())[self.name].contiguous()


def take(
    rules: Iterable[Rule],
    theirs: Mapping[str, Lazy],
    shapes: Mapping[str, Sequence[int]],
    where: str,
    ignored: Callable[[str], bool] = lambda name: False,
) -> dict[str, Lazy]:
    """Our tensors, each to be made of theirs when it is read.

    Args:
        rules: one for each of ours.
        theirs: by name.
        shapes: of ours, by name.
        where: the file, for messages.
        ignored: which of theirs say nothing that ours do not.

    Raises:
        ToolmemError: naming a tensor that is missing, of another shape, or that ours has no place for.
    """
    found: dict[str, Lazy] = {}
    left = dict.fromkeys(name for name in theirs if not ignored(name))
    for rule in rules:
        parts = []
        for number, name in enumerate(rule.theirs):
            if name not in theirs:
                raise ToolmemError(
                    f"{where}: the tensor {name} is missing: the file is incomplete, or its model is of "
                    "another architecture than it says"
                )
            ours = tuple(shapes[rule.ours])
            wanted = rule.shape or ((rule.rows[number], *ours[1:]) if rule.rows else ours)
            if tuple(theirs[name].shape) != wanted:
                raise ToolmemError(
                    f"{where}: the tensor {name} has shape {list(theirs[name].shape)}, and its config asks "
                    f"for {list(wanted)}: the file and its config do not belong together"
                )
            left.pop(name, None)
            parts.append(theirs[name])
        found[rule.ours] = Whole(rule, tuple(parts), tuple(shapes[rule.ours]))
    if left:
        name = next(iter(left))
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise ToolmemError(
            f"{where}: the tensor {name}{more} has no place in our model: an option of its architecture is "
            "not supported"
        )
    return found


def give(rules: Iterable[Rule], ours: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Their tensors, each to be cut out of ours when it is read.

    Args:
        rules: one for each of theirs.
        ours: by name.
    """
    found: dict[str, Lazy] = {}
    for rule in rules:
        source = ours[rule.ours]
        for number, name in enumerate(rule.theirs):
            shape = rule.shape or tuple(source.shape)
            if rule.rows:
                shape = (rule.rows[number], *shape[1:])
            found[name] = Part(rule, name, source, tuple(shape))
    return found
