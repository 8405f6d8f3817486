"""Shapes at budgets: the best of each, by facts counted by hand, and how sure it is."""

from __future__ import annotations

import pytest
from plot_toys import write_folder
from sweep_toys import BASE

from toolmem.analysis.allocation_plot import (
    default_bounds,
    draw_frontier,
    draw_maps,
    factor_table,
    panels,
    shapes_of,
)
from toolmem.analysis.page import Request, panels_of, plot
from toolmem.analysis.sources import SweepSource
from toolmem.errors import ToolmemError

RECALL = "recall/exact_match"


def shape(dim, layers, tied=True):
    keys = {"dim": dim, "n_layers": layers, "hidden_dim": 4 * dim, "tie_embeddings": tied}
    return {f"model.model.{key}": value for key, value in keys.items()}


def written(**report):
    base = BASE | {
        "data": {"class_path": "toolmem.data.FactsDataModule", "init_args": {"people": 50}}
    }
    return {
        "name": "shapes",
        "base": base,
        "axes": {
            "setting": {"in_weight": {}, "in_tool": {"data.setting": "in_tool"}},
            "budget": {"1k": {}, "2k": {"data.batch_size": 8}},
            "shape": {"wide": shape(16, 1), "deep": shape(8, 3), "untied": shape(8, 2, False)},
        },
        "seeds": 2,
        "metrics": [RECALL],
        "report": {
            "kind": "allocation", "x": "budget", "panel": "setting", "best_over": ["shape"],
            "metric": RECALL, **report,
        },
    }  # fmt: skip


def values(run):
    """In weight wide leads by far at 1k, and by less than its seeds differ at 2k; in tool all are alike."""
    settings = run.settings
    big = settings["budget"] == "2k"
    recall = {"wide": 0.6, "deep": 0.3, "untied": 0.1}[settings["shape"]]
    if settings["setting"] == "in_tool":
        recall = 0.5
    elif big:
        recall = {"wide": 0.7, "deep": 0.65, "untied": 0.2}[settings["shape"]] + 0.2 * run.seed
    params = (2000 if big else 1000) + 10 * run.recipe["model"]["model"]["init_args"]["n_layers"]
    return {RECALL: recall, "params_total": params}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return SweepSource.open(
        write_folder(tmp_path_factory.mktemp("a") / "shapes", written(), values)
    )


def test_facts_of_each_shape(source):
    """50 people of 4 attributes are 200 facts."""
    found = {(s.setting, s.budget, s.name): s for s in shapes_of(source)}
    assert len(found) == 12
    first = found["in_weight", "1k", "wide"]
    assert (first.of, first.facts, first.params) == (200, (120.0, 120.0), 1010)
    assert found["in_weight", "2k", "wide"].facts == pytest.approx((140, 180))
    assert first.words() == "1 layer of width 16, 2 heads, feed-forward x 4.0, tied"
    assert found["in_tool", "2k", "untied"].factors["tied"] is False


def test_the_answer_in_words_and_its_certainty(source):
    panel, frontier = panels(source, Request())
    text = panel.text
    assert (
        "in_weight, budget 1k: 1 layer of width 16, 2 heads, feed-forward x 4.0, tied recalls most, 120 of "
        "200 facts (seeds 120 to 120); next 3 layers of width 8" in text
    )
    assert "it would lead in 100% of cases." in text
    assert "2 of 3 shapes cannot be told apart" in text  # in weight at 2k
    assert "3 of 3 shapes cannot be told apart" in text  # in tool
    assert (panel.name, frontier.name) == ("shapes", "shapes_frontier")
    one_seed = [row for row in source.rows if row["seed"] == 0]
    alone = SweepSource(source.path, source.recipe, one_seed)
    assert "one seed alone" in panels(alone, Request())[0].text


def test_each_choice_at_its_best(source):
    heads, rows = factor_table(shapes_of(source), source.report)
    assert heads == ["setting", "choice", "value", "budget 1k", "budget 2k"]
    found = {tuple(row[:3]): row[3:] for row in rows}
    assert found["in_weight", "tied", "True"] == ["120", "160"]
    assert found["in_weight", "tied", "False"] == ["20", "60"]
    assert found["in_weight", "width", "8"] == ["60", "150"]
    assert found["in_weight", "layers", "3"] == ["60", "150"]
    assert not any(key[1] == "heads" for key in found)  # all have two


def test_heat_maps(source):
    figure = draw_maps(shapes_of(source))
    maps = [
        axes
        for axes in figure.axes
        if axes.images and axes.get_yticklabels()[0].get_text() == "wide"
    ]
    assert [axes.get_title(loc="left") for axes in maps] == ["in_weight", "in_tool"]
    assert maps[0].images[0].get_array().tolist() == [
        [120, pytest.approx(160)], [60, pytest.approx(150)], [20, pytest.approx(60)]
    ]  # fmt: skip
    frames = [patch.get_xy() for patch in maps[0].patches]
    assert frames == [(-0.5, -0.5), (0.5, -0.5)]


def test_the_frontier_and_bounds_over_it(source):
    figure = draw_frontier(shapes_of(source), [("half", lambda x: x / 2)])
    [axes] = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    xs, ys = lines["half"].get_data()
    assert ys == pytest.approx(xs / 2)
    assert (xs[0], xs[-1]) == (pytest.approx(1010), pytest.approx(2030))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["half", "in_weight, best", "in_tool, best"]
    best = [line for line in axes.lines if list(line.get_ydata()) == pytest.approx([120, 160])]
    assert best
    [(label, held)] = default_bounds()
    assert "2 bits a parameter" in label
    assert held(2000.0) == pytest.approx(2 * held(1000.0))
    assert 50 < held(1000.0) < 1000  # a fact is between 8 and 160 bits


def test_the_csv(source):
    panel = panels(source, Request())[0]
    heads, rows = panel.data
    assert heads[:11] == [
        "setting", "budget", "shape", "layers", "width", "heads", "feed-forward ratio", "tied",
        "facts_recalled", "seed", "params_total",
    ]  # fmt: skip
    assert len(rows) == 24
    assert rows[0][:9] == ["in_weight", "1k", "wide", 1, 16, 2, 4.0, True, 120.0]


def test_the_folder_is_drawn_so(source, tmp_path):
    """Because its recipe says so, or because it was asked for."""
    names = [panel.name for panel in panels_of(source, Request())]
    assert names == ["shapes", "shapes_frontier"]
    files = plot(source.path, tmp_path / "a.html", kind="allocation")
    assert "shapes.csv" in [path.name for path in files]


def test_a_sweep_that_compares_no_shapes(tmp_path):
    report = {"line": "shape", "best_over": [], "kind": None}
    folder = write_folder(tmp_path / "lines", written(**report), values)
    with pytest.raises(ToolmemError, match="to compare shapes, its report needs `x`"):
        plot(folder, kind="allocation")
