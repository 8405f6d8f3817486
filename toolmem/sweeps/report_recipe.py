"""What a sweep's plot shows: the key ``report`` of its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.sweeps.checks import boolean, check_keys, one_of, strings

MODES = ("min", "max")
PARAMETERS = ("params_total", "params_non_embedding", "params_untied")
PUBLISHED = ("metric", "x", "line", "reach")


@dataclass(frozen=True)
class ReportRecipe:
    """What the sweep's plot shows.

    Args:
        metric: what is drawn upwards.
        x: the axis that is drawn along.
        line: the axis of which each value is a line; None draws one.
        mode: is a larger (``max``) or a smaller metric better?
        best_over: axes of which each point shows the best value alone.
        title: of the page.
        log_x: draw ``x`` on a log scale; decided by its values when None.
        panel: the axis of which each value has a picture of its own; None draws one.
        x_column: the count of parameters that is drawn along in place of the labels of ``x``.
        kind: of figure (a file ``NAME_plot.py`` of ``toolmem.analysis``); by what the sweep is when None.
        published: columns of a CSV of published results, for ``toolmem plot --published``: that of
            ``metric``, ``x``, ``line`` and ``reach``.
    """

    metric: str
    x: str
    line: str | None = None
    mode: str = "max"
    best_over: tuple[str, ...] = ()
    title: str | None = None
    log_x: bool | None = None
    panel: str | None = None
    x_column: str | None = None
    kind: str | None = None
    published: dict[str, str] = field(default_factory=dict)


def parse_report(
    written: Any,
    axes: Sequence[str],
    metrics: Sequence[str],
    searching: bool,
    alike: Sequence[str] = (),
) -> ReportRecipe:
    """Check the report of a recipe.

    Args:
        written: what is there.
        axes: their names.
        metrics: that may be drawn.
        searching: is the sweep a search?
        alike: axes of one value, which need no place in the plot.

    Raises:
        ToolmemError: for what it cannot be, naming the key.
    """
    check_keys("report", written, tuple(ReportRecipe.__dataclass_fields__))
    metric, x, line, panel = (written.get(key) for key in ("metric", "x", "line", "panel"))
    if searching:
        metric = metric or metrics[0]
    if metric not in metrics:
        raise ToolmemError(
            f"report.metric is {metric!r}: choose from "
            + (", ".join(metrics) if searching else f"metrics ({', '.join(metrics)})")
        )
    best_over = strings(written.get("best_over", []), "report.best_over")
    named = [
        ("x", x),
        ("line", line),
        ("panel", panel),
        *(("best_over", name) for name in best_over),
    ]
    for key, name in named:
        if name not in axes and not (key in ("line", "panel") and name is None):
            raise ToolmemError(f"report.{key} is {name!r}: choose from axes ({', '.join(axes)})")
    drawn = [name for _, name in named if name is not None]
    if len(set(drawn)) < len(drawn):
        raise ToolmemError("report: x, line, panel and best_over must name different axes")
    if rest := [name for name in axes if name not in (*drawn, *alike)]:
        raise ToolmemError(
            f"report: the axis {rest[0]} is neither x nor line nor panel nor in best_over: points of its "
            "values would fall together"
        )
    mode = one_of(written.get("mode", "min" if searching else "max"), "report.mode", MODES)
    log_x = written.get("log_x")
    if log_x is not None:
        boolean(log_x, "report.log_x")
    x_column = written.get("x_column")
    if x_column is not None:
        one_of(x_column, "report.x_column", PARAMETERS)
    kind = written.get("kind")
    if not (kind is None or isinstance(kind, str)):
        raise ToolmemError(f"report.kind is {kind!r}: name a kind of figure, such as allocation")
    if searching and (which := next((k for k in ("panel", "x_column") if written.get(k)), None)):
        raise ToolmemError(f"report.{which}: the plot of a search has none, leave it out")
    return ReportRecipe(
        metric, x, line, mode, best_over, written.get("title"), log_x, panel, x_column, kind,
        _published(written.get("published", {})),
    )  # fmt: skip


def _published(written: Any) -> dict[str, str]:
    check_keys("report.published", written, PUBLISHED)
    for key, column in written.items():
        if not isinstance(column, str) or not column:
            raise ToolmemError(f"report.published.{key} is {column!r}: name a column of the CSV")
    return dict(written)


def default_report(
    axes: Mapping[str, Sequence[Any]], metrics: Sequence[str], searching: bool
) -> ReportRecipe:
    """The report of a recipe that says none: along the first axis of numbers, lines of the next one's values.

    Args:
        axes: labels by axis.
        metrics: that may be drawn; the first is.
        searching: is the sweep a search?

    Raises:
        ToolmemError: when there is no axis.
    """
    if not axes:
        raise ToolmemError("axes: there is none to draw along")
    numbers = [
        name
        for name, labels in axes.items()
        if all(isinstance(one, int | float) and not isinstance(one, bool) for one in labels)
    ]
    x = (numbers or list(axes))[0]
    others = [name for name in axes if name != x]
    mode = "min" if searching or "loss" in metrics[0] else "max"
    return ReportRecipe(metrics[0], x, others[0] if others else None, mode, tuple(others[1:]))
