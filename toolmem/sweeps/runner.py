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
from toolmem.sweeps.outcome import result_row
from toolmem.sweeps.plans import Job, Plan
from toolmem.sweeps.recipe import SweepRecipe
from toolmem.sweeps.workers import Worker, share_cores

ATTEMPTS = 3  # processes that a run may bring down before it counts as failed
LOOK = 0.5  # seconds between two looks at the workers


@dataclass
class State:
    """How far a sweep is.

    Args:
        done: runs of the recipe that are done.
        failed: that have failed.
        to_go: trainings that are left; of a search about so many.
        running: of each run that a worker is at, when it began (``time.monotonic``).
        seconds: that each training took which was done here.
        workers: processes.
        summary: what the plan says of itself.
    """

    done: int = 0
    failed: int = 0
    to_go: int = 0
    running: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    workers: int = 1
    summary: str = ""


class SweepRunner:
    """Runs a sweep in worker processes; this process alone writes results.

    Args:
        sweep: the recipe.
        plan: says which runs are to be trained, by the results so far.
        folder: the sweep's.
        command: what starts a worker (see ``toolmem.cli.sweep_worker``).
        workers: how many processes.
    """

    def __init__(
        self,
        sweep: SweepRecipe,
        plan: Plan,
        folder: SweepFolder,
        command: Sequence[str],
        workers: int,
    ) -> None:
        if workers < 1:
            raise ToolmemError(f"--workers {workers}: it must be at least 1")
        self.sweep = sweep
        self.plan = plan
        self.folder = folder
        self.command = command
        self.n_workers = workers
        self.rows: dict[str, dict[str, Any]] = {}
        self.state = State()
        self._dropped: set[str] = set()
        self._finished: queue.SimpleQueue[tuple[_Seat, BaseException | None]] = queue.SimpleQueue()
        self._stopping = threading.Event()

    def take_stock(self, retry_failed: bool = False) -> list[Job]:
        """Take up results that a killed sweep left, and say which runs are to be trained first.

        Args:
            retry_failed: also those that have failed, from their start.

        Raises:
            ToolmemError: when the results are of another sweep.
        """
        self.rows = self.check_folder()
        left = []
        for row in self.folder.left_results():
            known = self.rows.get(row["name"])
            if known is None or (known["status"], known["finished"]) != (
                row["status"],
                row["finished"],
            ):
                left.append(row)
        self.rows.update({row["name"]: row for row in left})
        if retry_failed:
            for row in self.plan.mine(self.rows):
                if row["status"] == "failed":
                    self.folder.forget(row["name"])
                    del self.rows[row["name"]]
        self._keep([row for row in left if row["name"] in self.rows])
        return self.plan.wanted(self.rows)

    def check_folder(self) -> dict[str, dict[str, Any]]:
        """The results that are there, by run. The recipe may have changed, but runs of other axes alone
        are another sweep's.

        Raises:
            ToolmemError: when they are.
        """
        rows = {row["name"]: row for row in self.folder.results.rows()}
        axes = {axis.name for axis in self.sweep.varying}
        others = {tuple(row["settings"]) for row in rows.values()}
        if others and axes not in map(set, others):
            raise ToolmemError(
                f"{self.folder.path} holds results of another sweep, with the axes "
                f"{', '.join(min(others, key=repr))}; this one's are {', '.join(sorted(axes))}: name "
                "another --out"
            )
        return rows

    def run(self, lock: int, watch: Callable[[State], None]) -> None:
        """Train what the plan wants until it wants nothing, several runs at a time.

        Args:
            lock: the folder's lock.
            watch: called with the state now and then.
        """
        wanted = self.plan.wanted(self.rows)
        if not wanted:
            return
        cores = share_cores(min(self.n_workers, len(wanted)))
        self.state.workers = len(cores)
        seats = [
            _Seat(Worker(self.command, mine, lock, self.folder.path / f"worker_{index}.log"))
            for index, mine in enumerate(cores)
        ]
        for seat in seats:
            seat.thread = threading.Thread(target=self._serve, args=(seat,), daemon=True)
            seat.thread.start()
        try:
            while self._give_out(seats):
                self._take_next(watch)
        finally:
            self._stopping.set()
            for seat in seats:
                seat.orders.put(None)
                seat.worker.stop()
            for seat in seats:
                assert seat.thread is not None
                seat.thread.join(timeout=10)

    def _give_out(self, seats: Sequence[_Seat]) -> bool:
        """Give every idle worker a run; False when nothing is left to wait for."""
        for job in self.plan.wanted(self.rows):
            if job.run.name in self.state.running:
                continue
            idle = next((seat for seat in seats if seat.job is None), None)
            if idle is None:
                break
            idle.job = job
            self.state.running[job.run.name] = time.monotonic()
            idle.orders.put(job)
        return bool(self.state.running)

    def _take_next(self, watch: Callable[[State], None]) -> None:
        """Wait until a run has ended, and keep its result."""
        while True:
            watch(self.state)
            try:
                seat, error = self._finished.get(timeout=LOOK)
            except queue.Empty:
                continue
            break
        if error is not None:
            raise error
        assert seat.job is not None
        name = seat.job.run.name
        row = self.folder.result(name)
        assert row is not None
        self.state.seconds.append(time.monotonic() - self.state.running.pop(name))
        seat.job = None
        self._keep([row])
        watch(self.state)

    def _keep(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows down, drop checkpoints that nothing needs any more, and take count."""
        self.rows.update({row["name"]: row for row in rows})
        self.folder.results.write(rows)
        answers = getattr(self.plan, "answers", None)
        if answers is not None:
            self.folder.results.write(answers(self.rows), "searches")
        mine = self.plan.mine(self.rows)
        if not self.sweep.keep_checkpoints:
            keeps = self.plan.keeps(self.rows) | set(self.state.running)
            for row in mine:
                if row["name"] not in keeps | self._dropped:
                    self.folder.drop_checkpoints(row["name"])
                    self._dropped.add(row["name"])
        self.state.failed = sum(row["status"] == "failed" for row in mine)
        self.state.done = len(mine) - self.state.failed
        self.state.to_go = self.plan.to_go(self.rows)
        self.state.summary = self.plan.summary(self.rows)

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
        run = job.run
        words: dict[str, Any] = {
            "name": run.name,
            "settings": run.settings,
            "seed": run.seed,
            "recipe": run.recipe,
            "metrics": self.sweep.metrics,
            "runs": str(self.folder.runs),
        }
        if job.until is not None:
            words["until"] = job.until
        if job.judged is not None:
            words["judged"] = job.judged
        began = time.time()
        code: int | None = None
        for _ in range(ATTEMPTS):
            code = worker.do(words)
            if code is None or self._stopping.is_set():
                return
            if job.is_done_by(self.folder.result(run.name)):
                return  # it died between result and answer
        row = result_row(
            words,
            seconds=time.time() - began,
            threads=len(worker.cores),
            error=f"its process ended {ATTEMPTS} times, the last {_ending(code)}: see {worker.log.name} "
            "and the run's log.txt",
        )
        write_json(self.folder.runs / run.name / "result.json", row)


class _Seat:
    """A worker with the thread that serves it.

    Args:
        worker: the process.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.orders: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.job: Job | None = None
        self.thread: threading.Thread | None = None


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"with exit code {code}"
