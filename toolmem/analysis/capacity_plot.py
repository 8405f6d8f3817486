"""Bits of knowledge against parameters, facts and stored bits, laws fitted, contours, mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from toolmem.analysis.capacity import (
    AS_TRAINED,
    BITS,
    MARKS,
    Held,
    at_places,
    called,
    capacity,
    grouped,
    held_by,
    mean,
    records,
)
from toolmem.analysis.capacity_tables import (
    by_format,
    capacity_table,
    contour_table,
    experts_cell,
    experts_table,
    inference_flops,
    law_table,
    said_of_marks,
    storage_table,
    stored_per_fact_bit,
)
from toolmem.analysis.pictures import GREY, finite, legend_below, new_figure, style, tidy
from toolmem.analysis.report import Panel
from toolmem.analysis.scaling import try_fit
from toolmem.analysis.sources import Source, SweepSource
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from toolmem.analysis.page import Request

LEAST_OF_BAND = 6  # runs: with fewer, resamples are mostly of the same two or three


def applies(source: Source) -> bool:
    """To sweeps whose runs measured knowledge."""
    return isinstance(source, SweepSource) and any(finite(row.get(BITS)) for row in source.done)


def panels(source: Source, request: Request) -> list[Panel]:
    """The figures of capacity.

    Raises:
        ToolmemError: for what is no sweep, or has no run that measured knowledge.
    """
    if not isinstance(source, SweepSource) or not applies(source):
        raise ToolmemError(
            f"{source.path} has no run with {BITS}: train with the callback toolmem.training.KnowledgeProbe, "
            "and list what it logs among the sweep's metrics"
        )
    held = held_by(source.done)
    made = source.made(source.done)
    trained = [one for one in held if one.storage == AS_TRAINED]
    found = [
        Panel(
            "capacity",
            "Bits learned against parameters. A point is a run; a line joins, for each size, the mean over "
            "seeds of the population of which most was learned. Shade: the power law's 95 % band, of six "
            "runs or more. Grey: 2 and 1 bits per parameter.",
            draw_bits(trained),
            capacity_table(trained),
            records(held),
            heading="Bits per parameter",
            text=said_of_marks(trained),
            made=made,
        ),
        Panel(
            "capacity_laws",
            "Bits that a model of so many parameters learns at most, as laws, with 95 % intervals by the "
            "bootstrap over runs. Three sizes tell little: read the intervals, not the curve.",
            table=law_table(trained),
            heading="Laws",
            made=made,
        ),
    ]
    if len({one.storage for one in held}) > 1:
        found.append(
            Panel(
                "capacity_storage",
                "Share of the facts' bits learned, against bits in the weights for each bit of the "
                "facts; the most exposures. Grey: one bit in the weights for each bit learned, which nothing "
                "can pass.",
                draw_storage(held),
                storage_table(held),
                heading="Bits in the weights against bits of the facts",
                made=made,
            )
        )
    if (contours := draw_contours(trained)) is not None:
        found.append(
            Panel(
                "capacity_contours",
                "Recall and loss in bits a fact over parameters and facts, interpolated between runs (dots) "
                "on logarithmic scales. Dashed: facts that would fill 2 and 1 bits per parameter.",
                contours,
                contour_table(trained),
                heading="Recall and loss over parameters and facts",
                made=made,
            )
        )
    if cell := experts_cell(trained):
        costs = inference_flops(source.done)
        found.append(
            Panel(
                "capacity_experts",
                f"Bits learned of {cell[0].facts:,} facts after {cell[0].exposures:,} exposures against all "
                "parameters, and against FLOPs of a token in inference (a third of training's).",
                draw_experts(cell, costs),
                experts_table(cell, costs),
                heading="Mixture of experts",
                made=made,
            )
        )
    return found


def draw_bits(held: Sequence[Held]) -> Figure:
    """Bits learned against parameters, a line a group.

    Args:
        held: weights as trained.
    """
    figure = new_figure(4.2)
    axes = figure.add_subplot()
    groups = grouped(held)
    for index, (group, runs) in enumerate(groups.items()):
        look = style(index)
        seen = [one for one in runs if one.knowledge_bits > 0]
        axes.scatter(
            [one.params_total for one in seen], [one.knowledge_bits for one in seen], s=14, alpha=0.4,
            color=look["color"], marker=look["marker"], linewidths=0, zorder=3,
        )  # fmt: skip
        most = capacity(runs)
        _law_band(axes, [one for r in most.values() for one in r], look["color"])
        best = {n: mean(r, "knowledge_bits") for n, r in most.items()}
        best = {n: bits for n, bits in best.items() if bits > 0}
        name = called(group, groups)
        if best:
            axes.plot(list(best), list(best.values()), label=name, markersize=5, zorder=4, **look)
        else:
            axes.plot([], [], label=f"{name} (no bits)", **look)
    sizes = sorted({one.params_total for one in held})
    _log_log(axes, sizes)
    low, high = axes.get_xlim()
    for mark in MARKS:
        axes.plot([low, high], [mark * low, mark * high], color=GREY, linewidth=1, zorder=1)
        axes.annotate(
            f"{mark:g} bit{'s' if mark > 1 else ''} per parameter", (high, mark * high), fontsize=7.5,
            color=GREY, ha="right", va="bottom", xytext=(-2, 2), textcoords="offset points",
        )  # fmt: skip
    axes.set_xlim(low, high)
    axes.set_xlabel("parameters")
    axes.set_ylabel("bits of knowledge")
    legend_below(figure, axes)
    return figure


def _law_band(axes: Axes, runs: Sequence[Held], colour: str) -> None:
    """Shade where the power law of these runs lies, where they are enough to tell."""
    law = try_fit("power", [h.params_total for h in runs], [h.knowledge_bits for h in runs])
    if law is None or len(law.residuals) < LEAST_OF_BAND:
        return
    sizes = [h.params_total for h in runs]
    along = np.geomspace(min(sizes), max(sizes), 50)
    low, high = law.band(along)
    axes.fill_between(along, low, high, color=colour, alpha=0.12, linewidth=0, zorder=2)


def _log_log(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    tidy(axes)
    axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
    _ticks(axes, sizes)


def _ticks(axes: Axes, sizes: Sequence[int]) -> None:
    """Write sizes along x, as many as there is room for."""
    shown = [sizes[0]]
    for size in sizes[1:]:
        if size > 1.2 * shown[-1]:
            shown.append(size)
    axes.set_xticks(shown, [f"{size:,}" for size in shown], fontsize=8)
    axes.minorticks_off()


def draw_storage(held: Sequence[Held]) -> Figure:
    """Share of the facts' bits learned, against stored bits for each of them.

    Args:
        held: of all formats.
    """
    figure = new_figure(3.8)
    axes = figure.add_subplot()
    for index, (storage, runs) in enumerate(by_format(held).items()):
        places = sorted(at_places(runs).values(), key=stored_per_fact_bit)
        axes.scatter(
            [stored_per_fact_bit(r) for r in places],
            [mean(r, "knowledge_bits") / r[0].entropy_bits for r in places],
            label=storage, s=26, alpha=0.8, zorder=3, **style(index),
        )  # fmt: skip
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    line = np.geomspace(min(low, 0.5), high, 200)
    axes.plot(line, np.minimum(line, 1), color=GREY, linewidth=1, zorder=1)
    axes.set_ylim(-0.02, 1.05)
    tidy(axes)
    axes.set_xlabel("bits in the weights for each bit of the facts")
    axes.set_ylabel("share of the facts' bits learned")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    legend_below(figure, axes)
    return figure


def draw_contours(held: Sequence[Held]) -> Figure | None:
    """Recall and loss over parameters and facts, a column for each number of exposures.

    Args:
        held: weights as trained.

    Returns:
        None where runs are too few, or lie on one line.
    """
    every = {group: at_places(runs) for group, runs in grouped(held).items()}
    shown = {group: places for group, places in every.items() if _spans_area(list(places))}
    if not shown:
        return None
    figure = new_figure(2.9 * 2, width=max(5.2, 3.0 * len(shown)))
    grid = figure.subplots(2, len(shown), squeeze=False, sharex=True, sharey=True)
    for column, (group, places) in enumerate(shown.items()):
        for row, (name, levels) in enumerate(_levels(held).items()):
            axes = grid[row][column]
            _contour(figure, axes, places, name, levels)
            if row == 0:
                axes.set_title(called(group, shown), fontsize=9)
            else:
                axes.set_xlabel("parameters")
            if column == 0:
                axes.set_ylabel("facts")
    return figure


def _spans_area(places: Sequence[tuple[int, int]]) -> bool:
    """Are there enough places to interpolate between, and not all on one line of the logarithms?"""
    if len(places) < 4:
        return False
    logs = np.log(np.array(places, float))
    return int(np.linalg.matrix_rank(logs - logs.mean(0), tol=1e-6)) == 2


def _levels(held: Sequence[Held]) -> dict[str, np.ndarray]:
    from matplotlib.ticker import MaxNLocator

    worst = max(max(one.loss for one in held), 1e-3)
    return {
        "recall": np.linspace(0, 1, 11),
        "loss": np.asarray(MaxNLocator(10).tick_values(0, worst)),
    }


def _contour(
    figure: Figure,
    axes: Axes,
    places: Mapping[tuple[int, int], list[Held]],
    name: str,
    levels: np.ndarray,
) -> None:
    sizes, facts = (np.array(one, float) for one in zip(*places, strict=True))
    values = np.array([mean(runs, name) for runs in places.values()])
    colours = "viridis" if name == "recall" else "viridis_r"
    # interpolation may round above the last level, and leave a hole
    closed = np.append(levels[:-1], levels[-1] + 1e-6)
    filled = axes.tricontourf(np.log(sizes), np.log(facts), values, levels=closed, cmap=colours)
    lines = axes.tricontour(
        np.log(sizes), np.log(facts), values, levels=levels[1:-1:2], colors="white", linewidths=0.7
    )
    axes.clabel(lines, fontsize=6.5, fmt="%.2g")
    axes.plot(np.log(sizes), np.log(facts), "k.", markersize=3)
    each = next(iter(places.values()))[0]
    a_fact = each.entropy_bits / each.facts
    along = np.log(np.array([sizes.min(), sizes.max()]))
    for mark in MARKS:
        axes.plot(along, along + np.log(mark / a_fact), "k--", linewidth=0.8)
    axes.set_xlim(*along)
    axes.set_ylim(np.log(facts.min()), np.log(facts.max()))
    known = sorted({int(n) for n in sizes})
    axes.set_xticks(np.log(known), [f"{n:,}" for n in known], fontsize=7.5, rotation=30)
    known = sorted({int(n) for n in facts})
    axes.set_yticks(np.log(known), [f"{n:,}" for n in known], fontsize=7.5)
    bar = figure.colorbar(filled, ax=axes, fraction=0.05, ticks=levels[::2])
    bar.ax.tick_params(labelsize=7)
    bar.set_label("recall" if name == "recall" else "loss, bits a fact", fontsize=8)


def draw_experts(cell: Sequence[Held], costs: Mapping[tuple[int, int], float]) -> Figure:
    """Bits learned against all parameters, and against the FLOPs of a token.

    Args:
        cell: records of the same facts and exposures.
        costs: FLOPs of a token by total and active parameters.
    """
    figure = new_figure(3.4, width=6.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for index, (group, runs) in enumerate(grouped(cell).items()):
        by_size = {r[0].params_total: r for r in at_places(runs).values()}
        bits = [mean(r, "knowledge_bits") for r in by_size.values()]
        left.plot(list(by_size), bits, label=group[2], markersize=6, **style(index))
        flops = [costs.get((n, r[0].params_active)) for n, r in by_size.items()]
        pairs = [(one, b) for one, b in zip(flops, bits, strict=True) if one is not None]
        right.plot([one for one, _ in pairs], [b for _, b in pairs], markersize=6, **style(index))
    left.axhline(cell[0].entropy_bits, color=GREY, linewidth=1)
    right.axhline(cell[0].entropy_bits, color=GREY, linewidth=1)
    for axes in (left, right):
        tidy(axes, 8)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.tick_params(axis="x", rotation=30)
    left.set_ylim(bottom=0)
    left.set_xlabel("all parameters")
    right.set_xlabel("FLOPs a token")
    left.set_ylabel("bits of knowledge")
    legend_below(figure, left)
    return figure
