"""The naive loop's rules, with a model that says what it is told to."""

import math
import re

import pytest
import torch
from torch import nn

from toolmem.errors import ToolmemError
from toolmem.generation import generate, generate_naive, stream
from toolmem.generation.reference import token_roles
from toolmem.models import Transformer
from toolmem.tools.base import Answer

USER, ASSISTANT, DATABASE, END = 256, 257, 258, 259


class Bytes:
    """A byte tokenizer."""

    vocab_size = 260
    role_ids = {"user": USER, "assistant": ASSISTANT, "database": DATABASE, "end": END}

    def encode(self, text):
        return list(text.encode())

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Echo:
    """A toolbox that answers a query with its letters in capitals, and notes its calls."""

    def __init__(self):
        self.seen = []

    def call_many(self, texts):
        self.seen.append(list(texts))
        return [Answer(text.upper(), False, 0.0) for text in texts]


class Script(Transformer):
    """Says one text: at position n the token after it; asserts that it is fed that very text."""

    def __init__(self, prompt, script, max_seq_len=200):
        super().__init__(260, 8, 1, 1, max_seq_len=max_seq_len)
        self.whole = torch.tensor([*prompt, *script])
        self.modes = []

    def hidden(self, tokens, cache=None, counts=None, spans=None, tree=None):
        self.modes.append(self.training)
        start = torch.zeros(len(tokens), 1, dtype=torch.int64) if cache is None else cache.lengths
        positions = start.view(-1, 1) + torch.arange(tokens.shape[1])
        real = positions < len(self.whole)
        expected = self.whole[positions.clamp(max=len(self.whole) - 1)]
        width = torch.full((len(tokens),), tokens.shape[1]) if counts is None else counts
        kept = torch.arange(tokens.shape[1]) < width[:, None]
        assert (tokens == expected)[real & kept].all(), "the dialogue is not what was scripted"
        if cache is not None:
            cache.advance(counts, tokens.shape[1])
        return self.whole[(positions + 1).clamp(max=len(self.whole) - 1)][..., None].float()

    def logits(self, hidden):
        return nn.functional.one_hot(hidden[..., 0].long(), 260).float() * 9

    def forward(self, tokens):
        return self.logits(self.hidden(tokens))


PROMPT = [USER, *b"who?", ASSISTANT]


def run_all(script, toolbox=None, prompt=PROMPT, max_seq_len=200, **limits):
    """The naive result, checked to equal the batched one and the streamed one."""
    model = Script(prompt, script, max_seq_len)
    naive = generate_naive(model, Bytes(), prompt, toolbox=toolbox, **limits)
    [batched] = generate(model, Bytes(), [prompt], toolbox=toolbox, **limits)
    for name in ("tokens", "roles", "finish_reason", "tool_calls", "prompt_length"):
        assert getattr(batched, name) == getattr(naive, name)
    events = stream(model, Bytes(), prompt, toolbox=toolbox, **limits)
    streamed = []
    while True:
        try:
            streamed.append(next(events))
        except StopIteration as stop:
            assert stop.value.tokens == naive.tokens
            break
    assert [event.token for event in streamed] == naive.tokens[len(prompt) :]
    assert [event.role for event in streamed] == naive.roles[len(prompt) :]
    return naive


def test_ends():
    result = run_all([*b"me", END, *b"and more"])
    assert result.tokens == [*PROMPT, *b"me", END]
    assert result.roles == [1] * 6 + [2] * 3
    assert result.finish_reason == "end"
    assert result.prompt_length == 6
    assert all(math.isnan(x) for x in result.log_probs[:6])
    expected = 9 - math.log(math.exp(9) + 259)
    assert result.log_probs[6:] == pytest.approx([expected] * 3, abs=1e-6)


def test_tool_call():
    toolbox = Echo()
    script = [*b"ask", DATABASE, *b"ASK", ASSISTANT, *b"it", END]
    result = run_all(script, toolbox)
    assert result.tokens == PROMPT + script
    assert result.roles == [1] * 6 + [2] * 4 + [3] * 4 + [2] * 3
    assert [math.isnan(x) for x in result.log_probs] == [role != 2 for role in result.roles]
    assert result.tool_calls == [("ask", Answer("ASK", False, 0.0))]
    assert toolbox.seen[0] == ["ask"]
    assert token_roles(result.tokens, Bytes.role_ids) == result.roles


def test_a_second_call_sends_its_own_turn_only():
    script = [*b"a", DATABASE, *b"A", ASSISTANT, *b"b", DATABASE, *b"B", ASSISTANT, END]
    toolbox = Echo()
    result = run_all(script, toolbox)
    assert toolbox.seen[:2] == [["a"], ["b"]]
    assert [query for query, _ in result.tool_calls] == ["a", "b"]


def test_calls_that_may_not_be_made():
    assert run_all([*b"ask", DATABASE, END]).finish_reason == "tool_calls"
    script = [*b"a", DATABASE, *b"A", ASSISTANT, *b"b", DATABASE]
    result = run_all(script, Echo(), max_tool_calls=1)
    assert result.finish_reason == "tool_calls"
    assert result.tokens == PROMPT + script
    assert len(result.tool_calls) == 1


def test_max_new_tokens_counts_what_the_model_writes():
    script = [*b"ask", DATABASE, *b"ASK", ASSISTANT, *b"it is long"]
    result = run_all(script, Echo(), max_new_tokens=6)
    assert result.tokens == PROMPT + script[:10]
    assert result.finish_reason == "length"
    result = run_all(script, Echo(), max_new_tokens=4)
    assert (result.tokens, result.finish_reason) == (PROMPT + script[:8], "length")
    result = run_all(script, max_new_tokens=0)
    assert (result.tokens, result.finish_reason) == (PROMPT, "length")


def test_max_seq_len():
    result = run_all([*b"word"] * 10, max_seq_len=20)
    assert len(result.tokens) == 20
    assert result.finish_reason == "length"
    script = [*b"ask", DATABASE, *b"ASK", ASSISTANT, *b"it", END]
    result = run_all(script, Echo(), max_seq_len=13)  # the answer does not fit
    assert result.tokens == PROMPT + script[:4]
    assert result.finish_reason == "length"
    assert len(result.tool_calls) == 1
    result = run_all(script, Echo(), max_seq_len=14)  # it fits just
    assert result.tokens == PROMPT + script[:8]
    assert run_all([END], max_seq_len=6).tokens == PROMPT  # the prompt fills it


def test_an_answer_longer_than_the_cache_was_made_for():
    class Long:
        def call_many(self, texts):
            return [Answer("x" * 150, False, 0.0) for _ in texts]

    script = [*b"ask", DATABASE, *(b"x" * 150), ASSISTANT, *b"ok", END]
    assert run_all(script, Long(), max_new_tokens=10).finish_reason == "end"


def test_the_last_fenced_block_is_the_query_that_is_noted():
    text = "Let me see.\n```\nFIND it\n```\n"
    script = [*text.encode(), DATABASE, *text.upper().encode(), ASSISTANT, END]
    assert run_all(script, Echo()).tool_calls[0][0] == "FIND it"


def test_roles_of_several_turns():
    tokens = [USER, 1, ASSISTANT, 2, DATABASE, 3, ASSISTANT, 4, END, USER, 5, ASSISTANT]
    assert token_roles(tokens, Bytes.role_ids) == [1, 1, 1, 2, 2, 3, 3, 2, 2, 1, 1, 1]


def test_mode_is_put_back_and_dropout_is_off():
    model = Script(PROMPT, [END])
    model.train()
    generate_naive(model, Bytes(), PROMPT)
    generate(model, Bytes(), [PROMPT])
    assert model.modes == [False, False]
    assert model.training


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "empty"), ([0] * 201, "max_seq_len 200"), ([1, 260], "vocab_size 260"), ([-1], "-1")],
)
def test_prompts_that_the_model_cannot_take(prompt, words):
    model = Script(PROMPT, [END])
    for run in (
        lambda: generate_naive(model, Bytes(), prompt),
        lambda: generate(model, Bytes(), [PROMPT, prompt]),
        lambda: next(stream(model, Bytes(), prompt)),
    ):
        with pytest.raises(ToolmemError, match=re.escape(words)):
            run()


def test_refusals():
    model = Script(PROMPT, [END])
    with pytest.raises(ToolmemError, match="batch_size"):
        generate(model, Bytes(), [PROMPT], batch_size=0)
    with pytest.raises(ToolmemError, match="2 seeds for 1"):
        generate(model, Bytes(), [PROMPT], seed=[1, 2])
    assert generate(model, Bytes(), []) == []


def test_roles_are_those_that_training_learned_from():
    from toolmem.data.dialogues import Dialogue, Turn
    from toolmem.data.text.token_table import encode_dialogue
    from toolmem.data.tokenizers import ByteTokenizer

    turns = (
        Turn("user", "when?"),
        Turn("assistant", "FIND x FOR y"),
        Turn("database", "1987"),
        Turn("assistant", "In 1987."),
    )
    tokens, roles = encode_dialogue(Dialogue(turns, "1987", "x", "y"), ByteTokenizer())
    assert token_roles(tokens.tolist(), ByteTokenizer().role_ids) == roles.tolist()
