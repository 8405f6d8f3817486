"""Generation by processes of one machine: each takes every n-th prompt, its own engine and its own threads.

    prompts --every n-th--> rank: engine --a few dialogues at a time, by a pipe--> results, in order

A rank that dies costs the dialogues that it had not handed over. They come back with ``error`` as their
reason to finish, and what became of the rank. Ranks over several machines are ``parallel.py``'s.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from toolmem.class_path import allow_packages, allowed_packages
from toolmem.errors import ToolmemError
from toolmem.generation.parallel import own_places, parts_of
from toolmem.generation.reference import failed
from toolmem.generation.requests import Request

if TYPE_CHECKING:
    from toolmem.generation.engine import Engine
    from toolmem.generation.reference import Generated

MakeEngine = Callable[[int], "Engine"]  # from the rank; can be pickled
END_S = 5.0  # that a process gets to end by itself


class Ranks:
    """Processes that share requests out among them. One thread at a time; close it after use.

    Args:
        make_engine: called in each process with its rank; can be pickled.
        n: processes.
        threads: of torch's, for all of them together; as many as this process has when None.

    Raises:
        ToolmemError: for fewer than one.
    """

    def __init__(self, make_engine: MakeEngine, n: int, threads: int | None = None) -> None:
        if n < 1:
            raise ToolmemError(f"ranks is {n}: it must be at least 1")
        context = multiprocessing.get_context("spawn")  # threads do not live through a fork
        total = torch.get_num_threads() if threads is None else threads
        self._workers: list[_Worker] = []
        try:
            for rank in range(n):
                here, there = context.Pipe()
                share = max(1, total // n + (rank < total % n))
                process = context.Process(
                    target=_work,
                    args=(there, make_engine, rank, share, allowed_packages()),
                    name=f"toolmem-rank-{rank}",
                    daemon=True,
                )
                process.start()
                there.close()  # so that its end is seen here
                self._workers.append(_Worker(rank, process, here))
        except BaseException:
            self.close()
            raise

    def each(self, requests: Sequence[Request]) -> Iterator[Generated]:
        """Bring requests to their end and yield the results in order.

        Args:
            requests: with seeds of their own: the results are those of one process.

        Raises:
            ToolmemError: when no process is left.
        """
        workers = [worker for worker in self._workers if worker.fate is None]
        if not workers:
            why = self._workers[0].fate if self._workers else "they were closed"
            raise ToolmemError(f"no rank is left to generate: {why}")
        for at, worker in enumerate(workers):
            places = own_places(at, len(workers), len(requests))
            worker.send([(place, requests[place]) for place in places])
        found: dict[int, Generated] = {}
        over = False
        try:
            for place, request in enumerate(requests):
                worker = workers[place % len(workers)]
                while place not in found and worker.fate is None:
                    found.update(worker.receive())
                if place in found:
                    yield found.pop(place)
                else:
                    yield failed(request.prompt, f"rank {worker.rank} {worker.fate}")
            over = True
        finally:
            if not over:  # what they still write nobody waits for
                self.close()

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            if worker.busy:
                worker.process.terminate()
            worker.process.join(END_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Worker:
    """The other side of a process."""

    def __init__(
        self, rank: int, process: multiprocessing.process.BaseProcess, connection: Connection
    ) -> None:
        self.rank = rank
        self.process = process
        self.connection = connection
        self.fate: str | None = None  # what became of it, once it is no more
        self._owed = 0

    @property
    def busy(self) -> bool:
        return self._owed > 0

    def send(self, own: list[tuple[int, Request]]) -> None:
        """Ask for dialogues."""
        self._owed = len(own)
        try:
            self.connection.send(own)
        except OSError:
            self._die()

    def receive(self) -> list[tuple[int, Generated]]:
        """Wait for the next few; none when it has died."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self._die()
            return []
        if isinstance(message, str):
            self.fate = message
            return []
        self._owed -= len(message)
        return list(message)

    def _die(self) -> None:
        self.process.join(END_S)
        code = self.process.exitcode
        if code is not None and code < 0:
            self.fate = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        else:
            self.fate = f"ended by itself (exit code {code})"


def _work(
    connection: Connection,
    make_engine: MakeEngine,
    rank: int,
    threads: int,
    packages: tuple[str, ...],
) -> None:
    """A rank's process: it ends when nobody is at the other end."""
    allow_packages(*packages)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started it
    torch.set_num_threads(threads)
    try:
        with make_engine(rank) as engine:
            while True:
                own = connection.recv()
                for part in parts_of(engine, own):
                    connection.send(part)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        kind = "" if isinstance(error, ToolmemError) else f"{type(error).__name__}: "
        with contextlib.suppress(OSError):
            connection.send(f"failed: {kind}{error}")
