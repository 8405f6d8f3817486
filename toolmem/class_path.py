"""Classes named in a recipe by their import path, made with options from the recipe."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from toolmem.errors import ToolmemError


def import_class(path: str, key: str) -> Any:
    """The class that an import path names.

    Args:
        path: ``package.module.Class``.
        key: where the recipe names it, for messages.

    Raises:
        ToolmemError: when there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ToolmemError(f"{key}: cannot import {path!r} ({error})") from error


def construct(path: str, options: Mapping[str, Any], given: Mapping[str, Any], key: str) -> Any:
    """Make an object of a class named by its import path.

    Args:
        path: ``package.module.Class``.
        options: what the recipe says.
        given: what the caller decides, as far as the class takes it and the recipe says nothing.
        key: where the recipe says it, for messages.

    Raises:
        ToolmemError: for a class that is not there, options that it does not take, or one that it
            needs and nobody gave.
    """
    kind = import_class(path, key)
    name = path.rpartition(".")[2]
    taken = inspect.signature(kind).parameters
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
    return kind(**arguments)
