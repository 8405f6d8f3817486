"""What varies in a sweep, and which combinations of it are trained: all, a list, or some at random."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.recipe_files import flattened, read_mapping
from toolmem.sweeps.checks import check_keys, is_number, is_whole, label

RANGES = ("uniform", "log_uniform")
DIGITS = 4  # that a number drawn from a range has


@dataclass(frozen=True)
class Range:
    """Numbers that one is drawn from.

    Args:
        kind: ``uniform``, or ``log_uniform``: every factor equally often.
        low: the smallest.
        high: the largest; of two whole numbers, whole ones are drawn.
    """

    kind: str
    low: float
    high: float

    def draw(self, source: random.Random) -> float:
        """One number, of four digits."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        # of whole numbers, the ends are to be as likely as the others
        low, high = (self.low - 0.5, self.high + 0.5) if whole else (self.low, self.high)
        if self.kind == "log_uniform":
            value = math.exp(source.uniform(math.log(low), math.log(high)))
        else:
            value = source.uniform(low, high)
        if whole:
            return min(max(round(value), self.low), self.high)
        return float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True)
class Axis:
    """One thing that varies.

    Args:
        name: how tables and plots call it.
        values: label -> dotted keys and what they become. A label is a number or a word.
        key: the one key that labels are written to, where they are its values.
        range: what labels are drawn from, where they are not listed.
    """

    name: str
    values: dict[Any, dict[str, Any]] = field(default_factory=dict)
    key: str | None = None
    range: Range | None = None

    def with_labels(self, labels: Sequence[Any]) -> Axis:
        """The axis of these labels, each the value of its key."""
        assert self.key is not None
        return replace(self, values={one: {self.key: one} for one in dict.fromkeys(labels)})


def with_files(axes: Any, folder: str | Path) -> Any:
    """The axes as they are written, a label that names a recipe's file with the dotted keys of that recipe.

    Args:
        axes: what is there.
        folder: where such a path starts from.

    Raises:
        ToolmemError: for a file that is no recipe.
    """
    if not isinstance(axes, Mapping):
        return axes
    found = {}
    for name, labels in axes.items():
        found[name] = labels
        if isinstance(labels, Mapping) and not {"key", "values", *RANGES} & set(labels):
            found[name] = {
                one: flattened(
                    read_mapping(Path(folder) / keys, f"axes.{name}.{one}: {folder}/{keys}")
                )
                if isinstance(keys, str)
                else keys
                for one, keys in labels.items()
            }
    return found


def parse_axes(written: Any, place: str = "axes") -> tuple[Axis, ...]:
    """The axes of a recipe.

    Raises:
        ToolmemError: for what it cannot be, naming the key.
    """
    if not isinstance(written, Mapping) or not written:
        raise ToolmemError(
            f"{place} is empty: name at least one thing that varies, with its values"
        )
    return tuple(
        parse_axis(f"{place}.{name}", str(name), values) for name, values in written.items()
    )


def parse_axis(place: str, name: str, written: Any) -> Axis:
    """One axis: a key and its values or their range, or labels with the keys that each sets.

    Args:
        place: where it is, dotted.
        name: of the axis.
        written: what is there.

    Raises:
        ToolmemError: for what it cannot be, naming the key.
    """
    if not isinstance(written, Mapping):
        raise ToolmemError(
            f"{place} is {written!r}: write {{key: model.model.dim, values: [...]}}, or each label "
            "with the keys that it sets"
        )
    if {"key", "values", *RANGES} & set(written):
        return _axis_of_key(place, name, written)
    if not written:
        raise ToolmemError(f"{place} is empty: give it at least one value")
    for one, keys in written.items():
        if not isinstance(keys, Mapping):
            raise ToolmemError(
                f"{place}.{one} is {keys!r}: give the dotted keys that it sets or a recipe's file that does, "
                "or write the axis as {key: ..., values: [...]}"
            )
    return Axis(name, {label(place, one): dict(keys) for one, keys in written.items()})


def _axis_of_key(place: str, name: str, written: Mapping[str, Any]) -> Axis:
    check_keys(place, written, ("key", "values", *RANGES))
    key = written.get("key")
    if not isinstance(key, str) or not key:
        raise ToolmemError(f"{place}.key is {key!r}: name the dotted key that varies")
    given = [one for one in ("values", *RANGES) if one in written]
    if len(given) > 1:
        raise ToolmemError(f"{place} has {' and '.join(given)}: keep one of them")
    if not given:
        return Axis(name, key=key)
    if given[0] in RANGES:
        return Axis(name, key=key, range=_range(f"{place}.{given[0]}", given[0], written[given[0]]))
    values = written["values"]
    if not isinstance(values, list) or not values:
        raise ToolmemError(f"{place}.values is {values!r}: give a list of values")
    labels = [label(place, value) for value in values]
    if len(set(labels)) < len(labels):
        raise ToolmemError(f"{place}.values names a value twice: {values}")
    return Axis(name, key=key).with_labels(labels)


def _range(place: str, kind: str, written: Any) -> Range:
    if not (isinstance(written, list) and len(written) == 2 and all(map(is_number, written))):
        raise ToolmemError(f"{place} is {written!r}: give its smallest and largest number")
    low, high = written
    if not low < high:
        raise ToolmemError(f"{place} is {written!r}: the first number must be the smaller")
    if kind == "log_uniform" and low <= 0:
        raise ToolmemError(f"{place} is {written!r}: numbers must be above 0")
    return Range(kind, low, high)


Combinations = tuple[tuple[Axis, ...], tuple[dict[str, Any], ...]]


def combine(axes: tuple[Axis, ...], listed: Any = None, drawn: Any = None) -> Combinations:
    """The axes with every label that comes up, and the combinations of labels.

    Args:
        axes: of the recipe, in their order.
        listed: the recipe's ``list``; None for none. Axes that none of them names are crossed with it.
        drawn: its ``random``; None for none.

    Raises:
        ToolmemError: naming the key.
    """
    if listed is not None and drawn is not None:
        raise ToolmemError("list and random are both there: keep one of them")
    if listed is not None:
        return _listed(axes, listed)
    if drawn is not None:
        return _drawn(axes, drawn)
    for axis in axes:
        if axis.range is not None:
            raise ToolmemError(
                f"axes.{axis.name}.{axis.range.kind} is a range: say how many are drawn of it by "
                "random: {n: 20}, or list its values"
            )
        _needs_values(axis)
    names = [axis.name for axis in axes]
    products = itertools.product(*(axis.values for axis in axes))
    return axes, tuple(dict(zip(names, labels, strict=True)) for labels in products)


def _needs_values(axis: Axis) -> None:
    if not axis.values and axis.range is None:
        raise ToolmemError(f"axes.{axis.name}.values is None: give a list of values")


def _listed(axes: tuple[Axis, ...], written: Any) -> Combinations:
    names = [axis.name for axis in axes]
    if not isinstance(written, list) or not written:
        raise ToolmemError(
            f"list is {written!r}: give each combination that is trained, as {{{names[0]}: ...}}"
        )
    found: list[dict[str, Any]] = []
    named = {name for one in written if isinstance(one, Mapping) for name in one}
    crossed = [axis for axis in axes if axis.name not in named and axis.values]
    rows = [
        (f"list[{index}]", {**one, **dict(zip((a.name for a in crossed), rest, strict=True))})
        if isinstance(one, Mapping)
        else (f"list[{index}]", one)
        for rest in itertools.product(*(axis.values for axis in crossed))
        for index, one in enumerate(written)
    ]
    for place, one in rows:
        check_keys(place, one, names)
        if missing := [name for name in names if name not in one]:
            raise ToolmemError(f"{place}: it says nothing of {missing[0]}: each names every axis")
        for axis in axes:
            if axis.range is not None:
                raise ToolmemError(f"axes.{axis.name}.{axis.range.kind}: with a list, leave it out")
            if axis.values and one[axis.name] not in axis.values:
                raise ToolmemError(
                    f"{place}.{axis.name} is {one[axis.name]!r}: choose from "
                    f"{', '.join(map(str, axis.values))}"
                )
        combination = {name: label(place, one[name]) for name in names}
        if combination in found:
            raise ToolmemError(f"{place} is there twice: {combination}")
        found.append(combination)
    return _labelled(axes, found), tuple(found)


def _drawn(axes: tuple[Axis, ...], written: Any) -> Combinations:
    check_keys("random", written, ("n", "seed"))
    n, seed = written.get("n"), written.get("seed", 0)
    if not is_whole(n, 1):
        raise ToolmemError(f"random.n is {n!r}: give how many combinations are drawn, at least 1")
    if not is_whole(seed, 0):
        raise ToolmemError(f"random.seed is {seed!r}: give a whole number, 0 or more")
    found: list[dict[str, Any]] = []
    for axis in axes:
        _needs_values(axis)
    for index in range(n):
        combination = {}
        for axis in axes:
            # Of its own for each number: a larger n, or another axis, changes none of the others.
            source = random.Random(f"{seed}/{axis.name}/{index}")
            if axis.range is not None:
                combination[axis.name] = axis.range.draw(source)
            else:
                combination[axis.name] = source.choice(list(axis.values))
        if combination not in found:
            found.append(combination)
    return _labelled(axes, found), tuple(found)


def _labelled(
    axes: tuple[Axis, ...], combinations: Sequence[Mapping[str, Any]]
) -> tuple[Axis, ...]:
    """The axes, those without listed values with the labels that come up, in order."""
    found = []
    for axis in axes:
        if not axis.values:
            labels = [one[axis.name] for one in combinations]
            if all(map(is_number, labels)):
                labels.sort()
            axis = axis.with_labels(labels)
        found.append(axis)
    return tuple(found)
