"""Event loops and functions in daemon threads, which never keep the process from ending."""

from __future__ import annotations

import asyncio
import contextlib
import threading
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


def runs(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether a loop takes up work; waits up to `PING_S` to see it."""
    taken = threading.Event()
    try:
        loop.call_soon_threadsafe(taken.set)
    except RuntimeError:  # closed
        return False
    return taken.wait(PING_S)


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
