"""Learning dynamics: recall of known and unseen people and loss by kind of token, over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from toolmem.analysis.dynamics import (
    LEVEL,
    LINES,
    NAME,
    RECALL,
    Curve,
    curves_of,
    draw_line,
    left_of,
    log_steps,
    passed,
    run_panel,
)
from toolmem.analysis.pictures import (
    COLOURS,
    GREY,
    label_x,
    legend_below,
    new_figure,
    places_of,
    plain_log_y,
    style,
    tidy,
)
from toolmem.analysis.report import Panel
from toolmem.analysis.sources import RunSource, Source, SweepSource
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from toolmem.analysis.page import Request


def applies(source: Source) -> bool:
    """To runs that measured losses by kind of token, and sweeps whose ``report.kind`` is dynamics."""
    if isinstance(source, SweepSource):
        return source.report.kind == NAME
    return any(name.startswith("loss/known/") for name in source.metrics)


def panels(source: Source, request: Request) -> list[Panel]:
    """The figures of a run, or of a sweep's runs.

    Raises:
        ToolmemError: for runs without recall at several steps.
    """
    if isinstance(source, RunSource):
        return [run_panel(source)]
    return sweep_panels(source)


@dataclass(frozen=True)
class Dynamics:
    """What a run of a sweep did.

    Args:
        row: of results.
        recall: of known and of unseen people, by step.
        losses: the last ones, by metric.
        steps: at which recall passes the level; None for never.
    """

    row: Mapping[str, Any]
    recall: Mapping[str, Curve]
    losses: Mapping[str, float]
    steps: Mapping[str, float | None]


def read_runs(source: SweepSource) -> list[Dynamics]:
    """The dynamics of each run that went to its end.

    Args:
        source: the sweep.

    Raises:
        ToolmemError: where a run's metrics are gone, or hold no recall at several steps.
    """
    found = []
    for row in source.done:
        run = RunSource.open(source.path / "runs" / row["name"])
        recall = curves_of(run.metrics, str(run.path))
        losses = {
            name: curve[max(curve)]
            for name, curve in run.metrics.items()
            if name.startswith("loss/")
        }
        steps = {who: passed(curve) for who, curve in recall.items()}
        found.append(Dynamics(row, recall, losses, steps))
    if not found:
        raise ToolmemError(f"{source.path}: no run went to its end yet: nothing to draw")
    return found


def sweep_panels(source: SweepSource) -> list[Panel]:
    """When recall of known and of unseen people passes the level, by the sweep's axes; and their curves.

    Args:
        source: the sweep.

    Raises:
        ToolmemError: for axes that points would fall together of.
    """
    report = source.report
    for axis in (*report.best_over, *([report.panel] if report.panel else [])):
        if len({row["settings"][axis] for row in source.done}) > 1:
            raise ToolmemError(
                f"report: dynamics are drawn along x and line, and {axis} has several values: make a sweep "
                "of each"
            )
    runs = read_runs(source)
    groups: dict[tuple[Any, Any], list[Dynamics]] = {}
    for x in _labels(source, report.x):
        for line in _labels(source, report.line):
            mine = [r for r in runs if _label(r, report.x) == x and _label(r, report.line) == line]
            if mine:
                groups[x, line] = mine
    made = source.made(source.done)
    of_line = f", lines: {report.line}" if report.line else ""
    losses = sorted({name for run in runs for name in run.losses})
    more: dict[str, Any] = {}
    by_name = {run.row["name"]: run for run in runs}
    for who in RECALL:
        more[f"step_{who}"] = lambda row, w=who: by_name[row["name"]].steps.get(w)
    for name in losses:
        more[f"last {name}"] = lambda row, n=name: by_name[row["name"]].losses.get(n)
    return [
        Panel(
            NAME,
            f"The step at which recall passes {LEVEL}, of people that training knows (full) and of people "
            f"never seen (hollow), by {report.x}{of_line}. Means over seeds, bars from the smallest to the "
            "largest; what never passes it counts as the topmost line.",
            draw_steps(source, groups),
            _sweep_table(source, groups),
            source.records(source.done, more),
            made=made,
        ),
        Panel(
            f"{NAME}_curves",
            f"Recall over steps, a picture for each {report.x}{of_line}; whole: people that training knows, "
            "broken: people never seen. Means over seeds.",
            draw_curves(source, groups),
            made=made,
        ),
    ]


def _labels(source: SweepSource, axis: str | None) -> list[Any]:
    from toolmem.analysis.sweep_plot import labels_of

    return labels_of(source.recipe, axis)


def _label(run: Dynamics, axis: str | None) -> Any:
    return None if axis is None else run.row["settings"][axis]


def draw_steps(source: SweepSource, groups: Mapping[tuple[Any, Any], Sequence[Dynamics]]) -> Figure:
    """The steps at which recall passes the level, along x.

    Args:
        source: the sweep.
        groups: runs of each x and line.
    """
    report = source.report
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    xs, lines = _labels(source, report.x), _labels(source, report.line)
    places, numbers = places_of(xs)
    last = max(max(run.recall["known"]) for runs in groups.values() for run in runs)
    never = last * 1.5
    apart = 1.06 if numbers and min(xs) > 0 else 1.0  # side by side, so that bars can be told apart
    for index, line in enumerate(lines):
        for who in RECALL:
            found = []
            for x in xs:
                steps = [run.steps.get(who) for run in groups.get((x, line), ())]
                if steps and any(who in run.steps for run in groups[x, line]):
                    shown = [never if step is None else step for step in steps]
                    place = places[x] * apart ** (index - (len(lines) - 1) / 2)
                    found.append((place, fmean(shown), min(shown), max(shown)))
            if not found:
                continue
            at, means, low, high = (list(column) for column in zip(*found, strict=True))
            bars = [
                [m - a for m, a in zip(means, low, strict=True)],
                [b - m for m, b in zip(means, high, strict=True)],
            ]
            look = style(index)
            word = who if line is None else f"{report.line} {line}, {who}"
            axes.errorbar(
                at, means, yerr=bars, **look, linestyle=LINES[who], linewidth=1.4, markersize=5.5,
                markerfacecolor=look["color"] if who == "known" else "white", capsize=2.5,
                elinewidth=1.0, label=word,
            )  # fmt: skip
    axes.axhline(last, color=GREY, linewidth=0.8)
    axes.annotate(
        "the run's end; above: never", (0.99, last), xycoords=("axes fraction", "data"), fontsize=7.5,
        color=GREY, va="bottom", ha="right",
    )  # fmt: skip
    tidy(axes)
    label_x(axes, xs, report.log_x)
    plain_log_y(axes, "{x:,.0f}")
    axes.set_ylim(top=never * 1.15)
    axes.set_xlabel(report.x)
    axes.set_ylabel(f"step where recall is {LEVEL}")
    legend_below(figure, axes)
    return figure


def draw_curves(
    source: SweepSource, groups: Mapping[tuple[Any, Any], Sequence[Dynamics]]
) -> Figure:
    """Recall over steps, a picture for each x.

    Args:
        source: the sweep.
        groups: runs of each x and line.
    """
    report = source.report
    xs = [x for x in _labels(source, report.x) if any(key[0] == x for key in groups)]
    lines = _labels(source, report.line)
    figure = new_figure(1.9 * len(xs) + 0.6)
    rows = figure.subplots(len(xs), 1, sharex=True, squeeze=False)[:, 0]
    every = sorted({s for runs in groups.values() for r in runs for s in r.recall["known"]})
    zero = left_of(every)
    for axes, x in zip(rows, xs, strict=True):
        for index, line in enumerate(lines):
            for who in RECALL:
                curves = [r.recall[who] for r in groups.get((x, line), ()) if who in r.recall]
                if not curves:
                    continue
                shared = set.intersection(*(set(curve) for curve in curves))
                mean = {step: fmean(curve[step] for curve in curves) for step in shared}
                label = str(line) if who == "known" and line is not None else None
                look = {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[who]}
                draw_line(axes, mean, zero, label=label, **look)
        axes.set_title(f"{report.x} {x}", loc="left", fontsize=9)
        axes.set_ylabel("recall")
        axes.set_ylim(0, 1.02)
        tidy(axes)
    rows[-1].set_xlabel("step")
    log_steps(rows[-1], every, zero)
    legend_below(figure, rows[0], report.line)
    return figure


def _sweep_table(
    source: SweepSource, groups: Mapping[tuple[Any, Any], Sequence[Dynamics]]
) -> tuple[list[str], list[list[str]]]:
    report = source.report
    heads = [name for name in (report.x, report.line) if name is not None]
    heads += [f"known {LEVEL} at", f"unseen {LEVEL} at", "later by", "known at the end"]
    heads += ["unseen at the end", "seeds"]
    rows = []
    for (x, line), runs in groups.items():
        cells = [str(x)] + ([str(line)] if report.line is not None else [])
        cells += [_span([run.steps.get(who) for run in runs]) for who in RECALL]
        gaps = [
            unseen - known
            for run in runs
            if (unseen := run.steps.get("unseen")) is not None
            and (known := run.steps["known"]) is not None
        ]
        cells.append(_span(gaps) if gaps else "")
        for who in RECALL:
            ends = [r.recall[who][max(r.recall[who])] for r in runs if who in r.recall]
            cells.append(f"{fmean(ends):.3f}" if ends else "")
        rows.append([*cells, str(len(runs))])
    return heads, rows


def _span(steps: Sequence[float | None]) -> str:
    """The mean and from where to where; how many never got there."""
    there = [step for step in steps if step is not None]
    if not there:
        return "never"
    words = f"{fmean(there):,.0f}"
    if len(there) > 1:
        words += f" ({min(there):,.0f} to {max(there):,.0f})"
    missing = len(steps) - len(there)
    return f"{words}, {missing} never" if missing else words
