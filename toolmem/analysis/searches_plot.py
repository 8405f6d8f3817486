"""The figure of a sweep's searches: the smallest model that reaches each value, along one axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from toolmem.analysis.pictures import (
    STYLES,
    label_x,
    legend_below,
    new_figure,
    places_of,
    plain_log_y,
    style,
    tidy,
)
from toolmem.analysis.published import Published, read_published
from toolmem.analysis.report import Panel, Table
from toolmem.analysis.sources import Source, SweepSource
from toolmem.analysis.sweep_plot import labels_of
from toolmem.data.people import ATTRIBUTES
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from toolmem.analysis.page import Request
    from toolmem.sweeps.recipe import SweepRecipe

AXIS_LABELS = {
    "params_total": "parameters",
    "params_non_embedding": "parameters without tables",
    "params_untied": "parameters, were no table tied",
}


@dataclass(frozen=True)
class Smallest:
    """The smallest models of one setting, over seeds.

    Args:
        line: label on the line's axis; None where there is one line.
        x: label along.
        reach: the value that they reach.
        sizes: of each seed that found one.
        n: seeds that have searched.
        rows: the searches.
    """

    line: Any
    x: Any
    reach: float
    sizes: tuple[int, ...]
    n: int
    rows: tuple[Mapping[str, Any], ...]

    @property
    def mean(self) -> float:
        """Over the seeds that found one; not a number for none."""
        return fmean(self.sizes) if self.sizes else math.nan

    @property
    def deviation(self) -> float:
        """The sample's standard deviation; 0 for one seed."""
        return stdev(self.sizes) if len(self.sizes) > 1 else 0.0


def smallest(searches: Sequence[Mapping[str, Any]], sweep: SweepRecipe) -> list[Smallest]:
    """One point for each line, x and value, in the recipe's order; of axes in ``best_over`` the best.

    Args:
        searches: rows of the table of this name.
        sweep: whose report it is.

    Raises:
        ToolmemError: when no search is over.
    """
    report, search = sweep.report, sweep.search
    assert report is not None and search is not None
    found = []
    for line in labels_of(sweep, report.line):
        for x in labels_of(sweep, report.x):
            for reach in search.reach:
                here = [
                    row
                    for row in searches
                    if row["status"] != "open"
                    and row["reach"] == reach
                    and row["settings"][report.x] == x
                    and (report.line is None or row["settings"][report.line] == line)
                ]
                by_rest: dict[str, list[Mapping[str, Any]]] = {}
                for row in here:
                    rest = repr([row["settings"][name] for name in report.best_over])
                    by_rest.setdefault(rest, []).append(row)
                points = [
                    Smallest(
                        line, x, reach,
                        tuple(
                            row[report.metric]
                            for row in rows
                            if row["status"] == "found" and row.get(report.metric) is not None
                        ),
                        len(rows), tuple(rows),
                    )
                    for rows in by_rest.values()
                ]  # fmt: skip
                if points:
                    found.append(min(points, key=lambda p: (-len(p.sizes), p.mean)))
    if not found:
        raise ToolmemError("report: no search is over yet: nothing to draw")
    return found


def published_of(path: str, sweep: SweepRecipe) -> list[Published]:
    """Published means of the values that are searched for.

    Args:
        path: the CSV: a column for x, one for the line, recall_threshold, mean_min_params, where
            ``report.published`` names no others.
        sweep: whose report it is.
    """
    report, search = sweep.report, sweep.search
    assert report is not None and search is not None
    found = read_published(
        path,
        sweep,
        xs=labels_of(sweep, report.x),
        metric="mean_min_params",
        reach="recall_threshold",
    )
    return [one for one in found if one.reach in search.reach]


def draw(points: Sequence[Smallest], published: Sequence[Published], sweep: SweepRecipe) -> Figure:
    """Sizes along x with the deviation over seeds, a colour a line, a stroke a value; published ones pale.

    Args:
        points: as `smallest` finds them.
        published: to be drawn beside.
        sweep: whose report it is.
    """
    report, search = sweep.report, sweep.search
    assert report is not None and search is not None
    figure = new_figure(4.2)
    axes = figure.add_subplot()
    order = labels_of(sweep, report.x)
    places, numbers = places_of(order)
    for index, line in enumerate(labels_of(sweep, report.line)):
        look = style(index)
        for which, reach in enumerate(search.reach):
            words = [str(line)] if line is not None else []
            words += [f"≥ {reach:g}"] if len(search.reach) > 1 or not words else []
            stroke = STYLES[which % len(STYLES)]
            mine = [p for p in points if (p.line, p.reach) == (line, reach) and p.sizes]
            if mine:
                axes.errorbar(
                    [places[p.x] for p in mine], [p.mean for p in mine],
                    yerr=[p.deviation for p in mine], **look, linestyle=stroke, markersize=5,
                    capsize=3, label=" ".join(words), zorder=3,
                )  # fmt: skip
            theirs = [p for p in published if (p.line, p.reach) == (line, reach)]
            if theirs:
                axes.plot(
                    [places.get(p.x, p.x) for p in theirs], [p.value for p in theirs], **look,
                    linestyle=stroke, alpha=0.45, markerfacecolor="white", markersize=4.5,
                    label=" ".join([*words, "published"]), zorder=2,
                )  # fmt: skip
    tidy(axes)
    if numbers and min(order) > 0 and report.log_x is not False and len(order) > 1:
        plain_log_y(axes, "{x:,.0f}")
    else:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    label_x(axes, order, axes.get_yscale() == "log")
    axes.set_xlabel(report.x)
    axes.set_ylabel(AXIS_LABELS[report.metric])
    legend_below(figure, axes, f"smallest model with {search.metric}" if points else None)
    return figure


def table_of(
    points: Sequence[Smallest], published: Sequence[Published], sweep: SweepRecipe
) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, a row a point.

    Args:
        points: as `smallest` finds them.
        published: beside.
        sweep: whose report it is.
    """
    report = sweep.report
    assert report is not None
    known = {(p.line, p.x, p.reach): p.value for p in published}
    heads = [name for name in (report.line, report.x) if name is not None]
    heads += ["reach", report.metric, "deviation", "seeds", "members", "tokens", "runs", "seconds"]
    heads += ["published"] if published else []
    cells = []
    for p in points:
        rows = [row for row in p.rows if row["status"] == "found"]
        tokens = [row["tokens"] for row in rows if row["tokens"] is not None]
        line = [str(p.line)] if report.line is not None else []
        line += [str(p.x), f"{p.reach:g}", f"{p.mean:,.0f}" if p.sizes else "none reached it"]
        line += [f"{p.deviation:,.0f}" if len(p.sizes) > 1 else "", f"{len(p.sizes)} of {p.n}"]
        line += [", ".join(str(row["member"]) for row in rows)]
        line += [f"{fmean(tokens):,.0f}" if tokens else ""]
        line += [str(sum(row["runs_trained"] for row in p.rows))]
        line += [f"{sum(row['seconds_of_all'] for row in p.rows):,.0f}"]
        if published:
            theirs = known.get((p.line, p.x, p.reach))
            line.append("" if theirs is None else f"{theirs:,.0f}")
        cells.append(line)
    return heads, cells


CSV_COLUMNS = {
    "recall_threshold": "reach",
    "seed": "seed",
    "params_total": "params_total",
    "params_non_embedding": "params_non_embedding",
    "tokens_trained": "tokens",
    "seconds": "seconds",
    "params_untied": "params_untied",
    "steps": "steps",
    "recall": "value",
    "runs_trained": "runs_trained",
    "seconds_of_all": "seconds_of_all",
}


def records(searches: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> Table:
    """Heads and rows of the CSV: a row a search that is over; sizes are empty where no model was found.

    Args:
        searches: rows of the table of this name.
        axes: in the order of columns.
    """
    over = [row for row in searches if row["status"] != "open"]
    facts = all(isinstance(row["settings"].get("people"), int) for row in over)
    heads = [*axes, *(["facts"] if facts else []), *CSV_COLUMNS]
    rows = []
    for row in over:
        cells = [row["settings"][name] for name in axes]
        cells += [len(ATTRIBUTES) * row["settings"]["people"]] if facts else []
        rows.append([*cells, *(row.get(name) for name in CSV_COLUMNS.values())])
    return heads, rows


def applies(source: Source) -> bool:
    """To sweeps with a search."""
    return isinstance(source, SweepSource) and source.recipe.search is not None


def panels(source: Source, request: Request) -> list[Panel]:
    """The figure of a sweep's searches.

    Raises:
        ToolmemError: for what is no sweep with a search, or of whose searches none is over.
    """
    if not isinstance(source, SweepSource) or source.recipe.search is None:
        raise ToolmemError(
            f"{source.path} has no search: `toolmem plot {source.path}` draws what it has"
        )
    recipe, search = source.recipe, source.recipe.search
    points = smallest(source.answers, recipe)
    theirs = [] if request.published is None else published_of(request.published, recipe)
    beside = " Hollow: published means." if theirs else ""
    return [
        Panel(
            recipe.name,
            f"The smallest model of the family that reaches each {search.metric}: the mean over seeds "
            f"and its standard deviation.{beside}",
            draw(points, theirs, recipe),
            table_of(points, theirs, recipe),
            records(source.answers, source.axes()),
            text=lead_of(source.answers),
            made=source.made(),
        )
    ]


def lead_of(searches: Sequence[Mapping[str, Any]]) -> str:
    """What the figure's text says of its searches."""
    count = {
        status: sum(row["status"] == status for row in searches) for status in ("found", "none")
    }
    words = [f"{count['found']} searches of {len(searches)} found a model."]
    if count["none"]:
        words.append(f"In {count['none']} no model of the family reached the value.")
    if still := len(searches) - count["found"] - count["none"]:
        words.append(f"{still} are not over.")
    if odd := sum(row["monotone"] is False for row in searches):
        words.append(
            f"In {odd} a larger model failed where the smallest one passed, by most of their seeds."
        )
    if failed := sum(row["runs_failed"] for row in searches):
        words.append(f"{failed} runs that failed count as not reaching it.")
    return " ".join(words)
