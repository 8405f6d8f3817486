"""What a recipe may say of its plot, and what is drawn where it says nothing."""

from __future__ import annotations

import pytest
from sweep_toys import sweep_with

from toolmem.errors import ToolmemError
from toolmem.sweeps import SweepRecipe
from toolmem.sweeps.report_recipe import default_report, parse_report

AXES = ["setting", "people", "width"]


def parsed(searching=False, **written):
    metrics = ("params_total", "params_untied") if searching else ("recall", "loss")
    return parse_report(
        {"metric": None if searching else "recall", **written}, AXES, metrics, searching
    )


def test_all_that_it_may_say():
    report = parsed(
        x="people", line="width", panel="setting", x_column="params_total", kind="allocation",
        published={"metric": "score", "x": "n"},
    )  # fmt: skip
    assert (report.panel, report.x_column, report.kind) == ("setting", "params_total", "allocation")
    assert report.published == {"metric": "score", "x": "n"}
    assert parsed(True, x="people", line="setting", best_over=["width"]).metric == "params_total"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"x": "people", "line": "setting"},
            "the axis width is neither x nor line nor panel",
        ),
        (
            {"x": "people", "line": "setting", "panel": "size"},
            "report.panel is 'size': choose from axes",
        ),
        ({"x": "people", "line": "width", "panel": "width"}, "must name different axes"),
        ({"x_column": "people"}, "report.x_column is 'people': choose from params_total"),
        ({"kind": 3}, "report.kind is 3: name a kind of figure"),
        ({"published": {"y": "a"}}, "report.published.y"),
        ({"published": {"x": 3}}, "report.published.x is 3: name a column"),
    ],
)
def test_what_it_may_not_say(written, message):
    whole = {"x": "people", "line": "setting", "best_over": ["width"]}
    with pytest.raises(ToolmemError) as raised:
        parsed(**(written if "x" in written else whole | written))
    assert message in str(raised.value)


def test_an_axis_of_one_value_needs_no_place():
    axes = {
        "width": {"key": "model.model.dim", "values": [4, 8]},
        "rest": {"all": {"model.model.n_heads": 1}},
    }
    written = sweep_with(axes=axes, report={"x": "width", "metric": "val/loss"})
    assert SweepRecipe.parse(written, "toy").report.x == "width"


def test_a_searchs_plot_has_one_picture():
    with pytest.raises(ToolmemError, match=r"report.panel: the plot of a search has none"):
        parsed(True, x="people", line="width", panel="setting")


def test_where_it_says_nothing():
    axes = {"kind": ["a", "b"], "width": [4, 8], "deep": [True, False], "lr": [0.1, 0.2]}
    report = default_report(axes, ["val/loss", "recall"], False)
    assert (report.x, report.line, report.best_over, report.mode) == (
        "width",
        "kind",
        ("deep", "lr"),
        "min",
    )
    report = default_report({"kind": ["a", "b"]}, ["recall"], False)
    assert (report.x, report.line, report.mode) == ("kind", None, "max")
    with pytest.raises(ToolmemError, match="none to draw along"):
        default_report({}, ["recall"], True)


def test_a_sweeps_name():
    assert SweepRecipe.parse(sweep_with(), "my first").name == "my-first"
    assert SweepRecipe.parse(sweep_with(name="second"), "my first").name == "second"
    for wrong in ("a/b", "", 3):
        with pytest.raises(ToolmemError, match="files are called by it"):
            SweepRecipe.parse(sweep_with(name=wrong), "toy")
