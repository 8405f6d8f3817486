"""The table of fine-tuned models: recall beside what was kept of before."""

from __future__ import annotations

import csv
import json

import pytest
from plot_toys import write_folder
from sweep_toys import sweep_with

from toolmem.analysis.finetuning_plot import COLUMNS
from toolmem.analysis.page import plot
from toolmem.errors import ToolmemError

RECALL = "recall/exact_match"
WRITTEN = sweep_with(
    name="toy",
    axes={
        "people": {"key": "data.batch_size", "values": [25, 100]},
        "setting": {"in_weight": {"model.model.n_heads": 1}, "in_tool": {"model.model.n_heads": 2}},
        "method": {"full": {"model.optimizer.lr": 0.1}, "lora": {"model.optimizer.lr": 0.2}},
    },
    seeds=1,
    metrics=[RECALL],
    report={"metric": RECALL, "x": "people", "line": "setting", "panel": "method"},
)


def results(**values):
    """A file as ``toolmem evaluate --out`` writes it."""
    tasks = {}
    for name, value in values.items():
        task, measure = name.rsplit("_", 1)
        tasks.setdefault(task, {"metrics": {}})["metrics"][measure] = {"value": value, "n": 300}
    return json.dumps({"tasks": tasks, "step": 4})


@pytest.fixture
def sweep(tmp_path):
    folder = write_folder(tmp_path / "toy", WRITTEN, lambda run: {RECALL: 0.75, "seconds": 12.5})
    (folder / "base.json").write_text(results(arc_easy_accuracy=0.5, lambada_accuracy=0.4))
    return folder


def table(folder, tmp_path):
    written = plot(folder, tmp_path / "page.html", kind="finetuning")
    [path] = [path for path in written if path.suffix == ".csv"]
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == COLUMNS
    return {(row["setting"], row["method"], row["people"]): row for row in rows}


def test_what_was_kept_stands_beside_the_base(sweep, tmp_path):
    from toolmem.sweeps import Results

    rows = Results(sweep / "results.duckdb").rows()
    [chosen] = [
        row["name"]
        for row in rows
        if (row["settings"]["setting"], row["settings"]["method"], row["settings"]["people"])
        == ("in_weight", "lora", 100)
    ]
    (sweep / "runs" / chosen).mkdir(parents=True)
    (sweep / "runs" / chosen / "evaluation.json").write_text(
        results(arc_easy_accuracy=0.45, lambada_accuracy=0.1, divergence_tv=0.25, divergence_kl=1.5)
    )
    found = table(sweep, tmp_path)
    assert len(found) == 8
    row = found["in_weight", "lora", "100"]
    assert (row["facts"], row["recall"], row["seconds"]) == ("400", "0.75", "12.5")
    numbers = [float(row[name]) for name in ("arc_easy_relative", "lambada_relative", "tv", "kl")]
    assert numbers == pytest.approx([90, 25, 0.25, 1.5])
    other = found["in_tool", "full", "25"]
    assert other["facts"] == "100" and other["arc_easy_relative"] == other["kl"] == ""


def test_a_file_that_is_none_is_named(sweep, tmp_path):
    (sweep / "base.json").write_text('{"tasks": {"arc_easy": {}}}')
    with pytest.raises(ToolmemError, match=r"base.json is no file of `toolmem evaluate --out`"):
        table(sweep, tmp_path)


def test_other_sweeps_have_no_such_table(tmp_path):
    written = {**WRITTEN, "axes": {**WRITTEN["axes"]}}
    del written["axes"]["method"]
    written["report"] = {"metric": RECALL, "x": "people", "line": "setting"}
    folder = write_folder(tmp_path / "toy", written, lambda run: {RECALL: 0.5})
    assert [p.name for p in plot(folder, tmp_path / "page.html")] == ["page.html", "toy.csv"]
    with pytest.raises(ToolmemError, match="no sweep over setting, method, people"):
        plot(folder, tmp_path / "page.html", kind="finetuning")
