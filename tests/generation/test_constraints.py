"""Grammars: what may come next is what some matching text goes on with."""

import json
import pickle
import random
import re
import sys

import pytest
import torch

from toolmem.data.hf_tokenizer import HFTokenizer
from toolmem.data.tokenizers import ByteTokenizer, SymbolTokenizer
from toolmem.errors import ToolmemError
from toolmem.generation import Sampling, beam_search, generate, generate_naive
from toolmem.generation import constraints as module
from toolmem.generation.reference import ASSISTANT, DATABASE, USER
from toolmem.generation.sampling import History
from toolmem.models import Transformer
from toolmem.tools.base import Answer

pytest.importorskip(
    "llguidance", reason="the extra constrain is not installed: no grammars to test"
)
TOKENIZER = ByteTokenizer()
ROLES = TOKENIZER.role_ids
PROMPT = [ROLES["user"], *b"Where?", ROLES["assistant"]]
ATTRIBUTES = ("birth_date", "birth_city", "employer")
NAMES = ("Ann Smith", "Anna Ng", "Zoë O'Neil-(Jr.)")


def wrote(tokens, prompt=PROMPT):
    return History(
        [*prompt, *tokens], [USER] * len(prompt) + [ASSISTANT] * len(tokens), len(prompt)
    )


def model(seed=0, max_seq_len=200, vocab=260):
    torch.manual_seed(seed)
    return Transformer(vocab, 16, 1, 2, max_seq_len=max_seq_len)


class Echo:
    def call_many(self, texts):
        return [Answer(f"<{text}>", False, 0.0) for text in texts]


def allowed_by_definition(language, text, stop):
    """Bytes and stop token after a prefix, of a finite language."""
    words = [word.encode() for word in language]
    after = {word[len(text)] for word in words if word.startswith(text) and len(word) > len(text)}
    return after | ({stop} if text in words else set())


def test_every_step_allows_what_some_query_goes_on_with():
    constraint = module.query_constraint(TOKENIZER, ATTRIBUTES, NAMES)
    language = [f"FIND {a} FOR {n}" for a in ATTRIBUTES for n in NAMES]
    for word in language:
        data = word.encode()
        for end in range(len(data) + 1):
            mask = constraint.allowed(wrote(data[:end]))
            expected = allowed_by_definition(language, data[:end], ROLES["database"])
            assert set(mask.nonzero()[:, 0].tolist()) == expected


def test_the_order_of_asking_changes_nothing(monkeypatch):
    monkeypatch.setattr(module, "KEPT_STATES", 3)
    constraint = module.query_constraint(TOKENIZER, ATTRIBUTES, NAMES)
    language = [f"FIND {a} FOR {n}" for a in ATTRIBUTES for n in NAMES]
    draw = random.Random(0)
    for _ in range(200):
        text = draw.choice(language).encode()
        text = text[: draw.randint(0, len(text))]
        mask = constraint.allowed(wrote(text))
        expected = allowed_by_definition(language, text, ROLES["database"])
        assert set(mask.nonzero()[:, 0].tolist()) == expected
        assert len(constraint._states) <= 3


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.95}])
def test_a_random_model_asks_well_formed_queries(options):
    constraint = module.query_constraint(TOKENIZER, ATTRIBUTES)
    sampler = Sampling(constraint=constraint, logit_bias={ROLES["database"]: 2.0}, **options)
    prompts = [[ROLES["user"], *bytes([i + 60]) * i, ROLES["assistant"]] for i in range(1, 7)]
    told = {"max_new_tokens": 170, "max_tool_calls": 1, "sampler": sampler, "toolbox": Echo()}
    results = generate(model(), TOKENIZER, prompts, **told)
    assert any(result.tool_calls for result in results)
    for result in results:
        pairs = zip(result.tokens, result.roles, strict=True)
        text = bytes(token for token, role in pairs if role == ASSISTANT and token < 256)
        assert re.match(rb"FIND (birth_date|birth_city|employer) FOR [^\x00-\x20]", text)
        for query, _ in result.tool_calls:
            assert re.fullmatch(r"FIND (birth_date|birth_city|employer) FOR .+", query)
    one = generate_naive(model(), TOKENIZER, prompts[3], seed=3, **told)
    assert one.tokens == results[3].tokens


def test_only_the_first_turn_is_bound():
    constraint = module.query_constraint(TOKENIZER, ATTRIBUTES)
    answered = [*b"FIND employer FOR A", ROLES["database"], *b"ACME", ROLES["assistant"]]
    roles = [ASSISTANT] * 20 + [DATABASE] * 5
    after = History([*PROMPT, *answered], [USER] * len(PROMPT) + roles, len(PROMPT))
    assert after.turn() == (1, [])
    assert constraint.allowed(after) is None
    always = module.query_constraint(TOKENIZER, ATTRIBUTES, turns=None)
    assert always.allowed(after).nonzero()[:, 0].tolist() == [ord("F")]


def test_a_json_schema_is_obeyed():
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Paris"]}, "year": {"type": "integer"}},
        "required": ["city", "year"],
        "additionalProperties": False,
    }
    ends = Sampling(
        logit_bias={ROLES["end"]: 8.0, ord("}"): 8.0, 32: -99.0, 10: -99.0, 9: -99.0, 13: -99.0},
        constraint=module.GrammarConstraint(TOKENIZER, json_schema=schema),
    )
    for result in generate(model(), TOKENIZER, [PROMPT] * 4, sampler=ends, max_new_tokens=120):
        assert result.finish_reason == "end"
        said = json.loads(TOKENIZER.decode(result.tokens[result.prompt_length : -1]))
        assert set(said) == {"city", "year"} and said["city"] in ("Rome", "Paris")
        assert isinstance(said["year"], int)


def test_a_lark_grammar_and_two_stops():
    lark = 'start: "(" start ")" | "x"'
    constraint = module.GrammarConstraint(TOKENIZER, lark=lark, stop=("end", "database"))
    mask = constraint.allowed(wrote(b"((x))"))
    assert set(mask.nonzero()[:, 0].tolist()) == {ROLES["end"], ROLES["database"]}
    assert set(constraint.allowed(wrote(b"((x")).nonzero()[:, 0].tolist()) == {ord(")")}


def test_beams_follow_the_grammar():
    options = Sampling(constraint=module.query_constraint(TOKENIZER, ATTRIBUTES, NAMES))
    found = beam_search(
        model(), PROMPT, n_beams=9, max_new_tokens=60, stop_tokens=[ROLES["database"]],
        options=options, length_penalty=0.0,
    )  # fmt: skip
    texts = {TOKENIZER.decode(x.tokens[:-1]) for x in found}
    assert texts == {f"FIND {a} FOR {n}" for a in ATTRIBUTES for n in NAMES}


def test_a_byte_level_bpe(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["FIND birth_city FOR Ann Smith"] * 50, trainer)
    tokenizer = HFTokenizer(backend.to_str())
    constraint = module.query_constraint(tokenizer, ATTRIBUTES, NAMES)
    first = constraint.allowed(wrote([])).nonzero()[:, 0].tolist()
    assert first == tokenizer.encode("FIND birth_city")[:1]  # forced text in its usual pieces
    mask = constraint.allowed(wrote(tokenizer.encode("FIND birth_")))
    assert {tokenizer.decode([i]) for i in mask.nonzero()[:, 0].tolist()} >= {"c", "d"}
    sampler = Sampling(constraint=constraint, temperature=0.0)
    wide = model(vocab=tokenizer.vocab_size + 7)  # a head padded to a round width
    prompt = [tokenizer.role_ids["user"], 5, tokenizer.role_ids["assistant"]]
    result = generate(wide, tokenizer, [prompt], sampler=sampler, max_new_tokens=60)[0]
    text = tokenizer.decode(result.tokens[len(prompt) : -1])
    assert text in {f"FIND {a} FOR {n}" for a in ATTRIBUTES for n in NAMES}


def test_it_can_be_sent_to_another_process():
    constraint = module.query_constraint(TOKENIZER, ATTRIBUTES, NAMES)
    again = pickle.loads(pickle.dumps(constraint))
    assert torch.equal(again.allowed(wrote(b"FIND ")), constraint.allowed(wrote(b"FIND ")))


def test_text_that_breaks_the_grammar_is_named():
    constraint = module.query_constraint(TOKENIZER, ATTRIBUTES)
    with pytest.raises(ToolmemError, match="'SELECT' breaks the constraint"):
        constraint.allowed(wrote(b"SELECT"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "not none"),
        ({"regex": "a", "lark": 'start: "a"'}, "not regex and lark"),
        ({"regex": "a(("}, "regex cannot be read"),
        ({"json_schema": {"type": "objec"}}, "json_schema cannot be read"),
        ({"lark": "start: ("}, "lark cannot be read"),
        ({"regex": "a", "stop": ("judge",)}, "judge"),
        ({"regex": "a", "stop": ()}, "stop is empty"),
        ({"regex": "a", "turns": 0}, "turns"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ToolmemError, match=message):
        module.GrammarConstraint(TOKENIZER, **options)


def test_a_tokenizer_without_roles_and_empty_lists_are_refused():
    with pytest.raises(ToolmemError, match="has: none"):
        module.GrammarConstraint(SymbolTokenizer(9), regex="a")
    with pytest.raises(ToolmemError, match="attributes is empty"):
        module.query_constraint(TOKENIZER, [])


def test_without_the_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ToolmemError, match=r"toolmem\[constrain\]"):
        module.GrammarConstraint(TOKENIZER, regex="a")
