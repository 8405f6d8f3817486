"""Allocation: at each budget of parameters, which shape of model stores most facts, and how sure that is.

Of a sweep with ``report: {kind: allocation, x: BUDGET, best_over: [SHAPE, ...], panel: SETTING}``; heat-maps
name shapes by the first of these axes. Layers, width, heads, feed-forward ratio and tied tables are read from
each run's own recipe. Facts stored are the metric, a share, of the facts that there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from toolmem.analysis.pictures import (
    GREY,
    STYLES,
    legend_below,
    new_figure,
    plain_log_y,
    style,
    tidy,
)
from toolmem.analysis.report import Panel
from toolmem.analysis.sources import Row, Source, SweepSource
from toolmem.analysis.sweep_plot import Point, all_points, count
from toolmem.data.people import ATTRIBUTES
from toolmem.errors import ToolmemError
from toolmem.evaluation.bootstrap import chance_of_largest
from toolmem.recipe_files import get_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from toolmem.analysis.page import Bound, Request
    from toolmem.sweeps.report_recipe import ReportRecipe

# How a shape is described, by what its recipe's model has.
FACTORS = {
    "layers": "n_layers",
    "width": "dim",
    "heads": "n_heads",
    "feed-forward ratio": "hidden_dim",
    "tied": "tie_embeddings",
}
PUBLISHED_BITS = 2.0  # a parameter after 1,000 exposures, arXiv 2404.05405


@dataclass(frozen=True)
class Shape:
    """A shape at a budget, in one setting.

    Args:
        setting: label of the picture; None where there is one.
        budget: label.
        name: of the shape, by which it is known at every budget.
        factors: value by name, of `FACTORS`.
        facts: recalled, of each seed.
        of: facts that there were.
        params: total parameters.
        rows: the runs.
    """

    setting: Any
    budget: Any
    name: str
    factors: Mapping[str, Any]
    facts: tuple[float, ...]
    of: int
    params: int
    rows: tuple[Row, ...]

    @property
    def mean(self) -> float:
        """Facts recalled, over seeds."""
        return fmean(self.facts)

    def words(self) -> str:
        """The shape in words."""
        f = self.factors
        tied = "tied" if f["tied"] else "untied"
        heads = f"{f['heads']} head" + ("s" if f["heads"] != 1 else "")
        layers = f"{f['layers']} layer" + ("s" if f["layers"] != 1 else "")
        return f"{layers} of width {f['width']}, {heads}, feed-forward x {f['feed-forward ratio']}, {tied}"


def applies(source: Source) -> bool:
    """To sweeps whose report says so."""
    return isinstance(source, SweepSource) and source.report.kind == "allocation"


def panels(source: Source, request: Request) -> list[Panel]:
    """Heat-maps of shapes by budget, the frontier, and what it comes to in words.

    Raises:
        ToolmemError: for a sweep that does not compare shapes at budgets.
    """
    shapes = shapes_of(source)
    assert isinstance(source, SweepSource)
    report = source.report
    name, made = source.recipe.name, source.made(source.done)
    factors = {
        factor: (lambda row, factor=factor: factors_of(row["recipe"])[factor]) for factor in FACTORS
    }
    recalled = {"facts_recalled": lambda row: row[report.metric] * facts_of(row)}
    bounds = default_bounds() if request.bounds is None else request.bounds
    return [
        Panel(
            name,
            f"Facts recalled ({report.metric} of the facts there are) by shape and {report.x}, means over "
            "seeds; framed: the most at its budget.",
            draw_maps(shapes),
            table_of(shapes, report),
            source.records(more=factors | recalled),
            heading="Which shape stores most",
            text=answer(shapes, report),
            made=made,
        ),
        Panel(
            f"{name}_frontier",
            "Facts recalled by total parameters: every shape (pale), the best at each budget (joined), and "
            "what can be said on paper (grey).",
            draw_frontier(shapes, bounds),
            factor_table(shapes, report),
            heading="The frontier, and each choice at its best",
            text="The table asks of each choice alone: with this value, what do the best of the shapes that "
            "were tried recall? They differ in the other choices too, as a budget demands.",
            made=made,
        ),
    ]


def shapes_of(source: Source) -> list[Shape]:
    """Every shape that was trained, in the recipe's order.

    Raises:
        ToolmemError: for a sweep that does not compare shapes at budgets.
    """
    if not isinstance(source, SweepSource) or source.recipe.search is not None:
        raise ToolmemError(
            f"{source.path} is no sweep without a search: shapes are compared in a grid"
        )
    report = source.report
    if not report.best_over or report.line is not None:
        raise ToolmemError(
            f"{source.path}: to compare shapes, its report needs `x`, the axis of budgets, `best_over`, "
            "those of shapes, and no `line`; `panel` may be the setting"
        )
    return [_shape(point, report) for point in all_points(source.done, report)]


def _shape(point: Point, report: ReportRecipe) -> Shape:
    row = point.rows[0]
    facts = facts_of(row)
    return Shape(
        point.panel,
        point.x,
        str(point.best[report.best_over[0]]),
        factors_of(row["recipe"]),
        tuple(value * facts for value in point.values),
        facts,
        row["params_total"],
        point.rows,
    )


def factors_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Layers, width, heads, feed-forward ratio and tied tables of a recipe's model."""
    found = {name: get_key(recipe, f"model.model.{key}") for name, key in FACTORS.items()}
    found["tied"] = bool(found["tied"])
    hidden, width = found["feed-forward ratio"], found["width"]
    found["feed-forward ratio"] = None if None in (hidden, width) else round(hidden / width, 2)
    return found


def facts_of(row: Row) -> int:
    """Facts that a run was taught."""
    people = get_key(row["recipe"], "data.people")
    if not isinstance(people, int):
        raise ToolmemError(f"{row['name']}: its recipe has no data.people: facts cannot be counted")
    attributes = get_key(row["recipe"], "data.attributes")
    return people * (len(attributes) if isinstance(attributes, list) else len(ATTRIBUTES))


def default_bounds() -> list[Bound]:
    """What fits in weight at most, by the bits a parameter that were published."""
    from toolmem.analysis.bounds import facts_bits, people_held

    each = facts_bits(1)

    def held(parameters: float) -> float:
        return len(ATTRIBUTES) * people_held(parameters, PUBLISHED_BITS, each)

    return [(f"{PUBLISHED_BITS:g} bits a parameter, in weight", held)]


def _groups(shapes: Sequence[Shape]) -> dict[tuple[Any, Any], list[Shape]]:
    """By setting and budget, the most facts first."""
    found: dict[tuple[Any, Any], list[Shape]] = {}
    for shape in shapes:
        found.setdefault((shape.setting, shape.budget), []).append(shape)
    return {key: sorted(group, key=lambda s: -s.mean) for key, group in found.items()}


def answer(shapes: Sequence[Shape], report: ReportRecipe) -> str:
    """The best shape of each setting and budget, what comes next, and how often it would stay ahead."""
    sentences = []
    for (setting, budget), group in _groups(shapes).items():
        first = group[0]
        where = f"{setting}, " if setting is not None else ""
        seeds = len(first.facts)
        spread = f" (seeds {min(first.facts):,.0f} to {max(first.facts):,.0f})" if seeds > 1 else ""
        text = (
            f"{where}{report.x} {budget}: {first.words()} recalls most, {first.mean:,.0f} of {first.of:,} "
            f"facts{spread}"
        )
        if len(group) > 1:
            second = group[1]
            text += f"; next {second.words()}, {second.mean:,.0f}"
            text += _certainty(group)
        sentences.append(f"{text}.")
    return "\n".join(sentences)


def _certainty(group: Sequence[Shape]) -> str:
    if min(len(shape.facts) for shape in group) < 2:
        return "; one seed alone: by how much chance decides is not known"
    chance = chance_of_largest([shape.facts for shape in group])
    likely = [i for i in range(len(group)) if chance[i] >= 0.05]
    text = f"; were the seeds drawn again, it would lead in {chance[0]:.0%} of cases"
    if len(likely) > 1:
        text += f", and {len(likely)} of {len(group)} shapes cannot be told apart"
    return text


def table_of(shapes: Sequence[Shape], report: ReportRecipe) -> tuple[list[str], list[list[str]]]:
    """A row a shape, the best of each budget first."""
    settings = [report.panel] if report.panel is not None else []
    heads = [
        *settings,
        report.x,
        "shape",
        "params",
        "facts recalled",
        "of",
        "smallest",
        "largest",
        "seeds",
    ]
    rows = []
    for (setting, budget), group in _groups(shapes).items():
        for shape in group:
            cells = [str(setting)] if settings else []
            cells += [
                str(budget),
                shape.words(),
                count(shape.params),
                count(shape.mean),
                count(shape.of),
            ]
            rows.append(
                [*cells, count(min(shape.facts)), count(max(shape.facts)), str(len(shape.facts))]
            )
    return heads, rows


def factor_table(
    shapes: Sequence[Shape], report: ReportRecipe
) -> tuple[list[str], list[list[str]]]:
    """A row a choice: the most facts that a shape with it recalls, at each budget."""
    settings = [report.panel] if report.panel is not None else []
    budgets = list(dict.fromkeys(shape.budget for shape in shapes))
    heads = [*settings, "choice", "value", *(f"{report.x} {budget}" for budget in budgets)]
    rows = []
    for setting in dict.fromkeys(shape.setting for shape in shapes):
        here = [shape for shape in shapes if shape.setting == setting]
        for factor in FACTORS:
            values = sorted({_rounded(factor, s) for s in here if s.factors[factor] is not None})
            for value in values if len(values) > 1 else ():
                cells = [str(setting)] if settings else []
                cells += [factor, str(value)]
                for budget in budgets:
                    means = [
                        s.mean for s in here if s.budget == budget and _rounded(factor, s) == value
                    ]
                    cells.append(f"{max(means):,.0f}" if means else "")
                rows.append(cells)
    return heads, rows


def _rounded(factor: str, shape: Shape) -> Any:
    """A choice as it is compared with others: a ratio to the next power of two."""
    value = shape.factors[factor]
    return (
        value if factor != "feed-forward ratio" or value is None else 2 ** round(math.log2(value))
    )


def draw_maps(shapes: Sequence[Shape]) -> Figure:
    """A heat-map a setting: shapes by budget, the most at each framed."""
    import numpy as np
    from matplotlib.patches import Rectangle

    settings = list(dict.fromkeys(shape.setting for shape in shapes))
    budgets = list(dict.fromkeys(shape.budget for shape in shapes))
    names = list(dict.fromkeys(shape.name for shape in shapes))
    figure = new_figure(0.9 + (0.55 + 0.27 * len(names)) * len(settings))
    every = figure.subplots(len(settings), 1, squeeze=False)[:, 0]
    best = {key: group[0] for key, group in _groups(shapes).items()}
    for axes, setting in zip(every, settings, strict=True):
        grid = np.full((len(names), len(budgets)), np.nan)
        for shape in shapes:
            if shape.setting == setting:
                grid[names.index(shape.name), budgets.index(shape.budget)] = shape.mean
        image = axes.imshow(grid, aspect="auto", cmap="viridis")
        low, high = np.nanmin(grid), np.nanmax(grid)
        for row, column in np.argwhere(np.isfinite(grid)):
            value = grid[row, column]
            dark = high == low or (value - low) / (high - low) < 0.6
            axes.text(
                column, row, f"{value:,.0f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip
        for column, budget in enumerate(budgets):
            if (setting, budget) in best:
                row = names.index(best[setting, budget].name)
                frame = Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#D55E00", lw=2
                )
                axes.add_patch(frame)
        axes.set_xticks(range(len(budgets)), [str(budget) for budget in budgets], fontsize=8.5)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(length=0)
        if setting is not None:
            axes.set_title(str(setting), loc="left", fontsize=9)
        if axes is every[-1]:
            axes.set_xlabel("budget of parameters", fontsize=8.5)
        bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
        bar.ax.tick_params(labelsize=7, length=2)
    return figure


def draw_frontier(shapes: Sequence[Shape], bounds: Sequence[Bound]) -> Figure:
    """Facts by parameters: every shape pale, the best of each budget joined, bounds in grey.

    Args:
        shapes: of all settings.
        bounds: a label, and a function of the number of parameters.
    """
    import numpy as np

    figure = new_figure(3.9)
    axes = figure.add_subplot()
    groups = _groups(shapes)
    for index, setting in enumerate(dict.fromkeys(shape.setting for shape in shapes)):
        look = style(index)
        here = [shape for shape in shapes if shape.setting == setting]
        axes.plot(
            [s.params for s in here],
            [s.mean for s in here],
            **look,
            linestyle="none",
            alpha=0.3,
            ms=4,
        )
        first = sorted(
            (g[0] for key, g in groups.items() if key[0] == setting), key=lambda s: s.params
        )
        spread = [
            [max(0.0, s.mean - min(s.facts)) for s in first],
            [max(0.0, max(s.facts) - s.mean) for s in first],
        ]
        label = "best" if setting is None else f"{setting}, best"
        axes.errorbar(
            [s.params for s in first], [s.mean for s in first], yerr=spread, **look, capsize=3, ms=5,
            label=label, zorder=3,
        )  # fmt: skip
    sizes = [shape.params for shape in shapes]
    along = np.geomspace(min(sizes), max(sizes), 50)
    for index, (label, function) in enumerate(bounds):
        values = [function(float(x)) for x in along]
        axes.plot(
            along, values, color=GREY, linestyle=STYLES[(index + 1) % 4], linewidth=1.2, label=label
        )
    tidy(axes)
    axes.set_xscale("log")
    if all(shape.mean > 0 for shape in shapes):
        plain_log_y(axes, "{x:,.0f}")
    ticks = sorted({round(fmean(s.params for s in g), -2) for g in groups.values()})
    apart = [x for i, x in enumerate(ticks) if i == 0 or x > 1.15 * ticks[i - 1]]
    axes.set_xticks(apart, [f"{x:,.0f}" for x in apart])
    axes.minorticks_off()
    axes.set_xlabel("total parameters")
    axes.set_ylabel("facts recalled")
    legend_below(figure, axes)
    return figure
