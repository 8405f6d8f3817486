from pathlib import Path

import pytest

from toolmem.analysis.norms_plot import TITLES, edges, ordered, panels_of
from toolmem.training.callbacks.norm_files import NormFile
from toolmem.training.callbacks.norm_measures import Row

MEASURES = list(TITLES)


@pytest.fixture
def run(tmp_path):
    """A run of two probes that was killed: its parts are not merged."""
    for step in (10, 20):
        rows = [
            Row(layer, "attention", measure, 0.0 if measure == "dead_units" else step * 0.1**index)
            for measure in MEASURES
            for index, layer in enumerate(
                ("embedding", "blocks.0.a", "blocks.0", "blocks.1.a", "blocks.1", "norm")
            )
        ]
        rows.append(Row("all", "all", "weight", 1e9))
        NormFile(tmp_path / "first").add(step, rows)
    return tmp_path / "first"


def test_layers_stand_by_part_and_depth(run):
    panels = panels_of(run)
    assert list(panels) == MEASURES
    assert panels["weight"] == {
        "embedding": {10: 10.0, 20: 20.0},
        "blocks.0.a": {10: 1.0, 20: 2.0},
        "blocks.1.a": {10: pytest.approx(0.01), 20: pytest.approx(0.02)},
        "blocks.0": {10: pytest.approx(0.1), 20: pytest.approx(0.2)},
        "blocks.1": {10: pytest.approx(1e-3), 20: pytest.approx(2e-3)},
        "norm": {10: pytest.approx(1e-4), 20: pytest.approx(2e-4)},
    }
    layers = ["embedding", "blocks.0.a", "blocks.0", "blocks.1.a", "blocks.1", "norm"]
    assert list(panels["weight"]) == [layers[i] for i in (0, 1, 3, 2, 4, 5)]
    deep = {f"blocks.{i}.mixer": {} for i in (0, 10, 2)}
    assert list(ordered(deep)) == ["blocks.0.mixer", "blocks.2.mixer", "blocks.10.mixer"]
    assert list(ordered({"norm": {}, "head": {}})) == ["norm", "head"]


def test_cells_lie_around_their_steps():
    assert edges([5]) == [4.5, 5.5]
    assert edges([10, 20, 50]) == [5.0, 15.0, 35.0, 65.0]


def test_pictures(run, tmp_path, toolmem):
    called = toolmem("plot", "norms", run)
    assert called.code == 0 and called.out == f"{run / 'norms.png'}\n"
    assert (run / "norms.png").read_bytes().startswith(b"\x89PNG")
    one = tmp_path / "new" / "one.svg"
    assert toolmem("plot", "norms", run, "--measure", "weight", "--out", one).code == 0
    text = one.read_text()
    assert "<svg" in text
    assert "<!-- weight norm -->" in text and "<!-- gradient" not in text
    for layer in panels_of(run)["weight"]:
        assert f"<!-- {layer} -->" in text
    assert toolmem("plot", "norms", run, "--measure", "dead_units").code == 0
    assert (run / "norms_dead_units.png").exists()


def test_help(toolmem):
    usage = toolmem("plot").out
    assert "toolmem plot norms runs/first" in usage
    assert "toolmem plot DIR [options]" in usage
    assert all(f"  {kind} " in usage for kind in ("sweep", "searches", "halving", "curves"))
    page = toolmem("plot", "norms", "--help").out
    assert all(measure in page for measure in MEASURES)


def test_a_run_that_measured_nothing(tmp_path, toolmem):
    Path(tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "norms.parquet").write_text("no")
    words = {"empty": "--norms.every_n_steps", "missing": "not a run's folder", "broken": "no file"}
    for name, message in words.items():
        called = toolmem("plot", "norms", tmp_path / name)
        assert called.code == 2 and message in called.err


def test_what_cannot_be_drawn(run, toolmem):
    for words, message in (
        (["--measure", "wieght"], "has no 'wieght'; it has weight, gradient"),
        (["--out", "norms.txt"], "must end in .png"),
        (["--out", f"{run}/norms.parquet.d/../norms/step_10.parquet/x.png"], "cannot write"),
        (["--mesure", "weight"], "mesure"),
    ):
        called = toolmem("plot", "norms", run, *words)
        assert called.code == 2 and message in called.err, words
    assert toolmem("plot", "nroms").code == 2


def test_a_recipe_measures_and_is_drawn(tmp_path, toolmem):
    from cli_toys import changed, write_config

    recipe = write_config(tmp_path / "tiny.yaml", changed(norms={"every_n_steps": 2}))
    called = toolmem("fit", "--config", recipe, "--runs", tmp_path, "--name", "probed")
    assert called.code == 0, called.err
    folder = tmp_path / "probed"
    assert set(panels_of(folder)["update_ratio"]["blocks.0.mixer"]) == {2, 4, 6}
    assert "norms/weight/kind/attention" in (folder / "metrics.csv").read_text().splitlines()[0]
    assert toolmem("plot", "norms", folder, "--out", folder / "norms.svg").code == 0
