"""The figures of learning dynamics, of runs and sweeps that are only numbers."""

import csv

import pytest
from plot_toys import ACC, grid, write_folder

from toolmem.analysis.dynamics import KINDS, passed, story
from toolmem.analysis.dynamics_plot import applies, panels
from toolmem.analysis.page import Request, plot
from toolmem.analysis.sources import RunSource, open_source
from toolmem.errors import ToolmemError
from toolmem.sweeps import SweepRecipe, expand

STEPS = (0, 1, 10, 100, 1000)


def write_run(folder, known, unseen=None, kinds=("query", "name", "copied", "other"), steps=STEPS):
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"recall/exact_match": known} | (
        {"recall/unseen/exact_match": unseen} if unseen else {}
    )
    for number, kind in enumerate(kinds):
        for who in ("known", "unseen") if unseen else ("known",):
            columns[f"loss/{who}/{kind}"] = [
                5 / (number + place + 1) for place in range(len(steps))
            ]
            columns[f"accuracy/{who}/{kind}"] = [0.1 * place for place in range(len(steps))]
    with open(folder / "metrics.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["step", *columns])
        writer.writerows([step, *(c[i] for c in columns.values())] for i, step in enumerate(steps))
    return folder


@pytest.mark.parametrize(
    ("curve", "step"),
    [
        ({0: 0.0, 100: 0.25, 200: 0.75}, 150.0),
        ({10: 0.6, 20: 0.1, 30: 0.9}, 10.0),
        ({0: 0.0, 10: 0.5}, 10.0),
        ({0: 0.0, 8: 1.0, 9: 0.0, 10: 1.0}, 4.0),
        ({0: 0.1, 10: 0.49}, None),
        ({}, None),
    ],
)
def test_where_a_curve_passes_the_level(curve, step):
    assert passed(dict(reversed(curve.items()))) == step


def test_in_words():
    assert story({"known": 100.0, "unseen": 1500.0}) == (
        "Recall of known people passes 0.5 at step 100, of unseen people at step 1,500, 1,400 later."
    )
    assert "40 earlier" in story({"known": 100.0, "unseen": 60.0})
    assert "never: what is learned is these people" in story({"known": 9.0, "unseen": None})
    assert story({"known": None}) == "Recall of known people never reaches 0.5."
    assert story({"known": 7.0}) == "Recall of known people passes 0.5 at step 7."


def lines_of(axes):
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def test_a_run(tmp_path):
    known, unseen = [0.0, 0.0, 0.4, 0.9, 1.0], [0.0, 0.0, 0.0, 0.1, 0.9]
    source = RunSource.open(write_run(tmp_path / "run", known, unseen))
    assert applies(source)
    (panel,) = panels(source, Request())
    top, bottom = panel.figure.axes
    # step 0 stands left of step 1
    assert lines_of(top)["recall, known"] == ([0.5, 1, 10, 100, 1000], known)
    assert lines_of(top)["recall, unseen"][1] == unseen
    assert set(lines_of(bottom)) == {"query", "name", "copied", "other"}
    at = [line.get_xdata()[0] for line in top.get_lines() if line.get_label().startswith("_")]
    assert at == pytest.approx([10 + 90 * 0.1 / 0.5, 100 + 900 * 0.4 / 0.8])
    assert "passes 0.5 at step 28, of unseen people at step 550, 522 later" in panel.text
    table = {row[0]: row[1:] for row in panel.table[1]}
    assert table["recall, known"] == ["0", "0.5", "1"]
    assert table["loss of query, known"] == ["5", f"{5 / 3 - (5 / 3 - 5 / 4) * 0.2:.3g}", "1"]
    heads, rows = panel.records
    assert len(rows) == len(STEPS) and len(heads) == 1 + 2 + 8 + 8
    paths = plot(tmp_path / "run", kind="dynamics")
    assert {path.name for path in paths} == {"report.html", "dynamics.csv"}
    with open(tmp_path / "run" / "dynamics.csv") as stream:
        written = list(csv.DictReader(stream))
    assert [float(row["recall/exact_match"]) for row in written] == known


def test_a_run_without_unseen_people(tmp_path):
    source = RunSource.open(write_run(tmp_path / "r", [0, 0, 0, 0.1, 0.2], kinds=["memorised"]))
    (panel,) = panels(source, Request())
    assert panel.text.endswith("never reaches 0.5.")
    assert set(lines_of(panel.figure.axes[1])) == {"memorised"} <= set(KINDS)


def test_what_cannot_be_drawn(tmp_path):
    source = RunSource.open(write_run(tmp_path / "once", [0.3], kinds=[], steps=(9,)))
    assert not applies(source)
    with pytest.raises(ToolmemError, match="no recall at several steps: train with --recall"):
        panels(source, Request())


def make_sweep(tmp_path, **report):
    written = grid(
        axes={
            "lr": {"key": "model.optimizer.lr", "values": [0.01, 0.1]},
            "warmup": {"key": "model.schedule.warmup_steps", "values": [0, 5]},
            "width": {"key": "model.model.dim", "values": report.pop("widths", [4])},
        },
        report={
            "kind": "dynamics", "metric": ACC, "x": "lr", "line": "warmup", "best_over": ["width"],
        } | report,
    )  # fmt: skip
    folder = write_folder(tmp_path / "sweep", written, lambda run: {ACC: 0.5})
    for run in expand(SweepRecipe.read(folder / "sweep.yaml")):
        fast = run.settings["lr"] == 0.1
        known = [0, 0, 0.1 * (1 + run.seed), 0.9, 1] if fast else [0, 0, 0, 0, 0.2]
        write_run(folder / "runs" / run.name, known, [0, 0, 0, 0.2, 0.8] if fast else [0] * 5)
    return folder


def test_a_sweep(tmp_path):
    folder = make_sweep(tmp_path)
    source = open_source(folder)
    assert applies(source)
    steps, curves = panels(source, Request())
    assert curves.name == "dynamics_curves" and len(curves.figure.axes) == 2
    passing = [10 + 90 * (0.5 - low) / (0.9 - low) for low in (0.1, 0.2)]
    rows = {tuple(row[:2]): row[2:] for row in steps.table[1]}
    mean = sum(passing) / 2
    assert rows["0.1", "0"][:2] == [
        f"{mean:,.0f} ({min(passing):,.0f} to {max(passing):,.0f})",
        "550 (550 to 550)",
    ]
    assert rows["0.01", "5"] == ["never", "never", "", "0.200", "0.000", "2"]
    drawn = steps.figure.axes[0].containers
    assert [one.get_label() for one in drawn] == [
        f"warmup {warmup}, {who}" for warmup in (0, 5) for who in ("known", "unseen")
    ]
    assert list(drawn[0].lines[0].get_ydata()) == pytest.approx([1500, mean])  # 1,500: never
    assert list(drawn[1].lines[0].get_ydata()) == pytest.approx([1500, 550])
    heads, records = steps.records
    cell = [dict(zip(heads, row, strict=True)) for row in records]
    fast = [one for one in cell if one["lr"] == 0.1 and one["warmup"] == 0]
    assert sorted(one["step_known"] for one in fast) == pytest.approx(sorted(passing))
    assert {one["step_unseen"] for one in cell if one["lr"] == 0.01} == {None}
    assert fast[0]["last loss/known/query"] == 1.0
    names = {path.name for path in plot(folder, tmp_path / "out", kind="dynamics")}
    assert names == {"report.html", "dynamics.csv"}


def test_axes_that_fall_together_are_refused(tmp_path):
    source = open_source(make_sweep(tmp_path, widths=[4, 8]))
    with pytest.raises(ToolmemError, match="width has several values"):
        panels(source, Request())
