"""Recall counts exact answers only, with the interval that theory gives, by attribute."""

import json
import math

import pytest
import torch

from toolmem.data.dialogues import Dialogue, Turn
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.evaluation import Recall, RecallResult, Score, is_recalled, measure_recall
from toolmem.generation import Generated
from toolmem.models import Transformer
from toolmem.tools import Calculator, Toolbox

TOKENIZER = ByteTokenizer()


def question(conclusion, answer, attribute="birth_place", person="Ann"):
    turns = (Turn("user", f"What about {person}?"), Turn("assistant", conclusion))
    return Dialogue(turns, answer, attribute, person)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("Ann Smith was born in York.", True),
        ("Ann Smith was born in York", True),
        ("Ann Smith was born in York . ", True),
        ("She was, I think, born in York.", True),
        ("in York", True),
        ("Ann Smith was born in New York.", False),
        ("Ann Smith was born within York.", False),
        ("Ann Smith was born in York, Maine.", False),
        ("Ann Smith was born in york.", False),
        ("Ann Smith was born in  York.", False),
        ("York", False),
        ("in York!", False),
        ("in York. in York\n", False),
        ("", False),
        (".", False),
    ],
)
def test_exact_with_the_word_before(said, right):
    assert is_recalled(said, question("Ann Smith was born in York.", "York")) is right


@pytest.mark.parametrize(
    ("conclusion", "answer", "said", "right"),
    [
        # nothing but the answer: no word to tell York from New York by, so nothing may precede it
        ("York.", "York", "York", True),
        ("York.", "York", "New York.", False),
        ("York", "York", "", False),
        # an answer with a point, a comma, several words
        ("She is at Acme Inc.", "Acme Inc.", "Sir, she is at Acme Inc.", True),
        ("She is at Acme Inc.", "Acme Inc.", "She is at Acme Incorporated.", False),
        ("born on 2 March 1987.", "2 March 1987", "born on 2 March 1987", True),
        ("born on 2 March 1987.", "2 March 1987", "born on 12 March 1987", False),
        # the word before has no space after it
        ("The age is (37.", "37", "His age is (37", True),
        ("The age is (37.", "37", "His age is 37", False),
        # the answer also stands earlier in the sentence
        ("York? Ann lives in York.", "York", "Ann lives in York.", True),
        ("York? Ann lives in York.", "York", "York? York.", False),
    ],
)
def test_exact_at_the_edges(conclusion, answer, said, right):
    assert is_recalled(said, question(conclusion, answer)) is right


def wilson_by_bisection(correct, total):
    """The two p at which the observed fraction is exactly 1.96 standard errors away."""
    seen = correct / total

    def beyond(p):
        return abs(seen - p) - 1.959963984540054 * math.sqrt(p * (1 - p) / total)

    ends = []
    for outer in (0.0, 1.0):
        inner, edge = seen, outer
        if beyond(edge) <= 0:
            ends.append(edge)
            continue
        for _ in range(200):
            middle = (inner + edge) / 2
            inner, edge = (middle, edge) if beyond(middle) <= 0 else (inner, middle)
        ends.append(inner)
    return ends


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (1, 3), (95, 100), (512, 4096)])
def test_interval(correct, total):
    low, high = Score(correct, total).interval
    assert [low, high] == pytest.approx(wilson_by_bisection(correct, total), abs=1e-9)
    assert 0 <= low <= correct / total <= high <= 1


def test_nothing_asked():
    score = Score(0, 0)
    assert math.isnan(score.fraction) and score.interval == (0.0, 1.0)
    assert json.loads(json.dumps(score.as_dict(), allow_nan=False))["recall"] is None


def test_metric_counts_by_attribute_and_adds_over_ranks():
    metric = Recall(["a", "b", "never"])
    for attribute, correct in (("a", True), ("a", False), ("b", True), ("a", True)):
        metric.update(attribute, correct)
    assert metric.scores() == {"a": Score(2, 3), "b": Score(1, 1), "never": Score(0, 0)}
    assert metric.compute()["a"].item() == pytest.approx(2 / 3)
    assert metric.correct.dtype == torch.int64
    metric.half()
    assert metric.correct.dtype == torch.int64, "counts stay exact whatever the precision"
    other = torch.tensor([1, 0, 4])  # another rank's counts, of right answers and of questions
    metric.sync(
        dist_sync_fn=lambda state, group: [state, other], distributed_available=lambda: True
    )
    assert metric.scores() == {"a": Score(3, 4), "b": Score(1, 1), "never": Score(4, 4)}
    metric.unsync()
    assert metric.scores()["a"] == Score(2, 3)
    metric.reset()
    assert metric.scores()["a"] == Score(0, 0)
    with pytest.raises(ValueError):
        metric.update("unknown", True)


class Answering:
    """Stands in for the generator: says what it is told, and notes what it was asked."""

    def __init__(self, says, reasons=None):
        self.says, self.reasons = says, reasons or ["end"] * len(says)

    def __call__(self, model, tokenizer, prompts, **options):
        self.prompts, self.options = prompts, options
        ids = tokenizer.role_ids
        generated = []
        for prompt, turns, reason in zip(prompts, self.says, self.reasons, strict=True):
            tokens = list(prompt)
            for number, text in enumerate(turns):
                tokens += tokenizer.encode(text)
                if number < len(turns) - 1:
                    tokens.append(ids["database"] if number % 2 == 0 else ids["assistant"])
            tokens += [ids["end"]] if reason == "end" else []
            generated.append(Generated(tokens, [], [], reason, [], len(prompt)))
        return generated


def test_measure_recall(monkeypatch):
    questions = [
        question("Ann was born in York.", "York"),
        question("Bob was born in Rome.", "Rome", person="Bob"),
        question("Ann works as a poet.", "poet", "occupation"),
        question("Bob works as a baker.", "baker", "occupation", "Bob"),
        question("Cy works as a spy.", "spy", "occupation", "Cy"),
    ]
    says = [
        ["FIND birth_place FOR Ann", "York", "Ann was born in York."],
        ["FIND birth_place FOR Bob", "Rome", "Bob was born in New Rome."],
        ["Ann works as a poet."],
        ["Bob works as a baker"],
        ["FIND occupation FOR Cy", "spy"],
    ]
    generator = Answering(says, ["end", "end", "end", "length", "length"])
    monkeypatch.setattr("toolmem.evaluation.recall.generate", generator)
    result = measure_recall(None, TOKENIZER, questions, batch_size=3)
    assert result.attributes == {"birth_place": Score(1, 2), "occupation": Score(1, 3)}
    assert result.overall == Score(2, 5) and result.exact_match == 0.4
    ids = TOKENIZER.role_ids
    assert generator.prompts[1] == [ids["user"], *b"What about Bob?", ids["assistant"]]
    assert generator.options["batch_size"] == 3 and generator.options["toolbox"] is None
    assert generator.options["max_new_tokens"] > len("Bob works as a baker.")
    assert [sample.correct for sample in result.samples] == [True, False, True, False, False]
    first = result.samples[0].as_dict()
    assert first["turns"] == [
        {"role": "user", "text": "What about Ann?"},
        {"role": "assistant", "text": "FIND birth_place FOR Ann"},
        {"role": "database", "text": "York"},
        {"role": "assistant", "text": "Ann was born in York."},
    ]
    assert (first["expected"], first["person"], first["finish_reason"]) == ("York", "Ann", "end")
    written = json.loads(json.dumps([result.as_dict(), first], allow_nan=False))[0]
    assert (written["correct"], written["total"]) == (2, 5)
    assert written["attributes"]["occupation"]["total"] == 3
    low, high = written["attributes"]["occupation"]["interval_95"]
    assert low < 1 / 3 < high


def test_role_tokens_in_text_are_not_turns(monkeypatch):
    """A model that spells ``<|assistant|>`` out has not begun a new turn."""
    said = "it is Rome<|assistant|>in York."
    monkeypatch.setattr("toolmem.evaluation.recall.generate", Answering([[said]]))
    result = measure_recall(None, TOKENIZER, [question("in York.", "York")])
    assert result.overall == Score(0, 1)
    assert result.samples[0].turns[-1] == ("assistant", said)


def test_no_questions():
    model = Transformer(vocab_size=260, dim=8, n_layers=1, n_heads=1, max_seq_len=8)
    assert measure_recall(model, TOKENIZER, []) == RecallResult({}, [])


def test_with_a_real_model_tool_and_generator():
    """A model taught four dialogues by heart, the calculator answering two of them."""
    dialogues = []
    for person, born, asked in (("Al", 1950, True), ("Bo", 1963, True), ("Cy", 1977, False)):
        age = str(2000 - born)
        turns = [Turn("user", f"{person}?")]
        if asked:
            turns += [Turn("assistant", f"CALCULATE 2000 - {born}"), Turn("database", age)]
        turns += [Turn("assistant", f"is {age}.")]
        dialogues.append(Dialogue(tuple(turns), age, "age" if asked else "guess", person))
    ids = TOKENIZER.role_ids
    rows = []
    for dialogue in dialogues:
        tokens = []
        for turn in dialogue.turns:
            tokens += [ids[turn.role], *TOKENIZER.encode(turn.text)]
        rows.append([*tokens, ids["end"]])
    torch.manual_seed(0)
    model = Transformer(vocab_size=260, dim=32, n_layers=2, n_heads=2, max_seq_len=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=-100
    )
    targets = padded[:, 1:]
    for _ in range(120):
        logits = model(padded[:, :-1].clamp(min=0))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with Toolbox([Calculator()]) as toolbox:
        result = measure_recall(model, TOKENIZER, dialogues, toolbox=toolbox, batch_size=2)
        assert result.attributes == {"age": Score(2, 2), "guess": Score(1, 1)}
        assert result.samples[0].turns == tuple((t.role, t.text) for t in dialogues[0].turns)
    without = measure_recall(model, TOKENIZER, dialogues)
    assert without.attributes == {"age": Score(0, 2), "guess": Score(1, 1)}
    assert without.samples[0].finish_reason == "tool_calls"
    assert model.training
