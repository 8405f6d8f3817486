"""``toolmem evaluate --watch``: every checkpoint once, gone on with where it was killed."""

from __future__ import annotations

import fcntl
import json
import shutil

import pytest

from toolmem.cli import evaluate_watch
from toolmem.evaluation.curves import read_points


@pytest.fixture
def run(runs, tmp_path):
    """A run that can be written to: a last checkpoint of step 6, and one of an earlier step."""
    folder = tmp_path / "run"
    shutil.copytree(runs / "in_weight", folder)
    return folder


@pytest.fixture
def task(tmp_path):
    rows = [{"context": f"Say {n}", "continuation": "it"} for n in range(6)]
    path = tmp_path / "cloze.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"words={path}"


@pytest.fixture
def loaded(monkeypatch):
    """Checkpoints that were loaded."""
    import toolmem.run as run_module

    found, plain = [], run_module.load
    monkeypatch.setattr(
        run_module,
        "load",
        lambda path, **options: found.append(path.name) or plain(path, **options),
    )
    return found


def test_each_step_is_evaluated_once(run, task, loaded, toolmem):
    words = ["evaluate", "--watch", run, "--n_questions", 4, "--tasks"]
    called = toolmem(*words, task)  # ends by itself: the run's last step is there
    assert called.code == 0, called.err
    points = read_points(run)
    assert list(points) == [6]
    assert set(points[6]) >= {"words/accuracy", "words/perplexity", "words/perplexity/low"}
    results = json.loads((run / "evaluations" / "6.json").read_text())
    assert results["tasks"]["words"]["examples"] == 6
    times = len(loaded)
    assert times >= 1
    before = (run / "evaluations" / "6.json").stat().st_mtime_ns
    assert toolmem(*words, task).code == 0
    assert len(loaded) == times
    assert (run / "evaluations" / "6.json").stat().st_mtime_ns == before
    # one task more: that alone is asked, and what was found stays
    called = toolmem(*words, f"{task},recall")
    assert called.code == 0, called.err
    assert "words" not in called.out
    both = json.loads((run / "evaluations" / "6.json").read_text())["tasks"]
    assert both["words"] == results["tasks"]["words"]
    assert both["recall"].keys() == {"known", "unseen"}
    assert read_points(run)[6].keys() > points[6].keys()


def test_killed_in_the_midst_it_goes_on(run, task, toolmem, monkeypatch):
    import toolmem.evaluation.answers as answers

    plain, seen = answers.Answers.add, []

    def add(self, row):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(row["line"])
        plain(self, row)

    monkeypatch.setattr(answers.Answers, "add", add)
    words = ["evaluate", "--watch", run, "--tasks", task, "--batch_size", 2, "--once", "true"]
    assert toolmem(*words).code == 130
    assert not read_points(run)
    monkeypatch.setattr(answers.Answers, "add", plain)
    asked = []
    from toolmem.evaluation.tasks import Asked

    ask = Asked.ask
    monkeypatch.setattr(
        Asked,
        "ask",
        lambda self, start, stop: asked.append((start, stop)) or ask(self, start, stop),
    )
    assert toolmem(*words).code == 0
    assert asked == [(4, 6)]
    assert list(read_points(run)) == [6]


def test_new_checkpoints_as_they_come(run, task, toolmem, monkeypatch):
    """The run is not there at first; then its last checkpoint comes; a damaged one is passed over."""
    kept = run.with_name("kept")
    shutil.move(run, kept)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 1:
            (run / "checkpoints").mkdir(parents=True)
            data = (kept / "checkpoints" / "last.ckpt").read_bytes()
            (run / "checkpoints" / "step_3.ckpt").write_bytes(data[: len(data) // 2])
        if len(slept) == 2:
            shutil.copy(kept / "checkpoints" / "last.ckpt", run / "checkpoints" / "last.ckpt")
            shutil.copy(kept / "config.yaml", run / "config.yaml")

    monkeypatch.setattr(evaluate_watch.time, "sleep", sleep)
    called = toolmem("evaluate", "--watch", run, "--tasks", task, "--every", 5)
    assert called.code == 0, called.err
    assert slept == [5.0, 5.0]
    assert list(read_points(run)) == [6]


def test_patience_ends_it(run, task, toolmem):
    (run / "config.yaml").unlink()
    words = ["evaluate", "--watch", run, "--tasks", task, "--every", 0.01, "--patience", 0.05]
    assert toolmem(*words).code == 0
    assert list(read_points(run)) == [6]


def test_one_process_watches(run, task, toolmem):
    (run / "evaluations").mkdir(exist_ok=True)
    with open(run / "evaluations" / ".watched", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        called = toolmem("evaluate", "--watch", run, "--tasks", task, "--once", "true")
    assert (called.code, called.err.count("\n")) == (2, 1)
    assert "watched by another process" in called.err
    called = toolmem("evaluate", "--watch", run, "--tasks", "words=/nowhere.jsonl")
    assert (called.code, called.err.count("\n")) == (2, 1)
