"""A file of answers: kept where it is about the same, cut where a process was killed."""

from __future__ import annotations

import json

import pytest
import torch

from toolmem.errors import ToolmemError
from toolmem.evaluation.answers import Answers, read_answers, weights_digest

ABOUT = {"step": 3, "weights": "abc"}
ROWS = [
    {"split": "known", "correct": n % 2 == 0, "person": f"Zo\u00eb \u2028 {n}"} for n in range(5)
]


def write(path, rows=ROWS, about=ABOUT):
    with Answers(path, about) as answers:
        for row in rows[len(answers.rows) :]:
            answers.add(row)
    return path.read_bytes()


def test_cut_at_every_byte_it_is_finished_the_same(tmp_path):
    whole = write(tmp_path / "whole.jsonl")
    assert read_answers(tmp_path / "whole.jsonl") == (ABOUT, ROWS)
    path = tmp_path / "cut.jsonl"
    lines = whole.split(b"\n")
    for cut in range(0, len(whole) + 1, 3):
        path.write_bytes(whole[:cut])
        with Answers(path, ABOUT) as answers:
            assert len(answers.rows) == max(0, whole[:cut].count(b"\n") - 1)
        assert path.read_bytes() == b"\n".join(lines[: len(answers.rows) + 1]) + b"\n"
        assert write(path) == whole


def test_kept_are_the_first(tmp_path):
    path = tmp_path / "answers.jsonl"
    whole = write(path)
    with Answers(path, ABOUT) as answers:
        answers.keep(2)
        assert answers.rows == ROWS[:2]
        answers.add(ROWS[2])
    assert read_answers(path)[1] == ROWS[:3]
    assert write(path) == whole


@pytest.mark.parametrize("about", [{"step": 4, "weights": "abc"}, {"step": 3, "weights": "abd"}])
def test_what_is_about_something_else_is_not_kept(tmp_path, about):
    path = tmp_path / "answers.jsonl"
    write(path)
    with Answers(path, about) as answers:
        assert answers.rows == []
    assert read_answers(path) == (about, [])


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", "no\n", json.dumps({"format": 9}) + "\n"])
def test_another_file_is_told_so(tmp_path, text):
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(ToolmemError, match=r"answers\.jsonl is no file of answers"):
        read_answers(path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolmemError, match="cannot write"):
        Answers(tmp_path / "file" / "answers.jsonl", ABOUT)


def test_the_digest_sees_every_bit():
    model = torch.nn.Linear(3, 2)
    before = weights_digest(model)
    assert weights_digest(model) == before
    for change in (lambda w: w.view(torch.int32)[1, 2].bitwise_xor_(1), lambda w: w[0, 0].neg_()):
        with torch.no_grad():
            change(model.weight)
        assert weights_digest(model) != before
        before = weights_digest(model)
    assert weights_digest(model.bfloat16()) != before
