"""OpenAI's chat completions, as far as a small model speaks them: requests checked, answers shaped.

Everything that a client can get wrong is an `ApiError` that names the key. Nothing here knows of HTTP.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolmem.errors import ToolmemError
from toolmem.generation.sampling import Greedy, Sampler, Sampling
from toolmem.tools.base import extract_query, plain_line

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer

# Said by many clients, and without any meaning here.
IGNORED = frozenset(
    {
        "metadata", "parallel_tool_calls", "prompt_cache_key", "reasoning_effort", "safety_identifier",
        "service_tier", "store", "user",
    }
)  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN = 60  # letters of a wrong value that a message repeats

# A token that a bias of this size forbids is never taken.
NEVER = -math.inf
# Below this temperature logits grow beyond float32, and the likeliest token is as good as certain.
COLDEST = 1e-3


class ApiError(Exception):
    """An answer that is not 200, in OpenAI's shape.

    Args:
        status: the HTTP status.
        message: what is wrong and what to do.
        param: the key of the request that is wrong.
        code: OpenAI's machine-readable word for it, where there is one.
        headers: to send beside it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass(frozen=True)
class Limits:
    """What the server lets a request ask for.

    Args:
        max_tokens: tokens that a model may write in one choice; also what a request gets that says
            nothing.
        max_choices: the largest ``n``.
        max_body_bytes: of a request.
        temperature: of a request that says nothing.
    """

    max_tokens: int = 256
    max_choices: int = 16
    max_body_bytes: int = 1 << 20
    temperature: float = 0.0


@dataclass(frozen=True)
class ClientTool:
    """A function that the client calls by itself, standing for the model's database.

    Args:
        name: what the call is named.
        argument: the parameter that the query is handed in.
    """

    name: str
    argument: str


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Args:
        turns: (role, text) with the roles of toolmem: user, assistant, database.
        model: the name asked for; None for whichever is served.
        sampler: how tokens are chosen.
        max_tokens: that the model may write in each choice.
        stop: texts that end an answer.
        n: choices.
        seed: of the first choice's samples; None for a fresh one.
        stream: answer by server-sent events.
        include_usage: close the stream with a count of tokens.
        logprobs: give the log-probability of each token of the answer.
        tools: those of the client; empty when the server's own answer.
        call_tools: whether the server's own tools answer the model's calls.
        return_token_ids: give the dialogue's token ids, roles and log-probabilities.
    """

    turns: list[tuple[str, str]]
    model: str | None = None
    sampler: Sampler = field(default_factory=Greedy)
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    n: int = 1
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    tools: tuple[ClientTool, ...] = ()
    call_tools: bool = True
    return_token_ids: bool = False


class Fields:
    """The keys of a JSON object, each taken once and checked.

    Args:
        data: the object.
        where: its own key, for messages.
    """

    def __init__(self, data: Any, where: str = "") -> None:
        if not isinstance(data, dict):
            raise wrong(where or "the body", data, "a JSON object")
        self.data = dict(data)
        self.where = where

    def key(self, name: str) -> str:
        """A key as a message names it."""
        return f"{self.where}.{name}" if self.where else name

    def take(self, name: str, kind: type | tuple[type, ...], wanted: str, default: Any) -> Any:
        """A value of some type; null and a missing key are the default."""
        value = self.data.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise wrong(self.key(name), value, wanted)
        return value

    def flag(self, name: str) -> bool:
        """True or false; false by default."""
        return self.take(name, bool, "true or false", False)

    def text(self, name: str, default: str | None = None) -> Any:
        """A string."""
        return self.take(name, str, "a string", default)

    def integer(self, name: str, default: int | None, low: int, high: int) -> Any:
        """A whole number in a range."""
        value = self.take(name, int, "a whole number", default)
        if value is not None and not low <= value <= high:
            raise wrong(self.key(name), value, f"from {low:,} to {high:,}")
        return value

    def number(self, name: str, default: float | None, low: float, high: float) -> Any:
        """A number in a range."""
        value = self.take(name, (int, float), "a number", default)
        if value is not None and not low <= value <= high:
            raise wrong(self.key(name), value, f"from {low:g} to {high:g}")
        return None if value is None else float(value)

    def end(self) -> None:
        """Refuse what nobody took."""
        unknown = sorted(self.data)
        if unknown:
            name = self.key(unknown[0])
            raise ApiError(
                400,
                f"unknown key {name[:SHOWN]}: check its spelling, or leave it out",
                param=name[:SHOWN],
                code="unknown_parameter",
            )


def wrong(key: str, value: Any, wanted: str) -> ApiError:
    """The error for a value that is not what its key wants."""
    try:
        shown = json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        shown = type(value).__name__
    if len(shown) > SHOWN:
        shown = shown[:SHOWN] + "…"
    return ApiError(400, f"{key} is {shown}: it must be {wanted}", param=key)


def read_json(body: bytes) -> Any:
    """A request's body.

    Raises:
        ApiError: it is not JSON.
    """
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = plain_line(str(error))[:200] or type(error).__name__
        raise ApiError(400, f"the body is not JSON: {reason}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def read_request(data: Any, limits: Limits, tokenizer: Tokenizer) -> ChatRequest:
    """Check a chat completions request.

    Args:
        data: the body, parsed.
        limits: what it may ask for.
        tokenizer: the model's.

    Raises:
        ApiError: naming the key that is wrong.
    """
    fields = Fields(data)
    for name in IGNORED:
        fields.data.pop(name, None)
    turns = read_messages(fields.data.pop("messages", None))
    tools = read_tools(fields.data.pop("tools", None))
    tools, bias, call_tools = choose_tools(fields.data.pop("tool_choice", None), tools, tokenizer)
    options = Fields(fields.take("stream_options", dict, "an object", {}), "stream_options")
    read_format(fields.take("response_format", dict, "an object", None))
    if fields.integer("top_logprobs", 0, 0, 20):
        raise ApiError(
            400,
            "top_logprobs is not offered: only the token that was taken has its log-probability",
            param="top_logprobs",
        )
    most = limits.max_tokens
    written = [
        fields.integer(name, None, 1, most) for name in ("max_completion_tokens", "max_tokens")
    ]
    request = ChatRequest(
        turns=turns,
        model=fields.text("model"),
        max_tokens=next((n for n in written if n is not None), most),
        stop=read_stop(fields.data.pop("stop", None)),
        n=fields.integer("n", 1, 1, limits.max_choices),
        seed=fields.integer("seed", None, -(2**63), 2**63 - 1),
        stream=fields.flag("stream"),
        include_usage=options.flag("include_usage"),
        logprobs=fields.flag("logprobs"),
        tools=tools,
        call_tools=call_tools,
        return_token_ids=fields.flag("return_token_ids"),
        sampler=read_sampler(fields, limits.temperature, bias, tokenizer.vocab_size),
    )
    options.data.pop("include_obfuscation", None)
    options.end()
    fields.end()
    return request


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


def choose_tools(
    choice: Any, tools: tuple[ClientTool, ...], tokenizer: Tokenizer
) -> tuple[tuple[ClientTool, ...], dict[int, float], bool]:
    """Who answers the model's calls, by ``tool_choice``.

    Returns:
        the client's tools that may be called, biases that make or prevent a call, and whether the
        server's own tools answer.
    """
    if choice == "none":
        return (), {tokenizer.role_ids["database"]: NEVER}, False
    if choice in (None, "auto"):
        return tools, {}, not tools
    named = choice
    if isinstance(choice, dict):
        wanted = choice.get("function")
        named = wanted.get("name") if isinstance(wanted, dict) else None
        chosen = tuple(tool for tool in tools if tool.name == named)
    else:
        chosen = tools if choice == "required" else ()
    if not chosen:
        raise wrong("tool_choice", choice, '"auto", "none", "required", or a function among tools')
    return chosen, {tokenizer.role_ids["end"]: NEVER}, False


def read_format(data: Any) -> None:
    """Only plain text is offered."""
    if data is not None and data.get("type") != "text":
        raise wrong("response_format.type", data.get("type"), '"text"')


def read_stop(data: Any) -> tuple[str, ...]:
    """One stop text, or up to four."""
    texts = [data] if isinstance(data, str) else [] if data is None else data
    good = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    if not good or len(texts) > 4:
        raise wrong("stop", data, "a text that is not empty, or a list of up to 4")
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise wrong("stop", data, "text: half a surrogate pair is none")
    return tuple(texts)


def read_sampler(
    fields: Fields, temperature: float, bias: Mapping[int, float], vocab_size: int
) -> Sampler:
    """How tokens are chosen.

    Args:
        fields: the request.
        temperature: where it names none.
        bias: that its choice of tools makes.
        vocab_size: token ids stand below it.
    """
    biases: dict[int, float] = {}
    for name, value in fields.take("logit_bias", dict, "an object", {}).items():
        key = f"logit_bias.{name[:SHOWN]}"
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            raise wrong(key, name, f"a token id below {vocab_size}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 100:
            raise wrong(key, value, "a number from -100 to 100")
        biases[int(name)] = value
    biases.update(bias)
    options = {
        "temperature": fields.number("temperature", temperature, 0, 100),
        "top_p": fields.number("top_p", None, 0, 1),
        "top_k": fields.integer("top_k", None, 1, vocab_size),
        "min_p": fields.number("min_p", None, 0, 1),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -2, 2),
        "presence_penalty": fields.number("presence_penalty", 0.0, -2, 2),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 0.1, 10),
        "logit_bias": biases or None,
    }
    if options["temperature"] < COLDEST:
        options["temperature"] = 0.0
    try:
        sampler = Sampling(**options)
    except ToolmemError as error:
        raise ApiError(400, str(error), param=str(error).split(" ")[0]) from None
    return sampler if sampler.random or sampler.needs_history or biases else Greedy()


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def tool_call(call_id: str, tools: Sequence[ClientTool], text: str, preferred: str | None) -> Any:
    """A model's call as the client is to make it.

    Args:
        call_id: its id.
        tools: the client's, at least one.
        text: what the model wrote.
        preferred: the name of the server's tool that would have understood it.
    """
    tool = next((tool for tool in tools if tool.name == preferred), tools[0])
    arguments = json.dumps({tool.argument: extract_query(text)})
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": tool.name, "arguments": arguments},
    }
