"""The curves of a run: loss, recall and whatever else it logged, over steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from toolmem.analysis.pictures import (
    is_share,
    legend_below,
    new_figure,
    plain_log_y,
    spans_wide,
    style,
    tidy,
)
from toolmem.analysis.report import Panel
from toolmem.analysis.sources import RunSource, Source
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from toolmem.analysis.page import Request

MOST_LINES = 8  # in a figure


def applies(source: Source) -> bool:
    """To runs."""
    return isinstance(source, RunSource)


def panels(source: Source, request: Request) -> list[Panel]:
    """A figure of each family of metrics: losses, recall, tasks, divergence.

    Raises:
        ToolmemError: for what is no run, or one that logged none of them.
    """
    if not isinstance(source, RunSource):
        raise ToolmemError(f"{source.path} is no run's folder: curves are drawn of a run")
    found = families(source)
    if not found:
        raise ToolmemError(
            f"{source.path} logged neither a loss nor recall; --metric names one of "
            f"{', '.join(source.metrics)}"
        )
    return [_panel(source, title, names) for title, names in found.items()]


def families(source: RunSource) -> dict[str, list[str]]:
    """Names of the metrics that are drawn together, by what they are."""
    if source.metric is not None:
        return {source.metric: [source.metric]}
    losses = [name for name in source.metrics if name.rpartition("/")[2].startswith("loss")]
    ends = {name: name.rpartition("/")[2] for name in source.metrics}
    recall = [name for name in ends if ends[name] == "exact_match" and name.startswith("recall")]
    tasks = [
        name for name in ends
        if ends[name] in ("accuracy", "accuracy_norm", "exact_match") and name not in recall
        and not name.startswith(("val/", "train/"))
    ]  # fmt: skip
    apart = [name for name in ends if ends[name] in ("kl", "kl_reverse", "tv")]
    by_attribute = [
        name for name in source.metrics if "exact_match/" in name and not name.startswith("val/")
    ]
    found = {
        "loss": losses,
        "recall": recall,
        "recall by attribute": by_attribute,
        "tasks": tasks,
        "divergence": apart,
    }
    return {title: names[:MOST_LINES] for title, names in found.items() if names}


def _panel(source: RunSource, title: str, names: list[str]) -> Panel:
    curves = {name: source.metrics[name] for name in names}
    steps = sorted({step for curve in curves.values() for step in curve})
    word = title.replace("/", "_").replace(" ", "_")
    rows = []
    for name, curve in curves.items():
        low = min(curve, key=lambda step, c=curve: c[step])  # type: ignore[misc]
        high = max(curve, key=lambda step, c=curve: c[step])  # type: ignore[misc]
        last = max(curve)
        pairs = [f"{curve[step]:.4g} at {step:,}" for step in (low, high, last)]
        rows.append([name, *pairs, str(len(curve))])
    return Panel(
        f"{source.name}_{word}",
        f"{title[0].upper()}{title[1:]} over steps.",
        _draw(curves, title),
        (["metric", "smallest", "largest", "last", "values"], rows),
        (["step", *names], [[s, *(curves[name].get(s) for name in names)] for s in steps]),
        made=source.made(),
    )


def _draw(curves: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    figure = new_figure(3.4)
    axes = figure.add_subplot()
    for index, (name, curve) in enumerate(curves.items()):
        steps = sorted(curve)
        few = len(steps) <= 30
        look = style(index)
        axes.plot(
            steps, [curve[step] for step in steps], color=look["color"], label=name,
            marker=look["marker"] if few else None, markersize=4, linewidth=1.6,
        )  # fmt: skip
    tidy(axes)
    axes.set_xlabel("step")
    axes.set_ylabel(title)
    values = sorted(value for curve in curves.values() for value in curve.values())
    if all(is_share(name) for name in curves):
        axes.set_ylim(0, 1.02)
    elif "loss" in title and spans_wide([values[0], *values]):
        plain_log_y(axes)
    legend_below(figure, axes)
    return figure
