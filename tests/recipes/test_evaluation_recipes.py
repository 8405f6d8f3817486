"""Recipes of tasks: rows as they are published become the questions that lm-eval asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolmem.evaluation.tasks import find_recipe, recipe_names
from toolmem.evaluation.tasks.asking import MEASURES
from toolmem.evaluation.tasks.items import Choice, Cloze, Question
from toolmem.evaluation.tasks.recipes import recipe_folder

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "evaluation"
STEM = {"stem": "Why?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]}
TEXTS = {"text": ["x", "y"], "label": ["1", "2"]}
SCENE = {
    "activity_label": "Removing ice",
    "ctx_a": "Then, the man [title] writes  over it. ",
    "ctx_b": "then The man",
    "endings": [", adds wax.", "goes [step] on.", "stops [title] here.", " d "],
    "label": "3",
}
# recipe -> rows, and the prompts, texts and right numbers that are to come of each
WANTED = {
    "arc_easy": [
        ({"query": "Question: Q", "choices": ["a", "b"], "gold": 1}, "Question: Q\nAnswer:", ["a", "b"], 1),
        ({"question": "Why?", "choices": TEXTS, "answerKey": "2"}, "Question: Why?\nAnswer:", ["x", "y"], 1),
        ({"question": STEM, "answerKey": "A"}, "Question: Why?\nAnswer:", ["x", "y"], 0),
    ],
    "arc_challenge": [
        ({"question": STEM, "answerKey": "B"}, "Question: Why?\nAnswer:", ["x", "y"], 1),
    ],
    "openbookqa": [
        ({"question_stem": "The sun", "choices": TEXTS, "answerKey": "1"}, "The sun", ["x", "y"], 0),
        ({"question": STEM, "answerKey": "B"}, "Why?", ["x", "y"], 1),
    ],
    "hellaswag": [
        ({"query": "q", "choices": ["a", "b"], "gold": 0}, "q", ["a", "b"], 0),
    ],
    "piqa": [
        ({"goal": "Sit", "sol1": "on it", "sol2": "at it", "label": 1},
         "Question: Sit\nAnswer:", ["on it", "at it"], 1),
        ({"query": "Question: Sit\n", "choices": ["a", "b"], "gold": 0},
         "Question: Sit\nAnswer:", ["a", "b"], 0),
    ],
    "boolq": [
        ({"passage": "P.", "question": "is it", "answer": True},
         "P.\nQuestion: is it?\nAnswer:", ["no", "yes"], 1),
        ({"passage": "P.", "question": "is it", "label": 0},
         "P.\nQuestion: is it?\nAnswer:", ["no", "yes"], 0),
    ],
    "copa": [
        ({"premise": "It fell.", "question": "cause", "choice1": "The wind", "choice2": "A", "label": 1},
         "It fell because", ["the wind", "a"], 1),
        ({"premise": "It fell.", "question": "effect", "choice1": "The wind", "choice2": "A", "label": 0},
         "It fell therefore", ["the wind", "a"], 0),
    ],
    "mmlu": [
        ({"question": " Q? ", "choices": ["u", "v", "w"], "answer": "C"},
         "Q?\nA. u\nB. v\nC. w\nAnswer:", ["A", "B", "C"], 2),
        ({"question": "Q?", "choices": ["u", "v"], "answer": 1, "subject": "high_school"},
         "Q?\nA. u\nB. v\nAnswer:", ["A", "B"], 1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WANTED)
def test_choices(name):
    for row, prompt, texts, gold in WANTED[name]:
        item = find_recipe(name, "x").item(row, 1, "x")
        assert isinstance(item, Choice)
        assert [option.text for option in item.options] == texts
        assert {option.prompt for option in item.options} == {prompt}
        assert item.gold == (gold,)


def test_the_subject_is_told():
    row = {"question": "Q", "choices": ["a", "b"], "answer": 0, "subject": "high_school_x"}
    preamble = find_recipe("mmlu", "x").item(row, 1, "x").preamble
    assert preamble == (
        "The following are multiple choice questions (with answers) about high school x.\n\n"
    )


def test_winogrande_scores_what_follows():
    row = {"sentence": "The _ was big.", "option1": "cup", "option2": "box", "answer": "2"}
    item = find_recipe("winogrande", "x").item(row, 1, "x")
    assert [(o.prompt, o.text) for o in item.options] == [
        ("The cup", "was big."), ("The box", "was big."),
    ]  # fmt: skip
    assert item.gold == (1,)


def test_cloze_and_questions():
    item = find_recipe("lambada", "x").item({"text": "one two three"}, 1, "x")
    assert item == Cloze(1, "one two", "three")
    row = {"question": "Who?", "answer": {"value": "Ann", "aliases": ["An", "Ann"]}}
    item = find_recipe("triviaqa", "x").item(row, 1, "x")
    assert item == Question(1, "Question: Who?\nAnswer:", ("Ann", "An"))


def test_every_recipe_is_tried_and_found():
    tried = {*WANTED, "winogrande", "lambada", "triviaqa"}
    assert set(recipe_names()) == tried == {path.stem for path in FOLDER.glob("*.yaml")}
    assert recipe_folder() == FOLDER
    for name in tried:
        recipe = find_recipe(name, "x")
        assert recipe.metric in {measure.name for measure in MEASURES[recipe.kind]}


def test_real_files(shared_data):
    for name, file, n in (
        ("arc_easy", "arc_easy", 2376), ("piqa", "piqa", 1838),
        ("lambada", "lambada_openai", 5153), ("triviaqa", "triviaqa_sm_sub", 3000),
    ):  # fmt: skip
        path = shared_data / "eval" / f"{file}.jsonl"
        assert len(find_recipe(name, path).items(path)) == n


@pytest.mark.slow
def test_hellaswag_as_the_harness_prepares_it():
    from datasets import Dataset  # lm-eval brings it
    from lm_eval.tasks.hellaswag.utils import process_docs

    [doc] = process_docs(Dataset.from_list([SCENE]))
    item = find_recipe("hellaswag", "x").item(SCENE, 1, "x")
    assert {option.prompt for option in item.options} == {doc["query"]}
    assert [option.text for option in item.options] == doc["choices"]
    assert item.gold == (doc["gold"],)
