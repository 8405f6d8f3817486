"""Ways of asking: an assistant that copies what the tool says is told from one that knows by heart."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chat_templates import chat_tokenizer

from toolmem.data import build_factbase, make_population
from toolmem.data.dialogues import TemplateSet
from toolmem.evaluation import probe_recall, probing
from toolmem.evaluation.probing import rephrased, values_instead, with_answer
from toolmem.evaluation.recall import RecallResult, Sample, is_recalled
from toolmem.models import Transformer
from toolmem.tools import open_toolbox

PEOPLE = make_population(12, seed=1)
QUESTIONS = [TemplateSet.load("in_tool").questions(PEOPLE).dialogue(i) for i in range(48)]
OTHERS = list(TemplateSet.load("biographies/in_tool").questions(PEOPLE).dialogues())


def edited():
    """The same people, each with the next one's facts."""
    moved = {name: [*values[1:], values[0]] for name, values in PEOPLE.attributes.items()}
    return replace(PEOPLE, attributes=moved)


@pytest.fixture
def toolbox(tmp_path):
    build_factbase(PEOPLE, tmp_path / "facts.duckdb")
    with open_toolbox(None, tmp_path / "facts.duckdb") as opened:
        yield opened


@pytest.fixture
def newer(tmp_path):
    build_factbase(edited(), tmp_path / "edited.duckdb")
    with open_toolbox(None, tmp_path / "edited.duckdb") as opened:
        yield opened


def assistant(monkeypatch, says):
    """In the model's place: asks as it should, and says what a rule makes of the tool's answer."""

    def measure(model, tokenizer, questions, *, toolbox=None, **_):
        samples = []
        for question in questions:
            [answer] = [None] if toolbox is None else toolbox.call_many([question.turns[1].text])
            said = says(question, answer)
            turns = ((turn.role, turn.text) for turn in question.turns[:-1])
            samples.append(
                Sample(question.attribute, question.person, question.answer,
                       is_recalled(said, question), (*turns, ("assistant", said)), "end")
            )  # fmt: skip
        return RecallResult.of(samples)

    monkeypatch.setattr(probing, "measure_recall", measure)


def sentence(question, value):
    return question.conclusion.replace(question.answer, value)


def shares(results):
    return {
        name: (one.exact.fraction, one.contains.fraction, one.other and one.other.fraction)
        for name, one in results.items()
    }


def ask(toolbox, newer):
    table = TemplateSet.load("in_tool").questions(edited())
    after = [table.dialogue(i) for i in range(48)]
    return probe_recall(
        None, None, QUESTIONS, toolbox=toolbox, other_words=OTHERS, edited=(after, newer)
    )


def test_one_that_copies(monkeypatch, toolbox, newer):
    assistant(monkeypatch, lambda question, answer: sentence(question, answer.text))
    found = shares(ask(toolbox, newer))
    assert found["asked"] == found["rephrased"] == (1, 1, None)
    assert found["tool_off"] == (0, 0, None)
    assert found["tool_wrong"] == (1, 1, 0)
    exact, contains, old = found["edited"]
    unchanged = [
        new == old
        for name, values in PEOPLE.attributes.items()
        for new, old in zip(edited().attributes[name], values, strict=True)
    ]
    assert (exact, contains) == (1, 1) and old == pytest.approx(sum(unchanged) / 48)


def test_one_that_knows_by_heart(monkeypatch, toolbox, newer):
    facts = {(one.attribute, one.person): one.answer for one in QUESTIONS}

    def says(question, answer):
        return f"I know: {facts[question.attribute, question.person]}, I think."

    assistant(monkeypatch, says)
    found = shares(ask(toolbox, newer))
    assert found["asked"] == found["tool_off"] == found["rephrased"] == (0, 1, None)
    assert found["tool_wrong"] == (0, 0, 1)
    exact, _, old = found["edited"]
    assert exact == 0 and old == 1


def test_other_words_are_none_of_training():
    words = rephrased(QUESTIONS, OTHERS)
    assert len(words) > 48  # several of each
    trained = {one.question for one in QUESTIONS}
    for one in words:
        [own] = [q for q in QUESTIONS if (q.attribute, q.person) == (one.attribute, one.person)]
        assert one.question not in trained and one.person in one.question
        assert one.turns[1:] == own.turns[1:] and one.answer == own.answer


def test_wrong_values_are_of_others_of_their_kind():
    instead = values_instead(QUESTIONS)
    for question in QUESTIONS:
        other = instead[question.answer]
        assert other != question.answer
        expected = with_answer(question, other)
        assert other in expected.conclusion and expected.question == question.question
        assert is_recalled(expected.conclusion, expected)
        assert not is_recalled(question.conclusion, expected)
    assert values_instead(QUESTIONS[:1]) == {}


def test_a_model_in_its_chat_format_is_asked_so(toolbox):
    """An untrained one: whatever it says, every question is counted once."""
    tokenizer = chat_tokenizer()
    model = Transformer(tokenizer.vocab_size, 16, 1, 2, max_seq_len=300)
    found = probe_recall(
        model, tokenizer, QUESTIONS[:4] + QUESTIONS[12:16], toolbox=toolbox, max_new_tokens=8
    )
    assert list(found) == ["asked", "tool_off", "tool_wrong"]
    assert {one.exact.total for one in found.values()} == {8}
    told = found["tool_wrong"].as_dict()
    assert told["other"]["total"] == told["exact"]["total"] == 8
    one = probe_recall(model, tokenizer, QUESTIONS[:1], toolbox=toolbox, max_new_tokens=4)
    assert list(one) == ["asked", "tool_off"]
    alone = probe_recall(model, tokenizer, QUESTIONS[:2], max_new_tokens=4)
    assert list(alone) == ["asked"]
