"""The two rich consoles: results go to stdout, progress and messages to stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

T = TypeVar("T")

ROLE_STYLES = {"user": "bold cyan", "assistant": "bold green", "database": "bold magenta"}


@cache
def stdout() -> Console:
    """The console that results are printed to."""
    from rich.console import Console

    return Console()


@cache
def stderr() -> Console:
    """The console that progress and messages are printed to."""
    from rich.console import Console

    return Console(stderr=True)


def progress() -> Progress:
    """A progress display with a bar, a count, time gone and time left, on stderr."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr(),
        transient=not stderr().is_terminal,
    )


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items`` under a progress bar."""
    with progress() as bar:
        yield from bar.track(items, total=total, description=description)


def dialogue_text(turns: Iterable[tuple[str, str]]) -> Text:
    """A dialogue as coloured text, one line a turn.

    Args:
        turns: (role, text) pairs.
    """
    from rich.text import Text

    result = Text()
    for index, (role, text) in enumerate(turns):
        if index:
            result.append("\n")
        result.append(f"{role:>9}: ", style=ROLE_STYLES.get(role, "bold"))
        result.append(text)
    return result
