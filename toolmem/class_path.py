"""Classes named in a file by their import path: which may be imported at all, and made with options.

Importing a module runs it. So what a recipe or a checkpoint names is taken only from packages that are
trusted: ``TRUSTED``, those of `allow_packages` (``--allow_packages`` on the command line), and, in a Python
program, from modules that the program has imported by itself, where nothing is left to run. It is looked at
before anything is imported, and what was imported must be a class of the kind that is wanted before it is
called.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from toolmem.errors import ToolmemError

TRUSTED = ("toolmem", "torch", "lightning", "pytorch_lightning")
OPTION = "--allow_packages"

_allowed: tuple[str, ...] = ()
_only_named = False  # on the command line what happens to be imported is not thereby trusted


def allow_packages(*packages: str) -> None:
    """Let recipes and checkpoints name classes of these packages, from here on in this process.

    Args:
        packages: their names, as in ``import NAME``.

    Raises:
        ToolmemError: for what is not the name of a package.
    """
    global _allowed
    _allowed = tuple(dict.fromkeys([*_allowed, *_names(packages)]))


@contextmanager
def only_packages(packages: Iterable[str]) -> Iterator[None]:
    """In here nothing is trusted but ``TRUSTED`` and these, whatever else is imported already.

    Args:
        packages: their names.

    Raises:
        ToolmemError: for what is not the name of a package.
    """
    global _allowed, _only_named
    before = _allowed, _only_named
    _allowed, _only_named = _names(packages), True
    try:
        yield
    finally:
        _allowed, _only_named = before


def allowed_packages() -> tuple[str, ...]:
    """The packages that the user allowed beside ``TRUSTED``."""
    return _allowed


def _names(packages: Iterable[str]) -> tuple[str, ...]:
    names = tuple(packages)
    for name in names:
        if not name.isidentifier() or name == "jsonargparse":
            raise ToolmemError(
                f"{OPTION}: {name!r} is not the name of a package that can be allowed: give the first "
                "part of what is imported, as my_models of my_models.large"
            )
    return names


def check_trusted(module: str, path: str, key: str) -> None:
    """Refuse a module that must not be imported because a file says so.

    Args:
        module: its import path.
        path: the whole import path that the file has, for messages.
        key: where the file has it, for messages.

    Raises:
        ToolmemError: when its package is not trusted.
    """
    package = module.partition(".")[0]
    if package in TRUSTED or package in _allowed or (not _only_named and module in sys.modules):
        return
    more = "" if _only_named else f" (in Python: import it, or toolmem.allow_packages({package!r}))"
    raise ToolmemError(f"{key}: {refusal(path)}{more}")


def refusal(path: str) -> str:
    """Why what a path names is not imported, and what to do about it."""
    package = path.partition(".")[0]
    return (
        f"{path} is not imported: a config or a checkpoint may name classes of toolmem, torch and "
        f"lightning. If you trust the package {package}, allow it: {OPTION} {package}"
    )


def path_of(kind: type) -> str:
    """The import path of a class, short where the class is exported by its package."""
    package = kind.__module__.rpartition(".")[0]
    if package and getattr(importlib.import_module(package), kind.__name__, None) is kind:
        return f"{package}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def import_class(path: str, key: str, kind: type = object) -> Any:
    """The class that an import path names.

    Args:
        path: ``package.module.Class``.
        key: where the file names it, for messages.
        kind: what it must be made from.

    Raises:
        ToolmemError: when its package is not trusted, or there is no such class.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ToolmemError(f"{key}: cannot import {path!r}: write package.module.Class")
    check_trusted(module, path, key)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ToolmemError(f"{key}: cannot import {path!r} ({error})") from error
    if not isinstance(found, type) or not issubclass(found, kind):
        raise ToolmemError(f"{key}: {path} is not a {_words(kind)}")
    check_trusted(found.__module__, path, key)  # it may be another's that the module has imported
    return found


def _words(kind: type) -> str:
    return "class" if kind is object else f"{path_of(kind)}, or made from it"


def construct(
    path: str,
    options: Mapping[str, Any],
    given: Mapping[str, Any],
    key: str,
    kind: type = object,
) -> Any:
    """Make an object of a class named by its import path.

    Args:
        path: ``package.module.Class``.
        options: what the recipe says.
        given: what the caller decides, as far as the class takes it and the recipe says nothing.
        key: where the recipe says it, for messages.
        kind: what the class must be made from.

    Raises:
        ToolmemError: for a class that is not there or not to be trusted, options that it does not take,
            or one that it needs and nobody gave.
    """
    found = import_class(path, key, kind)
    name = path.rpartition(".")[2]
    taken = inspect.signature(found).parameters
    unknown = [option for option in options if option not in taken]
    if unknown:
        others = [option for option in taken if option not in given]
        raise ToolmemError(
            f"{key}.{unknown[0]}: {name} takes no such option"
            + (f"; it takes {', '.join(others)}" if others else "")
        )
    arguments = {option: value for option, value in given.items() if option in taken} | {**options}
    for option, parameter in taken.items():
        several = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not several and option not in arguments:
            raise ToolmemError(f"{key}.{option} is missing: {name} needs it")
    return found(**arguments)
