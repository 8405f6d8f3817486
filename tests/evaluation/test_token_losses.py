"""Kinds of tokens by hand, and their losses against plain float64."""

import re

import numpy as np
import pytest
import torch

from toolmem.data.dialogues import Dialogue, TemplateSet, Turn
from toolmem.data.tables import load_population
from toolmem.data.text.token_table import encode_dialogue
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.evaluation import measure_token_losses, token_kinds
from toolmem.models import Transformer

LETTERS = {"query": "q", "name": "n", "copied": "c", "memorised": "m", "other": "o", None: " "}
OF_CODE = dict(zip(range(-1, 5), " qncmo", strict=True))
BYTES = ByteTokenizer()


class Threes:
    """Tokens of three bytes each, wherever fields begin and end."""

    role_ids = {"user": 0, "assistant": 1, "database": 2, "end": 3}
    vocab_size = 400

    def __init__(self):
        self.known = {}

    def encode(self, text):
        data = text.encode()
        pieces = [data[i : i + 3] for i in range(0, len(data), 3)]
        return [self.known.setdefault(piece, 4 + len(self.known)) for piece in pieces]

    def decode_bytes(self, ids):
        pieces = {number: piece for piece, number in self.known.items()}
        return b"".join(pieces[i] for i in ids)


class Shouting(ByteTokenizer):
    """Gives back another text than it was given."""

    def encode(self, text):
        return super().encode(text.replace("ß", "ss"))


def table(tmp_path, rows, head="name,birth_place"):
    path = tmp_path / "people.csv"
    path.write_text(head + "\n" + rows)
    return load_population(path)


def shown(dialogue, tokenizer=BYTES):
    """Each turn's text and its kinds as letters beneath, role tokens as dots and their kinds."""
    tokens, _ = encode_dialogue(dialogue, tokenizer)
    kinds = "".join(OF_CODE[kind] for kind in token_kinds(dialogue, tokenizer).tolist())
    assert len(kinds) == len(tokens)
    return kinds


def test_in_tool_by_hand(tmp_path):
    """The name holds a word of the template and the answer itself: places count, not words."""
    people = table(tmp_path, "France Born,France\n")
    (dialogue,) = TemplateSet.load("in_tool").questions(people).dialogues()
    said = [turn.text for turn in dialogue.turns]
    assert said == [
        "Where was France Born born?",
        "FIND birth_place FOR France Born",
        "France",
        "France Born was born in France.",
    ]
    assert (
        shown(dialogue)
        == "".join(
            [
                " " * (1 + len(said[0])),  # <|user|> and the question
                " ",  # <|assistant|>, which the user writes
                "qqqqqqqqqqqqqqqqqqqqqnnnnnnnnnnn",
                "q",  # <|database|>, by which the assistant calls
                "      ",
                " ",
                "nnnnnnnnnnnoooooooooooooccccccoo"[: len(said[3])],
                "o",  # <|end|>
            ]
        )
    )


def test_in_weight_by_hand(tmp_path):
    people = table(tmp_path, "France Born,France\n")
    (dialogue,) = TemplateSet.load("in_weight").questions(people).dialogues()
    assert dialogue.conclusion == "France Born was born in France."
    assert shown(dialogue) == " " * (2 + len(dialogue.question)) + (
        "nnnnnnnnnnnooooooooooooo" + "mmmmmm" + "oo"
    )


def test_an_answer_that_the_question_says_whole_is_no_memory(tmp_path):
    people = table(tmp_path, "Ra,Ra\n", "name,symbol")
    (dialogue,) = TemplateSet.load("in_weight").questions(people).dialogues()
    assert dialogue.conclusion == "The symbol of Ra is Ra."
    assert shown(dialogue).strip() == "oooooooooooooo" + "nn" + "oooo" + "nn" + "oo"


def test_several_hops_and_sql(tmp_path):
    people = table(
        tmp_path,
        "Ann O'Hara,3 May 1950,Rome,Bo Li\nBo Li,7 June 1961,Oslo,Ann O'Hara\n",
        "name,birth_date,current_address,friend",
    )
    two_hop = TemplateSet.load("two_hop_friend", "sql", setting="in_tool").questions(people)
    dialogue = two_hop.assembled(next(i for i in range(len(two_hop)) if two_hop.person_index[i]))
    first, _, second, _, last = (turn.text for turn in dialogue.turns[1:])
    assert first == "SELECT friend FROM people WHERE name = 'Bo Li'"
    assert second.endswith("WHERE name = 'Ann O''Hara'")
    kinds = shown(dialogue)
    start = 2 + len(dialogue.question)
    assert kinds[start : start + len(first) + 1] == "q" * 40 + "nnnnn" + "q" + "q"
    start = start + len(first) + 1 + len("Ann O'Hara") + 1
    assert re.fullmatch("q+c{11}qq", kinds[start : start + len(second) + 1])
    assert last.startswith("The friend of Bo Li ")
    assert re.fullmatch("o{14}n{5}o+c+oo", kinds[-len(last) - 1 :])

    older = TemplateSet.load("age_difference", setting="in_tool").questions(people).assembled(0)
    third = next(turn.text for turn in older.turns if turn.text.startswith("CALCULATE"))
    assert third == "CALCULATE 1961 - 1950"
    assert ("q" * 10 + "cccc" + "qqq" + "cccc" + "q") in shown(older)  # said in the dates


def test_a_turn_that_jinja_renders_whole(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "birth_place.jinja").write_text(
        "user: Where was {{ name }} born?\n"
        "assistant: {% if true %}{{ name }} in {{ birth_place }}.{% endif %}\n"
    )
    people = table(tmp_path, "In Oslo,Oslo\n")
    (dialogue,) = TemplateSet.load(tmp_path / "set").questions(people).dialogues()
    assert dialogue.conclusion == "In Oslo in Oslo."
    assert shown(dialogue).strip() == "nnnnnnn" + "oooo" + "mmmm" + "oo"


def test_tokens_on_a_border_are_the_fields(tmp_path):
    people = table(tmp_path, "Bo Li,Oslo\n")
    (dialogue,) = TemplateSet.load("in_weight").questions(people).dialogues()
    # "Bo " "Li " "was" " bo" "rn " "in " "Osl" "o."
    assert shown(dialogue, Threes()).strip() == "nnoooomm" + "o"
    with pytest.raises(ToolmemError, match="the tokenizer changes 'Straße'"):
        token_kinds(Dialogue((Turn("user", "Straße"),), "", "", ""), Shouting())


def test_fields_are_where_they_are_for_every_set():
    from toolmem.data import make_population
    from toolmem.data.dialogues import builtin_sets

    people = make_population(8, relations=True)
    for name in builtin_sets():
        table = TemplateSet.load(name).questions(people)
        for number, index in enumerate(table.sample(12)):
            dialogue = table.assembled(int(index))
            assert dialogue == table.dialogue(int(index))  # fields do not count
            block, _ = table.locate(int(index))
            for turn, segments in zip(dialogue.turns, block.turns, strict=True):
                rest = turn.text
                for start, stop, _ in reversed(turn.fields):
                    rest = rest[:start] + rest[stop:]
                assert rest == "".join(s for s in segments.segments if isinstance(s, str))
            assert set(shown(dialogue)) <= set(" qncmo") - set("mc"["in_tool" not in name])
            if number == 0:
                assert ("m" in shown(dialogue)) == ("in_weight" in name)


@pytest.mark.parametrize("setting", ["in_tool", "in_weight"])
def test_losses_are_those_of_plain_float64(setting):
    from toolmem.data import make_population

    torch.manual_seed(0)
    model = Transformer(260, dim=16, n_layers=1, n_heads=2, max_seq_len=200).double().eval()
    table = TemplateSet.load(setting).questions(make_population(7))
    dialogues = list(table.dialogues())
    found = measure_token_losses(model, BYTES, dialogues, batch_size=5)

    sums, hits = {}, {}
    for dialogue in dialogues:
        tokens, roles = encode_dialogue(dialogue, BYTES)
        logits = model.logits(model.hidden(torch.from_numpy(tokens)[None, :-1]))[0]
        logits = logits.detach().numpy()
        kinds = token_kinds(dialogue, BYTES)
        assert ((kinds >= 0) == (roles == 2)).all()
        for place in range(1, len(tokens)):
            if kinds[place] < 0:
                continue
            row = logits[place - 1]
            loss = np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[place]]
            sums.setdefault(OF_CODE[kinds[place]], []).append(loss)
            hits.setdefault(OF_CODE[kinds[place]], []).append(row.argmax() == tokens[place])
    assert {LETTERS[kind] for kind in found} == set(sums)
    for kind, one in found.items():
        expected = sums[LETTERS[kind]]
        assert one.tokens == len(expected)
        assert one.loss == pytest.approx(np.mean(expected), rel=1e-12)
        assert one.accuracy == pytest.approx(np.mean(hits[LETTERS[kind]]), rel=1e-12)


def test_models_that_look_both_ways():
    """Within the question they may; the losses are still those of one dialogue alone."""
    from toolmem.data import make_population

    model = Transformer(
        260, dim=16, n_layers=1, n_heads=2, max_seq_len=200, attention_mask="prefix"
    )
    table = TemplateSet.load("in_tool").questions(make_population(5))
    dialogues = list(table.dialogues())
    together = measure_token_losses(model.eval(), BYTES, dialogues)
    apart = [measure_token_losses(model, BYTES, [dialogue]) for dialogue in dialogues]
    for kind, one in together.items():
        total = sum(each[kind].tokens * each[kind].loss for each in apart)
        assert one.loss == pytest.approx(total / one.tokens, rel=1e-5)
