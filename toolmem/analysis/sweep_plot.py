"""The figure of a sweep: a metric along one axis, a line for each value of another, the best of the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from toolmem.analysis.pictures import (
    GREY,
    finite,
    is_share,
    label_x,
    legend_below,
    new_figure,
    places_of,
    plain_log,
    style,
    tidy,
)
from toolmem.analysis.published import Published, read_published
from toolmem.analysis.report import Panel
from toolmem.analysis.sources import Source, SweepSource
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from toolmem.analysis.page import Request
    from toolmem.sweeps.recipe import SweepRecipe
    from toolmem.sweeps.report_recipe import ReportRecipe

PANELS_IN_A_ROW = 3


@dataclass(frozen=True)
class Point:
    """The runs of one setting, over their seeds.

    Args:
        line: label on the line's axis; None where there is one line.
        x: label along.
        best: labels on the axes of which this is the best, or one of all.
        values: the metric of each seed.
        rows: the runs' rows.
        panel: label on the axis of pictures; None where there is one.
    """

    line: Any
    x: Any
    best: dict[str, Any]
    values: tuple[float, ...]
    rows: tuple[Mapping[str, Any], ...]
    panel: Any = None

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.values)

    def mean_of(self, column: str) -> float | None:
        """The mean of another column over seeds; None where it was not measured."""
        found = [row[column] for row in self.rows if row.get(column) is not None]
        return fmean(found) if found else None


def applies(source: Source) -> bool:
    """To sweeps without a search, unless the recipe names another kind."""
    return (
        isinstance(source, SweepSource)
        and source.recipe.search is None
        and source.report.kind in (None, "sweep")
    )


def panels(source: Source, request: Request) -> list[Panel]:
    """The figure of a sweep.

    Raises:
        ToolmemError: for what is no sweep, or has no run with the metric.
    """
    if not isinstance(source, SweepSource) or source.recipe.search is not None:
        raise ToolmemError(f"{source.path} is no sweep without a search: name another kind")
    recipe, report = source.recipe, source.report
    points = all_points(source.done, report)
    best = best_points(points, report)
    theirs = [] if request.published is None else published_of(request.published, best, recipe)
    varied = [name for name in report.best_over if len(labels_of(recipe, name)) > 1]
    over = f", the best over {' and '.join(varied)}" if varied else ""
    seeds = (
        " Means over seeds; shades from the smallest to the largest." if _several(points) else ""
    )
    beside = " Hollow: published." if theirs else ""
    return [
        Panel(
            recipe.name,
            f"{report.metric} by {report.x_column or report.x}{over}.{seeds}{beside}",
            draw(points, recipe, theirs),
            table_of(points, recipe, theirs),
            source.records(),
            made=source.made(source.done),
        )
    ]


def _several(points: Sequence[Point]) -> bool:
    return any(len(point.values) > 1 for point in points)


def published_of(path: str, best: Sequence[Point], sweep: SweepRecipe) -> list[Published]:
    """Published results beside points.

    Args:
        path: the CSV.
        best: the points that are drawn.
        sweep: whose report names its columns.
    """
    report = sweep.report
    assert report is not None
    xs = labels_of(sweep, report.x)
    if report.x_column is not None:
        xs = [x for p in best if (x := p.mean_of(report.x_column)) is not None]
        xs = [min(xs) / 2, max(xs) * 2]
    return read_published(path, sweep, xs=xs, metric=report.metric)


def all_points(rows: Sequence[Mapping[str, Any]], report: ReportRecipe) -> list[Point]:
    """One point for each setting: its done runs, over seeds.

    Args:
        rows: of results.
        report: which axes are drawn.

    Raises:
        ToolmemError: when no run has the metric.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "done" and finite(row.get(report.metric)):
            settings = row["settings"]
            line, panel = (
                None if axis is None else settings[axis] for axis in (report.line, report.panel)
            )
            key = (panel, line, settings[report.x], *(settings[name] for name in report.best_over))
            groups.setdefault(key, []).append(row)
    if not groups:
        raise ToolmemError(
            f"report.metric: no run that is done has {report.metric}: nothing to draw"
        )
    return [
        Point(
            line,
            x,
            dict(zip(report.best_over, best, strict=True)),
            tuple(row[report.metric] for row in found),
            tuple(found),
            panel,
        )
        for (panel, line, x, *best), found in groups.items()
    ]


def best_points(points: Iterable[Point], report: ReportRecipe) -> list[Point]:
    """Of the points of each line at each x, the one whose mean over seeds is best.

    Args:
        points: as `all_points` finds them.
        report: says whether large is good.
    """
    sign = 1 if report.mode == "max" else -1
    best: dict[tuple[Any, ...], Point] = {}
    for point in points:
        place = (point.panel, point.line, point.x)
        if place not in best or sign * point.mean > sign * best[place].mean:
            best[place] = point
    return list(best.values())


def labels_of(sweep: SweepRecipe, axis: str | None) -> list[Any]:
    """The labels of an axis in the order of the recipe; None alone for no axis."""
    if axis is None:
        return [None]
    return next(list(one.values) for one in sweep.axes if one.name == axis)


def draw(
    points: Sequence[Point], sweep: SweepRecipe, published: Sequence[Published] = ()
) -> Figure:
    """The best of each line along x, a picture for each value of the axis ``panel``.

    Beneath one picture alone stands a small one for each x, along the first of ``best_over``.

    Args:
        points: as `all_points` finds them.
        sweep: whose report it is.
        published: results to draw beside.
    """
    report = sweep.report
    assert report is not None
    pictures = labels_of(sweep, report.panel)
    varied = bool(report.best_over) and len(labels_of(sweep, report.best_over[0])) > 1
    small = labels_of(sweep, report.x) if varied and len(pictures) == 1 else []
    columns = max(1, min(len(small), PANELS_IN_A_ROW))
    n_rows = math.ceil(len(small) / columns)
    heights = [3.1] * len(pictures) + [1.75] * n_rows
    figure = new_figure(sum(heights) + 0.4)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    best = best_points(points, report)
    mains: list[Axes] = []
    for index, label in enumerate(pictures):
        axes = figure.add_subplot(grid[index, :], sharex=mains[0] if mains else None)
        mains.append(axes)
        _draw_lines(axes, [p for p in best if p.panel == label], sweep, report.x)
        _draw_published(axes, published, sweep)
        if report.panel is not None:
            axes.set_title(f"{report.panel}: {label}", loc="left", fontsize=9)
    mains[-1].set_xlabel(report.x_column or report.x)
    fullest = max(mains, key=lambda axes: len(axes.get_legend_handles_labels()[1]))
    legend_below(figure, fullest, report.line)
    first = None
    for index, x in enumerate(small):
        place = grid[len(pictures) + index // columns, index % columns]
        axes = figure.add_subplot(place, sharey=first)
        first = first or axes
        here = best_points_along([p for p in points if p.x == x], report)
        _draw_lines(axes, here, sweep, report.best_over[0], small=True)
        axes.set_title(f"{report.x} {x}", fontsize=8)
        axes.set_xlabel(report.best_over[0], fontsize=8)
        if index % columns == 0:
            axes.set_ylabel(report.metric, fontsize=7)
        else:
            axes.tick_params(labelleft=False)
    return figure


def best_points_along(points: Sequence[Point], report: ReportRecipe) -> list[Point]:
    """The best of each line at each value of the first axis of ``best_over``, which becomes their x."""
    along = report.best_over[0]
    moved = [Point(p.line, p.best[along], p.best, p.values, p.rows, p.panel) for p in points]
    return best_points(moved, report)


def _draw_lines(
    axes: Axes, points: Sequence[Point], sweep: SweepRecipe, along: str, small: bool = False
) -> None:
    report = sweep.report
    assert report is not None
    column = report.x_column if along == report.x else None
    order = labels_of(sweep, along)
    places, _ = places_of(order)
    drawn: list[float] = []
    for index, line in enumerate(labels_of(sweep, report.line)):
        placed = [
            (places[p.x] if column is None else p.mean_of(column), p)
            for p in points
            if p.line == line
        ]
        found = sorted(((x, p) for x, p in placed if x is not None), key=lambda pair: pair[0])
        if not found:
            continue
        xs, ys = [x for x, _ in found], [p.mean for _, p in found]
        drawn += xs
        look = style(index)
        axes.plot(
            xs, ys, **look, markersize=3 if small else 5, linewidth=1.1 if small else 1.8,
            label=None if line is None else str(line), clip_on=False, zorder=3,
        )  # fmt: skip
        if not small and any(len(p.values) > 1 for _, p in found):
            low, high = [min(p.values) for _, p in found], [max(p.values) for _, p in found]
            axes.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)
    tidy(axes, 7 if small else 9)
    if column is None:
        label_x(axes, order, None if small else report.log_x, 7 if small else 9, 45 if small else 0)
    elif drawn and report.log_x is not False and min(drawn) > 0:
        plain_log(axes.xaxis)
    if not small:
        axes.set_ylabel(report.metric)
    if is_share(report.metric):
        axes.set_ylim(0, 1)


def _draw_published(axes: Axes, published: Sequence[Published], sweep: SweepRecipe) -> None:
    """Hollow markers, in the colour of the line of the same label, joined where there is one at each x."""
    report = sweep.report
    assert report is not None
    places, _ = places_of(labels_of(sweep, report.x))
    lines = labels_of(sweep, report.line)
    for index, line in enumerate(dict.fromkeys(one.line for one in published)):
        own = line in lines
        look = style(lines.index(line)) if own else {**style(index), "color": GREY}
        found = sorted(
            ((places.get(p.x, p.x), p.value) for p in published if p.line == line),
            key=lambda pair: pair[0],
        )
        single = len({x for x, _ in found}) == len(found)
        label = "published" if line is None else f"{line} published"
        axes.plot(
            [x for x, _ in found], [y for _, y in found], **look, markersize=4.5,
            markerfacecolor="white", alpha=0.6 if own else 0.85, linewidth=1.0,
            linestyle="--" if single else "none",
            label=label, zorder=2,
        )  # fmt: skip


HEADS = ("params", "tokens", "FLOPs", "seconds", "seeds")


def table_of(
    points: Sequence[Point], sweep: SweepRecipe, published: Sequence[Published] = ()
) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the best points, in the recipe's order.

    Args:
        points: as `all_points` finds them.
        sweep: whose report it is.
        published: results that stand beside those of the same labels.
    """
    report = sweep.report
    assert report is not None
    best = {(p.panel, p.line, p.x): p for p in best_points(points, report)}
    known: dict[tuple[Any, Any], list[float]] = {}
    for one in published if report.x_column is None else ():
        known.setdefault((one.line, one.x), []).append(one.value)
    heads = [name for name in (report.panel, report.line, report.x) if name is not None]
    heads += [report.metric, *(f"best {name}" for name in report.best_over), *HEADS]
    heads += ["published"] if known else []
    rows = []
    for panel in labels_of(sweep, report.panel):
        for line in labels_of(sweep, report.line):
            for x in labels_of(sweep, report.x):
                if (panel, line, x) not in best:
                    continue
                point = best[panel, line, x]
                cells = [str(panel)] if report.panel is not None else []
                cells += [str(line)] if report.line is not None else []
                cells += [str(x), number_with_spread(point.values)]
                cells += [str(point.best[name]) for name in report.best_over]
                cells += [count(point.mean_of("params_total")), count(point.mean_of("tokens"))]
                flops = point.mean_of("flops")
                cells += ["" if flops is None else f"{flops:.2e}", count(point.mean_of("seconds"))]
                cells += [str(len(point.values))]
                if known:
                    cells.append(_range(known.get((line, x), [])))
                rows.append(cells)
    return heads, rows


def number_with_spread(values: Sequence[float]) -> str:
    """The mean over seeds, and the smallest and largest where there are several."""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def count(value: float | None) -> str:
    """A number as a table shows it; nothing for None."""
    return "" if value is None else f"{value:,.0f}"
