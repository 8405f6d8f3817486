"""OpenAI's own Python client talks to the server."""

from __future__ import annotations

import json

import openai
import pytest
import torch
from serving_toys import (
    ANSWER,
    IN_TOOL,
    IN_WEIGHT,
    QUERY,
    QUESTION,
    ROLES,
    TOKENIZER,
    TOOL_SAYS,
    calculator,
    reciter,
    serving,
    spell,
)

from toolmem.generation import Sampling, generate_naive

ASK = {"model": "toy", "messages": [{"role": "user", "content": QUESTION}]}
DIALOGUE = [
    {"role": "assistant", "text": QUERY},
    {"role": "database", "text": TOOL_SAYS},
    {"role": "assistant", "text": ANSWER},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "sum",
            "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
        },
    }
]


def test_an_answer(client):
    """The server's tool answered on the way; the client sees the answer, and what led to it."""
    reply = client.chat.completions.create(**ASK)
    [choice] = reply.choices
    assert choice.message.content == ANSWER
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert reply.model == "toy"
    assert reply.object == "chat.completion"
    assert choice.toolmem["dialogue"] == DIALOGUE
    [call] = choice.toolmem["tool_calls"]
    assert (call["query"], call["answer"], call["error"]) == (QUERY, TOOL_SAYS, False)
    written = len(spell(QUERY, "<database>", ANSWER, "<end>"))
    assert reply.usage.completion_tokens == written
    assert reply.usage.total_tokens == len(IN_TOOL)


def streamed(client, **options):
    """The chunks of a stream, its text as a client puts it together, and its turns."""
    chunks = list(client.chat.completions.create(**{**ASK, **options}, stream=True))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    content = "".join(delta.content or "" for delta in deltas)
    turns: list[dict[str, str]] = []
    for delta in deltas:
        piece = getattr(delta, "toolmem", None)
        if piece and turns and turns[-1]["role"] == piece["role"]:
            turns[-1]["text"] += piece["text"]
        elif piece:
            turns.append(dict(piece))
    return chunks, content, turns


def test_a_stream(client):
    chunks, content, turns = streamed(client, stream_options={"include_usage": True})
    assert content == ANSWER  # and nothing of the query
    assert turns == DIALOGUE
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.total_tokens == len(IN_TOOL)
    assert len({chunk.id for chunk in chunks}) == 1
    # letter by letter, not all at once
    assert sum(bool(getattr(c.choices[0].delta, "toolmem", None)) for c in chunks[:-1]) > 20


def test_a_model_without_tools_streams_its_content(engine):
    with serving(engine(reciter(IN_WEIGHT), TOKENIZER)) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        chunks, content, _turns = streamed(client)
        assert content == ANSWER
        pieces = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
        assert len(pieces) == len(ANSWER)  # "ë" is two tokens, and one piece
        assert client.chat.completions.create(**ASK).choices[0].message.content == ANSWER


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "sum"}}]
)
def test_the_client_answers_the_call(client, stream, choice):
    """With tools of its own the client gets the call, answers it, and has the answer."""
    options = {**ASK, "tools": TOOLS, "tool_choice": choice}
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        assert not any(c.choices[0].delta.content for c in chunks)
        [call] = [t for c in chunks for t in c.choices[0].delta.tool_calls or []]
        finish = chunks[-1].choices[0].finish_reason
    else:
        reply = client.chat.completions.create(**options)
        assert reply.choices[0].message.content is None
        [call] = reply.choices[0].message.tool_calls
        finish = reply.choices[0].finish_reason
    assert finish == "tool_calls"
    assert call.function.name == "sum"
    assert json.loads(call.function.arguments) == {"expression": QUERY}
    said = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": "sum", "arguments": call.function.arguments},
            }
        ],
    }
    answered = {"role": "tool", "tool_call_id": call.id, "content": TOOL_SAYS}
    messages = [*ASK["messages"], said, answered]
    reply = client.chat.completions.create(model="toy", messages=messages, tools=TOOLS)
    assert reply.choices[0].message.content == ANSWER
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == len(IN_TOOL)


def test_no_tool_choice_rules_the_call_out(client):
    reply = client.chat.completions.create(**ASK, tool_choice="none", max_tokens=40)
    assert ROLES["database"] not in TOKENIZER.encode(reply.choices[0].message.content)
    assert reply.choices[0].toolmem["tool_calls"] == []
    assert len(reply.choices[0].toolmem["dialogue"]) == 1
    assert reply.choices[0].message.content.startswith(QUERY)


def test_a_conversation_is_read_as_in_training(engine):
    """System text opens the user's turn; a turn that is over has its end."""
    whole = spell(
        "<user>", "Be brief.\n\nHello", "<assistant>", "Hi", "<end>",
        "<user>", "And?", "<assistant>", "No.", "<end>",
    )  # fmt: skip
    with serving(engine(reciter(whole), TOKENIZER)) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        reply = client.chat.completions.create(
            model="toy",
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "And?"},
            ],
            extra_body={"return_token_ids": True},
        )
        assert reply.choices[0].message.content == "No."
        assert reply.choices[0].toolmem["token_ids"] == whole


def test_choices_and_seeds(engine):
    """Choice i of a request samples as a request with seed + i does, and as the library does."""
    model = reciter(IN_WEIGHT, sharpness=0.35)
    with serving(engine(model, TOKENIZER)) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        options = {**ASK, "temperature": 1.0, "max_tokens": 12}
        many = client.chat.completions.create(**options, n=4, seed=7)
        texts = [choice.message.content for choice in many.choices]
        assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
        assert len(set(texts)) == 4
        one = client.chat.completions.create(**options, seed=9)
        assert one.choices[0].message.content == texts[2]
        prompt = spell("<user>", QUESTION, "<assistant>")
        limits = {"sampler": Sampling(), "max_new_tokens": 12}
        naive = generate_naive(model, TOKENIZER, prompt, seed=7, **limits)
        told = client.chat.completions.create(
            **options, seed=7, extra_body={"return_token_ids": True}
        )
        assert told.choices[0].toolmem["token_ids"] == naive.tokens
        streams = dict.fromkeys(range(4), "")
        for chunk in client.chat.completions.create(**options, n=4, seed=7, stream=True):
            for choice in chunk.choices:
                streams[choice.index] += choice.delta.content or ""
        assert [streams[i] for i in range(4)] == texts


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(engine, stream):
    """One entry a token of the answer, with the model's own log-probability."""
    model, toolbox = reciter(IN_TOOL, sharpness=0.5), calculator()
    with serving(engine(model, TOKENIZER, toolbox), toolbox=toolbox) as (address, _):
        create = openai.OpenAI(base_url=f"{address}/v1", api_key="none").chat.completions.create
        options = {**ASK, "logprobs": True}
        if stream:
            chunks = list(create(**options, stream=True))
            parts = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
            entries = [entry for part in parts for entry in part.content]
        else:
            entries = create(**options).choices[0].logprobs.content
    toolbox.close()
    assert [b for entry in entries for b in entry.bytes] == list(ANSWER.encode())
    with torch.no_grad():
        expected = model(torch.tensor([IN_TOOL])).log_softmax(-1)[0]
    start = len(IN_TOOL) - len(ANSWER.encode()) - 1
    for place, entry in enumerate(entries, start):
        right = float(expected[place - 1, IN_TOOL[place]])
        assert -1 < right < -0.01
        assert entry.logprob == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [(" is", "Zoë"), (["37", "nothing"], "Zoë is "), ("7.", "Zoë is 3"), (".", ANSWER[:-1])],
)
def test_stop_texts(engine, stop, text, stream):
    """The answer ends before a stop text, whichever way it comes, and so do its tokens."""
    with serving(engine(reciter(IN_WEIGHT), TOKENIZER)) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        if stream:
            chunks, content, _turns = streamed(client, stop=stop, logprobs=True)
            reason = chunks[-1].choices[0].finish_reason
            parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
            entries = [entry for part in parts for entry in part.content]
        else:
            choice = client.chat.completions.create(**ASK, stop=stop, logprobs=True).choices[0]
            content, reason = choice.message.content, choice.finish_reason
            entries = choice.logprobs.content
        assert (content, reason) == (text, "stop")
        assert bytes(b for entry in entries for b in entry.bytes).decode() == text


def test_its_limit_of_tokens(client):
    choice = client.chat.completions.create(**ASK, max_completion_tokens=len(QUERY) + 5).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content == ANSWER[:3]


def test_one_call_too_many(engine):
    toolbox = calculator()
    served = engine(reciter(IN_TOOL), TOKENIZER, toolbox)
    with serving(served, toolbox=toolbox, max_tool_calls=0) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        choice = client.chat.completions.create(**ASK).choices[0]
        assert choice.finish_reason == "length"
        assert choice.message.content == ""
        assert choice.toolmem["finish_reason"] == "tool_calls"
        _, content, _ = streamed(client)
        assert content == ""
    toolbox.close()


def test_the_models(client):
    [model] = client.models.list().data
    assert model.id == "toy"
    assert model.toolmem["tools"] == ["calculator"]
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError, match="'toy'"):
        client.models.retrieve("gpt-9")


def test_errors_are_the_clients_own(client):
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        create(**{**ASK, "model": "gpt-9"})
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="messages is empty") as empty:
        create(model="toy", messages=[])
    assert empty.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="max_seq_len"):
        create(model="toy", messages=[{"role": "user", "content": "x" * 300}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        create(**ASK, temperature=-1)


def test_the_asynchronous_client(in_tool):
    import asyncio

    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{in_tool[0]}/v1", api_key="none") as client:
            replies = await asyncio.gather(
                *(client.chat.completions.create(**ASK) for _ in range(20))
            )
            return [reply.choices[0].message.content for reply in replies]

    assert asyncio.run(talk()) == [ANSWER] * 20
