"""Which jobs a sweep has submitted, in a file of its folder: what a sweep that was killed finds them by.

A batch is written down before it is submitted, and Slurm's number when it is known. One without a number was
submitted or not: its name, which no other has, tells.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from toolmem.errors import ToolmemError
from toolmem.files import write_json
from toolmem.sweeps.slurm_queue import QueuedJob


@dataclass
class Batch:
    """Runs that were submitted together, as a job array where they are several.

    Args:
        name: of the job.
        runs: name -> step at which it is judged, or None; in the order of the array.
        job: Slurm's number; None until it is known.
    """

    name: str
    runs: dict[str, int | None]
    job: str | None = None

    def number(self, run: str) -> str | None:
        """Slurm's number of a run's job."""
        if self.job is None or len(self.runs) == 1:
            return self.job
        return f"{self.job}_{list(self.runs).index(run)}"

    def find(self, queued: dict[str, QueuedJob]) -> bool:
        """Look for the batch by its name, where its number is not known; True when it is, now."""
        for number, job in queued.items():
            if self.job is None and job.name == self.name:
                self.job = number.partition("_")[0]
        return self.job is not None


@dataclass
class JobsFile:
    """The file.

    Args:
        path: where it is.
    """

    path: Path
    batches: list[Batch] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> JobsFile:
        """Read it; empty where there is none.

        Raises:
            ToolmemError: for a file that is something else.
        """
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, [Batch(**batch) for batch in written["batches"]])
        except (FileNotFoundError, NotADirectoryError):
            return cls(path)
        except (ValueError, TypeError, KeyError) as error:
            raise ToolmemError(
                f"{path} does not tell which jobs were submitted ({error}): see that none is left in Slurm's "
                "queue, and remove it"
            ) from error

    def write(self) -> None:
        """Write it, in one step."""
        write_json(self.path, {"batches": [asdict(batch) for batch in self.batches]})

    def new_batch(self, sweep: str, runs: dict[str, int | None]) -> Batch:
        """A batch that is written down, and not submitted yet.

        Args:
            sweep: the sweep's name.
            runs: of the batch.
        """
        batch = Batch(f"{sweep}-{secrets.token_hex(4)}", runs)
        self.batches.append(batch)
        self.write()
        return batch

    def drop(self, batch: Batch) -> None:
        """Forget a batch."""
        self.batches.remove(batch)
        self.write()

    def runs(self) -> Iterator[tuple[str, Batch]]:
        """All runs, each with its batch; of one that is in two, the later."""
        found = {run: batch for batch in self.batches for run in batch.runs}
        yield from found.items()
