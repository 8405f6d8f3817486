"""Tricks: each option against the plain recipe, over sizes and seeds: helps, hurts, or no difference.

Of a sweep with ``report: {kind: tricks, x: SIZE, line: OPTION, panel: SETTING}``; the first label of the axis
of options is the plain recipe. A run of an option is paired with the plain one of its size, seed and setting,
and three shifts of the law are told, each with a bootstrap interval over pairs:

recall      the difference at the end of the same number of steps, none counted above what was to be reached
tokens      the ratio of tokens trained until it was reached, of pairs in which both reached it
parameters  the ratio of sizes at which it is reached, between sizes by a line over log parameters
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from toolmem.analysis.pictures import GREY, finite, legend_below, new_figure, style, tidy
from toolmem.analysis.report import Panel, Table
from toolmem.analysis.sources import Row, Source, SweepSource
from toolmem.analysis.sweep_plot import labels_of
from toolmem.errors import ToolmemError
from toolmem.evaluation.bootstrap import mean_interval
from toolmem.recipe_files import get_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from toolmem.analysis.page import Request

REACHED = 0.95  # where the recipe has no recall.stop_at
VERDICTS = ("helps", "no difference", "hurts", "too few pairs")
COLOURS = dict(zip(VERDICTS, ("#009E73", GREY, "#D55E00", "#cccccc"), strict=True))
LEAST_PAIRS = 3  # that an interval is believed of
SHOWN = 3  # options of each sign whose laws are drawn


@dataclass(frozen=True)
class Shift:
    """A mean over pairs, and its interval.

    Args:
        values: of each pair.
        log: they are base-2 logarithms of ratios.
    """

    values: tuple[float, ...]
    log: bool = False

    @property
    def mean(self) -> float:
        """Over pairs, a ratio where they are logarithms; not a number for none."""
        return self._plain(fmean(self.values)) if self.values else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 % by the bootstrap; not numbers for fewer than two pairs."""
        if len(self.values) < 2:
            return math.nan, math.nan
        low, high = mean_interval(self.values)
        return self._plain(low), self._plain(high)

    def _plain(self, value: float) -> float:
        return 2**value if self.log else value

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is above or below no shift at all, else 0."""
        low, high = self.interval
        none = 1.0 if self.log else 0.0
        if len(self.values) < LEAST_PAIRS:
            return 0
        return 1 if low > none else -1 if high < none else 0

    def text(self) -> str:
        """As a table shows it."""
        if not self.values:
            return ""
        form = ".2f" if self.log else "+.3f"
        low, high = self.interval
        spread = f" [{low:{form}}, {high:{form}}]" if finite(low) else ""
        return f"{'x ' if self.log else ''}{self.mean:{form}}{spread}"


@dataclass(frozen=True)
class Effect:
    """What an option does in a setting.

    Args:
        option: its label.
        setting: label; None where there is one.
        recall: difference at the same number of steps.
        tokens: ratio of tokens to reach it.
        params: ratio of parameters to reach it.
        reached: runs that reached it.
        plain_reached: of the plain ones that they are paired with.
    """

    option: Any
    setting: Any
    recall: Shift
    tokens: Shift
    params: Shift
    reached: int
    plain_reached: int

    @property
    def verdict(self) -> str:
        """By recall; where that shows nothing, by tokens."""
        if len(self.recall.values) < LEAST_PAIRS:
            return "too few pairs"
        sign = self.recall.sign or -self.tokens.sign
        return {1: "helps", -1: "hurts", 0: "no difference"}[sign]

    @property
    def order(self) -> tuple[int, float, float]:
        """For sorting: what helps most first."""
        tokens = self.tokens.mean if self.tokens.values else 1.0
        recall = self.recall.mean if self.recall.values else 0.0
        return VERDICTS.index(self.verdict), -recall, tokens


def applies(source: Source) -> bool:
    """To sweeps whose report says so."""
    return isinstance(source, SweepSource) and source.report.kind == "tricks"


def panels(source: Source, request: Request) -> list[Panel]:
    """A forest plot of all options with their table, and the laws of those that shift most.

    Raises:
        ToolmemError: for a sweep that does not compare options with a plain recipe.
    """
    effects = effects_of(source)
    assert isinstance(source, SweepSource)
    name, made, reach = source.recipe.name, source.made(source.done), reach_of(source)
    return [
        Panel(
            name,
            f"Each option against the plain recipe. Left: difference of {source.report.metric} at the same "
            f"number of steps, none counted above {reach:g}. Right: tokens to reach {reach:g}, as a multiple "
            "of the plain recipe's, where both reach it. Means over pairs of the same size and seed, 95 % "
            "intervals.",
            draw_forest(effects, reach),
            table_of(effects, source),
            source.records(),
            heading="What helps at this scale",
            text=answer(effects),
            made=made,
        ),
        Panel(
            f"{name}_effects",
            "The laws of the plain recipe (black) and of the options that shift it most: "
            f"{source.report.metric} by parameters, means over seeds.",
            draw_laws(effects, source),
            records=numbers_of(effects),
            heading="Laws",
            made=made,
        ),
    ]


def reach_of(source: SweepSource) -> float:
    """The value that is to be reached."""
    stop_at = get_key(source.recipe.base, "recall.stop_at")
    return float(stop_at) if isinstance(stop_at, int | float) else REACHED


Runs = dict[tuple[Any, Any, int], Row]  # by setting, size and seed


def runs_of(source: Source) -> dict[Any, Runs]:
    """Done runs by option, the plain recipe first.

    Raises:
        ToolmemError: for a sweep that does not compare options, or without a plain run.
    """
    if not isinstance(source, SweepSource) or source.recipe.search is not None:
        raise ToolmemError(
            f"{source.path} is no sweep without a search: options are compared in a grid"
        )
    report = source.report
    if report.line is None or report.best_over:
        raise ToolmemError(
            f"{source.path}: to compare options, its report needs `line`, the axis of options (the plain "
            "recipe first), `x`, that of sizes, and no `best_over`; `panel` may be the setting"
        )
    found: dict[Any, Runs] = {option: {} for option in labels_of(source.recipe, report.line)}
    for row in source.done:
        settings = row["settings"]
        if finite(row.get(report.metric)):
            setting = None if report.panel is None else settings[report.panel]
            found[settings[report.line]][setting, settings[report.x], row["seed"]] = row
    plain = next(iter(found))
    if not found[plain]:
        raise ToolmemError(
            f"{source.path}: no run of {report.line} {plain} has {report.metric}: nothing to compare with"
        )
    return found


def effects_of(source: Source) -> list[Effect]:
    """Every option's effect, by setting in the recipe's order, what helps most first.

    Raises:
        ToolmemError: as `runs_of`.
    """
    runs = runs_of(source)
    assert isinstance(source, SweepSource)
    report, reach = source.report, reach_of(source)
    plain, *options = runs
    effects = []
    for setting in labels_of(source.recipe, report.panel):
        for option in options:
            keys = [key for key in runs[option] if key[0] == setting and key in runs[plain]]
            pairs = [(runs[option][key], runs[plain][key]) for key in keys]
            if not pairs:
                continue
            values = [(a[report.metric], b[report.metric]) for a, b in pairs]
            both = [
                (a["tokens"], b["tokens"])
                for (a, b), (one, other) in zip(pairs, values, strict=True)
                if min(one, other) >= reach and a["tokens"] and b["tokens"]
            ]
            effects.append(
                Effect(
                    option,
                    setting,
                    Shift(tuple(min(a, reach) - min(b, reach) for a, b in values)),
                    Shift(tuple(math.log2(a / b) for a, b in both), log=True),
                    _size_shift(pairs, report.metric, reach),
                    sum(a >= reach for a, _ in values),
                    sum(b >= reach for _, b in values),
                )
            )
    order = {setting: place for place, setting in enumerate(labels_of(source.recipe, report.panel))}
    return sorted(effects, key=lambda effect: (order[effect.setting], effect.order))


def _size_shift(pairs: Sequence[tuple[Row, Row]], metric: str, reach: float) -> Shift:
    """Of each seed, the ratio of the parameters at which the law of an option and the plain one reach it."""
    found = []
    for seed in dict.fromkeys(a["seed"] for a, _ in pairs):
        laws = [
            [(row["params_total"], row[metric]) for row in side if row["seed"] == seed]
            for side in zip(*pairs, strict=True)
        ]
        one, other = (size_to_reach(law, reach) for law in laws)
        if one is not None and other is not None:
            found.append(math.log2(one / other))
    return Shift(tuple(found), log=True)


def size_to_reach(law: Sequence[tuple[int, float]], reach: float) -> float | None:
    """The parameters at which a value is reached, by lines between sizes over log parameters.

    Args:
        law: (parameters, value) of each size.
        reach: the value.

    Returns:
        None where no size reaches it, or the smallest one does: it is not known how small would do.
    """
    points = sorted(law)
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 < reach <= y1:
            share = (reach - y0) / (y1 - y0)
            return float(math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0))))
    return None


def answer(effects: Sequence[Effect]) -> str:
    """What helps and what hurts, by setting, and how much chance there is in it."""
    sentences = []
    for setting in dict.fromkeys(effect.setting for effect in effects):
        here = [effect for effect in effects if effect.setting == setting]
        for verdict in ("helps", "hurts"):
            names = [str(e.option) for e in here if e.verdict == verdict]
            where = f"{setting}, " if setting is not None else ""
            verb = "help" if verdict == "helps" else "hurt"
            sentences.append(f"{where}{verb}: {', '.join(names) or 'none'}.")
    judged = [effect for effect in effects if effect.verdict != "too few pairs"]
    told = sum(effect.verdict in ("helps", "hurts") for effect in judged)
    sentences.append(
        f"{told} of {len(judged)} comparisons show a difference; of as many options without any effect, "
        f"{max(1, round(0.05 * len(judged)))} or more would by chance."
    )
    return "\n".join(sentences)


HEADS = ("verdict", "recall", "tokens", "parameters", "reached", "plain reached", "pairs")


def table_of(effects: Sequence[Effect], source: SweepSource) -> Table:
    """A row a comparison, what helps most first."""
    settings = [] if source.report.panel is None else [source.report.panel]
    rows = []
    for e in sorted(effects, key=lambda effect: effect.order):
        cells = [str(e.option), *([str(e.setting)] if settings else []), e.verdict]
        cells += [e.recall.text(), e.tokens.text(), e.params.text()]
        n = len(e.recall.values)
        rows.append([*cells, str(e.reached), str(e.plain_reached), str(n)])
    return [str(source.report.line), *settings, *HEADS], rows


def numbers_of(effects: Sequence[Effect]) -> Table:
    """Heads and rows of the CSV of effects."""
    heads = ["option", "setting", "verdict"]
    for name in ("recall_difference", "tokens_ratio", "params_ratio"):
        heads += [name, f"{name}_low", f"{name}_high", f"{name}_pairs"]
    rows = []
    for e in effects:
        cells: list[Any] = [e.option, e.setting, e.verdict]
        for shift in (e.recall, e.tokens, e.params):
            three = (shift.mean, *shift.interval)
            cells += [value if finite(value) else None for value in three]
            cells.append(len(shift.values))
        rows.append(cells)
    return [*heads, "reached", "plain_reached"], [
        [*row, e.reached, e.plain_reached] for row, e in zip(rows, effects, strict=True)
    ]


def draw_forest(effects: Sequence[Effect], reach: float) -> Figure:
    """A row an option: differences of recall, and ratios of tokens, with their intervals."""
    settings = list(dict.fromkeys(effect.setting for effect in effects))
    groups = [[e for e in effects if e.setting == setting] for setting in settings]
    heights = [0.35 + 0.17 * len(group) for group in groups]
    figure = new_figure(sum(heights) + 0.9)
    grid = figure.subplots(
        len(groups), 2, squeeze=False, sharex="col",
        gridspec_kw={"height_ratios": heights, "width_ratios": [1.25, 1.0]},
    )  # fmt: skip
    for (left, right), setting, group in zip(grid, settings, groups, strict=True):
        _draw_shifts(left, [(e, e.recall) for e in group], 0.0)
        _draw_shifts(right, [(e, e.tokens) for e in group], 1.0)
        left.set_yticks(range(len(group)), [str(e.option) for e in group], fontsize=7.5)
        right.set_yticks([])
        if setting is not None:
            left.set_title(str(setting), loc="left", fontsize=9)
    left, right = grid[-1]
    left.set_xlabel("recall, difference", fontsize=8)
    right.set_xlabel(f"tokens to reach {reach:g}, ratio", fontsize=8)
    ratios = [effect.tokens.mean for effect in effects if effect.tokens.values]
    if ratios and max(ratios) > 4 * min(ratios):
        right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    legend_below(figure, _legend(grid[0, 0]))
    return figure


def _draw_shifts(axes: Axes, pairs: Sequence[tuple[Effect, Shift]], none: float) -> None:
    for row, (effect, shift) in enumerate(pairs):
        if not shift.values:
            continue
        low, high = shift.interval
        if finite(low):
            axes.plot([low, high], [row, row], color=COLOURS[effect.verdict], linewidth=1.6)
        axes.plot([shift.mean], [row], "o", color=COLOURS[effect.verdict], markersize=3.5)
    axes.axvline(none, color="black", linewidth=0.7, zorder=0)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    tidy(axes, 7.5)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.6)
    axes.grid(visible=False, axis="y")


def _legend(axes: Axes) -> Axes:
    for verdict in VERDICTS[:3]:
        axes.plot([], [], "o-", color=COLOURS[verdict], markersize=3.5, label=verdict)
    return axes


def draw_laws(effects: Sequence[Effect], source: SweepSource) -> Figure:
    """The metric by parameters, of the plain recipe and of the options of the largest effects."""
    runs = runs_of(source)
    plain = next(iter(runs))
    settings = list(dict.fromkeys(effect.setting for effect in effects))
    chosen: dict[Any, None] = {}
    for setting in settings:
        here = [e for e in effects if e.setting == setting]
        helps, hurts = (
            [e.option for e in here if e.verdict == verdict] for verdict in ("helps", "hurts")
        )
        chosen |= dict.fromkeys([*helps[:SHOWN], *hurts[-SHOWN:]])
    figure = new_figure(2.7 * len(settings) + 0.7)
    every = figure.subplots(len(settings), 1, squeeze=False, sharex=True)[:, 0]
    for axes, setting in zip(every, settings, strict=True):
        for index, option in enumerate([plain, *chosen]):
            law = _law(runs[option], setting, source.report.metric)
            look: Mapping[str, Any] = (
                {"color": "black", "marker": "o", "linewidth": 2.2}
                if option == plain
                else style(index - 1)
            )
            axes.plot(
                [x for x, _ in law], [y for _, y in law], **look, markersize=4, label=str(option)
            )
        tidy(axes)
        axes.set_ylim(0, 1.02)
        axes.set_ylabel(source.report.metric, fontsize=8.5)
        axes.set_xscale("log")
        if setting is not None:
            axes.set_title(str(setting), loc="left", fontsize=9)
    every[-1].set_xlabel("total parameters")
    legend_below(figure, every[0])
    return figure


def _law(runs: Runs, setting: Any, metric: str) -> list[tuple[float, float]]:
    by_size: dict[Any, list[Row]] = {}
    for (where, size, _), row in runs.items():
        if where == setting:
            by_size.setdefault(size, []).append(row)
    return sorted(
        (fmean(row["params_total"] for row in rows), fmean(row[metric] for row in rows))
        for rows in by_size.values()
    )
