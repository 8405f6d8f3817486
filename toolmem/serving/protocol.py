"""OpenAI's chat completions, as far as a small model speaks them: requests checked, answers shaped.

Everything that a client can get wrong is an `ApiError` that names the key. Nothing here knows of HTTP.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolmem.data.turn_format import NO_TOKEN, turn_format
from toolmem.errors import ToolmemError
from toolmem.generation.sampling import Greedy, Sampler, Sampling
from toolmem.serving.fields import SHOWN, ApiError, Fields, wrong
from toolmem.serving.messages import ClientTool, read_messages, read_tools
from toolmem.tools.base import extract_query

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer

# Said by many clients, and without any meaning here.
IGNORED = frozenset(
    {
        "metadata", "parallel_tool_calls", "prompt_cache_key", "reasoning_effort", "safety_identifier",
        "service_tier", "store", "user",
    }
)  # fmt: skip

# A token that a bias of this size forbids is never taken.
NEVER = -math.inf
# Below this temperature logits grow beyond float32, and the likeliest token is as good as certain.
COLDEST = 1e-3


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


def choose_tools(
    choice: Any, tools: tuple[ClientTool, ...], tokenizer: Tokenizer
) -> tuple[tuple[ClientTool, ...], dict[int, float], bool]:
    """Who answers the model's calls, by ``tool_choice``.

    Returns:
        the client's tools that may be called, biases that make or prevent a call, and whether the
        server's own tools answer.
    """
    form = turn_format(tokenizer)
    if choice == "none":  # a call that a turn's text is can but be left unanswered
        return (), {form.call: NEVER} if form.call != NO_TOKEN else {}, False
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
    if form.call == NO_TOKEN:
        raise ApiError(
            400,
            "tool_choice: a call cannot be made to come from this model, whose chat format has no token for "
            'one: leave it out, or "auto"',
            param="tool_choice",
        )
    return chosen, {form.end: NEVER}, False


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
