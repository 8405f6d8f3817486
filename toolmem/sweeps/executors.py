"""Where the runs of a sweep are trained, as the runner sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from toolmem.sweeps.plans import Job


class Executor(Protocol):
    """Trains the runs that it is handed, several at a time.

    Whatever becomes of a run, it leaves a ``result.json``: the trained run's own, or one that says why there
    is none.

    Attributes:
        ahead: does it train what may turn out not to be needed?
    """

    ahead: bool

    def open(self, wanted: Sequence[Job], lock: int) -> None:
        """Begin, and take up what an earlier sweep left behind.

        Args:
            wanted: what is to be trained first.
            lock: descriptor of the folder's lock.
        """

    def free(self) -> int:
        """How many runs it takes now."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Have runs trained.

        Args:
            jobs: at most ``free()``, each of a run that is not in ``busy()``.
        """

    def busy(self) -> set[str]:
        """Runs that it has, waiting or being trained."""

    def running(self) -> dict[str, float]:
        """Of each run that is being trained, when it began (``time.monotonic``)."""

    def places(self) -> int:
        """How many runs are trained at a time, about."""

    def wait(self, timeout: float) -> list[str]:
        """Wait until something has become of a run.

        Args:
            timeout: seconds, after which it gives up.

        Returns:
            Runs that it has no more: those with their result, and any that it gives back.
        """

    def note(self) -> str:
        """A few words beside the counts; empty for none."""

    def close(self) -> None:
        """End. What it trains on this machine ends with it."""

    def left(self) -> str:
        """What is to be known when the sweep was interrupted; empty for nothing."""
