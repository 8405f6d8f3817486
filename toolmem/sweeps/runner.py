"""Trains the runs of a sweep that have no result yet, several at a time."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.files import write_json
from toolmem.sweeps.folder import SweepFolder
from toolmem.sweeps.grid import Planned
from toolmem.sweeps.outcome import result_row
from toolmem.sweeps.recipe import SweepRecipe
from toolmem.sweeps.workers import Worker, share_cores

ATTEMPTS = 3  # processes that a run may bring down before it counts as failed
LOOK = 0.5  # seconds between two looks at the workers


@dataclass
class State:
    """How far a sweep is.

    Args:
        total: runs of the recipe.
        done: of them, done.
        failed: of them, failed.
        running: names of those that a worker is at.
        seconds: that each run took which was done here.
        workers: processes.
    """

    total: int
    done: int = 0
    failed: int = 0
    running: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    workers: int = 1

    @property
    def to_go(self) -> int:
        """Runs that have no result."""
        return self.total - self.done - self.failed


class SweepRunner:
    """Runs a sweep in worker processes; this process alone writes results.

    Args:
        sweep: the recipe.
        runs: of its grid.
        folder: the sweep's.
        command: what starts a worker (see ``toolmem.cli.sweep_worker``).
        workers: how many processes.
    """

    def __init__(
        self,
        sweep: SweepRecipe,
        runs: Sequence[Planned],
        folder: SweepFolder,
        command: Sequence[str],
        workers: int,
    ) -> None:
        if workers < 1:
            raise ToolmemError(f"--workers {workers}: it must be at least 1")
        self.sweep = sweep
        self.planned = {run.name: run for run in runs}
        self.folder = folder
        self.command = command
        self.n_workers = workers
        self.state = State(len(runs))
        self._waiting: queue.SimpleQueue[Planned] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[str | BaseException] = queue.SimpleQueue()
        self._stopping = threading.Event()

    def take_stock(self, retry_failed: bool = False) -> list[Planned]:
        """Take up results that a killed sweep left, and say which runs are to be trained.

        Args:
            retry_failed: also those that have failed, from their start.
        """
        known = self.folder.results.status()
        left: list[dict[str, Any]] = []
        todo: list[Planned] = []
        for name, run in self.planned.items():
            row = self.folder.result(name)
            status = row["status"] if row is not None else known.get(name)
            if status == "failed" and retry_failed:
                self.folder.forget(name)
                status = None
            if status is None:
                todo.append(run)
                continue
            if row is not None and known.get(name) != status:
                left.append(row)
            self._count(status, +1)
        self._keep(left)
        return todo

    def run(self, todo: Sequence[Planned], lock: int, watch: Callable[[State], None]) -> None:
        """Train runs, several at a time.

        Args:
            todo: the runs.
            lock: the folder's lock.
            watch: called with the state now and then.
        """
        if not todo:
            return
        for run in todo:
            self._waiting.put(run)
        cores = share_cores(min(self.n_workers, len(todo)))
        self.state.workers = len(cores)
        workers = [
            Worker(self.command, mine, lock, self.folder.path / f"worker_{index}.log")
            for index, mine in enumerate(cores)
        ]
        threads = [threading.Thread(target=self._serve, args=(w,), daemon=True) for w in workers]
        try:
            for thread in threads:
                thread.start()
            for _ in todo:
                self._take_next(watch)
        finally:
            self._stopping.set()
            for worker in workers:
                worker.stop()
            for thread in threads:
                thread.join(timeout=10)

    def _take_next(self, watch: Callable[[State], None]) -> None:
        while True:
            watch(self.state)
            try:
                found = self._finished.get(timeout=LOOK)
            except queue.Empty:
                continue
            if isinstance(found, BaseException):
                raise found
            row = self.folder.result(found)
            assert row is not None
            self._keep([row])
            self._count(row["status"], +1)
            self.state.seconds[found] = row["seconds"]
            watch(self.state)
            return

    def _count(self, status: str, by: int) -> None:
        if status == "done":
            self.state.done += by
        else:
            self.state.failed += by

    def _keep(self, rows: Sequence[dict[str, Any]]) -> None:
        self.folder.results.write(rows)
        for row in rows:
            if not self.sweep.keep_checkpoints:
                self.folder.drop_checkpoints(row["name"])

    def _serve(self, worker: Worker) -> None:
        """Give a worker one run after another; in a thread of its own."""
        try:
            while not self._stopping.is_set():
                try:
                    run = self._waiting.get_nowait()
                except queue.Empty:
                    return
                self.state.running.append(run.name)
                self._train(worker, run)
                self.state.running.remove(run.name)
                if not self._stopping.is_set():
                    self._finished.put(run.name)
        except BaseException as error:
            self._finished.put(error)

    def _train(self, worker: Worker, run: Planned) -> None:
        job = {
            "name": run.name,
            "settings": run.settings,
            "seed": run.seed,
            "recipe": run.recipe,
            "metrics": self.sweep.metrics,
            "runs": str(self.folder.runs),
        }
        began = time.time()
        code: int | None = None
        for _ in range(ATTEMPTS):
            code = worker.do(job)
            if code is None or self._stopping.is_set():
                return
            if self.folder.result(run.name) is not None:  # it died between result and answer
                return
        row = result_row(
            job,
            seconds=time.time() - began,
            threads=len(worker.cores),
            error=f"its process ended {ATTEMPTS} times, the last {_ending(code)}: see {worker.log.name} "
            "and the run's log.txt",
        )
        write_json(self.folder.runs / run.name / "result.json", row)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"with exit code {code}"
