"""Tasks asked in training: the numbers of the model as it is, each step once, training undisturbed."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from test_token_loss_probe import Kill, Killed, facts, fit, make_model

from toolmem.errors import ToolmemError
from toolmem.evaluation.answers import read_answers
from toolmem.evaluation.suite import Asking, make_examples, measure_part, parse_tasks
from toolmem.training import Checkpointing, TaskProbe

SHARES = ("accuracy", "accuracy_norm")


@pytest.fixture
def task(tmp_path):
    rows = [{"query": f"Is it {n}", "choices": ["no", "yes", "?"], "gold": n % 3} for n in range(9)]
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = tmp_path / "text.txt"
    text.write_text("Was it she? " * 9)
    return [f"small={path}", f"perplexity={text}"]


def rows(folder):
    with open(folder / "metrics.csv") as stream:
        return [row for row in csv.DictReader(stream) if row.get("small/accuracy")]


def test_what_is_logged_and_when(tmp_path, task):
    data = facts()
    module = fit(tmp_path, [TaskProbe(task, every_n_steps=3, steps=[0], batch_size=4)], data)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == ["0", "3", "4"]
    for row, model in ((logged[0], make_model()), (logged[-1], module.model)):
        for spec in parse_tasks(task):
            asking = Asking(batch_size=4)
            examples = make_examples(spec, model.eval(), data.tokenizer, asking)
            result = measure_part(spec, examples, asking)
            for name, one in result.estimates.items():
                assert float(row[f"{spec.name}/{name}"]) == pytest.approx(one.value, rel=1e-6)
    about, answers = read_answers(tmp_path / "evaluations" / "small_step_3.jsonl")
    assert about["step"] == 3
    assert len(answers) == 9


def test_training_is_the_same_with_and_without_it(tmp_path, task):
    with_it = fit(tmp_path / "a", [TaskProbe(task, steps=[0], every_n_steps=1)])
    without = fit(tmp_path / "b")
    for a, b in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)
    assert with_it.model.training


def test_a_resumed_run_asks_no_step_twice(tmp_path, task, monkeypatch):
    def go(folder, *more, **options):
        probe, keep = TaskProbe(task, every_n_steps=2), Checkpointing(every_n_steps=4)
        options |= {"max_steps": 8, "enable_checkpointing": True, "dropout": 0.0}
        return fit(folder, [probe, keep, *more], **options)

    go(tmp_path / "whole")
    part = tmp_path / "part"
    with pytest.raises(Killed):
        go(part, Kill())
    go(part, ckpt_path=part / "checkpoints" / "last.ckpt")
    assert [row["step"] for row in rows(part)] == ["2", "4", "6", "8"]
    assert (part / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_what_cannot_be_is_refused_before_the_first_step(tmp_path, task):
    for tasks in (["recall"], ["divergence=x.txt"]):
        with pytest.raises(ToolmemError, match="is not asked in training"):
            TaskProbe(tasks)
    with pytest.raises(ToolmemError, match="limit must be 1"):
        TaskProbe(task, limit=0)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "a", "choices": ["b", "c"], "gold": 2}\n')
    with pytest.raises(ToolmemError, match=r"bad\.jsonl, line 1: gold is 2"):
        fit(tmp_path, [TaskProbe([f"bad={bad}"])])
