"""Successive halving by results alone: who goes on from each rung, worked out by hand."""

from __future__ import annotations

import copy
import math

import pytest
from sweep_toys import BASE, row, sweep_with

from toolmem.errors import ToolmemError
from toolmem.sweeps import SweepRecipe
from toolmem.sweeps.plans import GridPlan, make_plan
from toolmem.sweeps.recipe import HALVED

RATES = [0.1, 0.2, 0.3, 0.4, 0.5]
HALVING = {"axis": "lr", "metric": "val/loss", "rungs": [10, 20]}


def recipe(**changes):
    base = copy.deepcopy(BASE)
    base["trainer"]["max_steps"] = 40
    written = sweep_with(
        base=base,
        axes={
            "width": {"key": "model.model.dim", "values": [4, 8]},
            "lr": {"key": "model.optimizer.lr", "values": RATES},
        },
        halving=HALVING,
        seeds=2,
        report=None,
    )
    return SweepRecipe.parse(written | changes, "toy")


def train(plan, value_of, rows=None, most=1000):
    rows = {} if rows is None else rows
    while most and (jobs := plan.wanted(rows)):
        job = jobs[0]
        assert not job.is_done_by(rows.get(job.run.name))
        steps = job.until or 40
        rows[job.run.name] = row(
            job.run.name, job.run.settings, seed=job.run.seed, steps=steps,
            stopped=HALVED if job.until else None, **{"val/loss": value_of(job.run, steps)},
            judged={str(at): value_of(job.run, at) for at in job.judged[1] if at <= steps},
        )  # fmt: skip
        most -= 1
    return rows


def far_from_the_best(run, steps):
    """Width 4 likes 0.31; at width 8 0.1 looks best until step 10, and seeds disagree about 0.5."""
    lr = run.settings["lr"]
    if run.settings["width"] == 4:
        return abs(lr - 0.31)
    if lr == 0.5:
        return 0.0 if run.seed == 0 else 9.0
    return lr if steps == 10 else 1 - lr


def steps_by_setting(rows):
    found = {}
    for r in rows.values():
        found.setdefault(tuple(r["settings"].values()), set()).add(r["steps"])
    return found


def test_the_better_half_goes_on_by_the_mean_over_seeds():
    plan = make_plan(recipe())
    rows = train(plan, far_from_the_best)
    steps = steps_by_setting(rows)
    # of 5, 3 go on, and of them 2
    assert steps == {
        (4, 0.1): {10}, (4, 0.2): {20}, (4, 0.3): {40}, (4, 0.4): {40}, (4, 0.5): {10},
        (8, 0.1): {20}, (8, 0.2): {40}, (8, 0.3): {40}, (8, 0.4): {10}, (8, 0.5): {10},
    }  # fmt: skip
    assert plan.to_go(rows) == 0
    assert plan.keeps(rows) == set()


def test_to_go_and_whose_checkpoints_stay():
    plan = make_plan(recipe())
    assert plan.to_go({}) == 2 * 2 * (5 + 3 + 2)
    rows = train(plan, far_from_the_best, most=10)  # width 4 is at its first rung
    assert {rows[name]["settings"]["lr"] for name in plan.keeps(rows)} == {0.2, 0.3, 0.4}
    assert plan.to_go(rows) == 2 * (3 + 2) + 2 * (5 + 3 + 2)
    assert plan.share_of_steps(plan.runs[0]) == pytest.approx((50 + 3 * 10 + 2 * 20) / 200)


@pytest.mark.parametrize("after", [3, 12, 19])
def test_killed_and_begun_again_it_ends_the_same(after):
    whole = train(make_plan(recipe()), far_from_the_best)
    rows = train(make_plan(recipe()), far_from_the_best, most=after)
    assert train(make_plan(recipe()), far_from_the_best, rows) == whole


def test_what_failed_or_diverged_ends():
    def value(run, steps):
        return math.nan if run.settings["lr"] <= 0.3 else run.settings["lr"]

    plan = make_plan(recipe())
    rows = train(plan, value)
    steps = steps_by_setting(rows)
    assert {lr for (_, lr), n in steps.items() if n == {40}} == {0.4, 0.5}
    none = train(make_plan(recipe()), lambda run, steps: math.nan)
    assert {r["steps"] for r in none.values()} == {10}


def test_a_grid_trains_what_halving_left():
    rows = train(make_plan(recipe()), far_from_the_best)
    grid = make_plan(recipe(halving=None))
    assert isinstance(grid, GridPlan)
    whole = {name for name, r in rows.items() if r["steps"] == 40}
    assert {job.run.name for job in grid.wanted(rows)} == set(rows) - whole
    assert {r["name"] for r in grid.mine(rows)} == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": "rate"}, "halving.axis is 'rate'"),
        ({"metric": "loss"}, "halving.metric is 'loss'"),
        ({"keep": 1}, "halving.keep is 1"),
        ({"rungs": []}, r"halving.rungs is \[\]"),
        ({"rungs": [20, 10]}, "each must be later"),
        ({"rungs": [10, 40]}, "ends at 40, base.trainer.max_steps is 40"),
        ({"mode": "up"}, "halving.mode is 'up'"),
        ({"rung": [1]}, "halving.rung: a sweep has no such key"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(changes, message):
    with pytest.raises(ToolmemError, match=message):
        recipe(halving=HALVING | changes)


def test_not_with_a_search():
    family = {"key": "model.model.n_layers", "values": [1, 2]}
    search = {"family": family, "metric": "val/loss", "reach": 1}
    with pytest.raises(ToolmemError, match="search and halving are both there"):
        recipe(search=search)
