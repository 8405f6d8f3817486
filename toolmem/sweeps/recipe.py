"""What a sweep's YAML says, checked as it is read.

base: ../facts_in_weight.yaml            a recipe's path, from this file's folder; or the recipe itself
axes:                                    every combination is a run
width: {key: model.model.dim, values: [16, 32]}         values of one key
architecture:                                           or bundles of keys, each with its label
attention: {model.model.class_path: toolmem.models.Transformer}
minGRU: {model.model: {class_path: toolmem.models.RNN, init_args: {...}}}
seeds: 3                                 how many, or a list of them
metrics: [val/loss]                      what is kept of metrics.csv: the last value, or
{val/loss: min} for the smallest (max, last)
report: {x: width, line: architecture, metric: val/loss, mode: min, best_over: [lr]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.recipe_files import read_mapping

KEYS = ("base", "axes", "seeds", "seed_keys", "metrics", "report", "keep_checkpoints")
REDUCTIONS = ("last", "min", "max")
MODES = ("min", "max")
SEED_KEYS = ("seed_everything", "data.seed")
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


@dataclass(frozen=True)
class Axis:
    """One thing that varies.

    Args:
        name: how tables and plots call it.
        values: label -> dotted keys and what they become. A label is a number or a word.
    """

    name: str
    values: dict[Any, dict[str, Any]]


@dataclass(frozen=True)
class ReportRecipe:
    """What the sweep's plot shows.

    Args:
        metric: what is drawn upwards.
        x: the axis that is drawn along.
        line: the axis of which each value is a line; None draws one.
        mode: is a larger (``max``) or a smaller metric better?
        best_over: axes of which each point shows the best value alone.
        title: of the page.
        log_x: draw ``x`` on a log scale; decided by its values when None.
    """

    metric: str
    x: str
    line: str | None = None
    mode: str = "max"
    best_over: tuple[str, ...] = ()
    title: str | None = None
    log_x: bool | None = None


@dataclass(frozen=True)
class SweepRecipe:
    """A sweep, as its YAML says it.

    Args:
        name: of the sweep.
        base: the recipe that every run starts from.
        axes: what varies, in the order in which they change it.
        seeds: each setting is trained with each.
        seed_keys: dotted keys that a seed is written to.
        metrics: name -> which of its logged values is kept (``last``, ``min``, ``max``).
        report: the plot; None for none.
        keep_checkpoints: keep those of runs that are done; they may fill a disk.
    """

    name: str
    base: dict[str, Any]
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...] = (0,)
    seed_keys: tuple[str, ...] = SEED_KEYS
    metrics: dict[str, str] = field(default_factory=lambda: {"val/loss": "last"})
    report: ReportRecipe | None = None
    keep_checkpoints: bool = False

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
            name: of the sweep.
            folder: where a ``base`` that is a path starts from.

        Raises:
            ToolmemError: for what it cannot be, naming the key.
        """
        _check_keys("", written, KEYS)
        axes = _axes(written.get("axes"))
        metrics = _metrics(written.get("metrics", ["val/loss"]))
        for metric in metrics:
            if metric in {*COLUMNS, *(axis.name for axis in axes)}:
                raise ToolmemError(f"metrics: {metric!r} is the name of another column of results")
        report = written.get("report")
        return cls(
            name,
            _base(written.get("base"), Path(folder)),
            axes,
            _seeds(written.get("seeds", 1)),
            _strings(written.get("seed_keys", list(SEED_KEYS)), "seed_keys"),
            metrics,
            None if report is None else _report(report, [axis.name for axis in axes], metrics),
            _boolean(written.get("keep_checkpoints", False), "keep_checkpoints"),
        )


def _check_keys(place: str, written: Any, known: Sequence[str]) -> None:
    if not isinstance(written, Mapping):
        raise ToolmemError(f"{place} is {written!r}: give it as keys ({', '.join(known)})")
    for key in written:
        if key not in known:
            where = f"{place}.{key}" if place else f"{key}"
            raise ToolmemError(f"{where}: a sweep has no such key; choose from {', '.join(known)}")


def _base(written: Any, folder: Path) -> dict[str, Any]:
    if isinstance(written, str):
        return read_mapping(folder / written, f"base: {folder / written}")
    if isinstance(written, dict) and written:
        return written
    raise ToolmemError("base is missing: name a recipe's file, or write the recipe itself")


def _axes(written: Any) -> tuple[Axis, ...]:
    if not isinstance(written, Mapping) or not written:
        raise ToolmemError("axes is empty: name at least one thing that varies, with its values")
    axes = tuple(_axis(str(name), values) for name, values in written.items())
    for axis in axes:
        if axis.name in COLUMNS:
            raise ToolmemError(f"axes.{axis.name}: every result has a column of this name already")
    return axes


def _axis(name: str, written: Any) -> Axis:
    place = f"axes.{name}"
    if not isinstance(written, Mapping):
        raise ToolmemError(
            f"{place} is {written!r}: write {{key: model.model.dim, values: [...]}}, or each label "
            "with the keys that it sets"
        )
    if "values" in written or "key" in written:
        _check_keys(place, written, ("key", "values"))
        key, values = written.get("key"), written.get("values")
        if not isinstance(key, str) or not key:
            raise ToolmemError(f"{place}.key is {key!r}: name the dotted key that varies")
        if not isinstance(values, list) or not values:
            raise ToolmemError(f"{place}.values is {values!r}: give a list of values")
        bundles = {_label(place, value): {key: value} for value in values}
        if len(bundles) < len(values):
            raise ToolmemError(f"{place}.values names a value twice: {values}")
        return Axis(name, bundles)
    if not written:
        raise ToolmemError(f"{place} is empty: give it at least one value")
    for label, keys in written.items():
        if not isinstance(keys, Mapping):
            raise ToolmemError(
                f"{place}.{label} is {keys!r}: give the dotted keys that it sets, or write the axis "
                "as {key: ..., values: [...]}"
            )
    return Axis(name, {_label(place, label): dict(keys) for label, keys in written.items()})


def _label(place: str, value: Any) -> Any:
    """How a value is called: numbers, words and truth values as they are."""
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    raise ToolmemError(f"{place}: {value!r} needs a label: write it as label: {{key: value}}")


def _seeds(written: Any) -> tuple[int, ...]:
    if isinstance(written, int) and not isinstance(written, bool) and written >= 1:
        return tuple(range(written))
    if isinstance(written, list) and written and all(type(seed) is int for seed in written):
        if len(set(written)) < len(written):
            raise ToolmemError(f"seeds names one twice: {written}")
        return tuple(written)
    raise ToolmemError(f"seeds is {written!r}: give how many (at least 1), or a list of them")


def _metrics(written: Any) -> dict[str, str]:
    if isinstance(written, list):
        written = dict.fromkeys(written, "last")
    if not isinstance(written, Mapping) or not written:
        raise ToolmemError(f"metrics is {written!r}: list names of logged metrics (val/loss)")
    for name, kept in written.items():
        if kept not in REDUCTIONS:
            raise ToolmemError(f"metrics.{name} is {kept!r}: choose from {', '.join(REDUCTIONS)}")
    return {str(name): str(kept) for name, kept in written.items()}


def _report(written: Any, axes: Sequence[str], metrics: Mapping[str, str]) -> ReportRecipe:
    _check_keys("report", written, tuple(ReportRecipe.__dataclass_fields__))
    metric, x, line = (written.get(key) for key in ("metric", "x", "line"))
    if metric not in metrics:
        raise ToolmemError(
            f"report.metric is {metric!r}: choose from metrics ({', '.join(metrics)})"
        )
    best_over = _strings(written.get("best_over", []), "report.best_over")
    for key, name in (("x", x), ("line", line), *(("best_over", name) for name in best_over)):
        if name not in axes and not (key == "line" and name is None):
            raise ToolmemError(f"report.{key} is {name!r}: choose from axes ({', '.join(axes)})")
    drawn = [name for name in (x, line, *best_over) if name is not None]
    if len(set(drawn)) < len(drawn):
        raise ToolmemError("report: x, line and best_over must name different axes")
    if rest := [name for name in axes if name not in drawn]:
        raise ToolmemError(
            f"report: the axis {rest[0]} is neither x nor line nor in best_over: points of its values "
            "would fall together"
        )
    mode = written.get("mode", "max")
    if mode not in MODES:
        raise ToolmemError(f"report.mode is {mode!r}: choose from {', '.join(MODES)}")
    log_x = written.get("log_x")
    if log_x is not None:
        _boolean(log_x, "report.log_x")
    return ReportRecipe(metric, x, line, mode, best_over, written.get("title"), log_x)


def _strings(written: Any, key: str) -> tuple[str, ...]:
    if isinstance(written, list) and all(isinstance(name, str) for name in written):
        return tuple(written)
    raise ToolmemError(f"{key} is {written!r}: give a list of names")


def _boolean(written: Any, key: str) -> bool:
    if isinstance(written, bool):
        return written
    raise ToolmemError(f"{key} is {written!r}: it is true or false")
