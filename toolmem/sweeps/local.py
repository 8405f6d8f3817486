"""Trains runs in processes of this machine, each pinned to its share of the cores."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Sequence

from toolmem.errors import ToolmemError
from toolmem.sweeps.folder import SweepFolder
from toolmem.sweeps.outcome import write_failure
from toolmem.sweeps.plans import Job
from toolmem.sweeps.recipe import SweepRecipe
from toolmem.sweeps.workers import Worker, share_cores

ATTEMPTS = 3  # processes that a run may bring down before it counts as failed


class LocalExecutor:
    """Worker processes, each served by a thread; one run at a time each. They end with this process.

    Args:
        sweep: the recipe.
        folder: the sweep's.
        command: what starts a worker (see ``toolmem.cli.sweep_worker``).
        workers: how many processes.

    Raises:
        ToolmemError: for less than one.
    """

    ahead = True  # by workers that find nothing else to do

    def __init__(
        self, sweep: SweepRecipe, folder: SweepFolder, command: Sequence[str], workers: int
    ) -> None:
        if workers < 1:
            raise ToolmemError(f"--workers {workers}: it must be at least 1")
        self.sweep = sweep
        self.folder = folder
        self.command = command
        self.n_workers = workers
        self._seats: list[_Seat] = []
        self._finished: queue.SimpleQueue[tuple[_Seat, BaseException | None]] = queue.SimpleQueue()
        self._stopping = threading.Event()

    def open(self, wanted: Sequence[Job], lock: int) -> None:
        """Start a thread a worker; processes start when they are given a run.

        Args:
            wanted: of which there may be fewer than workers.
            lock: that workers keep while they live, so that the next sweep waits for those of one killed.
        """
        for index, cores in enumerate(share_cores(min(self.n_workers, len(wanted)))):
            log = self.folder.path / f"worker_{index}.log"
            seat = _Seat(Worker(self.command, cores, lock, log))
            seat.thread = threading.Thread(target=self._serve, args=(seat,), daemon=True)
            seat.thread.start()
            self._seats.append(seat)

    def free(self) -> int:
        """Workers without a run."""
        return sum(seat.job is None for seat in self._seats)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Give idle workers a run each."""
        idle = [seat for seat in self._seats if seat.job is None]
        for seat, job in zip(idle, jobs, strict=False):
            seat.job = job
            seat.since = time.monotonic()
            seat.orders.put(job)

    def busy(self) -> set[str]:
        """Those that workers are at."""
        return set(self.running())

    def running(self) -> dict[str, float]:
        """Those that workers are at, and since when."""
        return {seat.job.run.name: seat.since for seat in self._seats if seat.job is not None}

    def places(self) -> int:
        """The workers."""
        return len(self._seats)

    def wait(self, timeout: float) -> list[str]:
        """Wait until a run has ended.

        Raises:
            BaseException: what a worker's thread raised.
        """
        try:
            seat, error = self._finished.get(timeout=timeout)
        except queue.Empty:
            return []
        if error is not None:
            raise error
        assert seat.job is not None
        name = seat.job.run.name
        seat.job = None
        return [name]

    def note(self) -> str:
        """Nothing."""
        return ""

    def close(self) -> None:
        """Let the workers end, whatever they do."""
        self._stopping.set()
        for seat in self._seats:
            seat.orders.put(None)
            seat.worker.stop()
        for seat in self._seats:
            assert seat.thread is not None
            seat.thread.join(timeout=10)

    def left(self) -> str:
        """Nothing: no worker is."""
        return ""

    def _serve(self, seat: _Seat) -> None:
        """Have a worker train one run after another; in a thread of its own."""
        try:
            while (job := seat.orders.get()) is not None:
                self._train(seat.worker, job)
                if self._stopping.is_set():
                    return
                self._finished.put((seat, None))
        except BaseException as error:
            self._finished.put((seat, error))

    def _train(self, worker: Worker, job: Job) -> None:
        words = job.words(self.sweep.metrics, self.folder.runs)
        began = time.time()
        code: int | None = None
        for _ in range(ATTEMPTS):
            code = worker.do(words)
            if code is None or self._stopping.is_set():
                return
            if job.is_done_by(self.folder.result(job.run.name)):
                return  # it died between result and answer
        write_failure(
            words,
            seconds=time.time() - began,
            threads=len(worker.cores),
            error=f"its process ended {ATTEMPTS} times, the last {_ending(code)}: see {worker.log.name} "
            "and the run's log.txt",
        )


class _Seat:
    """A worker with the thread that serves it.

    Args:
        worker: the process.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.orders: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.job: Job | None = None
        self.since = 0.0
        self.thread: threading.Thread | None = None


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"with exit code {code}"
