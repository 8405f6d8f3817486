"""The plot of searches, its table and its CSV: means and deviations worked out by hand."""

from __future__ import annotations

import csv
import io
import math

import pytest
from plot_toys import source_of
from sweep_toys import sweep_with

from toolmem.analysis.page import Request
from toolmem.analysis.searches_plot import (
    draw,
    lead_of,
    panels,
    published_of,
    smallest,
    table_of,
)
from toolmem.errors import ToolmemError
from toolmem.sweeps import SweepRecipe

SETTINGS = {"in_weight": {"model.model.n_heads": 1}, "in_tool": {"model.model.n_heads": 2}}


def sweep(**report):
    written = sweep_with(
        axes={"setting": SETTINGS, "people": {"key": "data.n_pairs", "values": [16, 32]}},
        search={
            "family": {"key": "model.model.dim", "values": [4, 8, 12]},
            "metric": "recall/exact_match",
            "reach": [0.5, 0.95],
        },
        seeds=2,
        metrics=["recall/exact_match"],
        report={"x": "people", "line": "setting"} | report,
    )
    return SweepRecipe.parse(written, "toy")


def search(setting, people, reach, seed, size, status="found", **changes):
    settings = {"setting": setting, "people": people}
    return {
        "name": f"{setting}{people}{reach}{seed}", "status": status, "settings": settings,
        "seed": seed, "reach": reach, "member": None if size is None else size // 100,
        "params_total": size, "params_non_embedding": size and size // 2, "tokens": 1000 + seed,
        "steps": 7, "seconds": 2.0, "value": None if size is None else 0.97, "runs_trained": 3,
        "runs_failed": 0, "seconds_of_all": 9.0, "monotone": True, **changes,
    }  # fmt: skip


def searches():
    return [
        search("in_weight", 16, 0.95, 0, 400), search("in_weight", 16, 0.95, 1, 800),
        search("in_weight", 32, 0.95, 0, 1200), search("in_weight", 32, 0.95, 1, None, "none"),
        search("in_weight", 16, 0.5, 0, 400), search("in_tool", 16, 0.95, 0, 800),
        search("in_tool", 32, 0.95, 0, None, "open"),
    ]  # fmt: skip


def test_means_and_deviations_over_seeds():
    points = {(p.line, p.x, p.reach): p for p in smallest(searches(), sweep())}
    assert set(points) == {
        ("in_weight", 16, 0.5), ("in_weight", 16, 0.95), ("in_weight", 32, 0.95), ("in_tool", 16, 0.95)
    }  # fmt: skip
    point = points["in_weight", 16, 0.95]
    assert (point.mean, point.deviation, point.n) == (600, pytest.approx(400 / math.sqrt(2)), 2)
    assert (points["in_weight", 32, 0.95].sizes, points["in_weight", 32, 0.95].n) == ((1200,), 2)
    half = smallest(searches(), sweep(metric="params_non_embedding"))
    assert half[1].sizes == (200, 400)
    with pytest.raises(ToolmemError, match="no search is over yet"):
        smallest([search("in_tool", 32, 0.95, 0, None, "open")], sweep())


def published(folder, text=None):
    path = folder / "published.csv"
    path.write_text(
        text
        or "setting,people,facts,recall_threshold,mean_min_params\n"
        "in_weight,16,64,0.95,6248\nin_weight,64,256,0.95,10908\nin_tool,16,64,0.9,1\n"
        "in_tool,32,128,0.95,\n"
    )
    return path


def test_published_means_of_the_same_labels_and_values(tmp_path):
    found = published_of(published(tmp_path), sweep())
    assert [(p.line, p.x, p.reach, p.value) for p in found] == [("in_weight", 16, 0.95, 6248)]
    with pytest.raises(ToolmemError, match="it has no column mean_min_params"):
        published_of(published(tmp_path, "people,recall_threshold\n16,0.95\n"), sweep())
    with pytest.raises(ToolmemError, match=r"missing.csv: No such file"):
        published_of(tmp_path / "missing.csv", sweep())


def test_what_is_drawn(tmp_path):
    points = smallest(searches(), sweep())
    figure = draw(points, published_of(published(tmp_path), sweep()), sweep())
    [axes] = figure.axes
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "in_weight ≥ 0.95 published", "in_weight ≥ 0.5", "in_weight ≥ 0.95", "in_tool ≥ 0.95",
    ]  # fmt: skip
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert ([16, 32], [600, 1200]) in drawn
    assert ([16], [6248]) in drawn
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_the_table(tmp_path):
    theirs = published_of(published(tmp_path), sweep())
    heads, cells = table_of(smallest(searches(), sweep()), theirs, sweep())
    rows = {tuple(line[:3]): dict(zip(heads, line, strict=True)) for line in cells}
    first = rows["in_weight", "16", "0.95"]
    assert (first["params_total"], first["deviation"], first["seeds"]) == ("600", "283", "2 of 2")
    assert (first["members"], first["runs"], first["published"]) == ("4, 8", "6", "6,248")
    assert rows["in_weight", "32", "0.95"]["seeds"] == "1 of 2"
    assert rows["in_tool", "16", "0.95"]["published"] == ""


def test_what_the_text_says():
    text = lead_of(searches())
    assert text.startswith("5 searches of 7 found a model. In 1 no model of the family")
    odd = [search("in_tool", 16, 0.95, 0, 400, monotone=False, runs_failed=2)]
    assert "In 1 a larger model failed" in lead_of(odd)
    assert "2 runs that failed count as not reaching it" in lead_of(odd)


def rows_of(panel):
    return list(csv.DictReader(io.StringIO(panel.csv())))


def test_the_csv_has_a_row_for_each_search_that_is_over():
    [panel] = panels(source_of(sweep(), [], searches()), Request())
    assert panel.name == "toy"
    rows = rows_of(panel)
    assert len(rows) == 6
    assert list(rows[0])[:10] == [
        "setting", "people", "facts", "recall_threshold", "seed", "params_total",
        "params_non_embedding", "tokens_trained", "seconds", "params_untied",
    ]  # fmt: skip
    first = rows[0]
    assert (first["people"], first["facts"], first["params_total"]) == ("16", "64", "400")
    assert (first["tokens_trained"], first["seconds"]) == ("1000", "2.0")
    assert rows[3]["params_total"] == ""


def test_rows_of_older_versions_have_no_untied_total():
    old = search("in_weight", 16, 0.95, 0, 400)
    new = search("in_weight", 16, 0.95, 1, 400, params_untied=450)
    untied = sweep(metric="params_untied")
    [panel] = panels(source_of(untied, [], [old, new]), Request())
    assert [row["params_untied"] for row in rows_of(panel)] == ["", "450"]
    [point] = smallest([old, new], untied)
    assert (point.sizes, point.n) == ((450,), 2)


def test_a_sweep_without_a_search_is_refused():
    written = sweep_with()
    with pytest.raises(ToolmemError, match="has no search"):
        panels(source_of(SweepRecipe.parse(written, "toy"), []), Request())
