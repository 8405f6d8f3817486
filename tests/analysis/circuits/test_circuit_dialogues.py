"""Positions in dialogues: what is copied, from where, and who wrote what."""

from __future__ import annotations

import pytest
import torch

from toolmem.analysis.circuits import side_by_side, tell
from toolmem.analysis.circuits.dialogues import kinds_of_copies
from toolmem.data.dialogues import Dialogue, TemplateSet, Turn
from toolmem.data.hf_tokenizer import train_tokenizer
from toolmem.data.people import make_population
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.generation.reference import foreign_spans


def dialogues(name: str) -> list[Dialogue]:
    table = TemplateSet.load(name).questions(make_population(6, relations=True))
    return [table.dialogue(i) for i in range(len(table))]


@pytest.fixture(scope="module")
def words():
    """A tokenizer that merges bytes."""
    texts = [
        turn.text for name in ("in_tool", "in_weight") for d in dialogues(name) for turn in d.turns
    ]
    return train_tokenizer(texts, vocab_size=400)


@pytest.mark.parametrize("name", ["in_tool", "in_weight", "in_tool_long", "two_hop_friend/in_tool"])
def test_what_stands_at_the_positions(name):
    tokenizer = ByteTokenizer()
    for dialogue in dialogues(name):
        told = tell(dialogue, tokenizer)

        def text(positions, told=told):
            return tokenizer.decode(told.tokens[list(positions)].tolist())

        for copy in told.copies:
            wanted = dialogue.answer if copy.what == "answer" else dialogue.person
            assert text(copy.target) == wanted and copy.sources
            assert all(text(source) == wanted for source in copy.sources)
            assert all(source[-1] < copy.target[0] for source in copy.sources)
        assert text(told.answer) == dialogue.answer
        assert text([told.places["end of question"]]) == "<|assistant|>"
        assert text([told.places["end of name"]]) == dialogue.person[-1]
        assert told.places["before answer"] == told.answer[0] - 1
        if "in_tool" not in name:
            assert told.query == () and "end of result" not in told.places
            assert "answer" not in [copy.what for copy in told.copies]
        elif "two_hop" not in name:
            assert text(told.query) == dialogue.turns[1].text + "<|database|>"
            assert text([told.places["end of result"]]) == dialogue.answer[-1]
            found = {copy.what: len(copy.sources) for copy in told.copies}
            assert found == {"name in query": 1, "name": 2, "answer": 1}


def test_tokens_that_are_longer_than_bytes(words):
    for dialogue in dialogues("in_tool"):
        told = tell(dialogue, words)
        assert dialogue.answer in words.decode(told.tokens[list(told.answer)].tolist())
        assert len(told.answer) <= len(dialogue.answer)
        for copy in told.copies:
            for source in copy.sources:
                assert torch.equal(told.tokens[list(source)], told.tokens[list(copy.target)])
    assert any(tell(d, words).copies for d in dialogues("in_tool"))


def test_names_beyond_ascii_and_texts_that_come_twice():
    said = ("Was Zoë in Oslo, Oslo?", "Zoë", "Oslo", "Oslo is not it, Zoë: Oslo.")
    roles = ("user", "assistant", "database", "assistant")
    told = tell(Dialogue(tuple(map(Turn, roles, said)), "Oslo", "place", "Zoë"), ByteTokenizer())
    copies = {copy.what: copy for copy in told.copies}
    assert copies["name in query"].sources == ((5, 6, 7, 8),)  # ë is two bytes
    # the last one that is said, from the first in each turn before
    assert (
        told.answer
        == copies["answer"].target
        == tuple(range(len(told.tokens) - 6, len(told.tokens) - 2))
    )
    assert [source[0] for source in copies["answer"].sources] == [13, 30]


def test_rows_are_padded_on_the_right():
    told = [tell(d, ByteTokenizer()) for d in dialogues("in_tool")[:3]]
    rows = side_by_side(told)
    for row, one in enumerate(told):
        n = len(one.tokens)
        assert torch.equal(rows.tokens[row, :n], one.tokens) and not rows.tokens[row, n:].any()
        assert rows.real[row].tolist() == [i < n for i in range(rows.tokens.shape[1])]
        assert rows.spans[row, :n].tolist() == foreign_spans(one.roles.tolist())
        assert (rows.spans[row, n:] == -1).all()
    assert kinds_of_copies(told) == ["name in query", "name", "answer"]
    assert kinds_of_copies([]) == []
