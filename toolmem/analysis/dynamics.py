"""What a run learned when: recall of known and unseen people, and loss by kind of token, over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from toolmem.analysis.pictures import COLOURS, GREY, new_figure, plain_log_y, tidy
from toolmem.analysis.report import Panel
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from toolmem.analysis.sources import RunSource

RECALL = {"known": "recall/exact_match", "unseen": "recall/unseen/exact_match"}
LINES = {"known": "-", "unseen": "--"}
KINDS = ("query", "name", "copied", "memorised", "other")
LEVEL = 0.5  # of recall: the step at which it is passed is told
NAME = "dynamics"

Curve = Mapping[int, float]


def passed(curve: Curve, level: float = LEVEL) -> float | None:
    """The step at which a curve first reaches a level, on the line between two rounds; None for never.

    Args:
        curve: value by step.
        level: to be reached.
    """
    points = sorted(curve.items())
    if points and points[0][1] >= level:
        return float(points[0][0])
    for (step, value), (later, higher) in pairwise(points):
        if higher >= level:
            return step + (later - step) * (level - value) / (higher - value)
    return None


def curves_of(metrics: Mapping[str, Curve], where: str) -> dict[str, Curve]:
    """Recall of known people and, where it was measured, of unseen ones.

    Raises:
        ToolmemError: for a run without recall at several steps.
    """
    found = {who: metrics[name] for who, name in RECALL.items() if name in metrics}
    if len(found.get("known", {})) < 2:
        raise ToolmemError(
            f"{where} has no recall at several steps: train with --recall.steps_per_decade 10, say"
        )
    return found


def run_panel(source: RunSource) -> Panel:
    """Recall and losses of a run.

    Args:
        source: the run.

    Raises:
        ToolmemError: for a run without recall at several steps.
    """
    recall = curves_of(source.metrics, str(source.path))
    losses = {
        (kind, who): source.metrics[name]
        for kind in KINDS
        for who in RECALL
        if (name := f"loss/{who}/{kind}") in source.metrics
    }
    steps = {who: passed(curve) for who, curve in recall.items()}
    names = [RECALL[who] for who in recall] + [f"loss/{who}/{kind}" for kind, who in losses]
    names += [name for name in source.metrics if name.startswith("accuracy/")]
    every = sorted({step for name in names for step in source.metrics[name]})
    return Panel(
        NAME,
        "Recall, and cross-entropy by kind of token, over steps; whole lines: people that training knows, "
        f"broken ones: people never seen. Upright lines: recall passes {LEVEL}.",
        draw_run(recall, losses, steps),
        _run_table(recall, losses, steps),
        (["step", *names], [[s, *(source.metrics[n].get(s) for n in names)] for s in every]),
        text=story(steps),
        made=source.made(),
    )


def story(steps: Mapping[str, float | None]) -> str:
    """In words, what comes first.

    Args:
        steps: at which recall of known and of unseen people passes the level; None for never.
    """
    known, unseen = steps.get("known"), steps.get("unseen")
    if known is None:
        return f"Recall of known people never reaches {LEVEL}."
    words = f"Recall of known people passes {LEVEL} at step {known:,.0f}"
    if "unseen" not in steps:
        return f"{words}."
    if unseen is None:
        return f"{words}, of unseen people never: what is learned is these people, not the rule."
    order = "later" if unseen >= known else "earlier"
    return f"{words}, of unseen people at step {unseen:,.0f}, {abs(unseen - known):,.0f} {order}."


def _run_table(
    recall: Mapping[str, Curve],
    losses: Mapping[tuple[str, str], Curve],
    steps: Mapping[str, float | None],
) -> tuple[list[str], list[list[str]]]:
    known = steps["known"]
    rows = []
    for label, curve in [
        *((f"recall, {who}", curve) for who, curve in recall.items()),
        *((f"loss of {kind}, {who}", curve) for (kind, who), curve in losses.items()),
    ]:
        middle = "" if known is None else f"{_between(curve, known):.3g}"
        rows.append([label, f"{curve[min(curve)]:.3g}", middle, f"{curve[max(curve)]:.3g}"])
    return ["", "first", f"where known recall is {LEVEL}", "last"], rows


def _between(curve: Curve, step: float) -> float:
    """The value at a step, on the line between two rounds."""
    points = sorted(curve.items())
    for (first, value), (later, other) in pairwise(points):
        if first <= step <= later:
            return value + (other - value) * (step - first) / (later - first)
    return points[-1][1]


def draw_run(
    recall: Mapping[str, Curve],
    losses: Mapping[tuple[str, str], Curve],
    steps: Mapping[str, float | None],
) -> Figure:
    """Recall above, losses beneath.

    Args:
        recall: by people, value by step.
        losses: by kind and people, value by step.
        steps: at which recall passes the level, by people.
    """
    figure = new_figure(5.6 if losses else 3.0)
    rows = figure.subplots(2 if losses else 1, 1, sharex=True, squeeze=False)[:, 0]
    every = sorted({s for curve in (*recall.values(), *losses.values()) for s in curve})
    zero = left_of(every)
    for who, curve in recall.items():
        draw_line(
            rows[0], curve, zero, color="#000000", linestyle=LINES[who], label=f"recall, {who}"
        )
    rows[0].set_ylabel("recall")
    rows[0].set_ylim(0, 1.02)
    if losses:
        for index, kind in enumerate(KINDS):
            for who in RECALL:
                if (kind, who) in losses:
                    label = kind if who == "known" else None
                    look = {"color": COLOURS[index], "linestyle": LINES[who]}
                    draw_line(rows[1], losses[kind, who], zero, label=label, **look)
        rows[1].set_ylabel("nats a token")
        plain_log_y(rows[1])
    for axes in rows:
        tidy(axes)
        for who, step in steps.items():
            if step is not None:
                axes.axvline(max(step, zero), color=GREY, linewidth=0.9, linestyle=LINES[who])
    rows[-1].set_xlabel("step")
    log_steps(rows[-1], every, zero)
    handles = [h for axes in rows for h in axes.get_legend_handles_labels()[0]]
    figure.legend(
        handles, [h.get_label() for h in handles], frameon=False, fontsize=8.5, ncols=4,
        loc="outside lower center",
    )  # fmt: skip
    return figure


def left_of(steps: Sequence[int]) -> float:
    """Where step 0 stands on a logarithmic scale: left of the first."""
    return min(step for step in steps if step) / 2


def draw_line(axes: Axes, curve: Curve, zero: float, **look: Any) -> None:
    """Draw a curve whose step 0 stands at ``zero``."""
    steps = sorted(curve)
    places, values = [max(step, zero) for step in steps], [curve[step] for step in steps]
    axes.plot(places, values, linewidth=1.6, marker=".", markersize=3.5, **look)


def log_steps(axes: Axes, steps: Sequence[int], zero: float) -> None:
    """Powers of ten along x, and step 0 at ``zero`` where there is one."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    first = min(step for step in steps if step)
    ticks = [
        t for t in LogLocator(subs=(1,)).tick_values(first, max(steps)) if first <= t <= max(steps)
    ]
    ticks = list(ticks) or [first]
    words = [f"{tick:,.0f}" for tick in ticks]
    if 0 in steps:
        ticks, words = [zero, *ticks], ["0", *words]
    axes.set_xticks(ticks, words)
