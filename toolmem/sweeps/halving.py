"""Successive halving (arXiv 1502.07943): of the values of one axis, the worse end at each rung.

Every run trains by the schedule of the whole: at a rung it pauses, is judged, and goes on from its
checkpoint as if it had never paused, or is left where it is. Values compete within each combination of the
other axes by the mean over seeds, and a value's seeds go on or end together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from toolmem.recipe_files import get_key
from toolmem.sweeps.grid import Planned
from toolmem.sweeps.plans import Job, Row
from toolmem.sweeps.recipe import HALVED, HalvingRecipe

Group = dict[object, list[Planned]]  # runs by label on the axis that is halved


class HalvingPlan:
    """The runs of a grid, of which the worse are ended at rungs.

    Args:
        runs: of the grid.
        halving: when, and by what.
    """

    def __init__(self, runs: Sequence[Planned], halving: HalvingRecipe) -> None:
        self.runs = list(runs)
        self.halving = halving
        self.last = len(halving.rungs)
        groups: dict[str, Group] = {}
        for run in runs:
            others = {name: label for name, label in run.settings.items() if name != halving.axis}
            group = groups.setdefault(repr(others), {})
            group.setdefault(run.settings[halving.axis], []).append(run)
        self.groups = list(groups.values())

    def places(self, n: int) -> list[int]:
        """How many of ``n`` values are trained to each rung, the last to the run's end."""
        found = [n]
        for _ in self.halving.rungs:
            found.append(max(1, math.ceil(found[-1] * self.halving.keep)))
        return found

    def stage(self, rows: Mapping[str, Row], group: Group) -> tuple[int, list[object]]:
        """The rung that a group is at, and the labels that are trained to it."""
        labels = list(group)
        for rung, places in enumerate(self.places(len(group))[1:]):
            runs = [run for one in labels for run in group[one]]
            if not all(self.job(run, rung).is_done_by(rows.get(run.name)) for run in runs):
                return rung, labels
            scores = {one: self._score(rows, group[one], rung) for one in labels}
            ranked = sorted(labels, key=lambda one: scores[one], reverse=True)
            labels = [one for one in ranked[:places] if scores[one] > -math.inf]
        return self.last, labels

    def job(self, run: Planned, rung: int) -> Job:
        """The training of a run to a rung."""
        until = self.halving.rungs[rung] if rung < self.last else None
        return Job(run, until, (self.halving.metric, self.halving.rungs))

    def _score(self, rows: Mapping[str, Row], runs: Sequence[Planned], rung: int) -> float:
        """The mean over seeds at a rung, the larger the better; minus infinity where a run failed there or
        diverged.
        """
        done = [rows[run.name] for run in runs if rows[run.name]["status"] == "done"]
        values = [self._value(row, rung) for row in done]
        if len(done) < len(runs) or any(map(math.isnan, values)):
            return -math.inf
        return fmean(values) * (1 if self.halving.mode == "max" else -1)

    def _value(self, row: Row, rung: int) -> float:
        """What a run was judged by at a rung, though it may have gone on since."""
        judged = row.get("judged") or {}
        value = judged.get(str(self.halving.rungs[rung]), row[self.halving.metric])
        return math.nan if value is None else float(value)

    # ---- what the runner asks

    def wanted(self, rows: Mapping[str, Row]) -> list[Job]:
        """Of each group, the runs that have not come to its rung."""
        found = []
        for group in self.groups:
            rung, labels = self.stage(rows, group)
            jobs = [self.job(run, rung) for label in labels for run in group[label]]
            found += [job for job in jobs if not job.is_done_by(rows.get(job.run.name))]
        return found

    def mine(self, rows: Mapping[str, Row]) -> list[Row]:
        """Those of its runs."""
        return [rows[run.name] for run in self.runs if run.name in rows]

    def to_go(self, rows: Mapping[str, Row]) -> int:
        """Trainings from one rung to the next that are left."""
        left = len(self.wanted(rows))
        for group in self.groups:
            rung, labels = self.stage(rows, group)
            seeds = max(len(runs) for runs in group.values())
            left += sum(self.places(len(group))[rung + 1 :]) * seeds if labels else 0
        return left

    def keeps(self, rows: Mapping[str, Row]) -> set[str]:
        """Runs that may still go on: of each group those at its rung, until the last."""
        found: set[str] = set()
        for group in self.groups:
            _, labels = self.stage(rows, group)
            paused = [run.name for one in labels for run in group[one]]
            found |= {
                name for name in paused
                if name in rows and rows[name].get("stopped") == HALVED
            }  # fmt: skip
        return found

    def summary(self, rows: Mapping[str, Row]) -> str:
        """How many runs each rung has left."""
        at = [rung for group in self.groups for rung in [self.stage(rows, group)[0]]]
        return f"rung {min(at) + 1} of {self.last + 1}"

    def share_of_steps(self, run: Planned) -> float:
        """The part of its steps that a run of this group is trained for, on the mean over its values."""
        others = next(group for group in self.groups if any(run in runs for runs in group.values()))
        steps = [*self.halving.rungs, get_key(run.recipe, "trainer.max_steps")]
        places = self.places(len(others))
        before = [0, *steps[:-1]]
        trained = sum(n * (to - since) for n, since, to in zip(places, before, steps, strict=True))
        return trained / (len(others) * steps[-1])
