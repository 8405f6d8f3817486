import numpy as np
import pytest

from toolmem.data.dialogues import Dialogue, TemplateSet, Turn, builtin_sets
from toolmem.data.hf_tokenizer import train_tokenizer
from toolmem.data.people import Population, make_population
from toolmem.data.text import token_table
from toolmem.data.text.token_table import TokenTable, encode_dialogue, prompt_tokens
from toolmem.data.tokenizers import ByteTokenizer


def _said(tokens, roles, tokenizer):
    """The dialogue as (role, text) runs: a reading of roles and tokens without any of our code."""
    runs = []
    for token, role in zip(tokens, roles, strict=True):
        name = ["none", "user", "assistant", "database"][role]
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        runs[-1][1].append(int(token))
    return [(name, tokenizer.decode(ids)) for name, ids in runs]


def test_each_token_belongs_to_who_wrote_it():
    dialogue = Dialogue(
        (
            Turn("user", "Q?"),
            Turn("assistant", "FIND"),
            Turn("database", "42"),
            Turn("assistant", "It is 42."),
        ),
        answer="42",
        attribute="a",
        person="p",
    )
    tokenizer = ByteTokenizer()
    tokens, roles = encode_dialogue(dialogue, tokenizer)
    assert tokens.dtype == np.int64 and roles.dtype == np.uint8
    assert _said(tokens, roles, tokenizer) == [
        ("user", "<|user|>Q?<|assistant|>"),
        ("assistant", "FIND<|database|>"),
        ("database", "42<|assistant|>"),
        ("assistant", "It is 42.<|end|>"),
    ]
    prompt = prompt_tokens("Q?", tokenizer)
    assert prompt == tokens[: len(prompt)].tolist()


def test_several_user_turns_each_begin_after_an_end():
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    tokenizer = ByteTokenizer()
    tokens, roles = encode_dialogue(Dialogue(turns, "d", "a", "p"), tokenizer)
    assert _said(tokens, roles, tokenizer) == [
        ("user", "<|user|>a<|assistant|>"),
        ("assistant", "b<|end|>"),
        ("user", "<|user|>c<|assistant|>"),
        ("assistant", "d<|end|>"),
    ]


def _assert_equal(table, questions, tokenizer):
    assert len(table) == len(questions)
    for i in range(len(questions)):
        tokens, roles = encode_dialogue(questions.dialogue(i), tokenizer)
        assert table.tokens(i).tolist() == tokens.tolist()
        assert table.roles(i).tolist() == roles.tolist()


@pytest.mark.parametrize("name", builtin_sets())
def test_all_at_once_equals_one_by_one(name):
    population = make_population(12, seed=3, relations=True)
    questions = TemplateSet.load(name).questions(population)
    table = TokenTable.build(questions, ByteTokenizer())
    _assert_equal(table, questions, ByteTokenizer())
    assert table.codes.dtype == np.uint16


@pytest.mark.parametrize("vocab_size", [400, 20_000])
def test_trained_tokenizers_see_whole_turns(vocab_size, monkeypatch):
    population = make_population(12)
    questions = TemplateSet.load("in_tool", "sql").questions(population)
    texts = [turn.text for d in questions.dialogues() for turn in d.turns]
    tokenizer = train_tokenizer(texts, 400)
    monkeypatch.setattr(tokenizer, "vocab_size", vocab_size)  # a large one needs wider codes
    table = TokenTable.build(questions, tokenizer)
    assert table.codes.dtype == (np.uint16 if vocab_size == 400 else np.uint32)
    _assert_equal(table, questions, tokenizer)


def test_values_of_any_script_and_length(monkeypatch):
    names = ["Zoë Ångström", "李 雷", "Bo Li", "D'Arcy <|end|> O'Neil"]
    values = ["x", "naïve " * 50, "<|database|>", "y" * 3000]
    population = Population(names, {"town": values})
    monkeypatch.setattr(token_table, "_CHUNK_CELLS", 64)  # many chunks, of their own widths
    for query in ("short", "sql"):
        questions = TemplateSet.load("in_tool", query).questions(population)
        table = TokenTable.build(questions, ByteTokenizer())
        _assert_equal(table, questions, ByteTokenizer())


def test_one_huge_value_does_not_widen_all_rows():
    n = 2000
    values = ["x"] * n
    values[7] = "z" * 100_000
    population = Population([f"N{i} M" for i in range(n)], {"town": values})
    table = TokenTable.build(TemplateSet.load("in_weight").questions(population), ByteTokenizer())
    assert table.longest > 100_000 and len(table) == n
    assert table.lengths.dtype == np.int64


def test_concatenation_and_one_by_one():
    population = make_population(5)
    tokenizer = ByteTokenizer()
    questions = [TemplateSet.load(s).questions(population) for s in ("in_weight", "in_tool")]
    tables = [TokenTable.build(q, tokenizer) for q in questions]
    joined = TokenTable.concatenate(tables)
    dialogues = [d for q in questions for d in q.dialogues()]
    slow = TokenTable.from_dialogues(dialogues, tokenizer)
    assert np.array_equal(joined.codes, slow.codes)
    assert np.array_equal(joined.offsets, slow.offsets)
    assert joined.longest == max(len(encode_dialogue(d, tokenizer)[0]) for d in dialogues)
