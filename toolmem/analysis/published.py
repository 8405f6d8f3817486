"""Published results, drawn beside those of a sweep: a CSV of which the recipe names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.sweeps.recipe import SweepRecipe


@dataclass(frozen=True)
class Published:
    """One published result.

    Args:
        line: the sweep's own label where it has one, else as the file says; None where there is one line.
        x: as the sweep's own label, or a number.
        reach: the value that was reached; None where the file is not of searches.
        value: of the metric.
    """

    line: Any
    x: Any
    reach: float | None
    value: float


def read_published(
    path: str | Path,
    sweep: SweepRecipe,
    *,
    xs: Sequence[Any],
    metric: str,
    reach: str | None = None,
) -> list[Published]:
    """Published results of a CSV, of those labels that the sweep's axes have where they are columns too.

    Its columns are those that ``report.published`` names; else the sweep's axes, and as below. Of words along
    x only the sweep's own count, of numbers all that are not beyond its smallest and largest. Lines that
    ``report.published.line`` names may be others than the sweep's.

    Args:
        path: the file.
        sweep: whose axes, and whose report names the columns.
        xs: labels along, or the numbers that stand for them.
        metric: the column of values, where the recipe does not say another.
        reach: the column of values that were reached, where there is one.

    Raises:
        ToolmemError: for a file that cannot be read, has not these columns, or no number where one must be.
    """
    report = sweep.report
    assert report is not None
    rows = _rows(path)
    there = list(rows[0]) if rows else []
    named = {"x": report.x_column or report.x, "metric": metric}
    if report.line in there:
        named["line"] = str(report.line)
    if reach is not None:
        named["reach"] = reach
    given = {
        key: one for key, one in report.published.items() if reach is not None or key != "reach"
    }
    for key, name in (named | given).items():
        if name not in there:
            raise ToolmemError(
                f"{path}: it has no column {name}; it has {', '.join(there) or 'none'}; "
                f"report.published.{key} in the recipe names the right one"
            )
    named |= given
    labels = {axis.name: _by_text(axis.values) for axis in sweep.axes}
    apart = (named["x"], given.get("line"))
    same = [name for name in labels if name in there and name not in apart]
    own_xs = _by_text(xs)
    numbers = [x for x in xs if isinstance(x, int | float) and not isinstance(x, bool)]
    found = []
    for row in rows:
        if not row[named["metric"]] or any(_text(row[one]) not in labels[one] for one in same):
            continue
        x = own_xs.get(_text(row[named["x"]]))
        if x is None and len(numbers) == len(xs):
            x = _number(path, named["x"], row)
            if not min(numbers) <= x <= max(numbers):
                continue
        if x is None:
            continue
        line = None
        if "line" in named:
            line = row[named["line"]]
            line = labels.get(report.line or "", {}).get(_text(line), line)
        reached = _number(path, named["reach"], row) if "reach" in named else None
        found.append(Published(line, x, reached, _number(path, named["metric"], row)))
    return found


def _rows(path: str | Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise ToolmemError(
            f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}"
        ) from error


def _number(path: str | Path, column: str, row: Mapping[str, str]) -> float:
    try:
        return float(row[column])
    except (TypeError, ValueError) as error:
        raise ToolmemError(f"{path}: {column} is {row[column]!r}: it must be a number") from error


def _text(written: Any) -> str:
    """A label as it is compared: 0.0 is 0."""
    try:
        return f"{float(written):g}"
    except (TypeError, ValueError):
        return str(written)


def _by_text(labels: Iterable[Any]) -> dict[str, Any]:
    return {_text(label): label for label in labels}
