"""What a request may say, and what is said to one that may not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_toys import ROLES, TOKENIZER

from toolmem.generation import Greedy, Sampling
from toolmem.serving.fields import ApiError, read_json
from toolmem.serving.protocol import ChatRequest, Limits, read_request

LIMITS = Limits(max_tokens=100, max_choices=4)
USER = {"role": "user", "content": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "db", "arguments": '{"query": "FIND"}'}}
CALLED = {"role": "assistant", "tool_calls": [CALL]}
TOOL = {"role": "tool", "tool_call_id": "c", "content": "x"}


def function(name="db", **parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def read(**body) -> ChatRequest:
    return read_request({"messages": [USER], **body}, LIMITS, TOKENIZER)


BAD = {
    "no messages": ({"messages": None}, "messages", "a list"),
    "messages are text": ({"messages": "hi"}, "messages", "a list"),
    "empty": ({"messages": []}, "messages", "empty"),
    "a message is text": ({"messages": ["hi"]}, "messages[0]", "object"),
    "unknown role": ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "robot"),
    "no role": ({"messages": [{"content": ""}]}, "messages[0].role", "one of"),
    "role is a list": ({"messages": [{"role": [], "content": ""}]}, "messages[0].role", "string"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content", "string"),
    "content is a number": ({"messages": [{**USER, "content": 3}]}, "messages[0].content", "3"),
    "an image": (
        {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "image_url",
    ),
    "unknown key of a message": ({"messages": [{**USER, "contnet": ""}]}, "messages[0].contnet", ""),
    "the system alone": ({"messages": [{**USER, "role": "system"}]}, "messages[0].role", "system"),
    "the assistant last": (
        {"messages": [USER, {"role": "assistant", "content": "x"}]},
        "messages[1].role",
        "assistant",
    ),
    "the assistant first": (
        {"messages": [{"role": "assistant", "content": "x"}, USER]},
        "messages[0].role",
        "follow",
    ),
    "a tool that was not called": ({"messages": [USER, TOOL]}, "messages[1].role", "call"),
    "a call without an answer": ({"messages": [USER, CALLED, USER]}, "messages[2].role", "call"),
    "another call's answer": (
        {"messages": [USER, CALLED, {**TOOL, "tool_call_id": "d"}]},
        "messages[2].tool_call_id",
        '"c"',
    ),
    "two calls": (
        {"messages": [USER, {**CALLED, "tool_calls": [CALL, CALL]}, TOOL]},
        "messages[1].tool_calls",
        "one at a time",
    ),
    "arguments that are no JSON": (
        {"messages": [USER, {**CALLED, "tool_calls": [{**CALL, "function": {"arguments": "x"}}]}]},
        "messages[1].tool_calls[0].function.arguments",
        "JSON",
    ),
    "temperature is text": ({"temperature": "hot"}, "temperature", "a number"),
    "temperature is true": ({"temperature": True}, "temperature", "a number"),
    "temperature below 0": ({"temperature": -0.1}, "temperature", "from 0"),
    "temperature is huge": ({"temperature": 10**400}, "temperature", "to 100"),
    "top_p above 1": ({"top_p": 1.5}, "top_p", "to 1"),
    "top_p is 0": ({"top_p": 0}, "top_p", "above 0"),
    "a penalty that makes infinities": ({"repetition_penalty": 1e30}, "repetition_penalty", "to 10"),
    "top_k is 0": ({"top_k": 0}, "top_k", "from 1"),
    "too many tokens": ({"max_tokens": 101}, "max_tokens", "100"),
    "no tokens": ({"max_completion_tokens": 0}, "max_completion_tokens", "from 1"),
    "half a token": ({"max_tokens": 1.5}, "max_tokens", "whole"),
    "too many choices": ({"n": 5}, "n", "4"),
    "stream is a number": ({"stream": 1}, "stream", "true or false"),
    "seed is text": ({"seed": "x"}, "seed", "whole"),
    "seed is huge": ({"seed": 2**64}, "seed", ""),
    "empty stop": ({"stop": ""}, "stop", ""),
    "five stops": ({"stop": list("abcde")}, "stop", "4"),
    "half a letter": ({"stop": "a\ud800"}, "stop", "surrogate"),
    "a stop is a number": ({"stop": [1]}, "stop", ""),
    "a misspelt key": ({"max_token": 5}, "max_token", "spelling"),
    "a key of stream_options": ({"stream_options": {"usage": True}}, "stream_options.usage", ""),
    "a bias for no token": ({"logit_bias": {"900": 1}}, "logit_bias.900", "260"),
    "a bias for a word": ({"logit_bias": {"x": 1}}, "logit_bias.x", "260"),
    "a bias that is text": ({"logit_bias": {"1": "x"}}, "logit_bias.1", "number"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 2}, "top_logprobs", "not offered"),
    "JSON wanted": ({"response_format": {"type": "json_object"}}, "response_format.type", "text"),
    "tools are an object": ({"tools": {}}, "tools", "list"),
    "a tool of another kind": ({"tools": [{"type": "web"}]}, "tools[0].type", "function"),
    "a tool without a name": ({"tools": [function(name="")]}, "tools[0].function.name", ""),
    "a tool with two arguments": (
        {"tools": [function(properties={"a": {}, "b": {}})]},
        "tools[0].function.parameters",
        "one",
    ),
    "a choice without tools": ({"tool_choice": "required"}, "tool_choice", ""),
    "a choice among others": (
        {"tools": [function()], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
        "",
    ),
    "a choice that is a number": ({"tools": [function()], "tool_choice": 3}, "tool_choice", "3"),
}  # fmt: skip


@pytest.mark.parametrize("body, param, text", BAD.values(), ids=BAD.keys())
def test_a_bad_request(body, param, text):
    with pytest.raises(ApiError) as caught:
        read(**body)
    error = caught.value.body()["error"]
    assert caught.value.status == 400
    assert error["param"] == param
    assert text in error["message"] and len(error["message"]) < 400
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"NaN", b'{"a": Infinity}', b"\xff", b"[" * 100_000, b"1" * 5000]
)
def test_a_body_that_is_no_json(body):
    with pytest.raises(ApiError, match="not JSON"):
        read_json(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["messages", "tools", "tool_choice", "stop", "n", "seed", "temperature", "logit_bias", "stream",
     "stream_options", "top_p", "top_k", "max_tokens", "model", "response_format", "logprobs"]
)  # fmt: skip


@given(body=JSON | st.dictionaries(KEYS, JSON, max_size=4), with_messages=st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_whatever_comes(body, with_messages):
    """Any JSON is a request or a 400, and the error can be sent."""
    if with_messages and isinstance(body, dict):
        body = {"messages": [USER], **body}
    try:
        assert isinstance(read_request(body, LIMITS, TOKENIZER), ChatRequest)
    except ApiError as error:
        assert error.status == 400
        json.dumps(error.body()).encode()


def test_what_is_left_out():
    request = read()
    assert request == ChatRequest([("user", "hi")], max_tokens=100)
    assert read(user="me", metadata={}, max_tokens=None, stop=None).sampler == Greedy()
    assert read(max_tokens=7).max_tokens == read(max_completion_tokens=7).max_tokens == 7
    warm = read_request({"messages": [USER]}, Limits(temperature=0.5), TOKENIZER)
    assert warm.sampler == Sampling(temperature=0.5)


def test_how_tokens_are_chosen():
    assert read(temperature=0).sampler == read(temperature=1e-30).sampler == Greedy()
    assert read(temperature=0.7, top_p=0.9, top_k=5).sampler == Sampling(0.7, top_k=5, top_p=0.9)
    assert read(frequency_penalty=1).sampler == Sampling(0, frequency_penalty=1)
    assert read(logit_bias={"65": -100}).sampler.logit_bias == {65: -100}


def test_who_answers_calls():
    """The server by default; the client when it brings tools; nobody when it says so."""
    assert (read().call_tools, read().tools) == (True, ())
    own = read(tools=[function()])
    assert not own.call_tools and own.tools[0].argument == "query"
    two = [
        function("a", properties={"x": {}}),
        function("b", properties={"y": {}, "z": {}}, required=["z"]),
    ]
    assert [tool.argument for tool in read(tools=two).tools] == ["x", "z"]
    chosen = read(tools=two, tool_choice={"type": "function", "function": {"name": "b"}})
    assert [tool.name for tool in chosen.tools] == ["b"]
    assert chosen.sampler.logit_bias == {ROLES["end"]: float("-inf")}
    none = read(tools=two, tool_choice="none", logit_bias={str(ROLES["database"]): 5})
    assert not none.call_tools and none.tools == ()
    assert none.sampler.logit_bias == {ROLES["database"]: float("-inf")}


def test_turns():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": [{"type": "text", "text": "d"}]},
        USER,
        {**CALLED, "content": None},
        {**TOOL, "content": "two\nlines"},
        {"role": "assistant", "content": "a"},
        USER,
        {"role": "user", "content": "and", "name": "me"},
    ]
    assert read(messages=messages).turns == [
        ("user", "s\n\nd\n\nhi"),
        ("assistant", "FIND"),
        ("database", "two lines"),
        ("assistant", "a"),
        ("user", "hi\n\nand"),
    ]


def test_a_call_keeps_the_words_around_its_query():
    said = "Let me see. ```FIND```"
    messages = [USER, {**CALLED, "content": said}, TOOL]
    assert read(messages=messages).turns[1] == ("assistant", said)
