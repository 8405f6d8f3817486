"""Searches by results alone: what they want next, whatever comes in whatever order, and what they find."""

from __future__ import annotations

import random

import pytest
from sweep_toys import BASE, row, sweep_with

from toolmem.errors import ToolmemError
from toolmem.sweeps import SweepRecipe
from toolmem.sweeps.search import FURTHER, SearchPlan, check_order

WIDTHS = [2, 4, 6, 8, 10, 12, 14, 16]
FAMILY = {"key": "model.model.dim", "values": WIDTHS}
METRIC = "recall/exact_match"


def recipe(**changes):
    written = sweep_with(
        axes={"pairs": {"key": "data.n_pairs", "values": [1, 2, 3]}},
        search={"family": FAMILY, "metric": METRIC, "reach": 0.95},
        metrics=[METRIC],
        seeds=3,
        report=None,
    )
    return SweepRecipe.parse(written | changes, "toy")


def result(run, value, **changes):
    width = run.settings["member"]
    return row(run.name, run.settings, seed=run.seed, params_total=100 * width,
               params_non_embedding=width, **{METRIC: value}, **changes)  # fmt: skip


def train(plan, value_of, workers=2, rows=None, order=None, most=10_000):
    """What the runner does, with results at once; runs end in an order of their own."""
    rows = {} if rows is None else rows
    running = {}
    source = random.Random(order)
    while most:
        for job in plan.wanted(rows):
            if len(running) < workers:
                running.setdefault(job.run.name, job.run)
        if not running:
            break
        name = source.choice(sorted(running))
        run = running.pop(name)
        assert name not in rows, "trained twice"
        value = value_of(run)
        rows[name] = result(run, value) if value is not None else result(run, 0, status="failed")
        most -= 1
    return rows


def needs(run):
    """Pairs and seed decide the width that it takes."""
    smallest = {1: 4, 2: 8, 3: 14}[run.settings["pairs"]] + 2 * (run.seed % 2)
    return 1.0 if run.settings["member"] >= smallest else 0.5


def found(plan, rows):
    return {
        (a["settings"]["pairs"], a["seed"], a["reach"]): (a["status"], a["member"], a["monotone"])
        for a in plan.answers(rows)
    }


EXPECTED = {
    (pairs, seed, 0.95): ("found", str(smallest + 2 * (seed % 2)), True)
    for pairs, smallest in {1: 4, 2: 8, 3: 14}.items()
    for seed in (0, 1, 2)
}


@pytest.mark.parametrize("workers", [1, 2, 7, 40])
def test_the_smallest_for_each_combination_and_seed(workers):
    plan = SearchPlan(recipe())
    rows = train(plan, needs, workers, order=workers)
    assert found(plan, rows) == EXPECTED
    assert plan.to_go(rows) == 0
    assert plan.summary(rows) == "9 of 9 searches over"
    if (
        workers <= 2
    ):  # nobody was idle: log2 and the member above, then a few around the last answer
        assert len(rows) <= 3 * (4 + 4 + 4)
    answer = plan.answers(rows)[0]
    assert answer["params_total"] == 400
    assert answer["value"] == 1.0
    assert rows[answer["run"]]["settings"]["member"] == 4
    assert answer["runs_failed"] == 0


@pytest.mark.parametrize("after", [1, 5, 11, 20])
def test_killed_and_begun_again_it_finds_the_same(after):
    rows = train(SearchPlan(recipe()), needs, order=after, most=after)
    plan = SearchPlan(recipe())
    train(plan, needs, rows=rows, order=after + 1)
    assert found(plan, rows) == EXPECTED


def test_a_changed_recipe_adds_only_what_is_new():
    rows = train(SearchPlan(recipe()), needs)
    before = len(rows)
    wider = {"pairs": {"key": "data.n_pairs", "values": [1, 2, 3]}}
    more = SearchPlan(recipe(axes=wider, seeds=4))
    train(more, needs, rows=rows)
    assert 0 < len(rows) - before <= 3 * 4  # three searches of the fourth seed
    assert len(more.answers(rows)) == 12


def test_several_values_share_their_runs():
    search = {"family": FAMILY, "metric": METRIC, "reach": [0.5, 0.95]}
    plan = SearchPlan(recipe(search=search))
    rows = train(plan, lambda run: min(run.settings["member"] / 12, 1.0))
    answers = found(plan, rows)
    assert {answers[2, seed, 0.5] for seed in (0, 1, 2)} == {("found", "6", True)}
    assert {answers[2, seed, 0.95] for seed in (0, 1, 2)} == {("found", "12", True)}
    assert len(rows) <= 3 * 3 * 7


def test_none_reaches_it():
    plan = SearchPlan(recipe())
    rows = train(plan, lambda run: 0.2, workers=1)
    assert set(found(plan, rows).values()) == {("none", None, True)}
    assert plan.answers(rows)[0]["params_total"] is None
    # the later seeds begin with the largest, and are over at once
    assert sum(r["seed"] > 0 for r in rows.values()) == 2 * 3


def test_a_contradiction_is_decided_by_further_seeds():
    def value(run):
        if run.settings["pairs"] == 1 and run.settings["member"] == 6 and run.seed == 0:
            return 0.1  # bad luck of the one above
        return needs(run)

    plan = SearchPlan(recipe(seeds=1))
    rows = train(plan, value, workers=1)
    assert found(plan, rows)[1, 0, 0.95] == ("found", "4", True)
    assert {r["seed"] for r in rows.values()} == {0, FURTHER, 2 * FURTHER}


def test_a_failed_run_does_not_reach_it_and_stops_nothing():
    plan = SearchPlan(recipe(seeds=1))
    rows = train(plan, lambda run: None if run.settings["member"] > 12 else needs(run))
    answers = {a["settings"]["pairs"]: a for a in plan.answers(rows)}
    assert answers[1]["status"] == answers[2]["status"] == "found"
    assert (answers[3]["status"], answers[3]["runs_failed"] > 0) == ("none", True)


def test_idle_workers_try_ahead():
    one = recipe(axes={"pairs": {"key": "data.n_pairs", "values": [1]}})
    jobs = [job.run.settings["member"] for job in SearchPlan(one).wanted({})]
    assert jobs == [WIDTHS[3], WIDTHS[1], WIDTHS[5]]  # the middle, and the middles of both halves


def test_expected_runs_are_those_of_searches_with_every_answer():
    plan = SearchPlan(recipe(seeds=1))
    counts = []
    for smallest in [*WIDTHS, 99]:
        one = SearchPlan(recipe(seeds=1, axes={"pairs": {"key": "data.n_pairs", "values": [1]}}))
        rows = train(one, lambda run, s=smallest: float(run.settings["member"] >= s), workers=1)
        counts.append(len(rows))
    assert plan.expected_runs(True) == pytest.approx(sum(counts) / len(counts))
    assert plan.most_runs() == max(counts)
    assert sum(plan.share_of_members().values()) == pytest.approx(plan.expected_runs(True))


def test_a_family_out_of_order_is_refused_by_its_members():
    sweep = recipe()
    plan = SearchPlan(sweep)
    runs = [plan.run_of({"pairs": p}, 0, m, 0) for p in (1, 2, 3) for m in range(len(WIDTHS))]
    sizes = {run.name: 100 * run.settings["member"] for run in runs}
    check_order(sweep, sizes)
    sizes[runs[3].name] = 600
    with pytest.raises(ToolmemError, match="6 has 600 parameters and 8, which comes after it, 600"):
        check_order(sweep, sizes)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"famly": FAMILY}, "search.famly: a sweep has no such key"),
        ({"family": [1, 2], "metric": METRIC, "reach": 1}, r"search.family is \[1, 2\]"),
        ({"family": {"key": "x", "values": [1]}, "metric": METRIC, "reach": 1}, "at least two"),
        ({"family": FAMILY, "metric": "recall", "reach": 1}, "search.metric is 'recall'"),
        ({"family": FAMILY, "metric": METRIC}, "search.reach is None"),
        ({"family": FAMILY, "metric": METRIC, "reach": [0.5, 0.5]}, "search.reach is"),
        ({"family": FAMILY, "metric": METRIC, "reach": 1, "check": 1}, "search.check is 1"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(search, message):
    with pytest.raises(ToolmemError, match=message):
        recipe(search=search)


def test_runs_that_end_too_early_are_refused():
    base = BASE | {"recall": {"stop_at": 0.9}}
    with pytest.raises(ToolmemError, match=r"recall.stop_at 0.9, before they can reach 0.95"):
        recipe(base=base)


def test_an_axis_cannot_be_called_as_the_familys_column():
    with pytest.raises(ToolmemError, match=r"axes.member: every result"):
        recipe(axes={"member": {"key": "data.n_pairs", "values": [1, 2]}})
