"""A process that trains one run after another, so that what is slow to import is imported once.

It is told by lines of JSON on its stdin, and answers each by a line on its stdout when the run's
``result.json`` is written. When its stdin ends while it works, the sweep was killed, and it ends at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def share_cores(workers: int) -> list[list[int]]:
    """The cores of each worker: all that this process may use, shared out evenly.

    Args:
        workers: how many; beyond the number of cores, they share.
    """
    found = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = found or list(range(os.cpu_count() or 1))
    if workers >= len(cores):
        return [[cores[index % len(cores)]] for index in range(workers)]
    bounds = [len(cores) * index // workers for index in range(workers + 1)]
    return [cores[bounds[index] : bounds[index + 1]] for index in range(workers)]


class Worker:
    """One worker process, started when it is needed.

    Args:
        command: what starts it.
        cores: that it runs on, a thread each.
        lock: descriptor of the sweep's lock, which it keeps while it lives.
        log: where it writes what belongs to no run.
    """

    def __init__(self, command: Sequence[str], cores: Sequence[int], lock: int, log: Path) -> None:
        self.command = list(command)
        self.cores = list(cores)
        self.lock = lock
        self.log = log
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        """The process's number; None while there is none."""
        return None if self._process is None else self._process.pid

    def do(self, job: Mapping[str, Any]) -> int | None:
        """Have a run trained, and wait for it.

        Args:
            job: what ``outcome.result_row`` takes.

        Returns:
            None when its result is written; else how the process ended: its return code.
        """
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):  # it is gone; the second when `stop` has closed the pipe
            answer = ""
        if answer:
            return None
        code = process.wait()
        self._process = None
        return code

    def stop(self) -> None:
        """Let it end: at once, when it is idle; whatever it does, soon."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[str]:
        threads = str(len(self.cores))
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
        }
        cores = ",".join(map(str, self.cores))
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [*self.command, "--cores", cores],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment, pass_fds=(self.lock,),
                start_new_session=True,  # Ctrl-C is for the sweep, which then lets its workers end
            )  # fmt: skip
        return self._process
