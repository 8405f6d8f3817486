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
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

from toolmem.tools.base import GRACE_S, Answer, Question, Toolbox, error_answer
from toolmem.tools.threads import WatchedLoop, in_thread

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
    running: bool = False


class _Worker(WatchedLoop):
    """The event loop that calls are made on; left behind when a tool holds it up."""

    def __init__(self, owner: ToolCalls) -> None:
        patience_s = getattr(owner.toolbox, "timeout_s", owner.timeout_s) + GRACE_S
        super().__init__("toolmem-calls", patience_s, owner._leave)
        self.turns = asyncio.Semaphore(owner.max_concurrent)
        self.batches: dict[_Batch, None] = {}  # those that are not at their end, oldest first
        self.running = 0  # calls


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
        self._worker: _Worker | None = None
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
            if fresh:
                self._start(list(dict.fromkeys(call.batch for call in fresh)))
        return futures

    def stats(self) -> ToolCallStats:
        """The counts at this moment."""
        with self._lock:
            running = self._worker.running if self._worker is not None else 0
            waiting = max(0, len(self._open) - running)
            return ToolCallStats(**{**self._counts, "running": running, "waiting": waiting})

    def close(self) -> None:
        """End every call under way with an error answer, and the thread; the toolbox stays open."""
        with self._lock:
            self._closed = True
            worker, self._worker = self._worker, None
            calls = list(self._open.values())
        for call in calls:
            self._settle(call, error_answer("the tool was closed before it answered", failed=True))
        if worker is not None:
            worker.stop()
            worker.join(CLOSE_S)

    def __enter__(self) -> ToolCalls:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Under the lock, in any thread.

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

    def _start(self, batches: list[_Batch]) -> None:
        if self._worker is None:
            self._worker = _Worker(self)
        self._worker.batches |= dict.fromkeys(batches)
        self._worker.soon(self._make_tasks, self._worker, batches)

    # Without the lock, in any thread.

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
            worker = self._worker
        future.set_running_or_notify_cancel()  # for those in concurrent.futures.wait
        if alone and worker is not None:
            worker.soon(self._drop, call)

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

    def _leave(self, worker: WatchedLoop) -> None:
        """Go on with a new worker where a tool blocks the loop of this one."""
        assert isinstance(worker, _Worker)
        guilty = self._later.blame(worker.loop) if self._later is not None else None
        if guilty is None:  # not blocked: the machine is slow
            return
        lost: list[_Call] = []
        with self._lock:
            if self._worker is not worker:
                return
            self._worker = None
            again: list[_Batch] = []
            known = any(batch.task is guilty for batch in worker.batches)
            for old in list(worker.batches):
                calls = [call for call in old.calls if id(call) in self._open]
                if old.task is guilty or (old.running and not known):
                    for call in calls:
                        call.attempts -= 1
                    lost += [call for call in calls if call.attempts <= 0]
                    calls = [call for call in calls if call.attempts > 0]
                    self._counts["retried"] += len(calls)
                new = _Batch(calls)
                for call in calls:
                    call.batch = new
                if calls:
                    again.append(new)
            if again:
                self._start(again)
        worker.stop()
        for call in lost:
            self._settle(call, self._too_late())

    def _too_late(self) -> Answer:
        seconds = getattr(self.toolbox, "timeout_s", self.timeout_s)
        reason = f"the tool did not answer within {seconds:g} seconds"
        return error_answer(reason, seconds, failed=True)

    # On the worker's loop.

    def _make_tasks(self, worker: _Worker, batches: list[_Batch]) -> None:
        for batch in batches:
            batch.task = worker.loop.create_task(self._run(worker, batch))

    def _drop(self, call: _Call) -> None:
        batch = call.batch
        if call in batch.calls:
            batch.calls.remove(call)
        if not batch.calls and batch.task is not None:
            batch.task.cancel()

    async def _run(self, worker: _Worker, batch: _Batch) -> None:
        """Ask until each call of the batch has its answer."""
        pause = self.backoff_s
        try:
            while batch.calls:
                calls = list(batch.calls)
                answers = await self._attempt(worker, batch, calls)
                if worker is not self._worker:
                    return  # left behind: its calls are made again elsewhere
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
        finally:
            worker.batches.pop(batch, None)

    async def _attempt(self, worker: _Worker, batch: _Batch, calls: list[_Call]) -> list[Answer]:
        async with worker.turns:
            batch.running = True
            worker.running += len(calls)
            try:
                questions = [call.question for call in calls]
                if self._later is not None and isinstance(questions[0], Question):
                    return [await self._later.ask(questions[0])]
                async with asyncio.timeout(self.timeout_s):
                    answers = await in_thread(self.toolbox.call_many, questions)
                return _checked(answers, len(calls))
            except TimeoutError:
                return [self._too_late()] * len(calls)
            except BaseException as error:  # its kind only, and even SystemExit, as in `Toolbox`
                task = asyncio.current_task()
                if task is not None and task.cancelling():  # by `_drop` or `close`
                    raise
                reason = f"the tool failed ({type(error).__name__})"
                return [error_answer(reason, failed=True)] * len(calls)
            finally:
                batch.running = False
                worker.running -= len(calls)


def _checked(answers: list[Answer], count: int) -> list[Answer]:
    if len(answers) != count or not all(isinstance(answer, Answer) for answer in answers):
        raise ValueError("call_many must give one Answer for each text")
    return answers
