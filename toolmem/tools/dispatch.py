"""Tool calls off the critical path: asked now, answered later, and never a reason to stop.

`ToolCalls` stands between a generator and a `Toolbox`. What a tool can say at once (lookups in the
database, sums) is said in the caller's thread, in bulk. Everything else runs on an event loop in a
daemon thread: so many at a time, again after a pause where the tool failed, once for all who ask the
same at the same time, and not at all where the answer is remembered.

    with ToolCalls(toolbox) as calls:
        first, second = calls.submit(["FIND birth_date FOR Ann Smith", "SELECT ..."])
        first.done()        # True: the database looks names up at once
        second.result()     # an Answer; an error answer if the tool fails, never an exception
"""

from __future__ import annotations

import asyncio
import random
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from toolmem.tools.base import Answer, Question, Toolbox, error_answer
from toolmem.tools.threads import in_thread, start_loop, stop_loop

if TYPE_CHECKING:
    from types import TracebackType

CLOSE_S = 2.0  # how long `close` waits for its thread, should a caller's callback hold it up


class AnswersMany(Protocol):
    """The least that can be asked: a `Toolbox`, or something that stands for one in a test."""

    def call_many(self, texts: Sequence[str]) -> list[Answer]:
        """Answer each text; blocks until all have been answered."""
        ...


@dataclass(frozen=True)
class ToolCallStats:
    """What became of the calls so far.

    Args:
        calls: texts submitted.
        at_once: of these, answered in the caller's thread.
        cached: of these, answered from memory.
        joined: of these, served by a call that was already under way.
        retried: attempts made again after a failure of the tool.
        failed: calls whose tool failed at every attempt.
        cancelled: calls given up because nobody waited for them any more.
        running: calls that a tool works on at this moment.
        waiting: calls that wait for their turn, or for their next attempt.
    """

    calls: int = 0
    at_once: int = 0
    cached: int = 0
    joined: int = 0
    retried: int = 0
    failed: int = 0
    cancelled: int = 0
    running: int = 0
    waiting: int = 0


@dataclass(eq=False)
class _Call:
    """One question under way, and all who wait for its answer."""

    question: Question | str  # a text for what has only `call_many`
    key: Hashable
    attempts: int
    batch: _Batch
    waiters: list[Future[Answer]] = field(default_factory=list)


@dataclass(eq=False)
class _Batch:
    """Calls that are made together: one for a toolbox, a whole `submit` for `call_many`."""

    calls: list[_Call] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


class ToolCalls:
    """Asks a toolbox without waiting for it. Safe to use from several threads.

    Two attributes of a tool switch what is shared: ``joinable`` (one call serves all who ask the
    same at the same time) and ``cacheable`` (its answers are remembered; errors never are). Both are
    True where a tool does not have them; a tool whose answers change sets ``cacheable = False``, one
    whose calls change something sets both. An object that has only ``call_many`` is called in a
    thread, once for each `submit`; nothing is known of it, so both are False unless it says True.

    Args:
        toolbox: a `Toolbox`, or an object with ``call_many``; it is left open.
        max_concurrent: calls that tools work on at one time (`submit`s for ``call_many``).
        retries: further attempts where the tool itself failed: `Answer.failed`, or an exception.
        backoff_s: seconds before the second attempt; each later pause is twice as long. All are
            drawn from half to one and a half times that, so that retries do not come all at once.
        cache_size: answers remembered; the one that was not asked for longest is forgotten first.
        timeout_s: seconds that one ``call_many`` may take; a `Toolbox` has limits of its own.
    """

    def __init__(
        self,
        toolbox: AnswersMany,
        *,
        max_concurrent: int = 64,
        retries: int = 2,
        backoff_s: float = 0.05,
        cache_size: int = 4096,
        timeout_s: float = 30.0,
    ) -> None:
        if max_concurrent < 1 or retries < 0 or backoff_s < 0 or cache_size < 0 or timeout_s <= 0:
            raise ValueError(
                "max_concurrent must be at least 1, timeout_s above 0, and retries, backoff_s and "
                "cache_size at least 0"
            )
        self.toolbox = toolbox
        self.max_concurrent = max_concurrent
        self.retries = retries
        self.backoff_s = backoff_s
        self.cache_size = cache_size
        self.timeout_s = timeout_s
        self._later = cast(Toolbox, toolbox) if hasattr(toolbox, "ask_now") else None
        self._lock = threading.Lock()  # guards all that follows
        self._counts = {each.name: 0 for each in fields(ToolCallStats)}
        self._cache: OrderedDict[Hashable, Answer] = OrderedDict()
        self._open: dict[int, _Call] = {}  # by identity: those that have not been answered
        self._joinable: dict[Hashable, _Call] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._turns: asyncio.Semaphore | None = None
        self._closed = False

    def submit(self, texts: Sequence[str]) -> list[Future[Answer]]:
        """Ask what each text asks.

        Args:
            texts: one assistant's turn each, as for `Toolbox.call`.

        Returns:
            one future a text, in order; done already where the answer was at hand. Its result is an
            answer, whatever the tool does. Cancelling it ends the call if nobody else waits for it.

        Raises:
            RuntimeError: after `close`.
        """
        found: list[Answer | Question | str] = list(texts)
        attempts = [1 + self.retries] * len(found)
        if self._later is not None:
            found = [*self._later.ask_now(texts)]
            for place, each in enumerate(found):
                if isinstance(each, Answer) and each.failed and self.retries:  # ask in earnest
                    found[place] = self._later.question(texts[place]) or each
                    attempts[place] = self.retries
        futures: list[Future[Answer]] = []
        fresh: list[_Call] = []
        group = _Batch()
        with self._lock:
            if self._closed:
                raise RuntimeError("these ToolCalls are closed")
            self._counts["calls"] += len(found)
            for each, left in zip(found, attempts, strict=True):
                future: Future[Answer] = Future()
                futures.append(future)
                if isinstance(each, Answer):
                    self._counts["at_once"] += 1
                    self._counts["failed"] += each.failed
                    future.set_result(each)
                elif (answer := self._remembered(each)) is not None:
                    future.set_result(answer)
                else:
                    call = self._joinable.get(self._key(each))
                    if call is None:
                        call = self._new_call(each, left, group)
                        fresh.append(call)
                    else:
                        self._counts["joined"] += 1
                    call.waiters.append(future)
                    future.add_done_callback(partial(self._when_done, call))
            loop = self._running_loop() if fresh else None
        if loop is not None:
            batches = {id(call.batch): call.batch for call in fresh}
            self._soon(loop, self._start, list(batches.values()))
        return futures

    def stats(self) -> ToolCallStats:
        """The counts at this moment."""
        with self._lock:
            waiting = len(self._open) - self._counts["running"]
            return ToolCallStats(**{**self._counts, "waiting": waiting})

    def close(self) -> None:
        """End every call under way with an error answer, and the thread; the toolbox stays open."""
        with self._lock:
            self._closed = True
            loop, self._loop = self._loop, None
            calls = list(self._open.values())
        for call in calls:
            self._settle(call, error_answer("the tool was closed before it answered", failed=True))
        if loop is not None:
            stop_loop(loop)
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join(CLOSE_S)

    def __enter__(self) -> ToolCalls:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # In the caller's thread, under the lock.

    def _switch(self, question: Question | str, name: str) -> bool:
        if isinstance(question, Question):
            return bool(getattr(question.tool, name, True))
        return bool(getattr(self.toolbox, name, False))

    @staticmethod
    def _key(question: Question | str) -> Hashable:
        if isinstance(question, Question):
            return id(question.tool), question.query
        return question

    def _remembered(self, question: Question | str) -> Answer | None:
        key = self._key(question)
        answer = self._cache.get(key)
        if answer is not None:
            self._counts["cached"] += 1
            self._cache.move_to_end(key)
        return answer

    def _new_call(self, question: Question | str, attempts: int, group: _Batch) -> _Call:
        batch = group if isinstance(question, str) else _Batch()
        call = _Call(question, self._key(question), attempts, batch)
        batch.calls.append(call)
        self._open[id(call)] = call
        if self._switch(question, "joinable"):
            self._joinable[call.key] = call
        return call

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop, self._thread = start_loop("toolmem-calls")
            self._turns = asyncio.Semaphore(self.max_concurrent)
            weakref.finalize(self, stop_loop, self._loop)  # should nobody close it
        return self._loop

    # From any thread.

    def _soon(
        self, loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *args: Any
    ) -> None:
        try:
            loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # closed in this very moment, and every call answered
            return

    def _when_done(self, call: _Call, future: Future[Answer]) -> None:
        """Let a caller go that no longer waits, and the call with the last of them."""
        if not future.cancelled():
            return
        with self._lock:
            if future not in call.waiters:
                return
            call.waiters.remove(future)
            alone = not call.waiters
            if alone:
                self._forget(call)
                self._counts["cancelled"] += 1
            loop = self._loop
        future.set_running_or_notify_cancel()  # for those in concurrent.futures.wait
        if alone and loop is not None:
            self._soon(loop, self._drop, call)

    def _forget(self, call: _Call) -> None:
        self._open.pop(id(call), None)
        if self._joinable.get(call.key) is call:
            del self._joinable[call.key]

    def _settle(self, call: _Call, answer: Answer) -> None:
        """Hand an answer to all who wait for it."""
        with self._lock:
            if id(call) not in self._open:
                return
            self._forget(call)
            self._counts["failed"] += answer.failed
            if not answer.error and self._switch(call.question, "cacheable"):
                self._cache[call.key] = answer
                while len(self._cache) > self.cache_size:
                    self._cache.popitem(last=False)
            waiters, call.waiters = call.waiters, []
        for future in waiters:
            if future.set_running_or_notify_cancel():
                future.set_result(answer)

    # On the loop.

    def _start(self, batches: list[_Batch]) -> None:
        for batch in batches:
            if any(id(call) in self._open for call in batch.calls):
                batch.task = asyncio.get_running_loop().create_task(self._run(batch))

    def _drop(self, call: _Call) -> None:
        if call in call.batch.calls:
            call.batch.calls.remove(call)
        if not call.batch.calls and call.batch.task is not None:
            call.batch.task.cancel()

    async def _run(self, batch: _Batch) -> None:
        """Ask until each call of the batch has its answer."""
        pause = self.backoff_s
        while batch.calls:
            calls = list(batch.calls)
            answers = await self._attempt(calls)
            for call, answer in zip(calls, answers, strict=True):
                call.attempts -= 1
                if call in batch.calls and not (answer.failed and call.attempts > 0):
                    batch.calls.remove(call)
                    self._settle(call, answer)
            if batch.calls:
                with self._lock:
                    self._counts["retried"] += len(batch.calls)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause *= 2

    async def _attempt(self, calls: list[_Call]) -> list[Answer]:
        assert self._turns is not None
        async with self._turns:
            with self._lock:
                self._counts["running"] += len(calls)
            try:
                [*questions] = [call.question for call in calls]
                if self._later is not None and isinstance(questions[0], Question):
                    return [await self._later.ask(questions[0])]
                async with asyncio.timeout(self.timeout_s):
                    answers = await in_thread(self.toolbox.call_many, questions)
                return _checked(answers, len(calls))
            except TimeoutError:
                reason = f"the tool did not answer within {self.timeout_s:g} seconds"
                return [error_answer(reason, self.timeout_s, failed=True)] * len(calls)
            except BaseException as error:  # its kind only, and even SystemExit, as in `Toolbox`
                task = asyncio.current_task()
                if task is not None and task.cancelling():  # by `_drop` or `close`
                    raise
                reason = f"the tool failed ({type(error).__name__})"
                return [error_answer(reason, failed=True)] * len(calls)
            finally:
                with self._lock:
                    self._counts["running"] -= len(calls)


def _checked(answers: list[Answer], count: int) -> list[Answer]:
    if len(answers) != count or not all(isinstance(answer, Answer) for answer in answers):
        raise ValueError("call_many must give one Answer for each text")
    return answers
