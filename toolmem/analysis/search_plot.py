"""The picture of a sweep's searches: the smallest model that reaches each value, along one axis."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from toolmem.analysis.report import write_report
from toolmem.analysis.sweep_plot import COLOURS, MARKERS, distinct, labels_of, save_pictures
from toolmem.data.people import ATTRIBUTES
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from toolmem.sweeps.recipe import SweepRecipe

STYLES = ("-", "--", ":", "-.")


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
                        tuple(row[report.metric] for row in rows if row["status"] == "found"),
                        len(rows), tuple(rows),
                    )
                    for rows in by_rest.values()
                ]  # fmt: skip
                if points:
                    found.append(min(points, key=lambda p: (-len(p.sizes), p.mean)))
    if not found:
        raise ToolmemError("report: no search is over yet: nothing to draw")
    return found


def read_published(path: str | Path, sweep: SweepRecipe) -> list[Smallest]:
    """Published means, of a CSV with a column for x, one for the line, recall_threshold, mean_min_params.

    Args:
        path: the file.
        sweep: whose axes its columns are named by; rows of other labels are passed over.

    Raises:
        ToolmemError: for a file that cannot be read, or has not these columns.
    """
    report, search = sweep.report, sweep.search
    assert report is not None and search is not None
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise ToolmemError(
            f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}"
        ) from error
    needed = [name for name in (report.x, report.line) if name is not None]
    needed += ["recall_threshold", "mean_min_params"]
    if missing := [name for name in needed if not rows or name not in rows[0]]:
        raise ToolmemError(f"{path}: it has no column {missing[0]}; it needs {', '.join(needed)}")
    lines = {str(label): label for label in labels_of(sweep, report.line)}
    xs = {str(label): label for label in labels_of(sweep, report.x)}
    found = []
    for row in rows:
        line = str(None) if report.line is None else row[report.line]
        if line in lines and row[report.x] in xs and row["mean_min_params"]:
            found.append(
                Smallest(
                    lines[line], xs[row[report.x]], float(row["recall_threshold"]),
                    (round(float(row["mean_min_params"])),), 0, (),
                )
            )  # fmt: skip
    return [point for point in found if point.reach in search.reach]


def draw(points: Sequence[Smallest], published: Sequence[Smallest], sweep: SweepRecipe) -> Figure:
    """Sizes along x with the deviation over seeds, a colour a line, a stroke a value; published ones pale.

    Args:
        points: as `smallest` finds them.
        published: to be drawn beside.
        sweep: whose report it is.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    report, search = sweep.report, sweep.search
    assert report is not None and search is not None
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    order = labels_of(sweep, report.x)
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in order)
    places = {x: x if numbers else index for index, x in enumerate(order)}
    for index, line in enumerate(labels_of(sweep, report.line)):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        for which, reach in enumerate(search.reach):
            words = [str(line)] if line is not None else []
            words += [f"{search.metric} ≥ {reach:g}"] if len(search.reach) > 1 or not words else []
            style = STYLES[which % len(STYLES)]
            mine = [p for p in points if (p.line, p.reach) == (line, reach) and p.sizes]
            if mine:
                axes.errorbar(
                    [places[p.x] for p in mine], [p.mean for p in mine],
                    yerr=[p.deviation for p in mine], color=colour, marker=marker, linestyle=style,
                    capsize=3, label=" ".join(words), zorder=3,
                )  # fmt: skip
            theirs = [p for p in published if (p.line, p.reach) == (line, reach)]
            if theirs:
                axes.plot(
                    [places[p.x] for p in theirs], [p.mean for p in theirs], color=colour,
                    marker=marker, linestyle=style, alpha=0.35, markerfacecolor="white",
                    label=" ".join([*words, "published"]), zorder=2,
                )  # fmt: skip
    if numbers and min(order) > 0 and report.log_x is not False and len(order) > 1:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xticks(list(places.values()), [str(x) for x in order])
    axes.minorticks_off()
    if axes.get_yscale() == "log":  # sizes often span less than a decade: say more than its ends
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel(report.x)
    axes.set_ylabel({"params_total": "parameters"}.get(report.metric, "parameters without tables"))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_title(title_of(sweep), loc="left", fontsize=11)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def title_of(sweep: SweepRecipe) -> str:
    """Of the page and the picture."""
    assert sweep.search is not None
    title = sweep.report.title if sweep.report is not None else None
    return title or f"Smallest model by {sweep.search.metric}"


def table_of(
    points: Sequence[Smallest], published: Sequence[Smallest], sweep: SweepRecipe
) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, a row a point.

    Args:
        points: as `smallest` finds them.
        published: beside.
        sweep: whose report it is.
    """
    report = sweep.report
    assert report is not None
    known = {(p.line, p.x, p.reach): p.mean for p in published}
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


def write_search_report(
    folder: str | Path,
    sweep: SweepRecipe,
    searches: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    command: str,
    published: str | None = None,
) -> tuple[list[str], list[list[str]]]:
    """Write ``report.html``, ``report.png`` and ``report.svg``; return the table.

    Args:
        folder: where to.
        sweep: whose report it is.
        searches: rows of the table of this name, of the sweep's own.
        rows: of its runs.
        command: that makes them again.
        published: a CSV of published means, drawn beside.

    Raises:
        ToolmemError: when no search is over, or the published file cannot be read.
    """
    points = smallest(searches, sweep)
    theirs = [] if published is None else read_published(published, sweep)
    figure = draw(points, theirs, sweep)
    save_pictures(figure, folder)
    heads, cells = table_of(points, theirs, sweep)
    write_report(
        Path(folder) / "report.html",
        title=title_of(sweep),
        lead=lead_of(searches, rows),
        table=(heads, cells),
        figures=[("The mean over seeds and its deviation.", figure)],
        circumstances=[
            ("command", command),
            ("seeds", ", ".join(map(str, sweep.seeds))),
            ("seconds of training, all runs", f"{sum(row['seconds'] or 0 for row in rows):,.0f}"),
            ("threads a run", distinct(rows, "threads")),
            ("toolmem", distinct(rows, "toolmem_version")),
            ("commit", distinct(rows, "git_commit")),
        ],
    )
    return heads, cells


def plot_folder(sweep: str | Path, out: str | Path, published: str | None = None) -> list[Path]:
    """Draw a sweep's searches from its folder; return the files.

    Args:
        sweep: the folder.
        out: where to.
        published: a CSV of published means, drawn beside.

    Raises:
        ToolmemError: when the folder is of no sweep with searches, or none is over.
    """
    from toolmem.sweeps.folder import SweepFolder
    from toolmem.sweeps.recipe import ReportRecipe, SweepRecipe
    from toolmem.sweeps.search import SearchPlan

    folder = SweepFolder(Path(sweep))
    if not (folder.path / "sweep.yaml").is_file():
        raise ToolmemError(f"{sweep} is no folder of a sweep: it has no sweep.yaml")
    recipe = SweepRecipe.read(folder.path / "sweep.yaml")
    if recipe.search is None:
        raise ToolmemError(
            f"{folder.path / 'sweep.yaml'} has no search: its plot is report.html there"
        )
    if recipe.report is None:
        names = [axis.name for axis in recipe.axes]
        if len(names) != 1:
            raise ToolmemError(
                f"{folder.path / 'sweep.yaml'} has no report: it says what is drawn along"
            )
        recipe = replace(recipe, report=ReportRecipe("params_total", names[0], mode="min"))
    plan = SearchPlan(recipe)
    rows = {row["name"]: row for row in folder.results.rows()}
    answers = plan.answers(rows)
    command = f"toolmem sweep sweep.yaml --out {folder.path.name}"
    write_search_report(out, recipe, answers, plan.mine(rows), command, published)
    write_csv(Path(out) / "searches.csv", answers)
    files = ("report.html", "report.png", "report.svg", "searches.csv")
    return [Path(out) / name for name in files]


CSV_COLUMNS = {
    "recall_threshold": "reach",
    "seed": "seed",
    "params_total": "params_total",
    "params_non_embedding": "params_non_embedding",
    "tokens_trained": "tokens",
    "seconds": "seconds",
    "steps": "steps",
    "recall": "value",
    "runs_trained": "runs_trained",
    "seconds_of_all": "seconds_of_all",
}


def write_csv(path: str | Path, searches: Sequence[Mapping[str, Any]]) -> None:
    """Write the searches that are over, a row each; sizes are empty where no model reached the value.

    Args:
        path: the file.
        searches: rows of the table of this name.
    """
    over = [row for row in searches if row["status"] != "open"]
    axes = list(dict.fromkeys(name for row in over for name in row["settings"]))
    facts = all(isinstance(row["settings"].get("people"), int) for row in over)
    heads = [*axes, *(["facts"] if facts else []), *CSV_COLUMNS]
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.DictWriter(stream, heads, lineterminator="\n")
        writer.writeheader()
        for row in over:
            values = dict(row["settings"])
            if facts:
                values["facts"] = len(ATTRIBUTES) * values["people"]
            writer.writerow(values | {head: row[name] for head, name in CSV_COLUMNS.items()})


def lead_of(searches: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the page says first."""
    count = {
        status: sum(row["status"] == status for row in searches) for status in ("found", "none")
    }
    words = [f"{count['found']} searches of {len(searches)}, by {len(rows)} runs."]
    if count["none"]:
        words.append(f"In {count['none']} no model of the family reached the value.")
    if still := len(searches) - count["found"] - count["none"]:
        words.append(f"{still} are not over.")
    if odd := sum(row["monotone"] is False for row in searches):
        words.append(
            f"In {odd} a larger model failed where the smallest one passed, by most of their seeds."
        )
    if failed := sum(row["status"] == "failed" for row in rows):
        words.append(
            f"{failed} runs failed, and count as not reaching it; results.duckdb says why."
        )
    return " ".join(words)
