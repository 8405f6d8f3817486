"""One chat completion: its lanes in the engine, and their tokens as OpenAI's chunks or one answer."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import toolmem
from toolmem.data.text.token_table import dialogue_tokens
from toolmem.data.turn_format import turn_format
from toolmem.errors import ToolmemError
from toolmem.generation.requests import EngineFull, Request
from toolmem.generation.transcript import Piece, Transcript, Turn
from toolmem.generation.turns import ASSISTANT, DATABASE
from toolmem.serving import protocol
from toolmem.serving.fields import ApiError
from toolmem.serving.protocol import ChatRequest
from toolmem.tools.base import extract_query

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.generation.engine import Engine
    from toolmem.generation.reference import Generated
    from toolmem.generation.requests import Handle
    from toolmem.tools.base import Toolbox

# the engine's reason -> OpenAI's. A call that nobody may answer any more is a limit that was reached.
FINISH_REASONS = {"end": "stop", "stop": "stop", "length": "length", "seconds": "length"}


class Choice:
    """One lane of a completion.

    Args:
        index: its number.
        handle: the engine's.
        tokenizer: the model's.
        request: what was asked.
        holds: keep an assistant's turn back until it is known not to be a tool call.
        toolbox: the server's own tools, which know what a query is for.
    """

    def __init__(
        self,
        index: int,
        handle: Handle,
        tokenizer: Tokenizer,
        request: ChatRequest,
        holds: bool,
        toolbox: Toolbox | None,
    ) -> None:
        self.index = index
        self.handle = handle
        self.tokenizer = tokenizer
        self.request = request
        self.holds = holds
        self.toolbox = toolbox
        self.transcript = Transcript(tokenizer, request.stop)
        self.generated: Generated | None = None
        self._told = 0  # tokens of the turn whose log-probabilities are out

    async def deltas(self) -> AsyncIterator[dict[str, Any]]:
        """The choice's part of each chunk, the last with its finish reason.

        Raises:
            ApiError: the engine was closed under it.
        """
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for event in self.handle:
                for piece in self.transcript.add(event.token, event.role, event.log_prob):
                    if (delta := self._delta(piece)) is not None:
                        yield delta
            self.generated = self.handle.result()
        except ToolmemError as error:
            if self.handle.failed:  # something of this dialogue's own: asking again would not help
                raise RuntimeError(f"a dialogue failed: {error}") from error
            raise ApiError(503, f"{error}: ask again later", code="stopped") from None
        if self.generated.finish_reason == "cancelled":
            raise ApiError(503, "the dialogue was cancelled: ask again", code="stopped")
        if (delta := self._delta(self.transcript.finish(), last=True)) is not None:
            yield delta
        yield self._chunk({}, self.finish_reason) | {"toolmem": self.extension()}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "finish_reason": reason, "logprobs": None}

    def _delta(self, piece: Piece, last: bool = False) -> dict[str, Any] | None:
        """New text as a chunk: at once under ``toolmem``, as content where it is the answer."""
        delta: dict[str, Any] = {}
        if piece.text:
            delta["toolmem"] = {"role": piece.role, "text": piece.text}
        turn = self.transcript.turns[-1]
        content = "" if self.holds or piece.role != "assistant" else piece.text
        if last and self.holds:
            content = self.answer
        if last and (call := self.tool_call()) is not None:
            delta["tool_calls"] = [{"index": 0, **call}]
        if content:
            delta["content"] = content
        if not delta:
            return None
        chunk = self._chunk(delta)
        if content and self.request.logprobs:
            chunk["logprobs"] = self._log_probs(turn, self._told)
            self._told = turn.shown
        return chunk

    @property
    def answer(self) -> str:
        """The last turn's text, unless it was a tool call."""
        turn = self.transcript.turns[-1]
        return "" if turn.role != "assistant" or (turn.calls and self.holds) else turn.text

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for why it ended."""
        assert self.generated is not None
        if self.tool_call() is not None:
            return "tool_calls"
        return FINISH_REASONS.get(self.generated.finish_reason, "length")

    def tool_call(self) -> dict[str, Any] | None:
        """The call that the client is to make, if the model ended with one and it can."""
        turn = self.transcript.turns[-1]
        if not (turn.calls and self.request.tools):
            return None
        # Of what it names, so that the same dialogue gives the same id in both forms of the answer.
        call_id = f"call_{self.index}_{len(self.request.turns)}"
        query = self._query(turn)
        preferred = tool_name(self.toolbox, query)
        return protocol.tool_call(call_id, self.request.tools, query, preferred)

    def _query(self, turn: Turn) -> str:
        """What a turn that is a call asks."""
        asked = turn_format(self.tokenizer).query(turn.text)
        return extract_query(turn.text if asked is None else asked)

    def message(self) -> dict[str, Any]:
        """The choice as a whole; call it when the deltas are over."""
        turn = self.transcript.turns[-1]
        call = self.tool_call()
        message: dict[str, Any] = {"role": "assistant", "content": self.answer, "refusal": None}
        if call is not None:
            # The turn as it was written, where it says more than the query.
            query = turn_format(self.tokenizer).written(self._query(turn), True)
            message["content"] = turn.text if turn.text != query else None
            message["tool_calls"] = [call]
        return {
            "index": self.index,
            "message": message,
            "finish_reason": self.finish_reason,
            "logprobs": self._log_probs(turn) if self.request.logprobs and self.answer else None,
            "toolmem": self.extension(),
        }

    def extension(self) -> dict[str, Any]:
        """What OpenAI's shape has no place for: every turn, the tool's answers, the engine's reason."""
        assert self.generated is not None
        told: dict[str, Any] = {
            "dialogue": [{"role": turn.role, "text": turn.text} for turn in self.transcript.turns],
            "tool_calls": [
                {
                    "query": query,
                    "answer": answer.text,
                    "error": answer.error,
                    "seconds": round(answer.seconds, 6),
                }
                for query, answer in self.generated.tool_calls
            ],
            "finish_reason": self.generated.finish_reason,
        }
        if self.request.return_token_ids:
            told |= {
                "token_ids": self.generated.tokens,
                "roles": self.generated.roles,
                # nan is no JSON: null where the model did not write
                "log_probs": [x if x == x else None for x in self.generated.log_probs],
                "prompt_length": self.generated.prompt_length,
            }
        return told

    def _log_probs(self, turn: Turn, start: int = 0) -> dict[str, Any]:
        entries = []
        told = slice(start, turn.shown)
        for token, value in zip(turn.tokens[told], turn.log_probs[told], strict=True):
            spelled = self.tokenizer.decode_bytes([token])
            entries.append(
                {
                    "token": spelled.decode("utf-8", "replace"),
                    "logprob": value,
                    "bytes": list(spelled),
                    "top_logprobs": [],
                }
            )
        return {"content": entries, "refusal": None}


class Completion:
    """A request under way.

    Args:
        engine: has its lanes.
        tokenizer: the model's.
        toolbox: the server's own tools, or None.
        request: checked.
        name: of the model.
        max_tool_calls: that the server's tools answer in one dialogue.
        max_seconds: that a dialogue may take; None for any.

    Raises:
        ApiError: the engine is full, or does not take the prompt.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        toolbox: Toolbox | None,
        request: ChatRequest,
        name: str,
        *,
        max_tool_calls: int = 4,
        max_seconds: float | None = None,
    ) -> None:
        self.request = request
        self.name = name
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.began = time.perf_counter()
        self.first_token_s: float | None = None
        self.choices: list[Choice] = []
        own_tools = request.call_tools and toolbox is not None
        holds = own_tools or bool(request.tools)
        seed = secrets.randbits(48) if request.seed is None else request.seed
        prompt = dialogue_tokens(request.turns, tokenizer)
        room = engine.model.max_seq_len
        if len(prompt) >= room:
            raise ApiError(
                400,
                f"messages are {len(prompt):,} tokens, and the model's max_seq_len is {room:,}: shorten "
                "them",
                param="messages",
                code="context_length_exceeded",
            )
        try:
            for index in range(request.n):
                handle = engine.submit(
                    Request(
                        prompt,
                        max_new_tokens=request.max_tokens,
                        max_tool_calls=max_tool_calls,
                        max_seconds=max_seconds,
                        sampler=request.sampler,
                        seed=seed + index,
                        stop_strings=request.stop,
                        use_tools=own_tools,
                    )
                )
                self.choices.append(Choice(index, handle, tokenizer, request, holds, toolbox))
        except EngineFull as error:
            self.cancel()
            raise ApiError(429, str(error), code="engine_full") from None
        except ToolmemError as error:
            self.cancel()
            raise ApiError(400, str(error), param="messages") from None
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give every lane back; one that is over stays as it is."""
        for choice in self.choices:
            choice.handle.cancel()

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The streamed form, chunk by chunk; choices as they come."""
        async for part in self._merged():
            yield self._envelope("chat.completion.chunk", [part])
        if self.request.include_usage:
            yield self._envelope("chat.completion.chunk", []) | {"usage": self.usage()}

    async def answer(self) -> dict[str, Any]:
        """The whole form."""
        async for _ in self._merged():
            pass
        choices = [choice.message() for choice in self.choices]
        return self._envelope("chat.completion", choices) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens: the prompt and what tools answered were read, the rest was written."""
        results = [choice.generated for choice in self.choices]
        done = [result for result in results if result is not None]
        read = max((result.prompt_length for result in done), default=0)
        roles = [role for result in done for role in result.roles[result.prompt_length :]]
        return protocol.usage(read + roles.count(DATABASE), roles.count(ASSISTANT))

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.name,
            "system_fingerprint": f"toolmem-{toolmem.__version__}",
            "choices": choices,
        }

    async def _merged(self) -> AsyncIterator[dict[str, Any]]:
        """Deltas of all choices in the order in which they come."""
        if len(self.choices) == 1:
            async for delta in self.choices[0].deltas():
                self._note(delta)
                yield delta
            return
        queue: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue(64)

        async def pump(choice: Choice) -> None:
            try:
                async for delta in choice.deltas():
                    await queue.put(delta)
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.create_task(pump(choice)) for choice in self.choices]
        try:
            open_choices = len(tasks)
            while open_choices:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    open_choices -= 1
                else:
                    self._note(item)
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    def _note(self, delta: dict[str, Any]) -> None:
        if self.first_token_s is None and delta["delta"].get("toolmem"):
            self.first_token_s = time.perf_counter() - self.began


def tool_name(toolbox: Toolbox | None, text: str) -> str | None:
    """The name of the tool that takes a turn's query; None when there is none."""
    query = extract_query(text)
    for tool in toolbox.tools if toolbox is not None else ():
        with contextlib.suppress(Exception):  # a tool that fails to say so does not take it
            if tool.accepts(query):
                return tool.name
    return None
