"""What a tool is, and the toolbox that asks tools without ever failing or hanging.

A tool answers one query with one short line of text. Whatever goes wrong is said in that line
(``error: …``), because the one who asked is a model: it reads text, it does not catch exceptions.

To add a tool, write one class with the four members of `Tool` and hand it to a `Toolbox`.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from toolmem.tools.threads import in_thread, runs, start_loop, stop_loop

# The language word after an opening fence counts as one only when a line break follows it.
FENCE = re.compile(r"```(?:[A-Za-z0-9_+-]*[ \t]*\r?\n)?(.*?)```", re.DOTALL)
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
GRACE_S = 0.5  # how long past its timeout a tool's event loop may stay silent before it is given up
HUGE = 2**20  # characters that are not cleaned before they are refused: that would take its time


@dataclass(frozen=True)
class Answer:
    """What a tool said.

    Args:
        text: one line without control characters; ``error: …`` when it is an error.
        error: whether the query could not be answered.
        seconds: wall time that the answer took.
        failed: the tool itself failed (it raised, or was silent for too long): the same query may
            be answered another time. False where the error is about the query.
    """

    text: str
    error: bool
    seconds: float
    failed: bool = False


class Question(NamedTuple):
    """A query that has to be waited for, and the tool that accepts it."""

    tool: Tool
    query: str


@runtime_checkable
class Tool(Protocol):
    """A source of answers.

    A tool may also offer ``answer_now(queries) -> list[Answer | None]``: answers that take
    microseconds, given without waiting, and None where the query needs `call`. Attributes
    ``joinable`` and ``cacheable`` (True where absent) tell `ToolCalls` whether one call may serve
    all who ask the same at the same time, and whether its answer may be given again later.
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


def error_answer(reason: str, seconds: float = 0.0, *, failed: bool = False) -> Answer:
    """An error that a model can read; ``failed`` as in `Answer`."""
    return Answer(f"error: {plain_line(reason)}", True, seconds, failed)


class Toolbox:
    """Several tools behind one door: finds the query, the tool, and an answer in bounded time.

    Tools run on an event loop of the toolbox's own, in a daemon thread, so that one that blocks
    neither stops the caller's loop nor keeps the process from ending: its loop is given up, the
    next call gets a new one, and the tool that blocked gets a thread for each call from then on.

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
        self._blocking: set[str] = set()  # names of tools that have blocked a loop

    async def call(self, text: str) -> Answer:
        """Answer what an assistant's turn asks; never raises, whatever the tool does.

        Args:
            text: the whole turn; `extract_query` finds the query in it.
        """
        [found] = self.ask_now([text])
        if isinstance(found, Answer):
            return found
        start = time.perf_counter()
        loop = self._running_loop()
        future = self._submit(found, loop)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.timeout_s + GRACE_S)
        except TimeoutError:
            self._give_up(loop)
            return self._timed_out(found.tool, start)

    async def ask(self, question: Question) -> Answer:
        """Wait for a tool's answer, on the caller's loop; never raises, but for a cancellation.

        A tool that blocks blocks that loop: `call` and `call_many` use one of the toolbox's own.

        Args:
            question: what `ask_now` could not answer.
        """
        tool, query = question
        start = time.perf_counter()
        task = asyncio.current_task()
        assert task is not None
        try:
            # Not wait_for: its inner task would let a SystemExit through to the loop.
            async with asyncio.timeout(self.timeout_s):
                if tool.name in self._blocking:
                    answer = await in_thread(asyncio.run, self._bounded(tool, query))
                else:
                    task.set_name(
                        tool.name
                    )  # tells `blame` who blocks, should the loop stand still
                    answer = await tool.call(query)
            return self._limited(answer)
        except TimeoutError:
            return self._timed_out(tool, start)
        except BaseException as error:  # even SystemExit: it would end the loop
            if isinstance(error, asyncio.CancelledError) and task.cancelling():
                raise
            return self._failed(tool, error, start)

    def blame(self, loop: asyncio.AbstractEventLoop) -> asyncio.Task[Any] | None:
        """The task that holds up a loop; its tool gets a thread for each call from now on."""
        task = asyncio.current_task(loop)
        if task is not None:
            self._blocking.add(task.get_name())
        return task

    def ask_now(self, texts: Sequence[str]) -> list[Answer | Question]:
        """What can be answered without waiting, in bulk, and what has to be asked, in order.

        Args:
            texts: one assistant's turn each.
        """
        names = ", ".join(each.name for each in self.tools)
        unknown = error_answer(f"no tool understands this query (tools: {names})")
        found: list[Answer | Question] = [self.question(text) or unknown for text in texts]
        asked = {place: each for place, each in enumerate(found) if isinstance(each, Question)}
        for tool in self.tools:
            mine = {place: each.query for place, each in asked.items() if each.tool is tool}
            answers = self._answers_now(tool, list(mine.values()))
            for place, answer in zip(mine, answers, strict=True):
                if answer is not None:
                    found[place] = answer
        return found

    def question(self, text: str) -> Question | None:
        """The query in a turn and the tool that accepts it, if any does."""
        query = extract_query(text)
        tool = self._route(query)
        return None if tool is None else Question(tool, query)

    def call_many(self, texts: Sequence[str]) -> list[Answer]:
        """Answer many turns, in order: quick ones in bulk, the others concurrently.

        May be called with or without a running event loop; blocks until all have answered or timed
        out.

        Args:
            texts: one assistant's turn each.
        """
        found = self.ask_now(texts)
        questions = {place: each for place, each in enumerate(found) if isinstance(each, Question)}
        answers = {place: each for place, each in enumerate(found) if isinstance(each, Answer)}
        if questions:
            start = time.perf_counter()
            deadline = start + self.timeout_s + GRACE_S
            loop = self._running_loop()
            waiting = {place: self._submit(question, loop) for place, question in questions.items()}
            late = False
            for place, future in waiting.items():
                try:
                    answers[place] = future.result(max(0.0, deadline - time.perf_counter()))
                except TimeoutError:
                    late = True
                    answers[place] = self._timed_out(questions[place].tool, start)
            if late:
                self._give_up(loop)
        return [answers[place] for place in range(len(found))]

    def close(self) -> None:
        """Close every tool and stop the toolbox's event loop."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            stop_loop(loop)
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

    def _answers_now(self, tool: Tool, queries: list[str]) -> list[Answer | None]:
        """What a tool says without waiting; None where it has to be called."""
        answer_now = getattr(tool, "answer_now", None)
        if answer_now is None or not queries:
            return [None] * len(queries)
        start = time.perf_counter()
        try:
            answers = list(answer_now(queries))
            if len(answers) != len(queries):
                raise ValueError("answer_now must answer every query")
            return [None if each is None else self._limited(each) for each in answers]
        except Exception as error:
            return [self._failed(tool, error, start)] * len(queries)

    async def _ask_always(self, question: Question) -> Answer:
        """`ask`, with an answer even when its loop is given up."""
        start = time.perf_counter()
        try:
            return await self.ask(question)
        except asyncio.CancelledError:
            return self._timed_out(question.tool, start)

    async def _bounded(self, tool: Tool, query: str) -> Answer:
        """For a loop of its own: a call that can be cancelled ends with its time."""
        async with asyncio.timeout(self.timeout_s):
            return await tool.call(query)

    def _limited(self, answer: Answer) -> Answer:
        text = answer.text
        if isinstance(text, bytes | bytearray):  # against the protocol, but what is meant is clear
            text = text.decode("utf-8", "replace")
        if len(text) > HUGE:
            if not answer.error:
                sizes = f"{len(text)} characters, at most {self.max_answer_bytes} bytes"
                return error_answer(f"answer too long ({sizes})", answer.seconds)
            text = text[:HUGE]
        text = plain_line(text)
        if answer.error:
            text = cut(text, self.max_answer_bytes)
        elif (size := len(text.encode("utf-8", "replace"))) > self.max_answer_bytes:
            reason = f"answer too long ({size} bytes, at most {self.max_answer_bytes})"
            return error_answer(reason, answer.seconds)
        return answer if text == answer.text else replace(answer, text=text)

    def _timed_out(self, tool: Tool, start: float) -> Answer:
        reason = f"{tool.name} did not answer within {self.timeout_s:g} seconds"
        return error_answer(reason, time.perf_counter() - start, failed=True)

    def _failed(self, tool: Tool, error: BaseException, start: float) -> Answer:
        # Its kind only: a message from the depths may hold paths, which are not for the model.
        reason = f"{tool.name} failed ({type(error).__name__})"
        return error_answer(reason, time.perf_counter() - start, failed=True)

    def _submit(self, question: Question, loop: asyncio.AbstractEventLoop) -> Future[Answer]:
        work = self._ask_always(question)
        try:
            return asyncio.run_coroutine_threadsafe(work, loop)
        except RuntimeError:  # given up by another caller in this very moment, and closed
            work.close()
            answered: Future[Answer] = Future()
            answered.set_result(error_answer("the tool is busy, ask again", failed=True))
            return answered

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop, _ = start_loop("toolmem")
            return self._loop

    def _give_up(self, loop: asyncio.AbstractEventLoop) -> None:
        """Leave a loop that some tool blocks; it ends by itself if the tool ever returns."""
        if loop is not self._loop or runs(loop):  # a tool that will not be cancelled blocks nobody
            return
        self.blame(loop)
        with self._lock:
            if self._loop is loop:
                self._loop = None
        stop_loop(loop)
