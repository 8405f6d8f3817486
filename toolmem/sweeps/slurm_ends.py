"""How jobs of Slurm end without a result, as a row of results tells it."""

from __future__ import annotations

from pathlib import Path

from toolmem.sweeps.slurm_options import SlurmOptions


def why_hopeless(state: str, number: str | None, last: bool, options: SlurmOptions) -> str | None:
    """Why a run would do no better in another job; None when it may.

    Args:
        state: that Slurm gives its job.
        number: of the job.
        last: no other follows anyway.
        options: what it had.
    """
    if state == "CANCELLED":
        return f"its job {number} was cancelled (scancel): --retry-failed trains the run again"
    if state == "OUT_OF_MEMORY":
        had = "Slurm's default memory" if options.mem_gb is None else f"{options.mem_gb:g} GB"
        words = f"out of memory: job {number} had {had}"
        return f"{words}: raise slurm.mem_gb, or make the model or the batch smaller"
    return out_of_time(options) if state == "TIMEOUT" and last else None


def out_of_time(options: SlurmOptions) -> str:
    """The error of a run that was too often out of time."""
    return (
        f"out of time: jobs of {options.timeout_min} minutes, {options.max_num_timeout} times requeued, were "
        "not enough: raise slurm.timeout_min or slurm.max_num_timeout; a job must reach a checkpoint "
        "(checkpointing.every_n_steps)"
    )


def told(log: Path) -> str:
    """The last line of a job's output, for an error; empty without one."""
    try:
        return f" ({last_line(log.read_text(errors='replace').strip())[:300]})"
    except OSError:
        return ""


def last_line(text: str) -> str:
    """What a program said last."""
    return text.rpartition("\n")[2]
