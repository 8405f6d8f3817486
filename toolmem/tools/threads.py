"""Event loops and functions in daemon threads, which never keep the process from ending."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
PING_S = 0.1  # how long a loop may take to show that it still runs


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


def start_loop(name: str) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """A new event loop that runs in a daemon thread until `stop_loop`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_serve, args=(loop,), name=name, daemon=True)
    thread.start()
    return loop, thread


def stop_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what runs on a loop of `start_loop` and end its thread, without waiting for it."""
    with contextlib.suppress(RuntimeError):  # it has closed by itself
        loop.call_soon_threadsafe(loop.stop)


def runs(loop: asyncio.AbstractEventLoop, patience_s: float = PING_S) -> bool:
    """Whether a loop takes up work within some seconds."""
    taken = threading.Event()
    try:
        loop.call_soon_threadsafe(taken.set)
    except RuntimeError:  # closed
        return False
    return taken.wait(patience_s)


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


class WatchedLoop:
    """An event loop in a daemon thread, and a second thread that tells when the first is held up.

    Args:
        name: of the thread.
        patience_s: seconds of standing still after which ``when_held_up`` is called.
        when_held_up: a method, called in the second thread with this object; not kept alive by it.
            The loop is stopped when the method's object is gone.
    """

    def __init__(
        self, name: str, patience_s: float, when_held_up: Callable[[WatchedLoop], None]
    ) -> None:
        self.loop, self.thread = start_loop(name)
        self.patience_s = patience_s
        self._stopped = threading.Event()
        self._when_held_up = weakref.WeakMethod(when_held_up, lambda _: self.stop())
        threading.Thread(target=self._watch, name=f"{name}-watch", daemon=True).start()

    def soon(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function on the loop; nothing happens once it is stopped."""
        with contextlib.suppress(RuntimeError):  # closed
            self.loop.call_soon_threadsafe(function, *args)

    def stop(self) -> None:
        """Cancel what runs on the loop and end both threads, without waiting for them."""
        self._stopped.set()
        stop_loop(self.loop)

    def join(self, seconds: float) -> None:
        """After `stop`: wait for the loop's end, but not for one that is held up."""
        if self.thread is not threading.current_thread() and runs(self.loop):
            self.thread.join(seconds)

    def _watch(self) -> None:
        while not self._stopped.wait(self.patience_s / 4):
            if not runs(self.loop, self.patience_s):
                method = self._when_held_up()
                if method is not None:
                    method(self)
                del method
