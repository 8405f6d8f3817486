"""Recipes as plain data: read from YAML, and changed by dotted keys as ``toolmem fit`` would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from toolmem.errors import ToolmemError

MAX_CHARS = 4 << 20
MAX_VALUES = 200_000
MAX_DEPTH = 64
OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")


def read_mapping(path: str | Path, source: str | None = None) -> dict[str, Any]:
    """A YAML file that holds a mapping; numbers as jsonargparse reads them (1e-3 is one).

    Args:
        path: the file.
        source: how messages call it; the path when None.

    Raises:
        ToolmemError: for a file that is missing, is not YAML, or holds no mapping.
    """
    source = str(path) if source is None else source
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ToolmemError(f"{source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ToolmemError(f"{source}: this is not a text file") from error
    except ValueError as error:  # a NUL in the path
        raise ToolmemError(f"{source!r}: this is no path ({error})") from error
    found = parse_yaml(text, source)
    if not isinstance(found, dict):
        raise ToolmemError(f"{source}: this is no mapping of keys (model, data, ...)")
    return found


def parse_yaml(text: str, source: str) -> Any:
    """YAML as jsonargparse reads it.

    Args:
        text: the YAML.
        source: where it is from, for messages.

    Raises:
        ToolmemError: when it is not YAML, naming the line.
    """
    from yaml import YAMLError

    try:
        return load_yaml(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or error
        raise ToolmemError(f"{source}: this is not YAML ({where}{problem})") from error


@cache
def _plain_loader() -> Callable[[str], Any]:
    from jsonargparse import get_loader

    loader: Callable[[str], Any] = get_loader("yaml")
    return loader


def load_yaml(text: str) -> Any:
    """YAML as jsonargparse reads it, of bounded size once its aliases are written out.

    Raises:
        yaml.YAMLError: when it is not YAML, or too large.
    """
    from yaml import YAMLError

    if len(text) > MAX_CHARS:
        raise YAMLError(f"{len(text):,} characters, at most {MAX_CHARS:,}")
    try:
        found = _plain_loader()(text)
    except YAMLError:
        raise
    except Exception as error:  # its constructors stumble by every kind of error
        raise YAMLError(f"{type(error).__name__}: {error}") from error
    left = MAX_VALUES
    waiting = [(found, 0)]
    while waiting:
        value, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise YAMLError(
                f"more than {MAX_VALUES:,} values or {MAX_DEPTH} levels, aliases written out"
            )
        if isinstance(value, Mapping):
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(inner, depth + 1) for inner in value]
    return found


def use_bounded_yaml() -> None:
    """Have jsonargparse read YAML by `load_yaml` in this process."""
    from jsonargparse import set_loader
    from yaml import YAMLError

    _plain_loader()  # the one that is there
    set_loader("yaml", load_yaml, exceptions=(YAMLError,))


def set_key(recipe: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key; within a class (``class_path``), ``init_args`` may be left out.

    Args:
        recipe: changed in place.
        key: ``model.optimizer.lr`` is ``model.optimizer.init_args.lr``.
        value: what it becomes; a mapping replaces all that was there.

    Raises:
        ToolmemError: for a key that leads through something that holds no keys.
    """
    names = key.split(".")
    place: Any = recipe
    for depth, name in enumerate(names):
        if not isinstance(place, dict):
            raise ToolmemError(
                f"{key}: {'.'.join(names[:depth])} is {place!r} in the recipe, and holds no keys"
            )
        if "class_path" in place and name not in OF_A_CLASS:
            if place.get("init_args") is None:
                place["init_args"] = {}
            place = place["init_args"]
        if depth == len(names) - 1:
            place[name] = value
        else:
            if place.get(name) is None:
                place[name] = {}
            place = place[name]


def get_key(recipe: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """What a dotted key holds; ``default`` where it is not given. ``init_args`` may be left out."""
    place: Any = recipe
    for name in key.split("."):
        if not isinstance(place, Mapping):
            return default
        if "class_path" in place and name not in OF_A_CLASS:
            place = place.get("init_args") or {}
        if name not in place:
            return default
        place = place[name]
    return place


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys; lists and empty mappings are values."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            found.update(flattened(inner, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = inner
    return found
