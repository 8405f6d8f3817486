"""The turns of a request, and the client's tools in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from toolmem.serving.fields import ApiError, Fields, wrong
from toolmem.tools.base import extract_query, plain_line

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ClientTool:
    """A function that the client calls by itself, standing for the model's database.

    Args:
        name: what the call is named.
        argument: the parameter that the query is handed in.
    """

    name: str
    argument: str


def read_messages(data: Any) -> list[tuple[str, str]]:
    """Messages as turns of toolmem's roles; what the system says opens the user's next turn.

    Raises:
        ApiError: an unknown role, a wrong type, an order that is no dialogue.
    """
    if not isinstance(data, list):
        raise wrong("messages", data, "a list of messages")
    if not data:
        raise ApiError(400, "messages is empty: it needs a user's message", param="messages")
    turns: list[tuple[str, str]] = []
    system: list[str] = []
    called: str | None = None  # the id of the call that the next message must answer
    for index, item in enumerate(data):
        where = f"messages[{index}]"
        message = Fields(item, where)
        role = message.text("role")
        if role not in ROLES:
            raise wrong(f"{where}.role", role, f"one of {', '.join(ROLES)}")
        if (role == "tool") != (called is not None):
            told = "answer the assistant's tool call" if called else "come after a tool call"
            raise ApiError(
                400,
                f"{where} is a {role}'s: a tool's message must {told}",
                param=f"{where}.role",
            )
        message.text("name")
        text = read_content(message, required=role != "assistant")
        if role in ("system", "developer"):
            system.append(text)
        elif role == "user":
            before = [turns.pop()[1]] if turns and turns[-1][0] == "user" else []
            turns.append(("user", "\n\n".join([*before, *system, text])))
            system = []
        elif role == "tool":
            answers = message.text("tool_call_id")
            if answers != called:
                raise wrong(f"{where}.tool_call_id", answers, f"{json.dumps(called)}")
            turns.append(("database", plain_line(text)))
            called = None
        else:
            if not turns or turns[-1][0] == "assistant":
                raise ApiError(
                    400,
                    f"{where} is the assistant's: it must follow a user's or a tool's message",
                    param=f"{where}.role",
                )
            called, text = read_call(message, text)
            turns.append(("assistant", text))
        message.end()
    last = turns[-1][0] if turns else "system"
    if system or last == "assistant":
        said = "the assistant" if last == "assistant" and not system else "the system"
        raise ApiError(
            400,
            f"the last message is from {said}: end with a user's or a tool's",
            param=f"messages[{len(data) - 1}].role",
        )
    return turns


def read_content(message: Fields, *, required: bool) -> str:
    """A message's text: a string, or parts of which each is a text."""
    value = message.data.pop("content", None)
    key = message.key("content")
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = []
        for index, item in enumerate(value):
            part = Fields(item, f"{key}[{index}]")
            if part.text("type") != "text":
                raise wrong(
                    f"{key}[{index}].type", item.get("type"), '"text": this model reads only'
                )
            texts.append(part.text("text", ""))
        return "".join(texts)
    if value is None and not required:
        return ""
    raise wrong(key, value, "a string, or a list of text parts")


def read_call(message: Fields, text: str) -> tuple[str | None, str]:
    """An assistant's tool call: its id and the text of the turn; (None, text) without one."""
    for name in ("refusal", "audio", "function_call", "annotations", "toolmem", "reasoning"):
        message.data.pop(name, None)
    calls = message.take("tool_calls", list, "a list", [])
    if not calls:
        return None, text
    where = message.key("tool_calls")
    if len(calls) > 1:
        raise ApiError(400, f"{where} has {len(calls)} calls: one at a time", param=where)
    call = Fields(calls[0], f"{where}[0]")
    function = Fields(call.take("function", dict, "an object", None), f"{where}[0].function")
    name = call.text("id")
    if not name:
        raise wrong(call.key("id"), name, "the call's id")
    key = function.key("arguments")
    arguments = function.text("arguments", "")
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        values = None
    texts = list(values.values()) if isinstance(values, dict) else []
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise wrong(key, arguments, "a JSON object with one text, as the model's call had it")
    # The turn as the model wrote it, where its text came back with the call.
    return name, text if text and extract_query(text) == texts[0] else texts[0]


def read_tools(data: Any) -> tuple[ClientTool, ...]:
    """The client's tools, each of which must take one text."""
    if data is None:
        return ()
    if not isinstance(data, list):
        raise wrong("tools", data, "a list")
    tools = []
    for index, item in enumerate(data):
        tool = Fields(item, f"tools[{index}]")
        if tool.text("type") != "function":
            raise wrong(tool.key("type"), item.get("type"), '"function"')
        function = Fields(tool.data.pop("function", None), tool.key("function"))
        name = function.text("name")
        if not name:
            raise wrong(function.key("name"), name, "the function's name")
        parameters = function.take("parameters", dict, "a JSON schema", {})
        properties = parameters.get("properties") or {"query": {}}
        required = parameters.get("required") or []
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise wrong(function.key("parameters"), parameters, "a JSON schema of an object")
        candidates = list(properties) if len(properties) == 1 else required
        if len(candidates) != 1 or not isinstance(candidates[0], str):
            raise ApiError(
                400,
                f"{function.key('parameters')} must have one parameter, or require one: the model "
                "writes one text, its query",
                param=function.key("parameters"),
            )
        tools.append(ClientTool(name, candidates[0]))
    return tuple(tools)
