"""``toolmem evaluate`` on tasks and texts: results, resumed, compared; what is malformed is named."""

from __future__ import annotations

import json

import pytest

CHOICES = [
    {"query": f"Which {n}", "choices": ["one", "two", "no"][: 2 + n % 2], "gold": n % 2}
    for n in range(10)
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    (tmp_path / "text.txt").write_text("Where was she born? " * 30)
    return tmp_path


def test_results_killed_resumed_and_compared(runs, files, toolmem):
    tasks = f"recall,small={files}/small.jsonl,perplexity={files}/text.txt"
    words = ["evaluate", "--tasks", tasks, "--batch_size", 4, "--n_questions", 8]
    for setting in ("in_weight", "in_tool"):
        out = files / f"{setting}.json"
        called = toolmem(*words, "--checkpoint", runs / setting, "--out", out)
        assert called.code == 0, called.err
    first = json.loads((files / "in_weight.json").read_text())
    small = first["tasks"]["small"]
    assert first["recall"].keys() == {"known", "unseen"}
    assert (small["kind"], small["examples"]) == ("multiple_choice", 10)
    low, high = small["metrics"]["accuracy"]["interval_95"]
    assert low <= small["metrics"]["accuracy"]["value"] <= high
    assert "small (10 questions" in called.out
    assert "perplexity" in called.out
    # killed in the midst: no results yet, some answers
    path = files / "in_weight.small.answers.jsonl"
    whole = path.read_bytes()
    assert len(whole.splitlines()) == 11
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:7]) + b'{"lin')
    (files / "in_weight.json").unlink()
    again = toolmem(*words, "--checkpoint", runs / "in_weight", "--out", files / "in_weight.json")
    assert again.code == 0
    assert path.read_bytes() == whole
    second = json.loads((files / "in_weight.json").read_text())
    assert second["tasks"]["small"]["metrics"] == small["metrics"]
    called = toolmem(
        "evaluate", "--compare", files / "in_weight.json", files / "in_tool.json",
        "--out", files / "apart.json",
    )  # fmt: skip
    assert called.code == 0, called.err
    apart = json.loads((files / "apart.json").read_text())["differences"]
    assert apart.keys() == {"recall/known", "recall/unseen", "small", "perplexity"}
    one = apart["small"]["accuracy"]
    assert one["first"] == small["metrics"]["accuracy"]["value"]
    assert one["gained"] - one["lost"] == round(10 * one["difference"])
    assert "perplexity" in called.out


def test_other_questions_are_not_compared(runs, files, toolmem):
    for name, limit in (("a", 5), ("b", 6)):
        called = toolmem(
            "evaluate", "--checkpoint", runs / "in_weight", "--out", files / f"{name}.json",
            "--tasks", f"small={files}/small.jsonl", "--limit", limit,
        )  # fmt: skip
        assert called.code == 0, called.err
    called = toolmem("evaluate", "--compare", files / "a.json", files / "b.json")
    assert called.code == 2
    assert "were not asked the same" in called.err
    (files / "c.json").write_text("[]")
    called = toolmem("evaluate", "--compare", files / "a.json", files / "c.json")
    assert (called.code, called.err.count("\n")) == (2, 1)
    assert "no file of results" in called.err


def test_divergence_from_a_base_and_from_what_was_kept_of_it(runs, files, toolmem):
    tasks = ["--tasks", f"divergence={files}/text.txt", "--window", 100]
    words = ["evaluate", "--checkpoint", runs / "in_tool", *tasks]
    out = files / "exact.json"
    called = toolmem(*words, "--base", runs / "in_weight", "--out", out)
    assert called.code == 0, called.err
    exact = json.loads(out.read_text())["tasks"]["divergence"]
    assert exact["metrics"]["kl"]["value"] > 0
    assert 0 < exact["metrics"]["tv"]["value"] < 1
    assert sum(one["tokens"] for one in exact["by_position"]) == 600
    kept = files / "base.safetensors"
    called = toolmem(
        "evaluate", "--checkpoint", runs / "in_weight", *tasks, "--store_base", kept, "--top_k", 260
    )
    assert called.code == 0, called.err
    out = files / "kept.json"
    assert toolmem(*words, "--base", kept, "--out", out).code == 0
    found = json.loads(out.read_text())["tasks"]["divergence"]["metrics"]
    for name in ("kl", "kl_reverse", "tv"):
        assert found[name]["value"] == pytest.approx(exact["metrics"][name]["value"], rel=1e-4)
    called = toolmem(*words)
    assert (called.code, called.err.count("\n")) == (2, 1)
    assert "--base" in called.err


MALFORMED = {
    "empty": ("", "is empty"),
    "blank": ("\n\n", "is empty"),
    "not JSON": ('{"query": "a"\n', "line 1: not JSON"),
    "not an object": ("[1]\n", "line 1: expected"),
    "other fields": ('{"a": 1}\n', "line 1: its fields (a) are of no kind"),
    "gold beyond": (
        json.dumps({"query": "q", "choices": ["a", "b"], "gold": 2}),
        "line 1: gold is 2",
    ),
    "gold no number": (
        json.dumps({"query": "q", "choices": ["a", "b"], "gold": 1.5}),
        "gold is 1.5",
    ),
    "one choice": (json.dumps({"query": "q", "choices": ["a"], "gold": 0}), "line 1: 1 choices"),
    "choice empty": (
        json.dumps({"query": "q", "choices": ["a", " "], "gold": 0}),
        "choices[1] is ' '",
    ),
    "choices a text": (json.dumps({"query": "q", "choices": "ab", "gold": 0}), "choices is 'ab'"),
    "query no text": (json.dumps({"query": 3, "choices": ["a", "b"], "gold": [0, 0]}), None),
    "second row": (
        json.dumps({"query": "q", "choices": ["a", "b"], "gold": 0}) + '\n{"query": "q"}\n',
        "line 2: choices (by its fields) wants a field that the row lacks: 'choices' is undefined",
    ),
    "no aliases": (json.dumps({"context": "c", "answer": 3}), "answers[0] is 3"),
    "no continuation": (json.dumps({"context": "c", "continuation": ""}), "continuation is ''"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_name_row_and_field(name, runs, tmp_path, toolmem):
    text, words = MALFORMED[name]
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    called = toolmem("evaluate", "--checkpoint", runs / "in_weight", "--tasks", f"mine={path}")
    if words is None:
        assert called.code == 0, called.err
        return
    assert called.code == 2
    assert called.err.count("\n") == 1
    assert str(path) in called.err
    assert words in called.err


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("small", "unknown task 'small': write recall, or NAME=FILE"),
        ("", "there is none"),
        ("a=x.jsonl,a=y.jsonl", "a is there twice"),
        ("a b=x.jsonl", "is no name"),
        ("recall=x.jsonl", "unknown task"),
        ("a=/nowhere.jsonl", "/nowhere.jsonl does not exist"),
        ("no.yaml=/nowhere.jsonl", "no.yaml"),
    ],
)
def test_what_tasks_there_are_is_told(tasks, words, runs, toolmem):
    called = toolmem("evaluate", "--checkpoint", runs / "in_weight", "--tasks", tasks)
    assert (called.code, called.err.count("\n")) == (2, 1)
    assert words in called.err


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("kind: quiz\n", "kind is 'quiz': choose multiple_choice, cloze, generation"),
        ("prompt: a\n", "kind is missing"),
        ("kind: cloze\nprompt: a\n", "continuation is missing"),
        ("kind: cloze\nprompt: '{{'\ncontinuation: a\n", "prompt: not Jinja"),
        ("kind: cloze\nprompts: a\nshots: 3\n", "shots: there is no such key"),
        ("kind: cloze\nprompt: a\ncontinuation: b\nn_shots: x\n", "n_shots: expected int"),
        ("kind: cloze\nprompt: a\ncontinuation: '{{ x }}'\n", "continuation"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_told(recipe, words, runs, files, toolmem):
    (files / "mine.yaml").write_text(recipe)
    called = toolmem(
        "evaluate", "--checkpoint", runs / "in_weight",
        "--tasks", f"{files}/mine.yaml={files}/small.jsonl",
    )  # fmt: skip
    assert (called.code, called.err.count("\n")) == (2, 1)
    assert words in called.err
