"""``toolmem generate``: one dialogue on the screen, or a file of them that survives a kill."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import toolmem as package
from toolmem.cli import generate as command

QUESTIONS = [f"When was person {i} born?" for i in range(7)]


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    return path


def test_one_question_is_streamed(runs, toolmem):
    words = ["--checkpoint", runs / "in_weight", "--prompt", QUESTIONS[0], "--max_new_tokens", 9]
    called = toolmem("generate", *words)
    assert called.code == 0
    assert called.out.startswith(f"     user: {QUESTIONS[0]}\n")
    reply = package.load(runs / "in_weight").ask(QUESTIONS[0], max_new_tokens=9)
    shown = re.sub(r"\s+", "", called.out)
    said = reply.dialogue[1][1].rstrip("�")  # bytes of a character that was cut off are not shown
    assert re.sub(r"\s+", "", f"assistant: {said}") in shown


def test_a_streamed_tool_call(runs, toolmem, monkeypatch):
    """What the database answers is shown under its own role."""
    run = package.load(runs / "in_tool")
    roles = run.tokenizer.role_ids
    said = [(roles["user"], 1)]
    text = lambda words, role: [(token, role) for token in run.tokenizer.encode(words)]  # noqa: E731
    said = text("FIND é FOR [b]", 2) + [(roles["database"], 2)] + text("1 May 1970", 3)
    said += [(roles["assistant"], 3)] + text("Then.", 2) + [(roles["end"], 2)]
    monkeypatch.setattr(type(run), "stream", lambda self, *args, **options: iter(said))
    called = toolmem("generate", "--checkpoint", runs / "in_tool", "--prompt", "When?")
    assert called.out.splitlines() == [
        "     user: When?",
        "assistant: FIND é FOR [b]",
        " database: 1 May 1970",
        "assistant: Then.",
    ]


def test_a_file_of_prompts(runs, prompts, tmp_path, toolmem):
    out = tmp_path / "out.jsonl"
    words = ["--prompts", prompts, "--out", out, "--max_new_tokens", 8]
    assert toolmem("generate", "--checkpoint", runs / "in_weight", *words).code == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == QUESTIONS
    run = package.load(runs / "in_weight")
    for question, answer in zip(QUESTIONS, answers, strict=True):
        reply = run.ask(question, max_new_tokens=8)
        assert answer["answer"] == reply.answer
        assert answer["dialogue"][0] == {"role": "user", "text": question}
        assert answer["finish_reason"] in ("end", "length")
        assert answer["tool_calls"] == 0


@pytest.mark.parametrize("options", [[], ["--temperature", "1.0", "--top_k", "20", "--seed", "3"]])
@pytest.mark.parametrize("cut", [0, 1, 17, 400])
def test_a_killed_call_goes_on(options, cut, runs, prompts, tmp_path, toolmem, monkeypatch):
    """Wherever the file was cut, the end is byte for byte that of a call that ran through."""
    monkeypatch.setattr(command, "CHUNK", 2)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    words = ["generate", "--checkpoint", runs / "in_weight", "--prompts", prompts, *options]
    words += ["--max_new_tokens", "8", "--out"]
    assert toolmem(*words, whole).code == 0
    content = whole.read_bytes()
    part.write_bytes(content[:cut])
    assert toolmem(*words, part).code == 0
    assert part.read_bytes() == content
    # a whole file stays as it is
    assert toolmem(*words, part).code == 0
    assert part.read_bytes() == content


def test_rows_that_are_there_are_not_asked_again(runs, prompts, tmp_path, toolmem, monkeypatch):
    out = tmp_path / "out.jsonl"
    words = ["generate", "--checkpoint", runs / "in_weight", "--prompts", prompts, "--out", out]
    words += ["--max_new_tokens", "4"]
    assert toolmem(*words).code == 0
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:5]) + lines[5][:10])
    asked: list[str] = []
    ask = package.Run.ask_many
    monkeypatch.setattr(
        package.Run,
        "ask_many",
        lambda self, questions, **options: (
            asked.extend(questions) or ask(self, questions, **options)
        ),
    )
    assert toolmem(*words).code == 0
    assert asked == QUESTIONS[5:]
    assert out.read_text() == "".join(lines)
