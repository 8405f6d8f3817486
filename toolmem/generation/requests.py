"""What is asked of the engine, and what comes back: requests, handles, events."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from toolmem.errors import ToolmemError
from toolmem.generation.reference import Generated
from toolmem.generation.sampling import Greedy, Sampler

if TYPE_CHECKING:
    from toolmem.generation.paging import Branch


class EngineFull(ToolmemError):  # noqa: N818 - named for what the caller sees
    """As many requests wait as may: ask again when some have finished."""


class Event(NamedTuple):
    """One new token of a dialogue.

    Args:
        token: its id.
        role: its role code.
        log_prob: the model's own, of a token that it wrote (nats); nan for a tool's.
    """

    token: int
    role: int
    log_prob: float = math.nan


@dataclass(frozen=True)
class Request:
    """A dialogue to go on with.

    Args:
        prompt: token ids, ending where the assistant begins to speak.
        max_new_tokens: tokens that the model may write.
        max_tool_calls: calls that it may make.
        max_seconds: wall time from its submission, waiting included; None for no limit.
        sampler: how tokens are chosen; greedily by default.
        seed: of the samples; they depend on nothing else.
        stop_tokens: ids; the dialogue stops behind the first that the model writes.
        stop_strings: the same for text in what the assistant says in one turn.
        use_tools: whether its queries are answered; else the first one finishes it (``tool_calls``).

    Raises:
        ToolmemError: for a limit that makes no sense.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    max_tool_calls: int = 4
    max_seconds: float | None = None
    sampler: Sampler = field(default_factory=Greedy)
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    use_tools: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0 or self.max_tool_calls < 0:
            raise ToolmemError("max_new_tokens and max_tool_calls must be 0 or above")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ToolmemError(f"max_seconds is {self.max_seconds}: it must be above 0")
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ToolmemError("stop_strings must be a tuple of strings that are not empty")


class Handle:
    """A request under way: iterate over its events (``for`` or ``async for``), or wait for its result.

    Args:
        request: what was asked.
        cancel: tells the engine that nobody wants it any more.
        listening: keep events; else only the result is kept.
        changed: shared with other handles, where one thread waits for all; one of its own when None.
    """

    branch: Branch | None = None  # what the engine was asked to keep of it

    def __init__(
        self,
        request: Request,
        cancel: Callable[[Handle], None],
        listening: bool = True,
        changed: threading.Condition | None = None,
    ) -> None:
        self.request = request
        self.listening = listening
        self.submitted = time.perf_counter()
        self.first_token_s: float | None = None  # seconds to the first token
        self._cancel = cancel
        self._changed = changed or threading.Condition()
        self._events: deque[Event] = deque()
        self._result: Generated | None = None
        self._error: BaseException | None = None
        self._wakers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def done(self) -> bool:
        """Whether it has come to its end."""
        return self._result is not None or self._error is not None

    def cancel(self) -> None:
        """Stop; the result has what was written until then, and ``cancelled`` as its reason."""
        if not self.done:
            self._cancel(self)

    def result(self, timeout: float | None = None) -> Generated:
        """Wait for the whole dialogue.

        Args:
            timeout: seconds; None to wait for as long as it takes.

        Raises:
            TimeoutError: when it is not there by then; it goes on.
            ToolmemError: when the engine failed, or was closed.
            Exception: what its own sampler, constraint or tool's answer raised.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"no result within {timeout} seconds")
        return self._outcome()

    async def wait(self) -> Generated:
        """``result``, for coroutines; cancelling the coroutine cancels the request."""
        try:
            while not self.done:
                await self._change()
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._outcome()

    def _outcome(self) -> Generated:
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    @property
    def failed(self) -> bool:
        """Whether it ended by something of its own that failed."""
        return self._result is not None and self._error is not None

    def dialogue(self) -> Generated:
        """What became of a request that is done, one that failed by something of its own as well.

        Raises:
            ToolmemError: when the engine failed, or was closed.
        """
        return self._outcome() if self._result is None else self._result

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self.done)
                events = list(self._events)
                self._events.clear()
            if not events:
                self._outcome()
                return
            yield from events

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while True:
                while self._events:
                    yield self._events.popleft()
                if self.done and not self._events:
                    self._outcome()
                    return
                await self._change()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancel()
            raise

    async def _change(self) -> None:
        """Wait until there is an event, or the end."""
        loop = asyncio.get_running_loop()
        with self._changed:
            if self._events or self.done:
                return
            future: asyncio.Future[None] = loop.create_future()
            self._wakers.append((loop, future))
        await future

    # The engine's side

    def tell(self, events: Sequence[Event]) -> None:
        """Hand out new tokens."""
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.submitted
        with self._changed:
            if self.listening:
                self._events.extend(events)
            self._wake()

    def finish(self, result: Generated | BaseException, error: Exception | None = None) -> None:
        """Hand out the end.

        Args:
            result: the dialogue, or what ended the engine's work.
            error: what failed of the dialogue's own.
        """
        with self._changed:
            if isinstance(result, Generated):
                self._result, self._error = result, error
            else:
                self._error = result
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        wakers, self._wakers = self._wakers, []
        for loop, future in wakers:
            with contextlib.suppress(RuntimeError):  # that loop has closed
                loop.call_soon_threadsafe(_set, future)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
