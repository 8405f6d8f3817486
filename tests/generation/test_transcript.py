"""Text that comes token by token is the text of all tokens."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolmem.data import ByteTokenizer
from toolmem.data.hf_tokenizer import train_tokenizer
from toolmem.generation.transcript import Transcript
from toolmem.generation.turns import ASSISTANT, DATABASE, split_turns

TOKENIZER = ByteTokenizer()
ROLES = TOKENIZER.role_ids
BPE = train_tokenizer(["naïve café — 東京 was born in 1987, Zoë 🎉 said"] * 3, 300)
TEXT = st.text(alphabet=st.sampled_from("aZ ë東🎉\ufffd.\n"), max_size=12)


def spell(*parts):
    """Bytes of text, and role tokens by their names in angle brackets."""
    tokens = []
    for part in parts:
        named = part.startswith("<") and part[1:-1] in ROLES
        tokens += [ROLES[part[1:-1]]] if named else TOKENIZER.encode(part)
    return tokens


def told(tokenizer, parts, stop=()):
    """Pieces of a dialogue of (role code, tokens), and the transcript."""
    transcript = Transcript(tokenizer, stop)
    pieces = [
        piece
        for role, tokens in parts
        for token in tokens
        for piece in transcript.add(token, role, -1.0 if role == ASSISTANT else math.nan)
    ]
    return [*pieces, transcript.finish()], transcript


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BPE], ids=["bytes", "bpe"])
@given(texts=st.lists(TEXT, min_size=1, max_size=7))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_dialogue(tokenizer, texts):
    """Query and answer in turn, whatever they say; it ends where it ends."""
    ids = tokenizer.role_ids
    tokens, parts = [ids["assistant"]], []
    for index, text in enumerate(texts):
        query = index % 2 == 0
        words = [*tokenizer.encode(text), ids["database" if query else "assistant"]]
        if query and index == len(texts) - 1:
            words[-1] = ids["end"]
        parts.append((ASSISTANT if query else DATABASE, words))
        tokens += words
    pieces, transcript = told(tokenizer, parts)
    turns = split_turns(tokens, tokenizer)
    assert [(turn.role, turn.text) for turn in transcript.turns] == turns
    shown: list[str] = [""]
    for piece in pieces[:-1]:
        shown[-1] += piece.text
        if piece.ends:
            shown.append("")
    if not (pieces[-1].calls and len(shown) > len(turns)):
        shown[-1] += pieces[-1].text
    assert shown[: len(turns)] == [text for _, text in turns]
    written = [t for role, part in parts if role == ASSISTANT for t in part]
    assert transcript.sampled == len(written)


@given(data=st.binary(max_size=24))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_bytes_that_are_no_text(data):
    pieces, transcript = told(TOKENIZER, [(ASSISTANT, list(data))])
    assert "".join(piece.text for piece in pieces) == transcript.turns[0].text
    assert transcript.turns[0].text == data.decode("utf-8", "replace")


@given(text=TEXT, stop=st.lists(st.text(alphabet="aZ ë", min_size=1, max_size=3), max_size=3))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_stop_texts(text, stop):
    """What is shown is what stands before the stop text that is whole first, never more at any moment."""
    expected = text
    for length in range(len(text) + 1):
        places = [at for at in (text[:length].find(one) for one in stop) if at >= 0]
        if places:
            expected = text[: min(places)]
            break
    pieces, transcript = told(TOKENIZER, [(ASSISTANT, TOKENIZER.encode(text))], stop)
    assert "".join(piece.text for piece in pieces) == expected == transcript.turns[0].text


def test_a_stop_text_is_the_assistants_only():
    parts = [(ASSISTANT, spell("a", "<database>")), (DATABASE, spell("xyz", "<assistant>"))]
    _, transcript = told(TOKENIZER, [*parts, (ASSISTANT, spell("wxyz"))], ["y"])
    assert [turn.text for turn in transcript.turns] == ["a", "xyz", "wx"]


def test_a_character_is_whole_before_it_is_shown():
    pieces, _ = told(TOKENIZER, [(ASSISTANT, list("aë🎉".encode()))])
    assert [piece.text for piece in pieces] == ["a", "ë", "🎉", ""]


def test_calls_and_log_probabilities():
    parts = [(ASSISTANT, spell("q", "<database>")), (DATABASE, spell("t", "<assistant>"))]
    pieces, transcript = told(TOKENIZER, parts)
    assert [(p.role, p.text, p.ends, p.calls) for p in pieces[:4]] == [
        ("assistant", "q", False, False),
        ("assistant", "", True, True),
        ("database", "t", False, False),
        ("database", "", True, False),
    ]
    assert [turn.calls for turn in transcript.turns] == [True, False, False]
    assert [turn.log_probs for turn in transcript.turns] == [[-1.0], [None], []]
    assert ROLES["database"] not in transcript.turns[0].tokens
