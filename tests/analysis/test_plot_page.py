"""``toolmem plot DIR``: which kinds a folder has, the files, and folders that have nothing to draw."""

from __future__ import annotations

import csv
import json
import sys
import types

import duckdb
import pytest
from plot_toys import ACC, grid, write_folder
from sweep_toys import sweep_with

import toolmem.analysis
from toolmem.analysis import page
from toolmem.analysis.page import kinds, load_kind, panels_of, plot, summary
from toolmem.analysis.sources import RunSource, SweepSource, open_source
from toolmem.errors import ToolmemError


def accuracy(run):
    return {ACC: 0.1 * run.seed + run.settings["width"] / 10 - run.settings["lr"]}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep's folder: look, but do not touch."""
    return write_folder(tmp_path_factory.mktemp("plot") / "first", grid(), accuracy)


@pytest.fixture
def run(tmp_path):
    """A run's folder, of a run that asked twice."""
    folder = tmp_path / "second"
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "step,train/loss,val/loss,recall/exact_match,recall/unseen/exact_match,train/tokens\n"
        "10,3.0,,,,100\n20,2.0,2.5,0.25,0.0,200\n40,1.0,1.5,0.75,0.5,400\n"
    )
    (folder / "config.yaml").write_text("seed_everything: 7\nname: second\n")
    about = {"processor": "A processor", "torch_threads": 2, "packages": {"torch": "2"}, "gpus": []}
    (folder / "environment.json").write_text(json.dumps(about))
    for step, text in ((20, "never"), (100, "Who <b>?")):
        turn = {"role": "user", "text": text}
        sample = {"split": "known", "correct": False, "expected": "42", "turns": [turn]}
        (folder / "samples" / f"step_{step}.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def test_each_kind_says_what_it_draws():
    assert {"sweep", "searches", "halving", "curves", "norms"} <= set(kinds())
    for kind in kinds():
        assert len(summary(kind)) > 20, kind
        module = load_kind(kind)
        assert callable(module.applies) and callable(module.panels)


def test_a_kind_is_one_file(monkeypatch, sweep, tmp_path):
    """A file of the right name is found, drawn, and can be asked for alone; nothing else names it."""
    (tmp_path / "dots_plot.py").write_text(
        '"""Dots."""\n'
        "from toolmem.analysis.report import Panel\n"
        "applies = lambda source: True\n"
        "def panels(source, request):\n"
        "    return [Panel('dots', 'Dots.', table=(['a'], [['1']]))]\n"
    )
    monkeypatch.setattr(toolmem.analysis, "__path__", [*toolmem.analysis.__path__, str(tmp_path)])
    assert summary("dots") == "Dots."
    every = panels_of(open_source(sweep), page.Request())
    assert [panel.name for panel in every] == ["dots", "toy"]
    assert [path.name for path in plot(sweep, tmp_path / "x.html", kind="dots")] == [
        "x.html",
        "dots.csv",
    ]
    sys.modules.pop("toolmem.analysis.dots_plot")


def test_a_sweeps_page(sweep, tmp_path):
    written = plot(sweep, tmp_path / "out", pictures=("pdf", "svg"))
    assert [path.name for path in written] == ["report.html", "toy.csv", "toy.pdf", "toy.svg"]
    text = written[0].read_text()
    for word in (
        "16 runs.",
        "seeds 0, 1",
        "A processor",
        "16 s of training",
        "best lr",
        "model.optimizer.lr",
    ):
        assert word in text, word
    with open(written[1], newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 16
    assert (rows[0]["kind"], rows[0]["params_untied"], rows[0]["processor"]) == (
        "b",
        "140",
        "A processor",
    )
    assert float(rows[0][ACC]) == pytest.approx(0.3)


def test_pictures_alone(sweep, run, tmp_path):
    written = plot(sweep, tmp_path / "figure.pdf")
    assert [path.name for path in written] == ["figure.pdf", "toy.csv"]
    assert written[0].read_bytes().startswith(b"%PDF")
    several = plot(run, tmp_path / "run.svg")
    assert [path.name for path in several if path.suffix == ".svg"] == [
        "run_second_loss.svg", "run_second_recall.svg"
    ]  # fmt: skip
    with pytest.raises(ToolmemError, match=r"x.docx must end in .html"):
        plot(sweep, tmp_path / "x.docx")


def test_another_metric_of_a_sweep(sweep, tmp_path):
    page = plot(sweep, tmp_path / "report.html", metric="seconds")[0].read_text()
    assert "seconds by width, the best over lr" in page
    with pytest.raises(
        ToolmemError, match=f"no run has 'recall/exact_match'; there are {ACC}, params_total"
    ):
        plot(sweep, tmp_path / "report.html", metric="recall/exact_match")


def test_a_runs_page(run, tmp_path):
    source = open_source(run)
    assert isinstance(source, RunSource)
    assert [panel.name for panel in panels_of(source, page.Request())] == [
        "second_loss",
        "second_recall",
    ]
    loss, recall = panels_of(source, page.Request())
    assert loss.table[1] == [
        ["train/loss", "1 at 40", "3 at 10", "1 at 40", "3"],
        ["val/loss", "1.5 at 40", "2.5 at 20", "1.5 at 40", "2"],
    ]
    assert recall.csv() == (
        "step,recall/exact_match,recall/unseen/exact_match\n20,0.25,0.0\n40,0.75,0.5\n"
    )
    [axes] = recall.figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.25, 0.75], [0.0, 0.5]]
    text = plot(run)[0].read_text()
    assert plot(run)[0] == run / "report.html"
    for word in (
        "40 steps, 400 tokens.",
        "Who &lt;b&gt;?",
        "wrong, it is 42",
        "A processor",
        "<dd>7</dd>",
    ):
        assert word in text, word
    assert "never" not in text  # of an earlier round
    [alone] = panels_of(open_source(run, "train/tokens"), page.Request())
    assert alone.name == "second_train_tokens"
    with pytest.raises(ToolmemError, match="never logged 'nothing'; there are train/loss"):
        plot(run, metric="nothing")


def test_a_run_of_a_kind_that_it_has_not(run, sweep):
    with pytest.raises(ToolmemError, match="is no sweep"):
        plot(run, kind="sweep")
    with pytest.raises(ToolmemError, match="is no run's folder"):
        plot(sweep, kind="curves")
    with pytest.raises(ToolmemError, match="no kind of figure 'pie'; there are"):
        plot(sweep, kind="pie")


def test_folders_with_nothing_to_draw(run, tmp_path):
    with pytest.raises(ToolmemError, match="there is no such folder"):
        plot(tmp_path / "missing")
    with pytest.raises(
        ToolmemError, match=r"is neither a sweep's folder .* the runs in it are second"
    ):
        plot(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "sweep.yaml").write_text("base: {a: 1}\naxes: {b: {key: a, values: [1, 2]}}\n")
    with pytest.raises(ToolmemError, match="empty has no results yet: `toolmem sweep"):
        plot(empty)
    (run / "metrics.csv").write_text("step\n")
    with pytest.raises(ToolmemError, match=r"metrics.csv is empty"):
        plot(run)
    (run / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ToolmemError, match="is no file of metrics"):
        plot(run)


def test_results_of_another_sweep(sweep, tmp_path):
    folder = write_folder(tmp_path / "other", sweep_with(), lambda run: {"val/loss": 1.0})
    (folder / "sweep.yaml").write_bytes((sweep / "sweep.yaml").read_bytes())
    with pytest.raises(ToolmemError) as raised:
        plot(folder)
    assert "has 4 runs, and none is of" in str(raised.value)
    assert "another sweep's, over width, lr" in str(raised.value)
    (folder / "results.duckdb").unlink()
    duckdb.connect(str(folder / "results.duckdb")).execute("CREATE TABLE t (a INT)").close()
    with pytest.raises(ToolmemError, match="holds no results of a sweep"):
        plot(folder)


def test_a_metric_that_no_run_has(tmp_path):
    folder = write_folder(tmp_path / "none", grid(), lambda run: {ACC: None})
    with pytest.raises(ToolmemError, match=f"no run that is done has {ACC}"):
        plot(folder)


def test_results_of_an_older_version(tmp_path):
    """Without processor and params_untied: read, drawn, and told by the runs' own folders."""
    folder = write_folder(tmp_path / "old", grid(), accuracy)
    with duckdb.connect(str(folder / "results.duckdb")) as connection:
        for column in ("processor", "params_untied"):
            connection.execute(f"ALTER TABLE runs DROP COLUMN {column}")
        [(name,)] = connection.execute("SELECT name FROM runs LIMIT 1").fetchall()
    source = SweepSource.open(folder)
    assert source.processors() == "unknown"
    (folder / "runs" / name).mkdir(parents=True)
    (folder / "runs" / name / "environment.json").write_text('{"processor": "An old one"}')
    assert source.processors() == "An old one"
    heads, rows = source.records()
    assert {row[heads.index("params_untied")] for row in rows} == {None}


def test_a_sweep_that_says_nothing_of_a_plot(tmp_path):
    """Along its first axis of numbers, lines of the next; its files are called by its folder."""
    written = grid()
    del written["report"], written["name"]
    folder = write_folder(tmp_path / "plain", written, accuracy)
    source = SweepSource.open(folder)
    report = source.report
    assert (report.x, report.line, report.best_over, report.metric) == (
        "width",
        "kind",
        ("lr",),
        ACC,
    )
    assert source.recipe.name == "plain"
    unfinished = SweepSource(folder, source.recipe, source.rows[:3], n_planned=16)
    assert "3 runs of 16; the others are still to be trained." in unfinished.lead()


def test_halving(tmp_path):
    """What each rate was judged by at the rungs, means over seeds."""
    halving = {"axis": "lr", "metric": "val/loss", "rungs": [1, 2], "keep": 0.5}
    written = sweep_with(halving=halving, seeds=2, name="rates")

    def judged(run):
        lr, seed = run.settings["lr"], run.seed
        steps = {"1": lr + seed, "2": lr} if lr == 1e-3 else {"1": 5.0}
        return {"val/loss": lr, "judged": steps, "stopped": None}

    source = SweepSource.open(write_folder(tmp_path / "rates", written, judged))
    panel, whole = panels_of(source, page.Request())
    assert (panel.name, whole.name) == ("rates_halving", "rates")
    assert panel.table[0] == ["width", "lr", "at step 1", "at step 2", "seeds"]
    assert panel.table[1][0] == ["4", "0.001", "0.501", "0.001", "2"]
    assert panel.table[1][1] == ["4", "0.01", "5", "", "2"]
    assert [len(axes.lines) for axes in panel.figure.axes] == [2, 2]


def test_a_module_of_that_name_that_is_no_kind(monkeypatch, sweep):
    """A file of others that ends so is passed over."""
    monkeypatch.setattr(page, "load_kind", lambda name: types.SimpleNamespace())
    with pytest.raises(ToolmemError, match="no kind of figure applies to it"):
        panels_of(open_source(sweep), page.Request())
