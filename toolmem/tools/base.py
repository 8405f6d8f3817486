"""What a tool is, and the toolbox that asks tools without ever failing or hanging.

A tool answers one query with one short line of text. Whatever goes wrong is said in that line
(``error: …``), because the one who asked is a model: it reads text, it does not catch exceptions.

To add a tool, write one class with the four members of `Tool` and hand it to a `Toolbox`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")

# The language word after an opening fence counts as one only when a line break follows it.
FENCE = re.compile(r"```(?:[A-Za-z0-9_+-]*[ \t]*\r?\n)?(.*?)```", re.DOTALL)
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
GRACE_S = 0.5  # how long past its timeout a tool's event loop may stay silent before it is given up


@dataclass(frozen=True)
class Answer:
    """What a tool said.

    Args:
        text: one line without control characters; ``error: …`` when it is an error.
        error: whether the query could not be answered.
        seconds: wall time that the answer took.
    """

    text: str
    error: bool
    seconds: float


@runtime_checkable
class Tool(Protocol):
    """A source of answers.

    A tool may also offer ``answer_now(queries) -> list[Answer | None]``: answers that take
    microseconds, given without waiting, and None where the query needs `call`.
    """

    name: str

    def accepts(self, query: str) -> bool:
        """Whether this query is addressed to this tool."""
        ...

    async def call(self, query: str) -> Answer:
        """Answer one query; slow synchronous work belongs in `in_thread`."""
        ...

    def close(self) -> None:
        """Free what the tool holds."""
        ...


def extract_query(text: str) -> str:
    """The query in an assistant's turn: its last fenced block, else the whole turn, stripped."""
    blocks = FENCE.findall(text)
    return (blocks[-1] if blocks else text).strip()


def plain_line(text: str) -> str:
    """``text`` as one line: runs of control characters and line breaks become one space."""
    return UNPRINTABLE.sub(" ", text).strip()


def cut(text: str, max_bytes: int) -> str:
    """The longest start of ``text`` that is at most ``max_bytes`` of UTF-8."""
    data = text.encode("utf-8", "replace")
    return text if len(data) <= max_bytes else data[:max_bytes].decode("utf-8", "ignore")


def error_answer(reason: str, seconds: float = 0.0) -> Answer:
    """An error that a model can read."""
    return Answer(f"error: {plain_line(reason)}", True, seconds)


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run a synchronous function in a thread of its own and wait for its result.

    Unlike ``asyncio.to_thread`` the thread is a daemon: a function that hangs does not keep the
    process from ending.
    """
    future: Future[T] = Future()

    def work() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="toolmem-tool", daemon=True).start()
    return await asyncio.wrap_future(future)


class Toolbox:
    """Several tools behind one door: finds the query, the tool, and an answer in bounded time.

    Tools run on an event loop of the toolbox's own, in a daemon thread, so that one that blocks
    neither stops the caller's loop nor keeps the process from ending: its loop is given up and the
    next call gets a new one.

    Args:
        tools: asked in this order; the first that accepts a query answers it.
        timeout_s: seconds after which a tool's silence becomes an error answer.
        max_answer_bytes: UTF-8 bytes; a longer answer becomes an error answer.
    """

    def __init__(
        self, tools: Iterable[Tool], *, timeout_s: float = 2.0, max_answer_bytes: int = 512
    ) -> None:
        self.tools = tuple(tools)
        if not self.tools:
            raise ValueError("a toolbox needs at least one tool")
        if timeout_s <= 0 or max_answer_bytes < 32:
            raise ValueError("timeout_s must be positive and max_answer_bytes at least 32")
        self.timeout_s = timeout_s
        self.max_answer_bytes = max_answer_bytes
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def call(self, text: str) -> Answer:
        """Answer what an assistant's turn asks; never raises, whatever the tool does.

        Args:
            text: the whole turn; `extract_query` finds the query in it.
        """
        query = extract_query(text)
        tool = self._route(query)
        quick = self._answers_now(tool, [query])[0]
        if quick is not None:
            return quick
        assert tool is not None  # without a tool the answer is there at once
        start = time.perf_counter()
        loop = self._running_loop()
        future = self._submit(self._call_tool(tool, query), loop)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.timeout_s + GRACE_S)
        except TimeoutError:
            self._give_up(loop)
            return self._timed_out(tool, start)

    def call_many(self, texts: Sequence[str]) -> list[Answer]:
        """Answer many turns, in order: quick ones in bulk, the others concurrently.

        May be called with or without a running event loop; blocks until all have answered or timed
        out.

        Args:
            texts: one assistant's turn each.
        """
        queries = [extract_query(text) for text in texts]
        tools = [self._route(query) for query in queries]
        answers: list[Answer | None] = [None] * len(queries)
        for tool in {id(tool): tool for tool in tools}.values():
            places = [place for place, owner in enumerate(tools) if owner is tool]
            found = self._answers_now(tool, [queries[place] for place in places])
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        start = time.perf_counter()
        loop = self._running_loop() if None in answers else None
        waiting = {
            place: self._submit(self._call_tool(tool, queries[place]), loop)
            for place, tool in enumerate(tools)
            if answers[place] is None and tool is not None and loop is not None
        }
        deadline = start + self.timeout_s + GRACE_S
        late = False
        for place, future in waiting.items():
            try:
                answers[place] = future.result(max(0.0, deadline - time.perf_counter()))
            except TimeoutError:
                late = True
                answers[place] = self._timed_out(tools[place], start)
        if late and loop is not None:
            self._give_up(loop)
        return [answer for answer in answers if answer is not None]

    def close(self) -> None:
        """Close every tool and stop the toolbox's event loop."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            _stop(loop)
        for tool in self.tools:
            tool.close()

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _route(self, query: str) -> Tool | None:
        for tool in self.tools:
            try:
                if tool.accepts(query):
                    return tool
            except Exception:  # a tool that fails to say so does not accept the query
                continue
        return None

    def _answers_now(self, tool: Tool | None, queries: list[str]) -> list[Answer | None]:
        """What can be said without waiting; None where the tool has to be called."""
        if tool is None:
            names = ", ".join(each.name for each in self.tools)
            return [error_answer(f"no tool understands this query (tools: {names})")] * len(queries)
        answer_now = getattr(tool, "answer_now", None)
        if answer_now is None:
            return [None] * len(queries)
        start = time.perf_counter()
        try:
            answers = list(answer_now(queries))
            if len(answers) != len(queries):
                raise ValueError("answer_now must answer every query")
            return [None if each is None else self._limited(each) for each in answers]
        except Exception as error:
            return [self._failed(tool, error, start)] * len(queries)

    async def _call_tool(self, tool: Tool, query: str) -> Answer:
        start = time.perf_counter()
        try:
            # Not wait_for: its inner task would let a SystemExit through to the loop.
            async with asyncio.timeout(self.timeout_s):
                answer = await tool.call(query)
            return self._limited(answer)
        except (TimeoutError, asyncio.CancelledError):  # cancelled: its loop was given up
            return self._timed_out(tool, start)
        except BaseException as error:  # even SystemExit: it would end the toolbox's loop, not ours
            return self._failed(tool, error, start)

    def _limited(self, answer: Answer) -> Answer:
        text = plain_line(answer.text)
        if answer.error:
            return replace(answer, text=cut(text, self.max_answer_bytes))
        size = len(text.encode("utf-8", "replace"))
        if size > self.max_answer_bytes:
            reason = f"answer too long ({size} bytes, at most {self.max_answer_bytes})"
            return error_answer(reason, answer.seconds)
        return answer if text == answer.text else replace(answer, text=text)

    def _timed_out(self, tool: Tool | None, start: float) -> Answer:
        name = tool.name if tool is not None else "tool"
        reason = f"{name} did not answer within {self.timeout_s:g} seconds"
        return error_answer(reason, time.perf_counter() - start)

    def _failed(self, tool: Tool, error: BaseException, start: float) -> Answer:
        # Its kind only: a message from the depths may hold paths, which are not for the model.
        reason = f"{tool.name} failed ({type(error).__name__})"
        return error_answer(reason, time.perf_counter() - start)

    def _submit(
        self, work: Coroutine[Any, Any, Answer], loop: asyncio.AbstractEventLoop
    ) -> Future[Answer]:
        try:
            return asyncio.run_coroutine_threadsafe(work, loop)
        except RuntimeError:  # given up by another caller in this very moment, and closed
            work.close()
            answered: Future[Answer] = Future()
            answered.set_result(error_answer("the tool is busy, ask again"))
            return answered

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = self._loop = asyncio.new_event_loop()
                threading.Thread(target=_serve, args=(loop,), name="toolmem", daemon=True).start()
            return self._loop

    def _give_up(self, loop: asyncio.AbstractEventLoop) -> None:
        """Leave a loop that some tool blocks; it ends by itself if the tool ever returns."""
        with self._lock:
            if self._loop is loop:
                self._loop = None
        _stop(loop)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.suppress(RuntimeError):  # it has closed by itself
        loop.call_soon_threadsafe(loop.stop)
