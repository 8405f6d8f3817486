"""What a sweep's YAML says, checked as it is read.

name: first                              how files are called; by default, as the recipe's file
base: ../facts_in_weight.yaml            a recipe's path, from this file's folder; or the recipe itself
axes:                                    every combination is a run
width: {key: model.model.dim, values: [16, 32]}         values of one key
architecture:                                           or bundles of keys, each with its label
attention: {model.model.class_path: toolmem.models.Transformer}
minGRU: {model.model: {class_path: toolmem.models.RNN, init_args: {...}}}
list: [{width: 16, lr: 1e-3}, ...]       only these combinations of the axes; or
random: {n: 20, seed: 0}                 so many at random
search: {family: {...}, metric: recall/exact_match, reach: 0.95}   for each the smallest model that ...
halving: {axis: lr, metric: val/loss, keep: 0.5, rungs: [200, 400]}  at each rung the worse ones end
seeds: 3                                 how many, or a list of them
metrics: [val/loss]                      what is kept of metrics.csv: the last value, or
{val/loss: min} for the smallest (max, last)
report: {x: width, line: architecture, metric: val/loss, mode: min, best_over: [lr]}
slurm: {timeout_min: 240, mem_gb: 8}     what each job asks for, with --executor slurm
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.recipe_files import get_key, read_mapping
from toolmem.sweeps.axes import Axis, combine, parse_axes, parse_axis, with_files
from toolmem.sweeps.checks import (
    boolean,
    check_keys,
    is_number,
    is_whole,
    one_of,
    strings,
)
from toolmem.sweeps.report_recipe import MODES, PARAMETERS, ReportRecipe, parse_report
from toolmem.sweeps.slurm_options import SlurmOptions

KEYS = (
    "name", "base", "axes", "list", "random", "search", "halving", "seeds", "seed_keys", "metrics", "report",
    "keep_checkpoints", "slurm",
)  # fmt: skip
REDUCTIONS = ("last", "min", "max")
SEED_KEYS = ("seed_everything", "data.seed")
MEMBER = "member"  # the column of a search's family
# What every row of results has; an axis or metric cannot be called so.
COLUMNS = {
    "name": "VARCHAR PRIMARY KEY",
    "status": "VARCHAR",
    "error": "VARCHAR",
    "seed": "BIGINT",
    "settings": "JSON",
    "recipe": "JSON",
    "params_total": "BIGINT",
    "params_non_embedding": "BIGINT",
    "steps": "BIGINT",
    "tokens": "BIGINT",
    "flops": "DOUBLE",
    "seconds": "DOUBLE",
    "threads": "BIGINT",
    "finished": "VARCHAR",
    "toolmem_version": "VARCHAR",
    "git_commit": "VARCHAR",
}
# What rows may have beside, those of older versions not: why a run ended before its last step, by what
# halving judged it at rungs, its parameters were no table tied, and what trained it.
MORE_COLUMNS = {
    "stopped": "VARCHAR",
    "judged": "JSON",
    "params_untied": "BIGINT",
    "processor": "VARCHAR",
}
HALVED = "halving"  # the run was left, or waits, at a rung
MAX_SEEDS = 100_000


@dataclass(frozen=True)
class SearchRecipe:
    """For each combination of the axes and each seed: the smallest model that reaches a value.

    Args:
        family: the models, ordered by their total parameters.
        metric: that is to be reached.
        reach: the values, each searched for.
        check: see whether the member above the one found reaches it too.
    """

    family: Axis
    metric: str
    reach: tuple[float, ...]
    check: bool = True


@dataclass(frozen=True)
class HalvingRecipe:
    """Successive halving (arXiv 1502.07943): all values of an axis start, at each rung the worse ones end.

    Args:
        axis: whose values compete, within each combination of the others, by the mean over seeds.
        metric: by which.
        rungs: optimizer steps at which they are judged; the best go on to ``trainer.max_steps``.
        keep: the share that goes on from each rung, rounded up.
        mode: is a larger (``max``) or a smaller metric better?
    """

    axis: str
    metric: str
    rungs: tuple[int, ...]
    keep: float = 0.5
    mode: str = "min"


@dataclass(frozen=True)
class SweepRecipe:
    """A sweep, as its YAML says it.

    Args:
        name: of the sweep.
        base: the recipe that every run starts from.
        axes: what varies, in the order in which they change it.
        combinations: label by axis, of each setting that is trained.
        seeds: each setting is trained with each.
        seed_keys: dotted keys that a seed is written to.
        metrics: name -> which of its logged values is kept (``last``, ``min``, ``max``).
        report: the plot; None for none.
        keep_checkpoints: keep those of runs that are done; they may fill a disk.
        search: what is searched for each combination; None when each is one run.
        halving: which runs are ended early, judged against others; None for none.
        slurm: what its jobs ask for where Slurm trains it.
    """

    name: str
    base: dict[str, Any]
    axes: tuple[Axis, ...]
    combinations: tuple[dict[str, Any], ...]
    seeds: tuple[int, ...] = (0,)
    seed_keys: tuple[str, ...] = SEED_KEYS
    metrics: dict[str, str] = field(default_factory=lambda: {"val/loss": "last"})
    report: ReportRecipe | None = None
    keep_checkpoints: bool = False
    search: SearchRecipe | None = None
    halving: HalvingRecipe | None = None
    slurm: SlurmOptions = field(default_factory=SlurmOptions)

    @property
    def varying(self) -> tuple[Axis, ...]:
        """All axes of a run, a search's family the last."""
        return self.axes if self.search is None else (*self.axes, self.search.family)

    @classmethod
    def read(cls, path: str | Path) -> SweepRecipe:
        """Read a sweep's YAML.

        Args:
            path: the file.

        Raises:
            ToolmemError: for what it cannot be, naming the key.
        """
        path = Path(path)
        return cls.parse(read_mapping(path), path.stem, path.parent)

    @classmethod
    def parse(cls, written: Mapping[str, Any], name: str, folder: str | Path = ".") -> SweepRecipe:
        """Check a sweep that was read.

        Args:
            written: the YAML's content.
            name: of the sweep, where it does not say its own.
            folder: where a ``base``, and labels, that are paths start from.

        Raises:
            ToolmemError: for what it cannot be, naming the key.
        """
        check_keys("", written, KEYS)
        base = _base(written.get("base"), Path(folder))
        searching = written.get("search") is not None
        axes: tuple[Axis, ...] = ()
        if not searching or "axes" in written:
            axes = parse_axes(with_files(written.get("axes"), folder))
        called = written.get("name", re.sub(r"[^\w.-]+", "-", name))
        if not isinstance(called, str) or not re.fullmatch(r"[\w.-]+", called):
            raise ToolmemError(
                f"name is {called!r}: files are called by it, so give a word of letters, digits, . _ -"
            )
        axes, combinations = combine(axes, written.get("list"), written.get("random"))
        metrics = _metrics(written.get("metrics", ["val/loss"]))
        _check_names(axes, metrics, searching)
        search = _search(written["search"], metrics, base) if searching else None
        halving = _halving(written.get("halving"), axes, metrics, base)
        if search is not None and halving is not None:
            raise ToolmemError("search and halving are both there: keep one of them")
        report = written.get("report")
        names = [axis.name for axis in axes]
        if report is not None:
            drawn = PARAMETERS if searching else tuple(metrics)
            alike = [axis.name for axis in axes if len(axis.values) == 1]
            report = parse_report(report, names, drawn, searching, alike)
        return cls(
            called,
            base,
            axes,
            combinations,
            _seeds(written.get("seeds", 1)),
            strings(written.get("seed_keys", list(SEED_KEYS)), "seed_keys"),
            metrics,
            report,
            boolean(written.get("keep_checkpoints", False), "keep_checkpoints"),
            search,
            halving,
            SlurmOptions.parse(written.get("slurm")),
        )


def _check_names(axes: Sequence[Axis], metrics: Mapping[str, str], searching: bool) -> None:
    taken = {*COLUMNS, *MORE_COLUMNS, *((MEMBER,) if searching else ())}
    for axis in axes:
        if axis.name in taken:
            raise ToolmemError(f"axes.{axis.name}: every result has a column of this name already")
    for metric in metrics:
        if metric in {*taken, *(axis.name for axis in axes)}:
            raise ToolmemError(f"metrics: {metric!r} is the name of another column of results")


def _base(written: Any, folder: Path) -> dict[str, Any]:
    if isinstance(written, str):
        return read_mapping(folder / written, f"base: {folder / written}")
    if isinstance(written, dict) and written:
        return written
    raise ToolmemError("base is missing: name a recipe's file, or write the recipe itself")


def _seeds(written: Any) -> tuple[int, ...]:
    if isinstance(written, int) and not isinstance(written, bool) and written >= 1:
        if written > MAX_SEEDS:
            raise ToolmemError(f"seeds is {written}: at most {MAX_SEEDS:,}")
        return tuple(range(written))
    if isinstance(written, list) and written and all(type(seed) is int for seed in written):
        if len(set(written)) < len(written):
            raise ToolmemError(f"seeds names one twice: {written}")
        return tuple(written)
    raise ToolmemError(f"seeds is {written!r}: give how many (at least 1), or a list of them")


def _metrics(written: Any) -> dict[str, str]:
    if isinstance(written, list) and all(isinstance(name, str) for name in written):
        written = dict.fromkeys(written, "last")
    if not isinstance(written, Mapping) or not written:
        raise ToolmemError(f"metrics is {written!r}: list names of logged metrics (val/loss)")
    for name, kept in written.items():
        if not isinstance(kept, str) or kept not in REDUCTIONS:
            raise ToolmemError(f"metrics.{name} is {kept!r}: choose from {', '.join(REDUCTIONS)}")
    return {str(name): str(kept) for name, kept in written.items()}


def _search(written: Any, metrics: Mapping[str, str], base: dict[str, Any]) -> SearchRecipe:
    check_keys("search", written, tuple(SearchRecipe.__dataclass_fields__))
    family = parse_axis("search.family", MEMBER, written.get("family"))
    if len(family.values) < 2:
        raise ToolmemError("search.family: name at least two models, the smallest first")
    metric = one_of(written.get("metric"), "search.metric", tuple(metrics))
    reach = written.get("reach")
    values = reach if isinstance(reach, list) else [reach]
    if not values or not all(map(is_number, values)) or len(set(values)) < len(values):
        raise ToolmemError(f"search.reach is {reach!r}: give a number, or a list of different ones")
    stop_at = get_key(base, "recall.stop_at")
    if metric == "recall/exact_match" and is_number(stop_at) and stop_at < max(values):
        raise ToolmemError(
            f"search.reach: runs end at recall.stop_at {stop_at}, before they can reach {max(values)}: "
            "raise it, or leave it out"
        )
    check = boolean(written.get("check", True), "search.check")
    return SearchRecipe(family, metric, tuple(map(float, values)), check)


def _halving(
    written: Any, axes: Sequence[Axis], metrics: Mapping[str, str], base: dict[str, Any]
) -> HalvingRecipe | None:
    if written is None:
        return None
    check_keys("halving", written, tuple(HalvingRecipe.__dataclass_fields__))
    axis = one_of(written.get("axis"), "halving.axis", [one.name for one in axes])
    metric = one_of(written.get("metric"), "halving.metric", tuple(metrics))
    keep = written.get("keep", 0.5)
    if not (is_number(keep) and 0 < keep < 1):
        raise ToolmemError(f"halving.keep is {keep!r}: give a share above 0 and below 1")
    rungs = written.get("rungs")
    last = get_key(base, "trainer.max_steps")
    if not (isinstance(rungs, list) and rungs and all(is_whole(step, 1) for step in rungs)):
        raise ToolmemError(f"halving.rungs is {rungs!r}: list the steps at which runs are judged")
    if any(later <= step for step, later in pairwise(rungs)):
        raise ToolmemError(f"halving.rungs is {rungs!r}: each must be later than the one before")
    if not is_whole(last, 1) or last <= rungs[-1]:
        raise ToolmemError(
            f"halving.rungs ends at {rungs[-1]}, base.trainer.max_steps is {last}: rungs come before it"
        )
    mode = one_of(written.get("mode", "min"), "halving.mode", MODES)
    return HalvingRecipe(axis, metric, tuple(rungs), float(keep), mode)
