"""Trains runs as jobs of Slurm, by submitit: an array of all that is wanted at once, a job a run.

This process waits for their ``result.json``, and asks Slurm for jobs that ended without one. Jobs outlive it:
the next sweep of the folder finds them by ``slurm/jobs.json``.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.errors import ToolmemError
from toolmem.files import atomic_path
from toolmem.sweeps.folder import SweepFolder
from toolmem.sweeps.outcome import seconds_spent, write_failure
from toolmem.sweeps.plans import Job, is_trained
from toolmem.sweeps.recipe import SweepRecipe
from toolmem.sweeps.slurm_ends import last_line, told, why_hopeless
from toolmem.sweeps.slurm_jobs import Batch, JobsFile
from toolmem.sweeps.slurm_options import SlurmOptions
from toolmem.sweeps.slurm_queue import (
    GONE,
    QueuedJob,
    accounted,
    check_programs,
    jobs_of_user,
)

if TYPE_CHECKING:
    import submitit

ATTEMPTS = 3  # jobs that a run may bring down before it counts as failed
LOOK = 2.0  # seconds between two looks for results
SETTLE = 15.0  # seconds that a shared file system may take to show what an ended job has written
REFUSALS = 10  # in a row, while other jobs go on
UNSURE = ("timed out", "Unable to contact")  # sbatch may say so of a job that is in the queue


@dataclass
class Task:
    """A run that was submitted.

    Args:
        name: the run's.
        batch: that it is in.
        job: the run as the plan wants it; None when it does not.
        since: when it was first seen to run (``time.monotonic``).
        ended: when its job was first seen to have ended.
    """

    name: str
    batch: Batch
    job: Job | None
    state: str = "PENDING"
    reason: str = ""
    since: float | None = None
    ended: float | None = None

    @property
    def number(self) -> str | None:
        """Slurm's number of its job."""
        return self.batch.number(self.name)


class SlurmExecutor:
    """Jobs of Slurm, which go on when this process ends.

    Args:
        sweep: the recipe.
        folder: the sweep's, which all nodes see.
        options: what each job asks for, settled.
        make: of the words of a run and these options, what its job calls; pickled by its name.

    Raises:
        ToolmemError: without submitit, or on a machine without Slurm.
    """

    def __init__(
        self,
        sweep: SweepRecipe,
        folder: SweepFolder,
        options: SlurmOptions,
        make: Callable[[Mapping[str, Any], SlurmOptions], Callable[[], None]],
    ) -> None:
        self.sweep = sweep
        self.folder = folder
        self.options = options
        self.make = make
        self.ahead = bool(options.ahead)
        check_programs()
        self._submitit = _executor(folder.path / "slurm", options)
        self._jobs = JobsFile(folder.path / "slurm" / "jobs.json")
        self._tasks: dict[str, Task] = {}
        self._deaths: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()  # looks in vain for a batch without a number
        self._refusals = 0
        self._looked = self._asked = -float("inf")
        self._trouble = self._refusal = ""

    # ---- what the runner asks

    def open(self, wanted: Sequence[Job], lock: int) -> None:
        """Take up jobs that are in Slurm's queue from before.

        Args:
            wanted: what is to be trained first.
            lock: of the folder; jobs do not keep it.

        Raises:
            ToolmemError: when Slurm does not answer.
        """
        self._jobs = JobsFile.read(self._jobs.path)
        if not self._jobs.batches:
            return
        queued = jobs_of_user()
        jobs = {job.run.name: job for job in wanted}
        for batch in list(self._jobs.batches):
            if not batch.find(queued):
                self._jobs.batches.remove(batch)
        for name, batch in self._jobs.runs():
            task = Task(name, batch, jobs.get(name))
            entry = queued.get(batch.number(name) or "")
            if entry is not None and not entry.ended:
                task.state, task.reason = entry.state, entry.reason
                self._tasks[name] = task
                self._hand_in(task)
            elif self._is_trained(task):  # since stock was taken
                self._tasks[name] = task
        self._prune()

    def free(self) -> int:
        """What ``max_jobs`` leaves; nothing while Slurm takes none."""
        assert self.options.max_jobs is not None
        if any(batch.job is None for batch in self._jobs.batches):
            return 0
        return max(0, self.options.max_jobs - len(self._tasks))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Submit runs as one array.

        Raises:
            ToolmemError: when Slurm refuses it, with its words.
        """
        batch = self._jobs.new_batch(self.sweep.name, {job.run.name: job.until for job in jobs})
        calls = [self._call(job) for job in jobs]
        try:
            self._submitit.update_parameters(**self.options.parameters(batch.name))
            first = self._submitit.submit_array(calls)[0]
        except (RuntimeError, OSError) as error:
            self._refused(batch, error)
        else:
            self._refusals, self._refusal = 0, ""
            batch.job = first.job_id.partition("_")[0]
            self._jobs.write()
        for job in jobs:
            self._tasks[job.run.name] = Task(job.run.name, batch, job)

    def busy(self) -> set[str]:
        """Those with a job."""
        return set(self._tasks)

    def running(self) -> dict[str, float]:
        """Those that Slurm said are running, and when it first did."""
        return {t.name: t.since for t in self._tasks.values() if t.since is not None}

    def places(self) -> int:
        """Those that are running."""
        return len(self.running())

    def wait(self, timeout: float) -> list[str]:
        """Wait, then look whether something is due: for results, or for jobs that ended without.

        Raises:
            ToolmemError: when jobs end without having begun to train, one after another.
        """
        time.sleep(timeout)
        over: list[str] = []
        now = time.monotonic()
        if now >= self._looked + LOOK:
            over += self._find_results()
            self._looked = time.monotonic()
        assert self.options.poll_s is not None
        if now >= self._asked + self.options.poll_s:
            over += self._ask()
            self._asked = time.monotonic()
        return over

    def note(self) -> str:
        """How many wait in the queue, and for what; or why Slurm does not answer."""
        tasks = self._tasks.values()
        waiting = Counter(t.reason for t in tasks if t.since is None and t.ended is None)
        reasons = ", ".join(f"{reason or 'submitted'} {n}" for reason, n in waiting.most_common(3))
        words = [f"{waiting.total()} in the queue ({reasons})"] if waiting else []
        return "; ".join([*words, *filter(None, (self._trouble, self._refusal))])

    def close(self) -> None:
        """Leave the jobs to Slurm."""

    def left(self) -> str:
        """Which jobs go on, and how to end them."""
        numbers = dict.fromkeys(
            t.batch.job for t in self._tasks.values() if t.batch.job is not None
        )
        if not numbers:
            return ""
        return (
            f"{len(self._tasks)} of them go on as jobs of Slurm; to end these too: "
            f"scancel {' '.join(map(str, numbers))}"
        )

    def _hand_in(self, task: Task) -> None:
        """Write what a job calls, if the process that submitted it came no further."""
        from submitit.core.utils import DelayedSubmission, JobPaths

        path = JobPaths(self.folder.path / "slurm", task.number).submitted_pickle
        if task.job is None or path.exists():
            return
        submission = DelayedSubmission(self._call(task.job))
        submission.set_timeout(self.options.timeout_min or 0, self.options.max_num_timeout or 0)
        with atomic_path(path) as temporary:
            submission.dump(temporary)

    def _call(self, job: Job) -> Callable[[], None]:
        """What the job of a run calls."""
        words = job.words(self.sweep.metrics, self.folder.runs.absolute())
        return self.make(words, self.options)

    # ---- results

    def _find_results(self) -> list[str]:
        over = [name for name, task in self._tasks.items() if self._is_trained(task)]
        for name in over:
            self._deaths.pop(name, None)
        return self._let_go(over)

    def _is_trained(self, task: Task) -> bool:
        return is_trained(self.folder.result(task.name), task.batch.runs[task.name])

    def _let_go(self, names: Sequence[str]) -> list[str]:
        for name in names:
            del self._tasks[name]
        if names:
            self._prune()
        return list(names)

    def _prune(self) -> None:
        """Forget batches of which no run has a job any more."""
        needed = {id(task.batch) for task in self._tasks.values()}
        self._jobs.batches = [one for one in self._jobs.batches if id(one) in needed]
        self._jobs.write()

    # ---- jobs that end without

    def _ask(self) -> list[str]:
        try:
            queued = jobs_of_user()
        except ToolmemError as error:
            self._trouble = f"Slurm does not answer: {last_line(str(error))}"
            return []
        self._trouble = ""
        given_back = self._find_batches(queued)
        now = time.monotonic()
        numbers = {t.name: t.number for t in self._tasks.values() if t.number is not None}
        forgotten = accounted(number for number in numbers.values() if number not in queued)
        dead = []
        for name, number in numbers.items():
            task = self._tasks[name]
            entry = queued.get(number) or QueuedJob(number, forgotten.get(number, GONE), "", "")
            task.state, task.reason = entry.state, entry.reason
            if not (entry.ended or entry.state == GONE):
                task.ended = None
                running = entry.state not in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING")
                task.since = (task.since or now) if running else None
            elif task.ended is None:
                task.ended = now
                with contextlib.suppress(OSError):
                    list((self.folder.runs / name).iterdir())  # NFS looks again
            elif now >= task.ended + SETTLE and not self._is_trained(task):
                dead.append(task)
        for task in dead:
            self._failed(task)
        return given_back + self._let_go([task.name for task in dead])

    def _find_batches(self, queued: dict[str, QueuedJob]) -> list[str]:
        """Of batches that sbatch has not told the number of, give back what was not submitted."""
        given_back: list[str] = []
        for batch in [one for one in self._jobs.batches if one.job is None]:
            if batch.find(queued):
                self._jobs.write()
                for task in self._tasks.values():
                    if task.batch is batch:
                        self._hand_in(task)
                continue
            self._misses[batch.name] += 1
            if self._misses[batch.name] > 1:  # Slurm may be slow
                given_back += self._let_go([n for n, t in self._tasks.items() if t.batch is batch])
        return given_back

    def _failed(self, task: Task) -> None:
        """Write why a run has no result, unless another job may still bring it one."""
        self._deaths[task.name] += 1
        if task.job is None:
            return
        words = task.job.words(self.sweep.metrics, self.folder.runs)
        log = self.folder.path / "slurm" / f"{task.number}_0_log.out"
        if not (self.folder.runs / task.name / "clock.json").exists():
            self._check_beginning(task, log)
        last = self._deaths[task.name] >= ATTEMPTS
        error = why_hopeless(task.state, task.number, last, self.options)
        if error is None and last:
            error = (
                f"its job ended {ATTEMPTS} times without a result, the last as {task.state}: see "
                f"slurm/{log.name} and the run's log.txt{told(log)}"
            )
        if error is not None:
            write_failure(
                words,
                seconds=seconds_spent(self.folder.runs / task.name),
                threads=self.options.cpus_per_task,
                error=error,
            )

    def _check_beginning(self, task: Task, log: Path) -> None:
        """Stop when no job so far has even begun to train: the next would not either."""
        begun = self.folder.runs.glob("*/clock.json")
        if self._deaths.total() >= max(ATTEMPTS, REFUSALS) and next(begun, None) is None:
            raise ToolmemError(
                f"jobs of Slurm end before they train, the last as {task.state}: see {log}{told(log)}; the "
                f"nodes must see {self.folder.path.absolute()} and this Python, with toolmem in it "
                "(slurm.setup may load modules first)"
            )

    def _refused(self, batch: Batch, error: Exception) -> None:
        """Slurm has not taken a batch, or has not said so. While others go on, it is tried again."""
        words = str(error).strip()
        self._refusals += 1
        unsure = any(word in words for word in UNSURE)
        if self._refusals < REFUSALS and (self._tasks or unsure):
            self._refusal = f"sbatch: {last_line(words)}"
            return
        self._jobs.drop(batch)
        raise ToolmemError(
            f"Slurm does not take the jobs: {words}\nlook at slurm.partition, slurm.account, "
            "slurm.timeout_min, slurm.max_jobs and what else the recipe or the command asks for"
        ) from error


def check_no_jobs(folder: SweepFolder) -> None:
    """Refuse to train here what jobs of Slurm may be training.

    Args:
        folder: the sweep's.

    Raises:
        ToolmemError: naming the jobs.
    """
    jobs = JobsFile.read(folder.path / "slurm" / "jobs.json")
    if not jobs.batches:
        return
    try:
        queued = jobs_of_user()
    except ToolmemError as error:
        raise ToolmemError(
            f"this sweep has submitted jobs to Slurm, and whether they are over cannot be asked ({error}): "
            f"go on with --executor slurm, or, if none is left, remove {jobs.path}"
        ) from error
    for batch in jobs.batches:
        batch.find(queued)
    numbers = {batch.number(name): batch.job for name, batch in jobs.runs()}
    left = {
        numbers[job.number]: None
        for job in queued.values()
        if job.number in numbers and not job.ended
    }
    if left:
        raise ToolmemError(
            f"jobs of Slurm are at runs of this sweep: go on with --executor slurm, or end them first: "
            f"scancel {' '.join(map(str, left))}"
        )


def _executor(folder: Path, options: SlurmOptions) -> submitit.AutoExecutor:
    try:
        import submitit
    except ImportError as error:
        raise ToolmemError(
            '--executor slurm needs submitit: pip install "toolmem[cluster]"'
        ) from error
    return submitit.AutoExecutor(
        folder, cluster="slurm", slurm_max_num_timeout=options.max_num_timeout
    )
