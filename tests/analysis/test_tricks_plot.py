"""Options against the plain recipe: shifts worked out by hand, pair by pair."""

from __future__ import annotations

import math

import pytest
from plot_toys import source_of
from sweep_toys import BASE, row, sweep_with

from toolmem.analysis.page import Request
from toolmem.analysis.tricks_plot import (
    Shift,
    draw_forest,
    draw_laws,
    effects_of,
    panels,
    size_to_reach,
    table_of,
)
from toolmem.errors import ToolmemError
from toolmem.sweeps import SweepRecipe

RECALL = "recall/exact_match"
SIZES = (100, 200, 400)


def sweep(**report):
    axes = {
        "setting": {"in_weight": {}, "in_tool": {"data.setting": "in_tool"}},
        "size": {n: {"model.model.dim": n // 10} for n in SIZES},
        "option": {
            name: {"model.optimizer.lr": lr}
            for name, lr in (("plain", 1), ("good", 2), ("bad", 3), ("same", 4), ("quick", 5))
        },
    }
    drawn = {"kind": "tricks", "x": "size", "line": "option", "panel": "setting", "metric": RECALL}
    base = BASE | {"recall": {"stop_at": 0.9}}
    return SweepRecipe.parse(
        sweep_with(
            name="tricks", base=base, axes=axes, seeds=2, metrics=[RECALL], report=drawn | report
        ),
        "tricks",
    )


def rows():
    """In weight plain recalls 0.3, 0.6, 0.9 by size, 0.02 more with seed 1; in tool nothing is reached."""
    found = []
    for setting in ("in_weight", "in_tool"):
        for index, size in enumerate(SIZES):
            for seed in (0, 1):
                plain = round(0.3 * (index + 1), 1) + 0.02 * seed if setting == "in_weight" else 0.1
                values = {
                    "plain": (plain, 1000), "good": (plain + 0.2, 1000),
                    "bad": (plain - 0.1 - 0.05 * seed, 1000),
                    "same": (plain + (0.01 if seed else -0.01), 1000), "quick": (plain, 500),
                }  # fmt: skip
                for option, (recall, tokens) in values.items():
                    settings = {"setting": setting, "size": size, "option": option}
                    name = f"{setting}{size}{option}{seed}"
                    made = {RECALL: recall, "tokens": tokens, "params_total": size}
                    found.append(row(name, settings, seed=seed, **made))
    return found


def by_key(effects):
    return {(effect.option, effect.setting): effect for effect in effects}


def test_shifts_by_hand():
    effects = by_key(effects_of(source_of(sweep(), rows())))
    assert len(effects) == 8
    good = effects["good", "in_weight"]
    # none counts above 0.9, which plain reaches at the largest size already
    assert good.recall.values == pytest.approx((0.2, 0.2, 0.2, 0.2, 0.0, 0.0))
    assert (good.reached, good.plain_reached) == (2, 2)
    assert good.verdict == "helps"
    bad = effects["bad", "in_weight"]
    assert bad.recall.mean == pytest.approx(-(0.1 + 0.15 + 0.1 + 0.15 + 0.1 + 0.13) / 6)
    assert (bad.verdict, bad.tokens.values) == ("hurts", ())
    assert effects["same", "in_tool"].recall.mean == pytest.approx(0)
    assert effects["same", "in_tool"].verdict == "no difference"
    assert effects["good", "in_tool"].recall.mean == pytest.approx(0.2)


def test_tokens_of_pairs_that_both_reached_it():
    quick = by_key(effects_of(source_of(sweep(), rows())))["quick", "in_weight"]
    assert quick.tokens.values == pytest.approx((-1.0, -1.0))
    assert quick.tokens.mean == pytest.approx(0.5)
    assert quick.verdict == "no difference"  # two pairs alone
    more = [dict(one, **{RECALL: 0.95}) for one in rows()]
    quick = by_key(effects_of(source_of(sweep(), more)))["quick", "in_weight"]
    assert len(quick.tokens.values) == 6
    assert (quick.recall.mean, quick.tokens.mean, quick.verdict) == (0, 0.5, "helps")
    assert quick.tokens.text() == "x 0.50 [0.50, 0.50]"


def test_sizes_at_which_it_is_reached():
    """Half-way between two values is the geometric mean of their sizes."""
    assert size_to_reach([(400, 1.0), (100, 0.0)], 0.5) == pytest.approx(200)
    assert size_to_reach([(100, 0.1), (200, 0.5), (400, 0.9)], 0.9) == pytest.approx(400)
    assert size_to_reach([(100, 0.1), (200, 0.5)], 0.9) is None
    assert size_to_reach([(100, 0.95), (200, 0.99)], 0.9) is None
    good = by_key(effects_of(source_of(sweep(), rows())))["good", "in_weight"]

    def sizes(*laws):
        return [size_to_reach(list(zip(SIZES, law, strict=True)), 0.9) for law in laws]

    plain = sizes((0.3, 0.6, 0.9), (0.32, 0.62, 0.92))
    better = sizes((0.5, 0.8, 1.1), (0.52, 0.82, 1.12))
    wanted = math.prod(b / p for b, p in zip(better, plain, strict=True)) ** 0.5
    assert good.params.mean == pytest.approx(wanted)
    assert wanted < 1


def test_intervals():
    shift = Shift((0.1, 0.2, 0.3, 0.4))
    low, high = shift.interval
    assert 0.1 <= low < shift.mean < high <= 0.4
    assert (shift.sign, Shift((-0.1, 0.1, 0.0)).sign, Shift((1.0, 1.0)).sign) == (1, 0, 0)
    assert math.isnan(Shift(()).mean)
    assert Shift((1.0,)).text() == "+1.000"


def test_the_table_is_sorted_by_effect():
    source = source_of(sweep(), rows())
    heads, cells = table_of(effects_of(source), source)
    assert heads[:4] == ["option", "setting", "verdict", "recall"]
    verdicts = [line[2] for line in cells]
    assert verdicts == ["helps"] * 2 + ["no difference"] * 4 + ["hurts"] * 2
    assert cells[0][:2] == ["good", "in_tool"]  # 0.2 on all six pairs
    assert cells[-1][0] == "bad"
    assert cells[0][3] == "+0.200 [+0.200, +0.200]"


def test_the_panels():
    forest, laws = panels(source_of(sweep(), rows()), Request())
    assert (forest.name, laws.name) == ("tricks", "tricks_effects")
    assert "in_weight, help: good.\nin_weight, hurt: bad.\nin_tool, help: good." in forest.text
    assert "4 of 8 comparisons show a difference" in forest.text
    assert "tokens to reach 0.9" in forest.caption
    assert len(forest.data[1]) == 60
    heads, records = laws.data
    assert heads[:7] == [
        "option", "setting", "verdict", "recall_difference", "recall_difference_low",
        "recall_difference_high", "recall_difference_pairs",
    ]  # fmt: skip
    assert records[0][:4] == ["good", "in_weight", "helps", pytest.approx(0.8 / 6)]
    assert len(laws.csv().splitlines()) == 9


def test_what_is_drawn():
    source = source_of(sweep(), rows())
    figure = draw_forest(effects_of(source), 0.9)
    left = figure.axes[0]
    assert left.get_yticklabels()[0].get_text() == "good"
    assert left.get_title(loc="left") == "in_weight"
    laws = draw_laws(effects_of(source), source)
    names = [line.get_label() for line in laws.axes[0].lines]
    assert names == ["plain", "good", "bad"]
    assert list(laws.axes[0].lines[0].get_ydata()) == pytest.approx([0.31, 0.61, 0.91])


def test_sweeps_that_compare_no_options():
    with pytest.raises(ToolmemError, match="to compare options, its report needs `line`"):
        effects_of(source_of(sweep(line=None, best_over=["option"]), rows()))
    without = [one for one in rows() if one["settings"]["option"] != "plain"]
    with pytest.raises(ToolmemError, match="no run of option plain has recall/exact_match"):
        effects_of(source_of(sweep(), without))
    few = [one for one in rows() if one["settings"]["size"] == 100]
    assert {e.verdict for e in effects_of(source_of(sweep(), few))} == {"too few pairs"}
