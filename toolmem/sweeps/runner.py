"""Trains the runs of a sweep that have no result yet, several at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.sweeps.executors import Executor
from toolmem.sweeps.folder import SweepFolder
from toolmem.sweeps.plans import Job, Plan
from toolmem.sweeps.recipe import SweepRecipe

LOOK = 0.5  # seconds after which the state is shown again


@dataclass
class State:
    """How far a sweep is.

    Args:
        done: runs of the recipe that are done.
        failed: that have failed.
        to_go: trainings that are left; of a search about so many.
        running: of each run that is being trained, when it began (``time.monotonic``).
        seconds: that each training took which was done meanwhile.
        places: how many are trained at a time.
        summary: what the plan says of itself.
        note: what the executor does.
    """

    done: int = 0
    failed: int = 0
    to_go: int = 0
    running: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    places: int = 1
    summary: str = ""
    note: str = ""


class SweepRunner:
    """Runs a sweep; this process alone writes results.

    Args:
        sweep: the recipe.
        plan: says which runs are to be trained, by the results so far.
        folder: the sweep's.
    """

    def __init__(self, sweep: SweepRecipe, plan: Plan, folder: SweepFolder) -> None:
        self.sweep = sweep
        self.plan = plan
        self.folder = folder
        self.rows: dict[str, dict[str, Any]] = {}
        self.state = State()
        self._busy: set[str] = set()
        self._dropped: set[str] = set()

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

    def run(self, executor: Executor, lock: int, watch: Callable[[State], None]) -> None:
        """Have trained what the plan wants until it wants nothing.

        Args:
            executor: where.
            lock: the folder's lock.
            watch: called with the state now and then.
        """
        wanted = self.plan.wanted(self.rows)
        if not wanted:
            return
        try:
            executor.open(wanted, lock)
            while self._hand_over(executor):
                self._take_next(executor, watch)
        finally:
            executor.close()

    def _hand_over(self, executor: Executor) -> bool:
        """Hand over as many runs as are taken; False when nothing is left to wait for."""
        busy = executor.busy()
        jobs = [
            job for job in self.plan.wanted(self.rows)
            if job.run.name not in busy and (executor.ahead or not job.ahead)
        ][: executor.free()]  # fmt: skip
        if jobs:
            executor.submit(jobs)
        self._busy = executor.busy()
        return bool(self._busy)

    def _take_next(self, executor: Executor, watch: Callable[[State], None]) -> None:
        """Wait until runs have ended, and keep their results."""
        names: list[str] = []
        while not names:
            self.state.running = executor.running()
            self.state.places = max(1, executor.places())
            self.state.note = executor.note()
            watch(self.state)
            names = executor.wait(LOOK)
        rows = []
        for name in names:
            if (since := self.state.running.pop(name, None)) is not None:
                self.state.seconds.append(time.monotonic() - since)
            if (row := self.folder.result(name)) is not None:
                rows.append(row)
        self._busy = executor.busy()
        self._keep(rows)
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
            keeps = self.plan.keeps(self.rows) | self._busy
            for row in mine:
                if row["name"] not in keeps | self._dropped:
                    self.folder.drop_checkpoints(row["name"])
                    self._dropped.add(row["name"])
        self.state.failed = sum(row["status"] == "failed" for row in mine)
        self.state.done = len(mine) - self.state.failed
        self.state.to_go = self.plan.to_go(self.rows)
        self.state.summary = self.plan.summary(self.rows)
