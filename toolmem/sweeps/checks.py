"""What a sweep's YAML may hold, checked value by value; messages name the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolmem.errors import ToolmemError


def check_keys(place: str, written: Any, known: Sequence[str]) -> None:
    """Refuse what is no mapping, and keys that are not known.

    Args:
        place: where it is, dotted; empty for the whole recipe.
        written: what is there.
        known: keys that may be.

    Raises:
        ToolmemError: naming the key.
    """
    if not isinstance(written, Mapping):
        raise ToolmemError(f"{place} is {written!r}: give it as keys ({', '.join(known)})")
    for key in written:
        if key not in known:
            where = f"{place}.{key}" if place else f"{key}"
            raise ToolmemError(f"{where}: a sweep has no such key; choose from {', '.join(known)}")


def label(place: str, value: Any) -> Any:
    """How a value is called: numbers, words and truth values as they are.

    Raises:
        ToolmemError: for a list or a mapping, which needs a name.
    """
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    raise ToolmemError(f"{place}: {value!r} needs a label: write it as label: {{key: value}}")


def strings(written: Any, key: str) -> tuple[str, ...]:
    """A list of words.

    Raises:
        ToolmemError: for anything else.
    """
    if isinstance(written, list) and all(isinstance(name, str) for name in written):
        return tuple(written)
    raise ToolmemError(f"{key} is {written!r}: give a list of names")


def boolean(written: Any, key: str) -> bool:
    """True or false.

    Raises:
        ToolmemError: for anything else.
    """
    if isinstance(written, bool):
        return written
    raise ToolmemError(f"{key} is {written!r}: it is true or false")


def is_number(written: Any) -> bool:
    """Is it a number, and no truth value?"""
    return isinstance(written, int | float) and not isinstance(written, bool)


def is_whole(written: Any, least: int) -> bool:
    """Is it a whole number of at least so much, and no truth value?"""
    return isinstance(written, int) and not isinstance(written, bool) and written >= least


def one_of(written: Any, key: str, choices: Sequence[Any]) -> Any:
    """One of a few.

    Raises:
        ToolmemError: for anything else.
    """
    if written in choices:
        return written
    raise ToolmemError(f"{key} is {written!r}: choose from {', '.join(map(str, choices))}")
