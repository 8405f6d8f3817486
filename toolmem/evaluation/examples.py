"""An evaluation example by example: in parts, written down as they come, gone on with where it was killed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from toolmem.evaluation.measures import Measure

if TYPE_CHECKING:
    from toolmem.evaluation.answers import Answers


class Examples(Protocol):
    """What an evaluation asks: examples in the order in which it asks them.

    Args:
        measures: the numbers that come of it.
    """

    @property
    def measures(self) -> Sequence[Measure]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Of all that is asked, to know it again."""
        ...

    def ask(self, start: int, stop: int) -> Iterable[dict[str, Any]]:
        """Ask some of them; plain data of each, in order, as it comes."""
        ...


def ask_in_parts(
    examples: Examples,
    *,
    part: int,
    answers: Answers | None = None,
    invariant: bool = False,
    advance: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Ask all examples, part after part; what a file of answers holds already is not asked again.

    A part that was not brought to its end is asked again as a whole, so that each example has the company
    that it would have had, and the same numbers to the last bit; where they do not hang on company
    (``invariant``), only what is missing.

    Args:
        examples: what is asked.
        part: examples asked at once.
        answers: where to write each down as it comes.
        invariant: numbers hang on nothing beside an example.
        advance: is told of how many more examples there are numbers.

    Returns:
        a row an example, in the order asked.
    """
    rows: list[dict[str, Any]] = [] if answers is None else answers.rows[: len(examples)]
    done = len(rows)
    if not invariant and done < len(examples):
        done = done // part * part
    del rows[done:]
    if answers is not None:
        answers.keep(done)
    if advance is not None and done:
        advance(done)
    while len(rows) < len(examples):
        start = len(rows)
        for row in examples.ask(start, min(len(examples), (start // part + 1) * part)):
            if answers is not None:
                answers.add(row)
            rows.append(row)
            if advance is not None:
                advance(1)
    return rows
