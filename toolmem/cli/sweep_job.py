"""What a job of Slurm calls to train one run of a sweep, by the code of the local workers."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.class_path import allowed_packages, only_packages

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

    from toolmem.sweeps.slurm_options import SlurmOptions


class SweepJob:
    """One run as submitit calls it, again after each requeue; it goes on from the run's last checkpoint.

    Args:
        words: see ``toolmem.sweeps.plans.Job.words``.
        options: what its job has.
    """

    def __init__(self, words: Mapping[str, Any], options: SlurmOptions) -> None:
        self.words = dict(words)
        self.options = options
        self.allowed = allowed_packages()  # of the command that submits it

    def __call__(self) -> None:
        """Train the run, and write its ``result.json``."""
        from toolmem.sweeps.folder import SweepFolder
        from toolmem.sweeps.plans import is_trained

        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
        threads = self.options.cpus_per_task
        assert threads is not None
        folder = SweepFolder(Path(self.words["runs"]).parent)
        if is_trained(folder.result(self.words["name"]), self.words.get("until")):
            return  # requeued when all was done
        # a job is one process: Lightning is not to ask Slurm for others, nor to requeue it itself
        os.environ.pop("SLURM_NTASKS", None)
        warnings.filterwarnings("ignore", "The `srun` command is available on your system")
        from toolmem.training.callbacks.preemption import Preempted, end_on_signals

        end_on_signals()
        try:
            import torch

            from toolmem.cli.sweep_worker import train

            torch.set_num_threads(threads)
            with only_packages(self.allowed):
                train({**self.words, "preemptible": True}, threads)
        except Preempted as asked:
            print(asked, flush=True)
            if asked.signum != signal.SIGUSR2:  # Slurm knows what it does with this job
                sys.exit(128 + asked.signum)
            assert callable(requeue)
            self._go_on_later(requeue)

    def _go_on_later(self, requeue: Any) -> None:
        """Have submitit requeue the job, unless it was out of time too often."""
        from submitit.core.utils import UncompletedJobError

        from toolmem.sweeps.outcome import seconds_spent, write_failure
        from toolmem.sweeps.slurm_ends import out_of_time

        try:
            requeue(signal.SIGUSR2, None)
        except UncompletedJobError:
            write_failure(
                self.words,
                seconds=seconds_spent(Path(self.words["runs"]) / self.words["name"]),
                threads=self.options.cpus_per_task,
                error=out_of_time(self.options),
            )

    def checkpoint(self) -> DelayedSubmission:
        """What submitit requeues: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
