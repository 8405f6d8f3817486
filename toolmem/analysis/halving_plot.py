"""The figure of successive halving: what each value was judged by at the rungs, and where it ended."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from toolmem.analysis.pictures import (
    finite,
    legend_below,
    new_figure,
    plain_log_y,
    spans_wide,
    style,
    tidy,
)
from toolmem.analysis.report import Panel
from toolmem.analysis.sources import Row, Source, SweepSource
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from toolmem.analysis.page import Request


def applies(source: Source) -> bool:
    """To sweeps with halving."""
    return isinstance(source, SweepSource) and source.recipe.halving is not None


def panels(source: Source, request: Request) -> list[Panel]:
    """The figure of a sweep's halving.

    Raises:
        ToolmemError: for what is no sweep with halving.
    """
    if not isinstance(source, SweepSource) or source.recipe.halving is None:
        raise ToolmemError(f"{source.path} is no sweep with halving")
    halving = source.recipe.halving
    curves = judged(source)
    others = [axis for axis in source.axes() if axis != halving.axis]
    heads = [*others, halving.axis, *(f"at step {rung}" for rung in halving.rungs), "seeds"]
    rows = [
        [*map(str, key), *(f"{curve[r]:.4g}" if r in curve else "" for r in halving.rungs), str(n)]
        for key, (curve, n) in curves.items()
    ]
    return [
        Panel(
            f"{source.recipe.name}_halving",
            f"{halving.metric} at the rungs, means over seeds: at each, the better "
            f"{halving.keep:.0%} of the values of {halving.axis} go on.",
            _draw(curves, source),
            (heads, rows),
            made=source.made(),
        )
    ]


Curves = dict[tuple[Any, ...], tuple[dict[int, float], int]]


def judged(source: SweepSource) -> Curves:
    """By labels, the halved axis' last: the mean over seeds at each rung, and how many seeds there are."""
    halving = source.recipe.halving
    assert halving is not None
    names = [*(axis for axis in source.axes() if axis != halving.axis), halving.axis]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in source.rows:
        groups.setdefault(tuple(row["settings"][name] for name in names), []).append(row)
    curves: Curves = {}
    for key, rows in groups.items():
        curve = {}
        for rung in halving.rungs:
            values = [(row.get("judged") or {}).get(str(rung)) for row in rows]
            there = [float(value) for value in values if value is not None and finite(value)]
            if there:
                curve[rung] = fmean(there)
        curves[key] = (curve, len(rows))
    return curves


def _draw(curves: Curves, source: SweepSource) -> Figure:
    halving = source.recipe.halving
    assert halving is not None
    groups = list(dict.fromkeys(key[:-1] for key in curves))
    labels = list(dict.fromkeys(key[-1] for key in curves))
    figure = new_figure(2.6 * len(groups) + 0.6)
    every = figure.subplots(len(groups), 1, squeeze=False, sharex=True)[:, 0]
    for axes, group in zip(every, groups, strict=True):
        for index, label in enumerate(labels):
            curve, _ = curves.get((*group, label), ({}, 0))
            if curve:
                axes.plot(
                    list(curve),
                    list(curve.values()),
                    **style(index),
                    markersize=5,
                    label=str(label),
                )
        tidy(axes)
        axes.set_ylabel(halving.metric)
        axes.set_title(", ".join(map(str, group)), loc="left", fontsize=9)
        low_high = [value for line in axes.lines for value in line.get_ydata()]
        if low_high and spans_wide([min(low_high), *low_high, max(low_high)]):
            plain_log_y(axes)
    every[-1].set_xlabel("step")
    every[-1].set_xticks(halving.rungs)
    fullest = max(every, key=lambda axes: len(axes.lines))
    legend_below(figure, fullest, halving.axis)
    return figure
