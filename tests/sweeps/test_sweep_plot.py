"""The plot and its table: the best of each line, worked out by hand."""

from __future__ import annotations

import math

import pytest
from sweep_toys import row, sweep_with

from toolmem.analysis.sweep_plot import all_points, best_points, draw, table_of, write_sweep_report
from toolmem.errors import ToolmemError
from toolmem.sweeps import SweepRecipe

ACC = "val/accuracy"


def sweep(**report):
    axes = {
        "kind": {"b": {"model.model.n_heads": 1}, "a": {"model.model.n_heads": 2}},
        "width": {"key": "model.model.dim", "values": [4, 8]},
        "lr": {"key": "model.optimizer.lr", "values": [0.1, 0.2]},
    }
    report = {"metric": ACC, "x": "width", "line": "kind", "best_over": ["lr"]} | report
    return SweepRecipe.parse(sweep_with(axes=axes, seeds=2, metrics=[ACC], report=report), "toy")


def rows():
    """b at width 4: 0.1 has the higher mean (0.5), 0.2 the highest single seed (0.8)."""
    found = []
    for kind, width, lr, values in (
        ("b", 4, 0.1, (0.5, 0.5)), ("b", 4, 0.2, (0.8, 0.0)),
        ("b", 8, 0.1, (0.6, 0.7)), ("b", 8, 0.2, (0.9, 0.7)),
        ("a", 8, 0.2, (0.1, 0.3)),
    ):  # fmt: skip
        for seed, value in enumerate(values):
            settings = {"kind": kind, "width": width, "lr": lr}
            name = f"{kind}_{width}_{lr}_{seed}"
            found.append(row(name, settings, seed=seed, **{ACC: value}))
    return found


def test_the_best_is_by_the_mean_over_seeds():
    points = all_points(rows(), sweep().report)
    best = {(p.line, p.x): (p.mean, p.best["lr"]) for p in best_points(points, sweep().report)}
    assert best == {
        ("b", 4): (0.5, 0.1), ("b", 8): (pytest.approx(0.8), 0.2), ("a", 8): (0.2, 0.2)
    }  # fmt: skip
    least = best_points(points, sweep(mode="min").report)
    assert {(p.line, p.x): p.best["lr"] for p in least} == {
        ("b", 4): 0.2, ("b", 8): 0.1, ("a", 8): 0.2
    }  # fmt: skip


def test_what_failed_or_is_no_number_is_left_out():
    settings = {"kind": "a", "width": 4, "lr": 0.1}
    more = [
        row("failed", settings, status="failed", **{ACC: 1.0}),
        row("nan", settings, **{ACC: math.nan}),
        row("none", settings, **{ACC: None}),
    ]
    assert len(all_points([*rows(), *more], sweep().report)) == 5
    with pytest.raises(ToolmemError, match=f"no run that is done has {ACC}"):
        all_points(more, sweep().report)


def test_the_table_in_the_recipes_order():
    heads, cells = table_of(all_points(rows(), sweep().report), sweep())
    assert heads[:4] == ["kind", "width", ACC, "best lr"]
    assert [line[:4] for line in cells] == [
        ["b", "4", "0.500 (0.500 to 0.500)", "0.1"],
        ["b", "8", "0.800 (0.700 to 0.900)", "0.2"],
        ["a", "8", "0.200 (0.100 to 0.300)", "0.2"],
    ]
    assert cells[0][heads.index("params") :] == ["100", "1,000", "1.00e+06", "1", "2"]


def test_what_is_drawn():
    figure = draw(all_points(rows(), sweep().report), sweep())
    main, *panels = figure.axes
    assert [text.get_text() for text in main.get_legend().get_texts()] == ["b", "a"]
    assert [list(line.get_xdata()) for line in main.lines] == [[4, 8], [8]]
    assert [list(line.get_ydata()) for line in main.lines] == [[0.5, pytest.approx(0.8)], [0.2]]
    assert [axes.get_title() for axes in panels] == ["width 4", "width 8"]
    assert list(panels[0].lines[0].get_xdata()) == [0.1, 0.2]
    assert list(panels[0].lines[0].get_ydata()) == [0.5, 0.4]
    words = sweep(x="kind", line="width")
    assert draw(all_points(rows(), words.report), words).axes[0].lines


def test_the_files(tmp_path):
    write_sweep_report(tmp_path, sweep(), rows(), "toolmem sweep x.yaml --out y")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "report.svg").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "0.800 (0.700 to 0.900)" in page
    assert "toolmem sweep x.yaml --out y" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
