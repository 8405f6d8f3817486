"""``toolmem generate``: one dialogue on the screen, or a file of them that survives a kill."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import toolmem as package

QUESTIONS = [f"When was person {i} born?" for i in range(7)]


def children(pid: int) -> list[int]:
    """The processes that another has started."""
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_the_kernel_of_attention_is_told(command, runs, prompts, tmp_path, toolmem, monkeypatch):
    from toolmem.models.attention import HeadMixing

    ran, plain = [], HeadMixing.weights
    monkeypatch.setattr(
        HeadMixing, "weights", lambda self, *args: ran.append(1) or plain(self, *args)
    )
    words = {
        "generate": ["--prompts", prompts, "--out", tmp_path / "out.jsonl", "--max_new_tokens", 2],
        "evaluate": ["--n_questions", 2],
    }[command]
    words += ["--checkpoint", runs / "in_weight"]
    assert toolmem(command, *words).code == 0
    assert not ran
    if command == "generate":
        (tmp_path / "out.jsonl").unlink()
    assert toolmem(command, *words, "--attention", "plain").code == 0
    assert ran
    refused = toolmem(command, *words, "--attention", "eager")
    assert refused.code == 2
    assert "attention" in refused.err


def test_compiled_it_says_the_same(runs, prompts, tmp_path, toolmem, monkeypatch):
    """Traced, and run as it was traced: what inductor makes of it is the matter of another test."""
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda graph, inputs, config_patches: graph
    )
    words = ["generate", "--checkpoint", runs / "in_tool", "--max_new_tokens", 6]
    said, files = [], []
    for compile in ("false", "true"):
        out = tmp_path / f"{compile}.jsonl"
        called = toolmem(*words, "--prompts", prompts, "--out", out, "--compile", compile)
        assert called.code == 0
        files.append(out.read_text())
        said.append(toolmem(*words, "--prompt", QUESTIONS[0], "--compile", compile).out)
    assert "2 graphs compiled in" in called.err
    assert files[0] == files[1] and len(files[0].splitlines()) == len(QUESTIONS)
    assert said[0] == said[1]
    refused = toolmem(*words, "--prompts", prompts, "--out", out, "--compile", "true", "--ranks", 2)
    assert refused.code == 2 and "--ranks" in refused.err


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
def test_a_killed_call_goes_on(options, cut, runs, prompts, tmp_path, toolmem):
    """Wherever the file was cut, the end is byte for byte that of a call that ran through."""
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
    ask = package.Run.ask_each
    monkeypatch.setattr(
        package.Run,
        "ask_each",
        lambda self, questions, **options: (
            asked.extend(questions) or ask(self, questions, **options)
        ),
    )
    assert toolmem(*words).code == 0
    assert asked == QUESTIONS[5:]
    assert out.read_text() == "".join(lines)


def open_or_die(opened, rank):
    """Rank 1's process dies instead."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return opened(rank)


def test_ranks_write_the_same_file_and_one_that_dies_is_made_good_for(
    runs, prompts, tmp_path, toolmem, monkeypatch
):
    """First rank 1 dies: its rows say so, then they are asked again, wherever that is cut off."""
    from toolmem import run as runs_module
    from toolmem.generation import Ranks

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    words = ["generate", "--checkpoint", runs / "in_tool", "--prompts", prompts, "--seed", "3"]
    words += ["--temperature", "1", "--max_new_tokens", "8", "--out"]
    assert toolmem(*words, whole).code == 0
    wanted = whole.read_text().splitlines()

    with monkeypatch.context() as patch:
        patch.setattr(
            runs_module, "Ranks", lambda opened, n: Ranks(partial(open_or_die, opened), n)
        )
        called = toolmem(*words, out, "--ranks", 2)
    assert called.code == 2
    for word in ("3 of 7 prompts", "rank 1 was killed by signal 9", "again"):
        assert word in called.err
    marked = out.read_text()
    rows = [json.loads(line) for line in marked.splitlines()]
    assert [row["prompt"] for row in rows] == QUESTIONS
    for number, row in enumerate(rows):
        if number % 2 == 0:
            assert row == json.loads(wanted[number])
        else:
            assert row["answer"] is None and row["finish_reason"] == "error"
            assert row["error"].startswith("rank 1 was killed")
    # answers to two of the three were there when the next call was killed
    again = tmp_path / "out.jsonl.again"
    again.write_text("".join(wanted[number] + "\n" for number in (1, 3)) + '{"prompt": "When')
    asked: list[str] = []
    ask = package.Run.ask_each
    monkeypatch.setattr(
        package.Run,
        "ask_each",
        lambda self, questions, **options: (
            asked.extend(questions) or ask(self, questions, **options)
        ),
    )
    assert toolmem(*words, out).code == 0
    assert asked == [QUESTIONS[5]]
    assert out.read_text() == whole.read_text()
    assert not again.exists()
    # what another call has left is not taken for an answer
    out.write_text(marked)
    again.write_text(wanted[0] + "\n")
    assert toolmem(*words, out).code == 0
    assert out.read_text() == whole.read_text()
    assert not again.exists()


def test_ranks_are_for_files(runs, toolmem):
    for words in (["--prompt", "When?", "--ranks", 2], ["--prompt", "When?", "--ranks", 0]):
        called = toolmem("generate", "--checkpoint", runs / "in_tool", *words)
        assert called.code == 2 and "--ranks" in called.err


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_moment_each_prompt_is_answered_once(ranks, runs, tmp_path):
    """SIGKILL, a few times, at moments drawn by chance; a last call goes through."""
    draw = random.Random(0)
    n, kills = (400, 3) if ranks == 1 else (1000, 1)  # ranks hand over many at a time
    questions = [f"When was person {number} born?" for number in range(n)]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    words = ["--checkpoint", str(runs / "in_tool"), "--prompts", str(prompts), "--out", str(out)]
    command = [sys.executable, "-m", "toolmem", "generate", *words, "--max_new_tokens", "150"]
    command += ["--ranks", str(ranks)]
    kept = b""
    for kill in range(kills):
        enough = len(kept.splitlines()) + draw.randint(1, 80)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 100
            while not out.exists() or out.read_bytes().count(b"\n") < enough:
                assert process.poll() is None and time.monotonic() < end, "nothing to kill"
                time.sleep(0.002)
            time.sleep(0.01 * draw.random())
            assert process.poll() is None, "it was at its end already"
            started = children(process.pid)
            assert len(started) >= (ranks if ranks > 1 else 0)
        finally:
            process.kill()
            process.wait()
        end = time.monotonic() + 30
        while any(alive(pid) for pid in started):
            assert time.monotonic() < end, "a rank outlives the process that started it"
            time.sleep(0.05)
        written = out.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        assert whole.startswith(kept), "a row that was there has changed"
        kept = whole
        if kill == 0:  # a row that was cut off, whether or not this kill left one
            out.write_bytes(kept + b'{"prompt": "When was')
    assert 3 <= len(kept.splitlines()) < len(questions)
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(kept)
    rows = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert [row["prompt"] for row in rows] == questions
