"""What Slurm says of jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from toolmem.errors import ToolmemError

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")
ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
    + ("REVOKED", "TIMEOUT")
)  # fmt: skip
GONE = "GONE"  # Slurm knows the job no more
ASKING = 60  # seconds that Slurm has to answer


@dataclass(frozen=True)
class QueuedJob:
    """One job, as squeue has it.

    Args:
        number: ``12``, or ``12_3`` of an array.
        state: ``PENDING``, ``RUNNING``, ...
        reason: why it waits.
        name: that it was submitted by.
    """

    number: str
    state: str
    reason: str
    name: str

    @property
    def ended(self) -> bool:
        """Will it do no more? A requeued job may look so for a moment."""
        return self.state in ENDED


def check_programs() -> None:
    """Make sure that this machine submits jobs.

    Raises:
        ToolmemError: naming what is missing.
    """
    for program in PROGRAMS:
        if shutil.which(program) is None:
            raise ToolmemError(
                f"--executor slurm: there is no {program} here: run this on a machine that submits jobs to "
                "Slurm (a login node), or leave --executor out"
            )


def jobs_of_user() -> dict[str, QueuedJob]:
    """Jobs of this user by number, those among them that have ended in the last minutes.

    Raises:
        ToolmemError: when Slurm does not answer, with its words.
    """
    words = [
        "--noheader",
        "--array",
        "--states=all",
        f"--user={os.getuid()}",
        "--format=%i|%T|%r|%j",
    ]
    found = {}
    for line in _ask("squeue", *words).splitlines():
        parts = line.strip().split("|", 3)
        if len(parts) == 4:
            found[parts[0]] = QueuedJob(*parts)
    return found


def accounted(numbers: Iterable[str]) -> dict[str, str]:
    """States of jobs that squeue has forgotten, as far as they are accounted.

    Args:
        numbers: of the jobs.
    """
    chosen = ",".join(numbers)
    if not chosen or shutil.which("sacct") is None:
        return {}
    try:
        told = _ask("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", chosen)
    except ToolmemError:  # nothing is accounted on this cluster
        return {}
    lines = [line.split("|") for line in told.splitlines()]
    # "CANCELLED by 1000"
    return {line[0]: line[1].split()[0] for line in lines if len(line) == 2 and line[1]}


def _ask(program: str, *words: str) -> str:
    try:
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=ASKING)
    except FileNotFoundError:
        raise ToolmemError(f"there is no {program} here") from None
    except subprocess.TimeoutExpired:
        raise ToolmemError(f"{program} has not answered for {ASKING} s") from None
    if done.returncode:
        raise ToolmemError(
            done.stderr.strip() or f"{program} ended with exit code {done.returncode}"
        )
    return done.stdout
