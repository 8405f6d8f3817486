"""Lazy attributes for packages (PEP 562), so that importing a room costs nothing until it is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def attach(
    package: str, attributes: dict[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` that import each attribute on first use.

    Args:
        package: the package's ``__name__``.
        attributes: public name -> module that defines it.
    """

    def __getattr__(name: str) -> Any:
        if name not in attributes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(attributes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *attributes})

    return __getattr__, __dir__, sorted(attributes)
