"""Dialogues in a chat template's format: the engine equals the naive loop, tools in the loop."""

from __future__ import annotations

import math
import random

import pytest
import torch
from chat_templates import chat_tokenizer

from toolmem.data.dialogues import Dialogue, Turn
from toolmem.data.text.token_table import encode_dialogue, prompt_tokens
from toolmem.generation import Engine, Request, Sampling, generate, generate_naive
from toolmem.generation.transcript import Transcript
from toolmem.generation.turns import ASSISTANT, DATABASE, split_turns
from toolmem.models import Transformer
from toolmem.tools.base import Answer

NAMES = ("smollm2", "qwen", "zephyr")
ALL = pytest.mark.parametrize("name", NAMES)


class Scripted(Transformer):
    """Says the next token of whichever script its context begins like."""

    def __init__(self, vocab_size, scripts):
        super().__init__(vocab_size, 8, 1, 1, max_seq_len=600)
        self.scripts = [torch.tensor(script) for script in scripts]

    def hidden(self, tokens, cache=None, counts=None, spans=None, tree=None):
        starts = torch.zeros(len(tokens), 1, dtype=torch.int64)
        if cache is not None:
            starts = cache.lengths.view(-1, 1)
        width = tokens.shape[1]
        positions = starts + torch.arange(width)
        after = torch.zeros(len(tokens), width, 1)
        kept = torch.arange(width) < (
            torch.full((len(tokens), 1), width) if counts is None else counts[:, None]
        )
        for row in range(len(tokens)):
            for script in self.scripts:
                here = script[positions[row].clamp(max=len(script) - 1)]
                if (here == tokens[row])[kept[row]].all():
                    at = (positions[row] + 1).clamp(max=len(script) - 1)
                    after[row, :, 0] = script[at].float()
                    break
            else:
                raise AssertionError("the dialogue is not what was scripted")
        if cache is not None:
            cache.advance(counts, width)
        return after

    def logits(self, hidden):
        return torch.nn.functional.one_hot(hidden[..., 0].long(), self.vocab_size).float() * 9

    def forward(self, tokens):
        return self.logits(self.hidden(tokens))


class Capitals:
    """Answers a query with its letters in capitals."""

    def __init__(self):
        self.seen = []

    def call_many(self, texts):
        self.seen += texts
        return [Answer(text.upper(), False, 0.0) for text in texts]


def told(tokenizer, *turns):
    """Tokens and roles of the dialogue of these texts, roles in turn."""
    return encode_dialogue(Dialogue(tuple(Turn(*turn) for turn in turns), "", "", ""), tokenizer)


def run(tokenizer, dialogue, toolbox=None, **limits):
    """The naive result, checked to equal the engine's."""
    limits["max_new_tokens"] = 300
    tokens, _ = dialogue
    prompt = prompt_tokens("Who?", tokenizer)
    assert tokens[: len(prompt)].tolist() == prompt
    model = Scripted(tokenizer.vocab_size, [tokens.tolist()])
    naive = generate_naive(model, tokenizer, prompt, toolbox=toolbox, **limits)
    [batched] = generate(model, tokenizer, [prompt], toolbox=toolbox, **limits)
    for key in ("tokens", "roles", "finish_reason", "tool_calls", "prompt_length"):
        assert getattr(batched, key) == getattr(naive, key)
    return naive


@ALL
def test_a_call_is_a_turn_whose_text_says_so(name):
    tokenizer, toolbox = chat_tokenizer(name), Capitals()
    dialogue = told(
        tokenizer, ("user", "Who?"), ("assistant", 'find "x"'), ("database", 'FIND "X"'),
        ("assistant", "more\n\\"), ("database", "MORE\n\\"), ("assistant", "It is so."),
    )  # fmt: skip
    result = run(tokenizer, dialogue, toolbox)
    assert result.tokens == dialogue[0].tolist() and result.roles == dialogue[1].tolist()
    assert result.finish_reason == "end"
    assert toolbox.seen[:2] == ['find "x"', "more\n\\"]
    assert [query for query, _ in result.tool_calls] == ['find "x"', "more\n\\"]
    assert [math.isnan(x) for x in result.log_probs] == [role != ASSISTANT for role in result.roles]
    turns = split_turns(result.tokens, tokenizer)
    assert [role for role, _ in turns] == [
        "user",
        "assistant",
        "database",
        "assistant",
        "database",
        "assistant",
    ]
    assert turns[2][1] == 'FIND "X"' and turns[-1][1] == "It is so."


@ALL
def test_a_turn_that_asks_nothing_ends_the_dialogue(name):
    tokenizer = chat_tokenizer(name)
    dialogue = told(tokenizer, ("user", "Who?"), ("assistant", "Ann, tool_call or not."))
    result = run(tokenizer, dialogue, Capitals())
    assert result.finish_reason == "end" and not result.tool_calls
    assert result.tokens == dialogue[0].tolist()


@ALL
def test_a_call_that_nobody_may_answer_is_one_too_many(name):
    tokenizer = chat_tokenizer(name)
    dialogue = told(
        tokenizer, ("user", "Who?"), ("assistant", "ask"), ("database", "ASK"), ("assistant", "a")
    )
    assert run(tokenizer, dialogue).finish_reason == "tool_calls"
    result = run(tokenizer, dialogue, Capitals(), max_tool_calls=0)
    assert result.finish_reason == "tool_calls" and not result.tool_calls
    # an answer that does not fit
    form, tokens = tokenizer.turns, dialogue[0].tolist()
    model = Scripted(tokenizer.vocab_size, [tokens])
    model.max_seq_len = form.spans(tokens)[2].stop
    prompt = prompt_tokens("Who?", tokenizer)
    naive = generate_naive(model, tokenizer, prompt, toolbox=Capitals())
    [ours] = generate(model, tokenizer, [prompt], toolbox=Capitals())
    assert naive.finish_reason == ours.finish_reason == "length" and naive.tokens == ours.tokens
    assert len(naive.tool_calls) == 1


class Often:
    """Answers of a length that depends on the query."""

    def call_many(self, texts):
        return [Answer(f"{len(text)}:" + "a" * (len(text) * 7 % 23), False, 0.0) for text in texts]


@ALL
@pytest.mark.parametrize("sampler", [None, Sampling(temperature=0.9)], ids=["greedy", "sampled"])
def test_untrained_models_say_the_same_by_any_schedule(name, sampler):
    """Many ragged lanes of a model that likes to end its turns, half of them calls by their text."""
    tokenizer = chat_tokenizer(name)
    torch.manual_seed(3)
    model = Transformer(tokenizer.vocab_size, 16, 2, 2, max_seq_len=330)
    opening = tokenizer.encode(tokenizer.turns.call_form.prefix)
    draw = random.Random(5)
    with torch.no_grad():
        model.head.weight[tokenizer.turns.end] *= 4
    prompts = []
    for i in range(10):
        text = "".join(draw.choices("abc é\n", k=draw.randint(1, 20)))
        # half of them have begun to ask already
        prompts.append(prompt_tokens(text, tokenizer) + opening * (i % 2))
    limits = {"max_new_tokens": 60, "max_tool_calls": 2, "sampler": sampler}
    together = generate(
        model, tokenizer, prompts, toolbox=Often(), seed=range(10), batch_size=4, **limits
    )
    for i, ours in enumerate(together):
        naive = generate_naive(model, tokenizer, prompts[i], toolbox=Often(), seed=i, **limits)
        for key in ("tokens", "roles", "finish_reason", "tool_calls"):
            assert getattr(ours, key) == getattr(naive, key), key
    assert {result.finish_reason for result in together} >= {"end"}
    assert any(result.tool_calls and DATABASE in result.roles for result in together)


@ALL
def test_a_tree_goes_on_where_the_user_speaks_again(name):
    tokenizer = chat_tokenizer(name)
    dialogue = told(
        tokenizer, ("user", "Who?"), ("assistant", "Ann."), ("user", "Sure?"), ("assistant", "Yes.")
    )
    tokens, roles = (part.tolist() for part in dialogue)
    model = Scripted(tokenizer.vocab_size, [tokens])
    with Engine(model, tokenizer, None) as engine:
        [first] = engine.root(prompt_tokens("Who?", tokenizer)).fork(1, max_new_tokens=40)
        [second] = first.say("Sure?").fork(1, max_new_tokens=40)
        assert second.tokens == tokens and second.dialogue.roles == roles
        assert [role for role, _ in second.turns()] == ["user", "assistant"] * 2


@ALL
def test_text_as_it_comes(name):
    tokenizer = chat_tokenizer(name)
    said = [("user", "Q"), ("assistant", "a é 1"), ("database", "A É."), ("assistant", "so é."),
            ("database", "B"), ("assistant", "end")]  # fmt: skip
    tokens, roles = told(tokenizer, *said)
    start = len(prompt_tokens("Q", tokenizer))
    transcript, pieces = Transcript(tokenizer), []
    for token, role in zip(tokens[start:].tolist(), roles[start:].tolist(), strict=True):
        pieces += transcript.add(token, role, -1.0 if role == ASSISTANT else math.nan)
    pieces.append(transcript.finish())
    turns = split_turns(tokens.tolist(), tokenizer)[1:]
    assert [(turn.role, turn.text) for turn in transcript.turns] == turns
    assert [turn.calls for turn in transcript.turns] == [True, False, True, False, False]
    texts = [""]
    for piece in pieces:
        texts[-1] += piece.text
        if piece.ends:
            texts.append("")
    assert texts[:-1] == [text for _, text in turns]
    assert [piece.calls for piece in pieces if piece.ends] == [True, False, True, False, False]


def test_a_query_may_be_held_to_a_grammar():
    pytest.importorskip("llguidance")
    from toolmem.generation.constraints import query_constraint

    for name in NAMES:
        tokenizer = chat_tokenizer(name)
        torch.manual_seed(0)
        model = Transformer(tokenizer.vocab_size, 16, 1, 2, max_seq_len=300)
        constraint = query_constraint(tokenizer, ["job", "birth_date"], ["Ann O'Neil", "Bo (2)"])
        sampler = Sampling(temperature=1.0, constraint=constraint)
        seen = Capitals()
        with Engine(model, tokenizer, seen) as engine:
            request = Request(
                prompt_tokens("Q", tokenizer), max_new_tokens=80, max_tool_calls=1, sampler=sampler
            )
            result = engine.submit(request).result()
        [query] = seen.seen
        _, attribute, _, person = query.split(" ", 3)
        assert attribute in ("job", "birth_date") and person in ("Ann O'Neil", "Bo (2)"), result


@ALL
def test_kinds_of_tokens(name):
    from toolmem.data import make_population
    from toolmem.data.dialogues import TemplateSet
    from toolmem.evaluation.token_losses import COPIED, FOREIGN, NAME, QUERY, token_kinds

    tokenizer = chat_tokenizer(name)
    questions = TemplateSet.load("in_tool").questions(make_population(2))
    dialogue = questions.assembled(0)
    tokens, roles = encode_dialogue(dialogue, tokenizer)
    kinds = token_kinds(dialogue, tokenizer)
    assert ((kinds == FOREIGN) == (roles != ASSISTANT)).all()
    spans = tokenizer.turns.spans(tokens.tolist())
    query = kinds[spans[1].start : spans[1].stop]
    assert set(query.tolist()) == {QUERY, NAME} and kinds[spans[1].stop] == QUERY
    named = [t for t, kind in zip(tokens[spans[1].start :], query, strict=False) if kind == NAME]
    assert tokenizer.decode(named).strip() == dialogue.person
    last = slice(spans[3].start, spans[3].stop)
    copied = [t for t, kind in zip(tokens[last], kinds[last], strict=True) if kind == COPIED]
    assert tokenizer.decode(copied).strip(" .") == dialogue.answer.strip(" .")


@ALL
def test_an_api_client_sees_the_query_and_sends_the_answer(name):
    from toolmem.data.text.token_table import dialogue_tokens
    from toolmem.serving.messages import read_messages

    tokenizer = chat_tokenizer(name)
    tokens, _ = told(
        tokenizer,
        ("user", "Who?"),
        ("assistant", 'say "x"'),
        ("database", "SAY"),
        ("assistant", "so"),
    )
    arguments = '{"query": "say \\"x\\""}'
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = read_messages(
        [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "SAY"},
        ]
    )
    assert (
        dialogue_tokens(turns, tokenizer)
        == tokens[: tokenizer.turns.turn_start(tokens.tolist())].tolist()
    )


def test_an_api_client_cannot_make_it_call():
    from toolmem.serving.fields import ApiError
    from toolmem.serving.messages import ClientTool
    from toolmem.serving.protocol import choose_tools

    tokenizer, tools = chat_tokenizer(), (ClientTool("f", "query"),)
    assert choose_tools("auto", tools, tokenizer) == (tools, {}, False)
    assert choose_tools("none", tools, tokenizer) == ((), {}, False)
    with pytest.raises(ApiError, match="cannot be made to come"):
        choose_tools("required", tools, tokenizer)
