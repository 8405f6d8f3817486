"""A sweep's folder: what lies in it, and that one process at a time writes there.

DIR/
  results.duckdb     a row a run
  sweep.yaml         the recipe as it was read last
  runs/NAME/         each run's own folder, as of ``toolmem fit``, with
    log.txt          what it printed
    result.json      its row, once it is done or has failed
  slurm/             with --executor slurm, what was submitted (jobs.json), and what jobs printed
  report.html, and of each figure NAME.csv, NAME.png, NAME.svg
  .lock              held by the sweep that runs here, and by its workers
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.files import explain_os_error
from toolmem.sweeps.results import Results

ORPHANS = 20.0  # seconds that the workers of a killed sweep have to notice and end
DYING = 1.0  # seconds that a killed sweep has itself


@dataclass(frozen=True)
class SweepFolder:
    """One sweep's folder.

    Args:
        path: where it is.
    """

    path: Path

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return self.path / "runs"

    @property
    def results(self) -> Results:
        """The file of results."""
        return Results(self.path / "results.duckdb")

    def result(self, name: str) -> dict[str, Any] | None:
        """What a run handed over; None while it has not.

        Args:
            name: the run's.
        """
        try:
            return json.loads((self.runs / name / "result.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def left_results(self) -> Iterator[dict[str, Any]]:
        """What all runs of the folder have handed over."""
        if self.runs.is_dir():
            for path in sorted(self.runs.iterdir()):
                if (found := self.result(path.name)) is not None:
                    yield found

    def forget(self, name: str) -> None:
        """Remove a run's result and checkpoints, so that it starts anew."""
        (self.runs / name / "result.json").unlink(missing_ok=True)
        (self.runs / name / "metrics.csv").unlink(missing_ok=True)
        self.drop_checkpoints(name)

    def drop_checkpoints(self, name: str) -> None:
        """Remove a run's checkpoints."""
        shutil.rmtree(self.runs / name / "checkpoints", ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Be the only sweep that writes here; yields the lock's descriptor.

        Workers inherit it: should this process be killed, the next waits until they have ended too.

        Raises:
            ToolmemError: when another sweep runs here, or the folder cannot be written.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise ToolmemError(f"--out {self.path} is a file: name a folder")
            self.runs.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        try:
            self._take(lock)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            yield lock
        finally:
            os.close(lock)

    def _take(self, lock: int) -> None:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                told = os.pread(lock, 300, 0).decode(errors="replace").partition(" ")
                owner, host = told[0].strip(), told[2].strip()
                here = host in ("", socket.gethostname())
                if time.monotonic() > began + (ORPHANS if here and not _alive(owner) else DYING):
                    raise ToolmemError(
                        f"another sweep (process {owner or 'unknown'}{'' if here else ' on ' + host}) is "
                        f"running in {self.path}: wait for it, or name another --out"
                    ) from error
                time.sleep(0.1)
            except OSError as error:
                raise ToolmemError(
                    f"cannot lock {self.path / '.lock'} ({error.strerror}): two sweeps at once would not be "
                    "noticed; choose a file system with locks (flock)"
                ) from error


def _alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: str) -> bool:
    """A killed process that its parent has not taken note of yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
