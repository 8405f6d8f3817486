"""Whether a checkpointed block is being run again, and what it keeps: for those who count."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

_depths = threading.local()  # the backward pass of a GPU has a thread of its own


def recomputing() -> bool:
    """Is a block being run again for its gradients, in this thread?"""
    return getattr(_depths, "depth", 0) > 0


def deepen(by: int) -> None:
    """Note that such a run begins (1), or ends (-1)."""
    _depths.depth = getattr(_depths, "depth", 0) + by


# Gets what selective checkpointing keeps, which no hook on saved tensors sees.
told: ContextVar[Callable[[Any], object] | None] = ContextVar("told", default=None)


def tell_kept(result: Any) -> None:
    """Say that an operation's result, a tensor or several, is kept."""
    tell = told.get()
    if tell is not None:
        for one in result if isinstance(result, tuple) else (result,):
            tell(one)
