"""``toolmem evaluate``: exact counts, per attribute, on known and unseen people."""

from __future__ import annotations

import json

import pytest
import torch

import toolmem as package
from toolmem.cli import evaluate as command
from toolmem.data import ATTRIBUTES
from toolmem.evaluation import Score, measure_recall
from toolmem.evaluation.recall import Sample


@pytest.mark.parametrize("setting", ["in_weight", "in_tool"])
def test_counts(setting, runs, tmp_path, toolmem):
    out = tmp_path / "results.json"
    called = toolmem(
        "evaluate", "--checkpoint", runs / setting, "--tasks", "recall", "--out", out
    )  # fmt: skip
    assert called.code == 0
    results = json.loads(out.read_text())
    assert results["step"] == 6
    for split, people in (("known", 12), ("unseen", 4)):
        recall = results["recall"][split]
        assert set(recall["attributes"]) == set(ATTRIBUTES)
        assert all(score["total"] == people for score in recall["attributes"].values())
        assert recall["total"] == 4 * people
        assert recall["correct"] == sum(s["correct"] for s in recall["attributes"].values())
        low, high = Score(recall["correct"], recall["total"]).interval
        assert recall["interval_95"] == [low, high]
    for word in (*ATTRIBUTES, "known people", "unseen people", "0/12", "0/48", "0/16"):
        assert word in called.out


def test_chunks_add_up(runs, monkeypatch):
    """A model that knows some of it is counted the same however the questions are parted."""
    run = package.load(runs / "in_weight")
    asked = command.questions_of(run, 48)
    known = {question.question for question in asked["known"][::3]}

    def half_right(model, tokenizer, questions, *, answered, **options):
        for question in questions:
            correct = question.question in known
            answered(Sample(question.attribute, "", "", correct, (), "end"))

    monkeypatch.setattr("toolmem.evaluation.recall.measure_recall", half_right)
    counts = []
    for chunk in (5, 512):
        monkeypatch.setattr(command, "CHUNK", chunk)
        result = command.measure(run, asked, 8)["known"]
        counts.append({name: (s.correct, s.total) for name, s in result.attributes.items()})
    assert counts[0] == counts[1]
    assert sum(correct for correct, _ in counts[0].values()) == 16


@pytest.mark.parametrize("setting", ["in_weight", "in_tool"])
def test_invariant_mode_gives_one_file_whatever_the_batch(
    setting, runs, tmp_path, toolmem, monkeypatch
):
    import toolmem.generation.engine as engines

    kernels, plain = [], engines.Engine.__init__
    monkeypatch.setattr(
        engines.Engine,
        "__init__",
        lambda self, *args, **options: (
            kernels.append((options["max_lanes"], options["invariant"]))
            or plain(self, *args, **options)
        ),
    )
    files = []
    for batch_size in (1, 7):
        out = tmp_path / f"{batch_size}.json"
        words = ["--checkpoint", runs / setting, "--batch_size", batch_size, "--out", out]
        words += ["--n_questions", 12]
        called = toolmem("evaluate", *words, "--invariant", "true")
        assert called.code == 0, called
        files.append(json.loads(out.read_text()))
        assert files[-1].pop("seconds") > 0
    assert files[0] == files[1]
    assert kernels == [(1, True), (1, True), (7, True), (7, True)]


def test_invariant_mode_gives_the_same_dialogues_and_refuses_what_it_cannot(runs):
    run = package.load(runs / "in_tool")
    questions, options = run.questions("known", 12), {"toolbox": run.toolbox, "invariant": True}
    one, more = (
        measure_recall(run.model, run.tokenizer, questions, batch_size=n, **options) for n in (1, 5)
    )
    assert one == more and len(one.samples) == 12
    for change, words in (
        ({"dtype": torch.bfloat16}, "bfloat16 on cpu"),
        ({"dtype": torch.float32, "device": "meta"}, "float32 on meta"),
    ):
        model = run.model.to(**change)
        with pytest.raises(package.ToolmemError, match=f"invariant: .*{words}: run it on"):
            measure_recall(model, run.tokenizer, questions, **options)


def test_compiled_it_says_the_same_and_how_long_that_took(runs, tmp_path, toolmem, monkeypatch):
    """Traced, and run as it was traced: what inductor makes of it is the matter of another test."""
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda graph, inputs, config_patches: graph
    )
    found = []
    for compile in ("false", "true"):
        out = tmp_path / f"{compile}.json"
        words = ["--checkpoint", runs / "in_tool", "--n_questions", 6, "--batch_size", 3]
        called = toolmem("evaluate", *words, "--out", out, "--compile", compile)
        assert called.code == 0, called
        found.append(json.loads(out.read_text()))
    assert "2 graphs compiled in" in called.err
    assert found[0]["recall"] == found[1]["recall"]
    assert "compile_seconds" not in found[0]
    assert found[1]["compile_seconds"] > 0 and found[1]["seconds"] > 0
    refused = toolmem("evaluate", *words, "--compile", "true", "--invariant", "true")
    assert refused.code == 2 and "leave one out" in refused.err


def test_ranks_find_what_one_process_finds(runs, tmp_path, toolmem):
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        words = ["--checkpoint", runs / "in_tool", "--ranks", ranks, "--out", out]
        called = toolmem("evaluate", *words, "--invariant", "true", "--n_questions", 9)
        assert called.code == 0, called
        found.append(json.loads(out.read_text()))
        del found[-1]["seconds"]
    assert found[0] == found[1]
    for words in (["--ranks", 0], ["--ranks", 2, "--compile", "true"]):
        called = toolmem("evaluate", "--checkpoint", runs / "in_tool", *words)
        assert called.code == 2 and "--ranks" in called.err


def test_it_is_what_the_library_measures(runs):
    run = package.load(runs / "in_tool")
    direct = measure_recall(
        run.model, run.tokenizer, run.questions("known", 8), toolbox=run.toolbox
    )
    assert (
        command.measure(run, command.questions_of(run, 8), 3)["known"].as_dict() == direct.as_dict()
    )


def test_without_unseen_people_there_is_one_column(runs, tmp_path, toolmem):
    facts = tmp_path / "facts.duckdb"
    assert toolmem("facts", "build", "--people", 12, "--out", facts).code == 0
    words = ["--factbase", facts, "--allow_other_factbase", "true", "--n_questions", 4]
    called = toolmem("evaluate", "--checkpoint", runs / "in_tool", *words)
    assert called.code == 0
    assert "known people" in called.out
    assert "unseen people" not in called.out


@pytest.mark.parametrize(("words", "again"), [((), 5), (("--invariant", "true"), 2)])
def test_killed_it_goes_on_and_counts_nothing_twice(
    words, again, runs, tmp_path, toolmem, monkeypatch
):
    """Of parts of five the one that was begun is asked anew, but where answers do not hang on company."""
    from toolmem.evaluation import answers, recall

    monkeypatch.setattr(command, "CHUNK", 5)
    plain_add, plain_measure, asked = answers.Answers.add, recall.measure_recall, []

    class Killed(BaseException):
        pass

    def add(self, row):
        if len(self.rows) == 8:
            raise Killed
        plain_add(self, row)

    def measure(model, tokenizer, questions, **options):
        asked.append(len(questions))
        return plain_measure(model, tokenizer, questions, **options)

    def call(name):
        out = ["--n_questions", 12, "--batch_size", 4, "--out", tmp_path / name]
        return toolmem("evaluate", "--checkpoint", runs / "in_tool", *out, *words)

    assert call("whole.json").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(answers.Answers, "add", add)
        with pytest.raises(Killed):
            call("killed.json")
    assert not (tmp_path / "killed.json").exists()
    monkeypatch.setattr(recall, "measure_recall", measure)
    assert call("killed.json").code == 0
    assert asked[0] == again and asked[1] == 2
    found = [json.loads((tmp_path / name).read_text()) for name in ("whole.json", "killed.json")]
    assert found[0]["recall"] == found[1]["recall"]
    files = [tmp_path / f"{name}.answers.jsonl" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    del asked[:]
    assert call("killed.json").code == 0  # a call that came to its end is made anew
    assert asked[:3] == [5, 5, 2]
