"""A sweep as it runs: counts, time left, and what each worker is at, on stderr."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from toolmem.console import stderr

if TYPE_CHECKING:
    from rich.console import Group

    from toolmem.sweeps.executors import Executor
    from toolmem.sweeps.runner import State, SweepRunner

SHOWN = 30  # runs that the table has at most


def train_all(runner: SweepRunner, executor: Executor, lock: int) -> None:
    """Train what is left with a live table; where stderr is no terminal, print the last state alone.

    Args:
        runner: with stock taken.
        executor: what trains.
        lock: the folder's lock.
    """
    from rich.live import Live

    began = time.monotonic()
    table = Table(runner.folder.runs, began)
    with Live(table.of(runner.state), console=stderr(), refresh_per_second=2) as live:

        def watch(state: State) -> None:
            live.update(table.of(state))

        runner.run(executor, lock, watch)
        watch(runner.state)


class Table:
    """Draws a sweep's state.

    Args:
        runs: the folder of its runs.
        began: when it began, by ``time.monotonic``.
    """

    def __init__(self, runs: Path, began: float) -> None:
        self.runs = runs
        self.began = began

    def of(self, state: State) -> Group:
        """The table of a state."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table as RichTable

        over = state.done + state.failed
        words = [f"{state.done} done, {state.failed} failed, {state.to_go} to go"]
        words += [word for word in (state.summary, time_left(state), state.note) if word]
        head = RichTable.grid(padding=(0, 1))
        head.add_row(
            ProgressBar(total=max(over + state.to_go, 1), completed=over, width=30),
            clock(time.monotonic() - self.began),
            ", ".join(words),
        )
        running = RichTable(box=None, pad_edge=False, show_header=bool(state.running))
        for column, justify in (("run", "left"), ("step", "right"), ("for", "right")):
            running.add_column(column, justify=justify, style="dim", overflow="fold")  # type: ignore[arg-type]
        for name, since in list(state.running.items())[:SHOWN]:
            step = last_step(self.runs / name / "metrics.csv")
            running.add_row(name, step, clock(time.monotonic() - since))
        if (more := len(state.running) - SHOWN) > 0:
            running.add_row(f"and {more} more")
        return Group(head, running)


def last_step(path: Path) -> str:
    """The step that a run logged last; empty before."""
    try:
        with open(path, "rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 2000))
            last = stream.read().decode(errors="replace").rstrip("\n").rpartition("\n")[2]
    except OSError:
        return ""
    step = last.partition(",")[0]
    return f"{int(step):,}" if step.isdigit() else ""


def time_left(state: State) -> str:
    """How long the rest may take, by the mean of the trainings so far."""
    if not state.seconds or not state.to_go:
        return ""
    mean = sum(state.seconds) / len(state.seconds)
    return f"about {clock(mean * state.to_go / state.places)} left"


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
