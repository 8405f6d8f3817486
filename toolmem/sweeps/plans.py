"""Which run is to be trained next, by the results so far: what the runner asks.

A plan is a pure function of results: a sweep that was killed goes on where its results say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from toolmem.sweeps.grid import Planned, expand
from toolmem.sweeps.recipe import HALVED, SweepRecipe

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A run to be trained now.

    Args:
        run: which.
        until: the optimizer step at which it is judged; None when it goes on to its end.
        judged: the metric that it is judged by, and all steps at which it is; None for none.
        ahead: it may turn out not to be needed.
    """

    run: Planned
    until: int | None = None
    judged: tuple[str, tuple[int, ...]] | None = None
    ahead: bool = False

    def is_done_by(self, row: Row | None) -> bool:
        """Is this a result of the run, trained as far as it is to be?"""
        return is_trained(row, self.until)

    def words(self, metrics: Mapping[str, str], runs: str | Path) -> dict[str, Any]:
        """What the process is told that trains it, and ``outcome.result_row`` takes.

        Args:
            metrics: that are kept of it.
            runs: the folder of all runs.
        """
        words: dict[str, Any] = {
            "name": self.run.name,
            "settings": self.run.settings,
            "seed": self.run.seed,
            "recipe": self.run.recipe,
            "metrics": dict(metrics),
            "runs": str(runs),
        }
        if self.until is not None:
            words["until"] = self.until
        if self.judged is not None:
            words["judged"] = self.judged
        return words


def is_trained(row: Row | None, until: int | None) -> bool:
    """Is this the result of a run, trained as far as it is to be?

    Args:
        row: what it handed over; None while it has not.
        until: the optimizer step at which it is judged; None when it goes on to its end.
    """
    if row is None:
        return False
    if row["status"] == "failed" or row.get("stopped") != HALVED:
        return True
    return until is not None and row["steps"] >= until


class Plan(Protocol):
    """What a sweep trains, in which order."""

    def wanted(self, rows: Mapping[str, Row]) -> list[Job]:
        """Runs to be trained now that have no result yet, the first first.

        Args:
            rows: the results so far, by run; those of other recipes may be among them.
        """

    def mine(self, rows: Mapping[str, Row]) -> list[Row]:
        """The results that are of this plan."""

    def to_go(self, rows: Mapping[str, Row]) -> int:
        """About how many runs are still to be trained."""

    def keeps(self, rows: Mapping[str, Row]) -> set[str]:
        """Runs with a result that may go on, whose checkpoints must stay."""

    def summary(self, rows: Mapping[str, Row]) -> str:
        """A few words on how far it is, beside the counts of runs; empty for none."""


def make_plan(sweep: SweepRecipe) -> Plan:
    """The plan of a recipe.

    Args:
        sweep: the recipe.

    Raises:
        ToolmemError: for settings that are the same run, or keys that lead nowhere.
    """
    from toolmem.sweeps.halving import HalvingPlan
    from toolmem.sweeps.search import SearchPlan

    if sweep.search is not None:
        expand(sweep, sweep.seeds[:2])  # of further seeds no more can be said
        return SearchPlan(sweep)
    if sweep.halving is not None:
        return HalvingPlan(expand(sweep), sweep.halving)
    return GridPlan(expand(sweep))


class GridPlan:
    """Every run, in order.

    Args:
        runs: of the grid.
    """

    def __init__(self, runs: Sequence[Planned]) -> None:
        self.runs = list(runs)

    def wanted(self, rows: Mapping[str, Row]) -> list[Job]:
        """All that have no result."""
        jobs = map(Job, self.runs)
        return [job for job in jobs if not job.is_done_by(rows.get(job.run.name))]

    def mine(self, rows: Mapping[str, Row]) -> list[Row]:
        """Those of its runs."""
        jobs = map(Job, self.runs)
        return [rows[j.run.name] for j in jobs if j.is_done_by(rows.get(j.run.name))]

    def to_go(self, rows: Mapping[str, Row]) -> int:
        """All that have no result."""
        return len(self.wanted(rows))

    def keeps(self, rows: Mapping[str, Row]) -> set[str]:
        """None."""
        return set()

    def summary(self, rows: Mapping[str, Row]) -> str:
        """Nothing beside the counts."""
        return ""
