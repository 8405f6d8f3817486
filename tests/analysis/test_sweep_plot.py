"""The plot and its table: the best of each line, worked out by hand."""

from __future__ import annotations

import math

import pytest
from plot_toys import ACC, grid, source_of
from sweep_toys import row

from toolmem.analysis.page import Request
from toolmem.analysis.published import read_published
from toolmem.analysis.sweep_plot import all_points, applies, best_points, draw, panels, table_of
from toolmem.errors import ToolmemError
from toolmem.sweeps import SweepRecipe


def sweep(**report):
    return SweepRecipe.parse(grid(report=grid()["report"] | report), "toy")


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


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_what_is_drawn():
    figure = draw(all_points(rows(), sweep().report), sweep())
    main, *small = figure.axes
    assert legend(figure) == ["b", "a"]
    assert [list(line.get_xdata()) for line in main.lines] == [[4, 8], [8]]
    assert [list(line.get_ydata()) for line in main.lines] == [[0.5, pytest.approx(0.8)], [0.2]]
    assert [axes.get_title() for axes in small] == ["width 4", "width 8"]
    assert list(small[0].lines[0].get_xdata()) == [0.1, 0.2]
    assert list(small[0].lines[0].get_ydata()) == [0.5, 0.4]
    words = sweep(x="kind", line="width")
    assert draw(all_points(rows(), words.report), words).axes[0].lines


def test_a_picture_for_each_value_of_an_axis():
    apart = sweep(line=None, panel="kind")
    points = all_points(rows(), apart.report)
    figure = draw(points, apart)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["kind: b", "kind: a"]
    assert [list(axes.lines[0].get_xdata()) for axes in figure.axes] == [[4, 8], [8]]
    heads, cells = table_of(points, apart)
    assert heads[:3] == ["kind", "width", ACC]
    assert [line[:2] for line in cells] == [["b", "4"], ["b", "8"], ["a", "8"]]


def test_parameters_along_x():
    sized = sweep(x_column="params_total")
    made = [dict(one, params_total=10 * one["settings"]["width"] ** 2) for one in rows()]
    figure = draw(all_points(made, sized.report), sized)
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[160, 640], [640]]
    assert figure.axes[0].get_xlabel() == "params_total"


def write(folder, text):
    path = folder / "published.csv"
    path.write_text(text)
    return path


def test_published_points_beside(tmp_path):
    """Of the sweep's own lines, where x is not beyond its own; by the columns that the recipe names."""
    path = write(tmp_path, "kind,emb_dim,score\nb,4,0.9\nb,6,0.8\nb,64,0.1\nc,4,0.3\na,8,\n")
    named = sweep(published={"x": "emb_dim", "metric": "score"})
    found = read_published(path, named, xs=[4, 8], metric=ACC)
    assert [(p.line, p.x, p.value) for p in found] == [("b", 4, 0.9), ("b", 6, 0.8)]
    points = all_points(rows(), named.report)
    figure = draw(points, named, found)
    assert legend(figure) == ["b", "a", "b published"]
    [line] = [one for one in figure.axes[0].lines if one.get_label() == "b published"]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([4, 6], [0.9, 0.8])
    heads, cells = table_of(points, named, found)
    assert heads[-1] == "published"
    assert [line[-1] for line in cells] == ["0.9", "", ""]


def test_published_lines_of_their_own(tmp_path):
    """A line that the recipe names may have other values; rows of other labels on other axes are not ours."""
    path = write(tmp_path, "kind,width,emb,val/accuracy\nb,4,24,0.9\nb,8,36,0.8\na,4,24,0.7\n")
    axes = grid()["axes"]
    axes["kind"] = {"b": axes["kind"]["b"]}
    report = {"metric": ACC, "x": "width", "line": "lr", "best_over": ["kind"]}
    own = SweepRecipe.parse(grid(axes=axes, report=report | {"published": {"line": "emb"}}), "toy")
    found = read_published(path, own, xs=[4, 8], metric=ACC)
    assert [(p.line, p.x, p.value) for p in found] == [("24", 4, 0.9), ("36", 8, 0.8)]
    no_line = SweepRecipe.parse(grid(axes=axes, report=report), "toy")
    found = read_published(path, no_line, xs=[4, 8], metric=ACC)
    assert {p.line for p in found} == {None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind,val/accuracy\nb,0.9\n", "no column width; it has kind, val/accuracy; report.published.x"),
        ("kind,width\nb,4\n", "it has no column val/accuracy"),
        ("", "it has none"),
        ("kind,width,val/accuracy\nb,4,high\n", "val/accuracy is 'high': it must be a number"),
    ],
)  # fmt: skip
def test_a_published_file_that_will_not_do(text, message, tmp_path):
    with pytest.raises(ToolmemError) as raised:
        read_published(write(tmp_path, text), sweep(), xs=[4, 8], metric=ACC)
    assert message in str(raised.value)
    with pytest.raises(ToolmemError, match=r"missing.csv: No such file"):
        read_published(tmp_path / "missing.csv", sweep(), xs=[4, 8], metric=ACC)


def test_the_panel():
    source = source_of(sweep(), rows())
    assert applies(source)
    [panel] = panels(source, Request())
    assert panel.name == "toy"
    assert "best over lr" in panel.caption
    assert "10 runs of toy.yaml, seeds 0, 1, 10 s of training in all" in panel.made
    heads, cells = panel.data
    assert heads[:6] == ["kind", "width", "lr", "seed", "params_total", "params_non_embedding"]
    assert heads[6:9] == ["params_untied", ACC, "tokens_trained"]
    assert len(cells) == 10
    assert panel.csv().splitlines()[1].startswith("b,4,0.1,0,100,,,0.5,1000,")
    named = sweep(kind="tricks")
    assert not applies(source_of(named, rows()))
