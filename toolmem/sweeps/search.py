"""A sweep's searches: by combination of the axes and seed, the smallest model that reaches a value.

The seeds of a combination come one after another, each from the last one's answer; combinations at once.
A worker that finds nothing else to do tries ahead what a search may want next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import fmean
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.sweeps.bisection import Step, next_step, trial_run
from toolmem.sweeps.grid import Planned, fingerprint, make_run, run_name
from toolmem.sweeps.plans import Job, Row
from toolmem.sweeps.recipe import HALVED, MEMBER, SearchRecipe, SweepRecipe
from toolmem.sweeps.report_recipe import PARAMETERS

FURTHER = 1000  # what is added to a seed for each further one that decides a contradiction


@dataclass(frozen=True)
class Found:
    """How one search stands.

    Args:
        settings: label by axis.
        seed: of its runs.
        reach: the value that is searched for.
        step: what it wants next, or what it found.
        rows: results that it rests on.
    """

    settings: dict[str, Any]
    seed: int
    reach: float
    step: Step
    rows: tuple[Row, ...]


class SearchPlan:
    """The searches of a sweep.

    Args:
        sweep: a recipe with a search.
    """

    def __init__(self, sweep: SweepRecipe) -> None:
        assert sweep.search is not None
        self.sweep = sweep
        self.search: SearchRecipe = sweep.search
        self.members = list(sweep.search.family.values)
        self._runs: dict[tuple[str, int, int, int], Planned] = {}

    def run_of(
        self, combination: Mapping[str, Any], seed: int, member: int, number: int
    ) -> Planned:
        """The run of one try.

        Args:
            combination: label by axis.
            seed: of the search.
            member: of the family.
            number: of the try, from 0; each has a seed of its own.
        """
        key = (repr(combination), seed, member, number)
        if key not in self._runs:
            settings = {**combination, MEMBER: self.members[member]}
            self._runs[key] = make_run(self.sweep, settings, seed + FURTHER * number)
        return self._runs[key]

    def tries(
        self, rows: Mapping[str, Row], combination: Mapping[str, Any], seed: int
    ) -> dict[int, list[Row]]:
        """Results by member, in the order of tries."""
        found: dict[int, list[Row]] = {}
        for member in range(len(self.members)):
            for number in range(3):
                row = rows.get(self.run_of(combination, seed, member, number).name)
                if row is None or row.get("stopped") == HALVED:
                    break
                found.setdefault(member, []).append(row)
        return found

    def _passes(self, row: Row, reach: float) -> bool:
        value = row.get(self.search.metric)
        return row["status"] == "done" and value is not None and value >= reach

    def _step(self, tried: Mapping[int, list[Row]], reach: float, guess: int | None) -> Step:
        passes = {m: [self._passes(row, reach) for row in found] for m, found in tried.items()}
        return next_step(passes, len(self.members), guess, self.search.check)

    def searches(self, rows: Mapping[str, Row], combination: Mapping[str, Any]) -> Iterator[Found]:
        """The searches of a combination that have begun, in order; all but the last are over."""
        guesses: dict[float, int | None] = dict.fromkeys(self.search.reach)
        for seed in self.sweep.seeds:
            tried = self.tries(rows, combination, seed)
            used = tuple(row for found in tried.values() for row in found)
            for reach in self.search.reach:
                step = self._step(tried, reach, guesses[reach])
                yield Found(dict(combination), seed, reach, step, used)
                if not step.over:
                    return
                # where none reached it, the next seed begins with the largest
                guesses[reach] = len(self.members) - 1 if step.answer is None else step.answer

    def all_searches(self, rows: Mapping[str, Row]) -> list[Found]:
        """Every search that has begun."""
        return [
            found
            for combination in self.sweep.combinations
            for found in self.searches(rows, combination)
        ]

    # ---- what the runner asks

    def wanted(self, rows: Mapping[str, Row]) -> list[Job]:
        """The next tries of each search, and behind them what may come after these."""
        now: list[Job] = []
        ahead: list[Job] = []
        for found in self._open(rows):
            runs = [
                self.run_of(found.settings, found.seed, member, number)
                for member, number in found.step.wanted
            ]
            now += [Job(run) for run in runs if run.name not in rows]
            ahead += [Job(run, ahead=True) for run in self._ahead(rows, found)]
        names = {job.run.name for job in now}
        return now + [job for job in ahead if job.run.name not in names]

    def _open(self, rows: Mapping[str, Row]) -> list[Found]:
        return [found for found in self.all_searches(rows) if not found.step.over]

    def _ahead(self, rows: Mapping[str, Row], found: Found) -> list[Planned]:
        """What the search may want once its next try has passed or failed."""
        member, number = found.step.wanted[0]
        run = self.run_of(found.settings, found.seed, member, number)
        runs = []
        for value in (float("inf"), float("-inf")):
            supposed = {**rows, run.name: {"status": "done", self.search.metric: value}}
            for later in self.searches(supposed, found.settings):
                if (later.seed, later.reach) == (found.seed, found.reach):
                    runs += [self.run_of(later.settings, later.seed, *w) for w in later.step.wanted]
        return [run for run in runs if run.name not in rows]

    def mine(self, rows: Mapping[str, Row]) -> list[Row]:
        """The results of all tries."""
        found = {}
        for combination in self.sweep.combinations:
            for seed in self.sweep.seeds:
                for tried in self.tries(rows, combination, seed).values():
                    found.update({row["name"]: row for row in tried})
        return list(found.values())

    def to_go(self, rows: Mapping[str, Row]) -> int:
        """About how many tries are left, were all answers equally likely."""
        left = 0.0
        for combination in self.sweep.combinations:
            begun = list(self.searches(rows, combination))
            n_open = sum(not found.step.over for found in begun)
            for found in begun:
                if not found.step.over:
                    tried = len({row["settings"][MEMBER] for row in found.rows})
                    left += max(1.0, self.expected_runs(found.seed == self.sweep.seeds[0]) - tried)
            seeds = len({found.seed for found in begun})
            left += (len(self.sweep.seeds) - seeds) * self.expected_runs(False)
            assert n_open <= 1
        return round(left)

    def expected_runs(self, first: bool) -> float:
        """Tries of a seed on the mean, were all answers equally likely.

        Args:
            first: it is the first, which has no answer to begin with.
        """
        return fmean(len(tried) for tried in self._trials[first])

    @cached_property
    def _trials(self) -> dict[bool, list[list[int]]]:
        """Members tried by the first seed (True), and by the next if it has the same answer."""
        n, check = len(self.members), self.search.check
        answers = range(n + 1)
        return {
            True: [trial_run(answer, n, None, check) for answer in answers],
            False: [trial_run(answer, n, min(answer, n - 1), check) for answer in answers],
        }

    def share_of_members(self) -> dict[int, float]:
        """How often each member is tried by all seeds of a combination, on the mean; one value of reach."""
        shares = dict.fromkeys(range(len(self.members)), 0.0)
        for first, times in ((True, 1), (False, len(self.sweep.seeds) - 1)):
            trials = self._trials[first]
            for tried in trials:
                for member in tried:
                    shares[member] += times / len(trials)
        return shares

    def most_runs(self) -> int:
        """Tries of all seeds of a combination at most, where no contradiction wants further seeds."""
        n, check = len(self.members), self.search.check
        first = max(map(len, self._trials[True]))
        later = max(
            len(trial_run(answer, n, guess, check)) for answer in range(n + 1) for guess in range(n)
        )
        each = len(self.search.reach)  # of the same runs, each value wants some of its own
        return min(n, each * first) + (len(self.sweep.seeds) - 1) * min(n, each * later)

    def keeps(self, rows: Mapping[str, Row]) -> set[str]:
        """None."""
        return set()

    def summary(self, rows: Mapping[str, Row]) -> str:
        """How many searches are over."""
        n = len(self.sweep.combinations) * len(self.sweep.seeds) * len(self.search.reach)
        over = sum(found.step.over for found in self.all_searches(rows))
        return f"{over} of {n} searches over"

    # ---- what it found

    def answers(self, rows: Mapping[str, Row]) -> list[dict[str, Any]]:
        """A row for each search that has begun, as the table ``searches`` has them."""
        return [self._answer(rows, found) for found in self.all_searches(rows)]

    def _answer(self, rows: Mapping[str, Row], found: Found) -> dict[str, Any]:
        place = fingerprint({"base": self.sweep.base, "axes": found.settings})
        name = run_name({**found.settings, "reach": found.reach}, found.seed, place)
        step = found.step
        passed: Row = {}
        if step.answer is not None:
            tried = self.tries(rows, found.settings, found.seed)[step.answer]
            passed = next(row for row in tried if self._passes(row, found.reach))
        status = "open" if not step.over else "none" if step.answer is None else "found"
        columns = (*PARAMETERS, "steps", "tokens", "flops", "seconds")
        return {
            "name": name,
            "status": status,
            "seed": found.seed,
            "settings": found.settings,
            **found.settings,
            "metric": self.search.metric,
            "reach": found.reach,
            "member": None if step.answer is None else str(self.members[step.answer]),
            "value": passed.get(self.search.metric),
            "run": passed.get("name"),
            **{column: passed.get(column) for column in columns},
            "monotone": step.monotone if step.over else None,
            "runs_trained": len(found.rows),
            "runs_failed": sum(row["status"] == "failed" for row in found.rows),
            "seconds_of_all": sum(row["seconds"] or 0.0 for row in found.rows),
        }


def check_order(sweep: SweepRecipe, sizes: Mapping[str, int]) -> None:
    """Refuse a family that is not ordered by its total parameters.

    Args:
        sweep: a recipe with a search.
        sizes: total parameters by run, of every member of the first seed.

    Raises:
        ToolmemError: naming two members that are not in order.
    """
    plan = SearchPlan(sweep)
    for combination in sweep.combinations:
        runs = [plan.run_of(combination, sweep.seeds[0], m, 0) for m in range(len(plan.members))]
        for before, after in pairwise(runs):
            if sizes[before.name] >= sizes[after.name]:
                names = [run.settings[MEMBER] for run in (before, after)]
                raise ToolmemError(
                    f"search.family: {names[0]} has {sizes[before.name]:,} parameters and {names[1]}, "
                    f"which comes after it, {sizes[after.name]:,}: order the models by their total "
                    "parameters, each larger than the one before"
                )
