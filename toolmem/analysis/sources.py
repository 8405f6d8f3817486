"""What is plotted: a sweep's folder or a run's, read once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.data.people import ATTRIBUTES
from toolmem.errors import ToolmemError
from toolmem.recipe_files import read_mapping

if TYPE_CHECKING:
    from toolmem.analysis.report import Table
    from toolmem.sweeps.recipe import SweepRecipe
    from toolmem.sweeps.report_recipe import ReportRecipe

Row = Mapping[str, Any]


@dataclass(frozen=True)
class SweepSource:
    """A sweep and its results.

    Args:
        path: its folder.
        recipe: what it is, with a report.
        rows: results of its runs, those that failed among them.
        answers: of its searches, as the table ``searches`` has them.
        command: that makes them again.
        n_planned: runs that the recipe asks for; None where results decide it.
    """

    path: Path
    recipe: SweepRecipe
    rows: Sequence[Row]
    answers: Sequence[Row] = ()
    command: str = ""
    n_planned: int | None = None

    @classmethod
    def open(cls, path: str | Path, command: str = "", metric: str | None = None) -> SweepSource:
        """Read a sweep's folder.

        Args:
            path: the folder.
            command: that makes it again; made up of its name when empty.
            metric: to be drawn in place of the recipe's own.

        Raises:
            ToolmemError: for a folder without a sweep or without results, results of another sweep, or
                a metric that no run has.
        """
        from toolmem.sweeps.folder import SweepFolder
        from toolmem.sweeps.plans import GridPlan, make_plan
        from toolmem.sweeps.recipe import SweepRecipe
        from toolmem.sweeps.search import SearchPlan

        folder = SweepFolder(Path(path))
        written = folder.path / "sweep.yaml"
        if not written.is_file():
            raise ToolmemError(f"{path} is no folder of a sweep: it has no sweep.yaml")
        recipe = SweepRecipe.read(written)
        if "name" not in read_mapping(written):
            recipe = replace(recipe, name=folder.path.resolve().name)
        every = {row["name"]: row for row in folder.results.rows()}
        if not every:
            raise ToolmemError(
                f"{path} has no results yet: `toolmem sweep RECIPE --out {path}` trains its runs"
            )
        plan = make_plan(recipe)
        rows = plan.mine(every)
        if not rows:
            axes = next(iter(every.values()))["settings"]
            raise ToolmemError(
                f"{folder.results.path} has {len(every)} runs, and none is of {written}: they are another "
                f"sweep's, over {', '.join(axes) or 'no axes'}; draw that one with its own recipe's folder"
            )
        answers = plan.answers(every) if isinstance(plan, SearchPlan) else []
        n_planned = len(plan.runs) if isinstance(plan, GridPlan) else None
        command = command or f"toolmem sweep sweep.yaml --out {folder.path.name}"
        recipe = replace(recipe, report=report_of(recipe, rows, metric))
        return cls(folder.path, recipe, rows, answers, command, n_planned)

    @property
    def report(self) -> ReportRecipe:
        """What is drawn."""
        assert self.recipe.report is not None
        return self.recipe.report

    @cached_property
    def done(self) -> list[Row]:
        """Results of runs that went to their end."""
        from toolmem.sweeps.recipe import HALVED

        return [r for r in self.rows if r["status"] == "done" and r.get("stopped") != HALVED]

    def axes(self) -> list[str]:
        """Names of its axes in the order of tables: of pictures, of lines, along, and the others."""
        report = self.report
        first = [report.panel, report.line, report.x, *report.best_over]
        every = [*first, *(axis.name for axis in self.recipe.axes)]
        return list(dict.fromkeys(name for name in every if name is not None))

    @property
    def title(self) -> str:
        """Of its page."""
        return self.report.title or f"Sweep {self.recipe.name}"

    def lead(self) -> str:
        """How many runs there are, and how many failed."""
        n_done = sum(row["status"] == "done" for row in self.rows)
        words = [f"{n_done:,} runs."]
        if self.n_planned is not None and self.n_planned > len(self.rows):
            words = [f"{n_done:,} runs of {self.n_planned:,}; the others are still to be trained."]
        if failed := len(self.rows) - n_done:
            words.append(f"{failed} runs failed; results.duckdb says why.")
        return " ".join(words)

    def made(self, rows: Sequence[Row] | None = None) -> str:
        """By which runs a figure was made, in a line.

        Args:
            rows: the runs; all when None.
        """
        rows = self.rows if rows is None else rows
        seconds = sum(row.get("seconds") or 0 for row in rows)
        threads = distinct(rows, "threads")
        return (
            f"{len(rows):,} runs of {self.recipe.name}.yaml, seeds {distinct(rows, 'seed')}, "
            f"{seconds:,.0f} s of training in all, {self.processors()}, threads a run: {threads}."
        )

    def processors(self) -> str:
        """What trained it: as its rows say or, rows of older versions, their runs' folders."""
        named = [row for row in self.rows if row.get("processor")]
        if named:
            return distinct(named, "processor")
        found = (environment_of(self.path / "runs" / row["name"]) for row in self.rows[:20])
        return ", ".join(dict.fromkeys(one["processor"] for one in found if one)) or "unknown"

    def circumstances(self) -> list[tuple[str, str]]:
        """How it was made, (name, value) pairs."""
        seconds = sum(row.get("seconds") or 0 for row in self.rows)
        return [
            ("command", self.command),
            ("seeds", distinct(self.rows, "seed")),
            ("seconds of training, all runs", f"{seconds:,.0f}"),
            ("processor", self.processors()),
            ("threads a run", distinct(self.rows, "threads")),
            ("trained by toolmem", distinct(self.rows, "toolmem_version")),
            ("commit", distinct(self.rows, "git_commit")),
        ]

    def recipe_text(self) -> str:
        """The YAML that makes it again; empty where it is gone."""
        return text_of(self.path / "sweep.yaml")

    def records(
        self, rows: Sequence[Row] | None = None, more: Mapping[str, Any] | None = None
    ) -> Table:
        """Heads and rows of its CSV, a row a run.

        Args:
            rows: the runs; those that went to their end when None.
            more: further columns: name -> what makes a cell of a row; they come after the axes.
        """
        rows = self.done if rows is None else rows
        columns: dict[str, Any] = {name: _cell(name) for name in self.axes()}
        if all(isinstance(row["settings"].get("people"), int) for row in rows):
            columns["facts"] = lambda row: len(ATTRIBUTES) * row["settings"]["people"]
        columns |= more or {}
        names = (
            "seed",
            "params_total",
            "params_non_embedding",
            "params_untied",
            *self.recipe.metrics,
        )
        columns |= {name: _cell(name) for name in names}
        columns["tokens_trained"] = _cell("tokens")
        columns |= {
            name: _cell(name) for name in ("steps", "flops", "seconds", "threads", "processor")
        }
        return list(columns), [[cell(row) for cell in columns.values()] for row in rows]


def _cell(name: str) -> Any:
    return lambda row: row["settings"].get(name, row.get(name))


def report_of(recipe: SweepRecipe, rows: Sequence[Row], metric: str | None) -> ReportRecipe:
    """What a sweep's plot shows: as its recipe says or, where it does not, as it can best be drawn.

    Args:
        recipe: of the sweep.
        rows: of its runs.
        metric: to be drawn in place of the recipe's own.

    Raises:
        ToolmemError: for a metric that no run has.
    """
    from toolmem.sweeps.report_recipe import PARAMETERS, default_report

    searching = recipe.search is not None
    choices = list(PARAMETERS if searching else recipe.metrics)
    report = recipe.report
    if report is None:
        axes = {axis.name: list(axis.values) for axis in recipe.axes}
        report = default_report(axes, choices, searching)
    if metric is None or metric == report.metric:
        return report
    if not searching:
        choices += ["params_total", "tokens", "flops", "seconds", "steps"]
    if metric not in choices:
        raise ToolmemError(f"metric: no run has {metric!r}; there are {', '.join(choices)}")
    mode = "max" if metric in recipe.metrics and "loss" not in metric else "min"
    return replace(report, metric=metric, mode=mode, kind=None, published={}, title=None)


@dataclass(frozen=True)
class RunSource:
    """A run.

    Args:
        path: its folder.
        metrics: value by step, by metric, in the order of ``metrics.csv``; then what evaluations of its
            checkpoints found (``evaluations/STEP.csv``).
        metric: to be drawn alone; None for all.
    """

    path: Path
    metrics: Mapping[str, Mapping[int, float]]
    metric: str | None = None

    @classmethod
    def open(cls, path: str | Path, metric: str | None = None) -> RunSource:
        """Read a run's folder.

        Args:
            path: the folder.
            metric: to be drawn alone.

        Raises:
            ToolmemError: for a folder without metrics, or without this one.
        """
        from toolmem.evaluation.curves import read_points
        from toolmem.training.loggers import read_rows

        folder = Path(path)
        rows = read_rows(folder / "metrics.csv")
        metrics: dict[str, dict[int, float]] = {}
        for row in rows:
            for name, value in row.items():
                if name != "step" and value:
                    metrics.setdefault(name, {})[int(row["step"])] = float(value)
        for step, found in read_points(folder).items():
            for name, number in found.items():
                if math.isfinite(number):
                    metrics.setdefault(name, {})[step] = number
        if not metrics:
            raise ToolmemError(f"{folder / 'metrics.csv'} is empty: nothing was logged yet")
        if metric is not None and metric not in metrics:
            raise ToolmemError(
                f"metric: {path} never logged {metric!r}; there are {', '.join(metrics)}"
            )
        return cls(folder, metrics, metric)

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.path.resolve().name

    @property
    def title(self) -> str:
        """Of its page."""
        return f"Run {self.name}"

    def lead(self) -> str:
        """How far it came."""
        last = max(step for values in self.metrics.values() for step in values)
        words = f"{last:,} steps"
        if tokens := self.metrics.get("train/tokens"):
            words += f", {max(tokens.values()):,.0f} tokens"
        return f"{words}."

    def made(self) -> str:
        """How it was made, in a line."""
        found = dict(self.circumstances())
        return f"Seed {found['seed']}, {found['processor']}, threads: {found['threads']}."

    def circumstances(self) -> list[tuple[str, str]]:
        """How it was made, (name, value) pairs."""
        about = environment_of(self.path) or {}
        config = self._config()
        result = _json(self.path / "result.json") or {}
        seconds = result.get("seconds")
        packages = about.get("packages", {})
        pairs = [
            ("command", f"toolmem fit --config config.yaml --name {self.name}"),
            ("seed", str(config.get("seed_everything", "unknown"))),
            ("seconds", "unknown" if seconds is None else f"{seconds:,.0f}"),
            ("processor", str(about.get("processor", "unknown"))),
            ("threads", str(about.get("torch_threads", "unknown"))),
        ]
        if about.get("gpus"):
            pairs.append(("accelerators", ", ".join(about["gpus"])))
        pairs += [(name, packages[name]) for name in ("torch", "lightning") if name in packages]
        if "toolmem" in packages:
            pairs.append(("trained by toolmem", packages["toolmem"]))
        return pairs

    def _config(self) -> dict[str, Any]:
        path = self.path / "config.yaml"
        return read_mapping(path) if path.is_file() else {}

    def recipe_text(self) -> str:
        """The YAML that makes it again; empty where it is gone."""
        return text_of(self.path / "config.yaml")

    def dialogues(self, most: int = 6) -> list[tuple[str, list[tuple[str, str]], str]]:
        """Of its last round of questions: heading, (role, text) turns and verdict of each.

        Args:
            most: of each split.
        """
        rounds = sorted((self.path / "samples").glob("step_*.jsonl"), key=_step_of)
        if not rounds:
            return []
        samples = [json.loads(line) for line in text_of(rounds[-1]).splitlines()]
        found = []
        for split in dict.fromkeys(sample["split"] for sample in samples):
            for sample in [one for one in samples if one["split"] == split][:most]:
                verdict = "right" if sample["correct"] else f"wrong, it is {sample['expected']}"
                turns = [(turn["role"], turn["text"]) for turn in sample["turns"]]
                heading = f"step {_step_of(rounds[-1]):,}, {split} person"
                found.append((heading, turns, verdict))
        return found


Source = SweepSource | RunSource


def open_source(path: str | Path, metric: str | None = None) -> Source:
    """Read what is to be plotted.

    Args:
        path: a sweep's folder, or a run's.
        metric: to be drawn in place of others.

    Raises:
        ToolmemError: for a folder that is neither, or has nothing to draw.
    """
    folder = Path(path)
    if (folder / "sweep.yaml").is_file() or (folder / "results.duckdb").is_file():
        return SweepSource.open(folder, metric=metric)
    if (folder / "metrics.csv").is_file():
        return RunSource.open(folder, metric=metric)
    if not folder.is_dir():
        raise ToolmemError(f"{path}: there is no such folder; name a sweep's or a run's")
    runs = sorted(one.parent.name for one in folder.glob("*/metrics.csv"))
    hint = f"; the runs in it are {', '.join(runs[:5])}" if runs else ""
    raise ToolmemError(
        f"{path} is neither a sweep's folder (with sweep.yaml) nor a run's (with metrics.csv){hint}"
    )


def distinct(rows: Iterable[Row], column: str) -> str:
    """The different values of a column."""
    found = dict.fromkeys(str(row[column]) for row in rows if row.get(column) is not None)
    return ", ".join(found) or "unknown"


def environment_of(folder: Path) -> dict[str, Any] | None:
    """Versions and hardware of a run; None where its folder does not say."""
    return _json(folder / "environment.json")


def _json(path: Path) -> dict[str, Any] | None:
    text = text_of(path)
    return json.loads(text) if text else None


def text_of(path: Path) -> str:
    """A file's text; nothing where it is not there."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _step_of(path: Path) -> int:
    return int(path.stem.partition("_")[2])
