"""Tasks asked of tiny models: scores against a plain loop, resumed anywhere, the same in any batch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.evaluation.answers import Answers
from toolmem.evaluation.examples import ask_in_parts
from toolmem.evaluation.measures import estimates
from toolmem.evaluation.tasks import Asked, Task, TaskRecipe, find_recipe
from toolmem.generation import generate_naive
from toolmem.models import Transformer

TOKENIZER = ByteTokenizer()
CHOICES = [
    {
        "query": f"Question: which of {'so ' * (n % 4)}many {n}?",
        "choices": ["a", "bcd"[: 1 + n % 3], "Zoë é"],
        "gold": n % 3,
    }
    for n in range(11)
]
CLOZES = [
    {"context": f"To {n} or not to {'x' * (n + 1)}", "continuation": f"be {n % 3}"}
    for n in range(7)
]
QUESTIONS = [
    {"context": f"Q: {n}\nA:", "answer": "the Sun", "aliases": ["x", "y."]} for n in range(6)
]
ROWS = {"choices": CHOICES, "clozes": CLOZES, "questions": QUESTIONS}


def tiny(seed=0):
    torch.manual_seed(seed)
    size = {"dim": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 400}
    model = Transformer(TOKENIZER.vocab_size, **size).eval()
    with torch.no_grad():  # opinions of its own
        model.head.weight *= 3
    return model


def write(folder, name):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]), encoding="utf-8")
    return str(path)


def in_file_order(rows):
    return sorted(rows, key=lambda row: row["line"])


def task_of(folder, name, **options):
    path = write(folder, name)
    recipe = find_recipe(name, path).asking(**options)
    return Task.read(name, recipe, path)


def log_prob(model, context, continuation):
    """Of a text after another, byte by byte, in float64."""
    before, after = TOKENIZER.encode(context), TOKENIZER.encode(continuation)
    with torch.no_grad():
        scores = model.double()(torch.tensor([before + after]))[0].log_softmax(-1)
    model.float()
    at = range(len(before) - 1, len(before) + len(after) - 1)
    return (
        sum(float(scores[place, token]) for place, token in zip(at, after, strict=True)),
        all(int(scores[place].argmax()) == token for place, token in zip(at, after, strict=True)),
    )


def test_multiple_choice_against_a_plain_loop(tmp_path):
    model = tiny()
    rows = ask_in_parts(Asked(task_of(tmp_path, "choices"), model, TOKENIZER), part=4)
    assert sorted(row["line"] for row in rows) == list(range(1, len(CHOICES) + 1))
    for given, row in zip(CHOICES, in_file_order(rows), strict=True):
        totals = [log_prob(model, given["query"], " " + text)[0] for text in given["choices"]]
        assert row["log_probs"] == pytest.approx(totals, abs=1e-4)
        sizes = [len(text) for text in given["choices"]]
        of_bytes = [len(text.encode()) for text in given["choices"]]
        gold = given["gold"]
        assert row["scores"]["accuracy"] == (np.argmax(totals) == gold)
        assert row["scores"]["accuracy_norm"] == (np.argmax(np.divide(totals, sizes)) == gold)
        assert row["scores"]["accuracy_bytes"] == (np.argmax(np.divide(totals, of_bytes)) == gold)
        chances = np.exp(totals) / np.exp(totals).sum()
        assert row["confidence"] == pytest.approx(chances.max(), abs=1e-4)
        assert row["scores"]["gold_probability"] == pytest.approx(chances[gold], abs=1e-4)


def test_cloze_against_a_plain_loop(tmp_path):
    model, task = tiny(), task_of(tmp_path, "clozes")
    rows = ask_in_parts(Asked(task, model, TOKENIZER), part=32)
    found = [log_prob(model, row["context"], " " + row["continuation"]) for row in CLOZES]
    totals = np.array([total for total, _ in found])
    numbers = estimates(task.measures, rows)
    assert numbers["perplexity"].value == pytest.approx(np.exp(-totals.mean()), rel=1e-4)
    n_bytes = sum(len(row["continuation"]) + 1 for row in CLOZES)
    assert numbers["token_perplexity"].value == pytest.approx(
        np.exp(-totals.sum() / n_bytes), rel=1e-4
    )
    assert numbers["bits_per_byte"].value == pytest.approx(
        -totals.sum() / np.log(2) / n_bytes, rel=1e-4
    )
    assert numbers["accuracy"].value == np.mean([greedy for _, greedy in found])


def test_questions_are_answered_as_the_plain_loop_answers(tmp_path):
    model, task = tiny(), task_of(tmp_path, "questions")
    rows = in_file_order(ask_in_parts(Asked(task, model, TOKENIZER, batch_size=4), part=4))
    for given, row in zip(QUESTIONS, rows, strict=True):
        prompt = TOKENIZER.encode(given["context"])
        plain = generate_naive(model, TOKENIZER, prompt, max_new_tokens=task.recipe.max_new_tokens)
        written = [token for token in plain.tokens[len(prompt) :] if token < 256]
        text = TOKENIZER.decode(written).lstrip()
        assert row["said"] == text.partition("\n")[0].strip()
        assert row["scores"].keys() == {"exact_match", "contains", "f1"}


@pytest.mark.parametrize("name", ["choices", "clozes", "questions"])
def test_killed_anywhere_it_ends_the_same(tmp_path, name):
    model, task = tiny(), task_of(tmp_path, name)
    asked = Asked(task, model, TOKENIZER, batch_size=4)
    about = {"asked": asked.digest()}
    path = tmp_path / "answers.jsonl"
    with Answers(path, about) as answers:
        rows = ask_in_parts(asked, part=4, answers=answers)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in range(0, len(lines), 3):
        path.write_bytes(b"".join(lines[: kept + 1]) + b'{"half')
        told = []
        with Answers(path, about) as answers:
            again = ask_in_parts(asked, part=4, answers=answers, advance=told.append)
        assert again == rows
        assert path.read_bytes() == whole
        assert sum(told) == len(rows)
        assert told[0] == (kept // 4 * 4 or 1) or kept >= len(rows)


@pytest.mark.parametrize("name", ["choices", "clozes", "questions"])
def test_invariant_is_the_same_to_the_bit_in_any_batch(tmp_path, name):
    model, task = tiny(), task_of(tmp_path, name)
    found = []
    for size in (1, 3, 32):
        asked = Asked(task, model, TOKENIZER, batch_size=size, invariant=True)
        found.append(ask_in_parts(asked, part=size, invariant=True))
    assert found[0] == found[1] == found[2]


def test_examples_stand_before_each_question_and_are_not_asked(tmp_path):
    task = task_of(tmp_path, "choices", n_shots=2)
    assert len(task.items) == len(CHOICES) - 2
    assert len(task.shots) == 2
    assert not {shot.line for shot in task.shots} & {item.line for item in task.items}
    asked = Asked(task, tiny(), TOKENIZER)
    before = TOKENIZER.decode(asked._pairs[0][0].context)
    for shot in task.shots:
        given = CHOICES[shot.line - 1]
        assert f"{given['query']} {given['choices'][given['gold']]}\n\n" in before
    assert before.endswith(CHOICES[task.items[0].line - 1]["query"])
    others = task_of(tmp_path, "choices", n_shots=2)
    assert others.digest() == task.digest() != task_of(tmp_path, "choices").digest()
    with pytest.raises(ToolmemError, match=r"n_shots is 11.*11 rows"):
        task_of(tmp_path, "choices", n_shots=11)


def test_examples_of_another_file(tmp_path):
    shots = write(tmp_path, "clozes")
    values = {"kind": "cloze", "prompt": "{{ context }}", "continuation": "{{ continuation }}"}
    values |= {"n_shots": 7, "shots_file": shots}
    (tmp_path / "mine.yaml").write_text(json.dumps(values))  # which is YAML, too
    task = Task.read("mine", find_recipe(str(tmp_path / "mine.yaml"), shots), shots)
    assert len(task.items) == len(task.shots) == 7


def test_in_the_models_chat_format(tmp_path):
    task = task_of(tmp_path, "choices", chat=True, n_shots=1)
    pair = Asked(task, tiny(), TOKENIZER)._pairs[0][1]
    shot, given = CHOICES[task.shots[0].line - 1], CHOICES[task.items[0].line - 1]
    assert TOKENIZER.decode(pair.context) == (
        f"<|user|>{shot['query']}<|assistant|>{shot['choices'][shot['gold']]}<|end|>"
        f"<|user|>{given['query']}<|assistant|>"
    )
    assert TOKENIZER.decode(pair.continuation) == given["choices"][1]


def test_what_the_model_cannot_take_is_named(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"context": "a", "continuation": "b" * 500}) + "\n")
    task = Task.read("long", find_recipe("long", path), str(path))
    with pytest.raises(ToolmemError, match="long, line 1: a continuation of 501 tokens"):
        ask_in_parts(Asked(task, tiny(), TOKENIZER), part=1)


def test_an_unknown_metric_is_refused():
    recipe = TaskRecipe("cloze", prompt="a", continuation="b", metric="accuracy_norm")
    with pytest.raises(ToolmemError, match="metric is 'accuracy_norm': choose from accuracy, perp"):
        _ = Task("t", recipe, ()).measures
