"""The picture of a sweep: a metric along one axis, a line for each value of another, the best of the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from toolmem.analysis.report import write_report
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from toolmem.sweeps.recipe import ReportRecipe, SweepRecipe

# Okabe and Ito's colours, told apart by colour-blind readers too, and a marker each.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7f7f7f", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PANELS_IN_A_ROW = 5


@dataclass(frozen=True)
class Point:
    """The runs of one setting, over their seeds.

    Args:
        line: label on the line's axis; None where there is one line.
        x: label along.
        best: labels on the axes of which this is the best, or one of all.
        values: the metric of each seed.
        rows: the runs' rows.
    """

    line: Any
    x: Any
    best: dict[str, Any]
    values: tuple[float, ...]
    rows: tuple[Mapping[str, Any], ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.values)

    def mean_of(self, column: str) -> float | None:
        """The mean of another column over seeds; None where it was not measured."""
        found = [row[column] for row in self.rows if row.get(column) is not None]
        return fmean(found) if found else None


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
        value = row.get(report.metric)
        if row["status"] == "done" and value is not None and not math.isnan(value):
            settings = row["settings"]
            line = settings[report.line] if report.line is not None else None
            key = (line, settings[report.x], *(settings[name] for name in report.best_over))
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
        )
        for (line, x, *best), found in groups.items()
    ]


def best_points(points: Sequence[Point], report: ReportRecipe) -> list[Point]:
    """Of the points of each line at each x, the one whose mean over seeds is best.

    Args:
        points: as `all_points` finds them.
        report: says whether large is good.
    """
    sign = 1 if report.mode == "max" else -1
    best: dict[tuple[Any, Any], Point] = {}
    for point in points:
        place = (point.line, point.x)
        if place not in best or sign * point.mean > sign * best[place].mean:
            best[place] = point
    return list(best.values())


def labels_of(sweep: SweepRecipe, axis: str | None) -> list[Any]:
    """The labels of an axis in the order of the recipe; None alone for no axis."""
    if axis is None:
        return [None]
    return next(list(one.values) for one in sweep.axes if one.name == axis)


def draw(points: Sequence[Point], sweep: SweepRecipe) -> Figure:
    """The best of each line along x; beneath, a small panel for each x along the first of ``best_over``.

    Args:
        points: as `all_points` finds them.
        sweep: whose report it is.
    """
    from matplotlib.figure import Figure

    report = sweep.report
    assert report is not None
    panels = labels_of(sweep, report.x) if report.best_over else []
    columns = max(1, min(len(panels), PANELS_IN_A_ROW))
    n_rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(7.6, 4.2 + 2.1 * n_rows), layout="constrained")
    grid = figure.add_gridspec(1 + n_rows, columns, height_ratios=[2.1, *([1.0] * n_rows)])
    main = figure.add_subplot(grid[0, :])
    _draw_lines(main, best_points(points, report), sweep, report.x)
    main.set_xlabel(report.x)
    over = f", best over {' and '.join(report.best_over)}" if report.best_over else ""
    main.set_title(report.title or f"{report.metric} by {report.x}{over}", loc="left", fontsize=11)
    if report.line is not None:
        main.legend(
            frameon=False,
            fontsize=9,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            title=report.line,
        )
    first = None
    for index, x in enumerate(panels):
        axes = figure.add_subplot(grid[1 + index // columns, index % columns], sharey=first)
        first = first or axes
        here = best_points_along([p for p in points if p.x == x], report)
        _draw_lines(axes, here, sweep, report.best_over[0], small=True)
        axes.set_title(f"{report.x} {x}", fontsize=8)
        axes.set_xlabel(report.best_over[0], fontsize=8)
        if index % columns == 0:
            axes.set_ylabel(report.metric, fontsize=8)
        else:
            axes.tick_params(labelleft=False)
    return figure


def best_points_along(points: Sequence[Point], report: ReportRecipe) -> list[Point]:
    """The best of each line at each value of the first axis of ``best_over``, which becomes their x."""
    along = report.best_over[0]
    moved = [Point(p.line, p.best[along], p.best, p.values, p.rows) for p in points]
    return best_points(moved, report)


def _draw_lines(
    axes: Axes, points: Sequence[Point], sweep: SweepRecipe, along: str, small: bool = False
) -> None:
    assert sweep.report is not None
    order = labels_of(sweep, along)
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in order)
    places = {x: x if numbers else index for index, x in enumerate(order)}
    for index, line in enumerate(labels_of(sweep, sweep.report.line)):
        found = sorted((p for p in points if p.line == line), key=lambda p: places[p.x])
        if not found:
            continue
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        xs, ys = [places[p.x] for p in found], [p.mean for p in found]
        axes.plot(
            xs, ys, color=colour, marker=marker, markersize=3 if small else 6,
            linewidth=1.1 if small else 1.8, label=None if line is None else str(line),
            clip_on=False, zorder=3,
        )  # fmt: skip
        if not small and any(len(p.values) > 1 for p in found):
            low, high = [min(p.values) for p in found], [max(p.values) for p in found]
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    _finish(axes, sweep.report, order if numbers else None, list(map(str, order)), small)


def _finish(
    axes: Axes, report: ReportRecipe, numbers: list[Any] | None, words: list[str], small: bool
) -> None:
    size = 7 if small else 9
    if numbers is None:
        axes.set_xticks(range(len(words)), words)
    else:
        wide = report.log_x if not small and report.log_x is not None else _spans_wide(numbers)
        if wide and min(numbers) > 0:
            axes.set_xscale("log")
        shown = [f"{x:g}" for x in numbers]
        axes.set_xticks(numbers, shown, rotation=45 if small else 0)
        axes.minorticks_off()
    axes.tick_params(labelsize=size)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    if not small:
        axes.set_ylabel(report.metric)
    if "accuracy" in report.metric or "exact_match" in report.metric:
        axes.set_ylim(0, 1)  # a fraction is seen against the whole


def _spans_wide(numbers: Sequence[float]) -> bool:
    return len(numbers) > 2 and min(numbers) > 0 and max(numbers) / min(numbers) >= 4


HEADS = ("params", "tokens", "FLOPs", "seconds", "seeds")


def table_of(points: Sequence[Point], sweep: SweepRecipe) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the best points, in the recipe's order.

    Args:
        points: as `all_points` finds them.
        sweep: whose report it is.
    """
    report = sweep.report
    assert report is not None
    best = {(p.line, p.x): p for p in best_points(points, report)}
    heads = [name for name in (report.line, report.x) if name is not None]
    heads += [report.metric, *(f"best {name}" for name in report.best_over), *HEADS]
    rows = []
    for line in labels_of(sweep, report.line):
        for x in labels_of(sweep, report.x):
            if (line, x) not in best:
                continue
            point = best[line, x]
            spread = f" ({min(point.values):.3f} to {max(point.values):.3f})"
            cells = [str(line)] if report.line is not None else []
            cells += [str(x), f"{point.mean:.3f}{spread if len(point.values) > 1 else ''}"]
            cells += [str(point.best[name]) for name in report.best_over]
            cells += [_count(point.mean_of("params_total")), _count(point.mean_of("tokens"))]
            flops, seconds = point.mean_of("flops"), point.mean_of("seconds")
            cells += ["" if flops is None else f"{flops:.2e}", _count(seconds)]
            rows.append([*cells, str(len(point.values))])
    return heads, rows


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def write_sweep_report(
    folder: str | Path,
    sweep: SweepRecipe,
    rows: Sequence[Mapping[str, Any]],
    command: str,
) -> tuple[list[str], list[list[str]]]:
    """Write ``report.html``, ``report.png`` and ``report.svg``; return the table.

    Args:
        folder: where to.
        sweep: whose report it is.
        rows: of results, of the sweep's runs.
        command: that makes them again.

    Raises:
        ToolmemError: when no run has the report's metric.
    """
    report = sweep.report
    assert report is not None
    points = all_points(rows, report)
    figure = draw(points, sweep)
    save_pictures(figure, folder)
    heads, cells = table_of(points, sweep)
    done = [row for row in rows if row["status"] == "done"]
    seconds = sum(row["seconds"] or 0 for row in done)
    failed = len(rows) - len(done)
    over = f" The best over {' and '.join(report.best_over)} is shown," if report.best_over else ""
    write_report(
        Path(folder) / "report.html",
        title=report.title or f"Sweep {sweep.name}",
        lead=f"{report.metric} of {len(done)} runs."
        + (f"{over} by the mean over seeds." if over else "")
        + (f" {failed} runs failed; results.duckdb says why." if failed else ""),
        table=(heads, cells),
        figures=[(f"{report.metric} by {report.x}", figure)],
        circumstances=[
            ("command", command),
            ("seeds", ", ".join(map(str, sweep.seeds))),
            ("seconds of training, all runs", f"{seconds:,.0f}"),
            ("threads a run", distinct(done, "threads")),
            ("toolmem", distinct(done, "toolmem_version")),
            ("commit", distinct(done, "git_commit")),
        ],
    )
    return heads, cells


def save_pictures(figure: Figure, folder: str | Path) -> None:
    """Write ``report.png`` and ``report.svg``."""
    for kind in ("png", "svg"):
        with atomic_path(Path(folder) / f"report.{kind}") as temporary:
            figure.savefig(temporary, format=kind, dpi=160, bbox_inches="tight")


def distinct(rows: Sequence[Mapping[str, Any]], column: str) -> str:
    """The different values of a column."""
    found = dict.fromkeys(str(row[column]) for row in rows if row.get(column) is not None)
    return ", ".join(found) or "unknown"
