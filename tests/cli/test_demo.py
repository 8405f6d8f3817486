"""``toolmem demo`` on a cut-down budget, and what it says of its three models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import toolmem as package
from toolmem.cli import demo
from toolmem.evaluation import Score


@pytest.mark.slow
def test_the_whole_demo(tmp_path, toolmem):
    called = toolmem("demo", "--runs", tmp_path, "--steps", 4, "--questions", 8)
    assert called.code == 0, called.err
    folder = tmp_path / "demo"
    for word in ("in-tool, 4,096 people", "in-weight, 64 people", "16,384", "256", "user: "):
        assert word in called.out
    assert "too few steps" in " ".join(
        called.out.split()
    )  # it does not claim what it does not show

    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<table" in page
    assert "data:image/svg+xml" in page
    links = set(re.findall(r"https?://[^\s\"'<>]+", page))
    namespaces = {"www.w3.org", "purl.org", "creativecommons.org", "matplotlib.org"}
    assert {link.split("/")[2] for link in links} <= namespaces  # names of the SVG's, never fetched
    assert not re.search(r"(src|href)\s*=\s*[\"'](https?:)?//", page)

    results = json.loads((folder / "results.json").read_text())
    assert [model["people"] for model in results["models"]] == [64, 4096, 4096]
    assert len({model["parameters"] for model in results["models"]}) == 1
    assert 8000 <= results["models"][0]["parameters"] <= 20000
    for model in results["models"]:
        assert model["recall"]["known"]["total"] == model["recall"]["unseen"]["total"] == 8
        assert model["steps"] == 4
    run = package.load(folder / "in_tool")
    assert run.questions("unseen", 1)


def result(known: float, unseen: float, **changes):
    scores = {"known": Score(round(known * 100), 100), "unseen": Score(round(unseen * 100), 100)}
    return {"recall": scores, "parameters": 9, **changes}


def test_it_says_the_point_only_when_it_is_shown():
    good = [result(1, 0.1), result(0.2, 0.1), result(1, 0.95)]
    assert "it learned the rule" in demo.lesson(good)
    for place, bad in ((0, result(0.5, 0)), (1, result(0.9, 0)), (2, result(1, 0.5))):
        worse = list(good)
        worse[place] = bad
        assert "do not show the point" in demo.lesson(worse)


def test_the_three_models_are_one_size():
    configs = [demo.config(part, "runs", 0) for part in demo.parts(None)]
    models = [config["model"]["model"] for config in configs]
    assert models[0] == models[1] == models[2]
    people = [config["data"]["init_args"]["people"] for config in configs]
    assert sorted(people) == [64, 4096, 4096]


def test_progress_is_read_from_the_metrics_file(tmp_path):
    metrics = tmp_path / "metrics.csv"
    assert demo.latest(metrics) == (0, "")
    metrics.write_text("step,train/loss,val/loss\n20,1.5,\n25,,2\n40,1.2")
    assert demo.latest(metrics) == (25, "loss 1.500")  # the last row is not whole yet


@pytest.mark.slow
def test_a_training_that_fails_is_told(tmp_path, toolmem, monkeypatch):
    """Its last words are shown, and the others are stopped."""
    config = demo.config

    def broken(part: demo.Part, runs: str, seed: int):
        settings = config(part, runs, seed)
        settings["model"]["model"]["init_args"]["dim"] = "wide"
        return settings

    monkeypatch.setattr(demo, "config", broken)
    called = toolmem("demo", "--runs", tmp_path, "--steps", 1, "--parallel", 1)
    assert called.code == 2
    assert "training in-tool, 4,096 people failed" in called.err
    assert "model.model.init_args.dim" in called.err
    assert not list(Path(tmp_path).rglob("*.ckpt"))
