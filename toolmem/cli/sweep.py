"""``toolmem sweep``: many runs from one recipe, one file of results, a plot."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolmem.class_path import OPTION, allowed_packages
from toolmem.cli.functions import call
from toolmem.console import stderr, stdout
from toolmem.errors import ToolmemError
from toolmem.sweeps.slurm_options import SlurmOptions

if TYPE_CHECKING:
    from toolmem.sweeps.executors import Executor
    from toolmem.sweeps.folder import SweepFolder
    from toolmem.sweeps.plans import Plan
    from toolmem.sweeps.recipe import SweepRecipe

EXAMPLE = "toolmem sweep recipes/sweeps/mqar.yaml --out sweeps/mqar"
FLAGS = {"--dry-run": "--dry_run=true", "--retry-failed": "--retry_failed=true"}
WORKER = (sys.executable, "-m", "toolmem.cli.sweep_worker")


def sweep(
    recipe: str,
    out: str,
    workers: int | None = None,
    executor: Literal["local", "slurm"] = "local",
    slurm: SlurmOptions = SlurmOptions(),  # noqa: B008
    dry_run: bool = False,
    retry_failed: bool = False,
) -> None:
    """Train every run of a sweep that has no result yet, and draw the plot.

    The same command goes on where it was stopped, however that was; a changed recipe adds what is new.
    ``--dry-run`` and ``--retry-failed`` need no value.

    Args:
        recipe: the sweep's YAML.
        out: its folder: results.duckdb, report.html, and a folder of each run.
        workers: runs that are trained at a time on this machine; by default, one a core.
        executor: local, in processes of this machine; or slurm, a job a run.
        slurm: what each job asks for, before what the recipe says.
        dry_run: only print how many runs there are, their parameters, tokens, FLOPs and hours on this
            machine.
        retry_failed: train also those again that have failed.

    Raises:
        ToolmemError: for a recipe that cannot be, or a folder in which another sweep runs.
    """
    from toolmem.analysis.page import load_kind
    from toolmem.cli.sweep_plan import check, show_plan
    from toolmem.cli.sweep_progress import train_all
    from toolmem.sweeps.folder import SweepFolder
    from toolmem.sweeps.plans import make_plan
    from toolmem.sweeps.recipe import SweepRecipe
    from toolmem.sweeps.runner import SweepRunner
    from toolmem.sweeps.slurm import check_no_jobs

    if executor == "local" and (given := slurm.given()):
        raise ToolmemError(f"--slurm.{given[0]} is of --executor slurm: add that, or leave it out")
    read = SweepRecipe.read(recipe)
    if read.report is not None and read.report.kind is not None:
        load_kind(read.report.kind)
    plan = make_plan(read)
    folder = SweepFolder(Path(out))
    n_workers = cores() if workers is None else workers
    runner = SweepRunner(read, plan, folder)
    trainer = executor_of("local" if dry_run else executor, slurm, read, folder, workers)
    if dry_run:
        runner.check_folder()
        check(read)
        show_plan(read, plan, folder, n_workers)
        return
    with folder.locked() as lock:
        if executor == "local":
            check_no_jobs(folder)
        if runner.take_stock(retry_failed):
            check(read)
        keep_recipe(recipe, read.name, folder)
        try:
            train_all(runner, trainer, lock)
        except KeyboardInterrupt:
            stderr().print(
                f"{runner.state.to_go} runs are left: the same command goes on with them"
            )
            raise
        finally:
            if words := trainer.left():
                stderr().print(words, highlight=False, soft_wrap=True)
        finish(read, plan, folder, recipe)


def executor_of(
    kind: str, slurm: SlurmOptions, read: SweepRecipe, folder: SweepFolder, workers: int | None
) -> Executor:
    """What trains the sweep's runs.

    Args:
        kind: ``local`` or ``slurm``.
        slurm: options of the command.
        read: the recipe.
        folder: the sweep's.
        workers: of ``local``; None for one a core.

    Raises:
        ToolmemError: for options of the other, or where there is no Slurm.
    """
    if kind == "local":
        from toolmem.sweeps.local import LocalExecutor

        command = (*WORKER, *(f"{OPTION}={package}" for package in allowed_packages()))
        return LocalExecutor(read, folder, command, cores() if workers is None else workers)
    from toolmem.cli.sweep_job import SweepJob
    from toolmem.sweeps.slurm import SlurmExecutor

    if workers is not None:
        raise ToolmemError(
            "--workers is of --executor local: leave it out; --slurm.array_parallelism says how many jobs "
            "run at a time"
        )
    return SlurmExecutor(read, folder, slurm.over(read.slurm), SweepJob)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_recipe(recipe: str, name: str, folder: SweepFolder) -> None:
    """Leave the recipe beside its results, all other files written out, so that it can be read from there."""
    import yaml

    from toolmem.files import write_text
    from toolmem.recipe_files import read_mapping
    from toolmem.sweeps.axes import with_files

    written = {"name": name, **read_mapping(recipe)}
    if isinstance(written.get("base"), str):
        written["base"] = read_mapping(Path(recipe).parent / written["base"])
    written["axes"] = with_files(written.get("axes"), Path(recipe).parent)
    if written["axes"] is None:
        del written["axes"]
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=110)
    write_text(folder.path / "sweep.yaml", text)


def finish(read: SweepRecipe, plan: Plan, folder: SweepFolder, recipe: str) -> None:
    """Print the results, and draw the plot."""
    from toolmem.analysis.page import Request, panels_of, write_page
    from toolmem.analysis.sources import SweepSource

    by_name = {row["name"]: row for row in folder.results.rows()}
    rows = plan.mine(by_name)
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed[:10]:
        stderr().print(f"failed: {row['name']}: {row['error']}", style="red", markup=False)
    if failed:
        stderr().print(
            f"{len(failed)} of {len(rows)} runs failed: runs/NAME/log.txt has more; --retry-failed "
            "tries them again"
        )
    if len(failed) == len(rows):
        raise ToolmemError(f"every run failed, the first so: {failed[0]['error']}")
    if read.report is None:
        show_results(read, plan, by_name, rows)
    else:
        command = f"toolmem sweep {shlex.quote(recipe)} --out {shlex.quote(str(folder.path))}"
        source = SweepSource.open(folder.path, command)
        panels = panels_of(source, Request(), read.report.kind)
        page, *_ = write_page(source, panels, folder.path / "report.html", ("png", "svg"))
        for panel in panels:
            if panel.table is not None:
                show_table(read.report.title or read.name, *panel.table)
        stdout().print(f"{page} has the plot", highlight=False, soft_wrap=True)
    also = "" if read.search is None else " in the table runs, every answer in searches"
    stdout().print(f"{folder.results.path} has every run{also}", highlight=False, soft_wrap=True)


def show_results(
    read: SweepRecipe,
    plan: Plan,
    by_name: Mapping[str, dict[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Print the results of a sweep that says nothing of a plot."""
    from toolmem.sweeps.recipe import HALVED
    from toolmem.sweeps.search import SearchPlan

    axes = [axis.name for axis in read.axes]
    if isinstance(plan, SearchPlan):
        rows = plan.answers(by_name)
        heads = [
            *axes,
            "seed",
            "reach",
            "status",
            "member",
            "params_total",
            "value",
            "runs_trained",
        ]
    else:
        rows = [row for row in rows if row["stopped"] != HALVED]
        heads = [*axes, "seed", "status", *read.metrics, "seconds"]
    show_table(read.name, heads, [[cell(row.get(head)) for head in heads] for row in rows])


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right" if head not in ("status",) else "left")
    for row in rows:
        table.add_row(*map(str, row))
    stdout().print(table)


def main(command: str, argv: list[str]) -> int:
    """Entry of ``toolmem sweep``.

    Args:
        command: ``sweep``.
        argv: the words after it.
    """
    words = [FLAGS.get(word, word) for word in argv]
    call(sweep, words, prog=f"toolmem {command}", positional=("recipe",), example=EXAMPLE)
    return 0
