"""``toolmem sweep``: many runs from one recipe, one file of results, a plot."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.cli.functions import call
from toolmem.console import stderr, stdout
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
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
    dry_run: bool = False,
    retry_failed: bool = False,
) -> None:
    """Train every run of a sweep that has no result yet, and draw the plot.

    The same command goes on where it was stopped, however that was; a changed recipe adds what is new.
    ``--dry-run`` and ``--retry-failed`` need no value.

    Args:
        recipe: the sweep's YAML.
        out: its folder: results.duckdb, report.html, and a folder of each run.
        workers: runs that are trained at a time; by default, one a core.
        dry_run: only print how many runs there are, their parameters, tokens, FLOPs and hours on this
            machine.
        retry_failed: train also those again that have failed.

    Raises:
        ToolmemError: for a recipe that cannot be, or a folder in which another sweep runs.
    """
    from toolmem.cli.sweep_plan import check, show_plan
    from toolmem.cli.sweep_progress import train_all
    from toolmem.sweeps.folder import SweepFolder
    from toolmem.sweeps.plans import make_plan
    from toolmem.sweeps.recipe import SweepRecipe
    from toolmem.sweeps.runner import SweepRunner

    read = SweepRecipe.read(recipe)
    plan = make_plan(read)
    folder = SweepFolder(Path(out))
    n_workers = cores() if workers is None else workers
    runner = SweepRunner(read, plan, folder, WORKER, n_workers)
    if dry_run:
        runner.check_folder()
        check(read)
        show_plan(read, plan, folder, n_workers)
        return
    with folder.locked() as lock:
        if runner.take_stock(retry_failed):
            check(read)
        keep_recipe(recipe, folder)
        try:
            train_all(runner, lock)
        except KeyboardInterrupt:
            stderr().print(
                f"{runner.state.to_go} runs are left: the same command goes on with them"
            )
            raise
        finish(read, plan, folder, recipe)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_recipe(recipe: str, folder: SweepFolder) -> None:
    """Leave the recipe beside its results, its base written out, so that it can be read from there."""
    import yaml

    from toolmem.files import write_text
    from toolmem.recipe_files import read_mapping

    written = read_mapping(recipe)
    if isinstance(written.get("base"), str):
        written["base"] = read_mapping(Path(recipe).parent / written["base"])
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=110)
    write_text(folder.path / "sweep.yaml", text)


def finish(read: SweepRecipe, plan: Plan, folder: SweepFolder, recipe: str) -> None:
    """Print the results, and draw the plot."""
    from toolmem.analysis.sweep_plot import write_sweep_report
    from toolmem.sweeps.recipe import HALVED
    from toolmem.sweeps.search import SearchPlan

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
    command = f"toolmem sweep {shlex.quote(recipe)} --out {shlex.quote(str(folder.path))}"
    if isinstance(plan, SearchPlan):
        finish_search(read, plan.answers(by_name), rows, folder, command)
        return
    if read.halving is not None:
        rows = [row for row in rows if row["stopped"] != HALVED]
    if read.report is None:
        heads = [*(axis.name for axis in read.varying), "seed", "status", *read.metrics, "seconds"]
        show_table(read.name, heads, [[cell(row.get(head)) for head in heads] for row in rows])
        stdout().print(f"{folder.results.path} has every run", highlight=False, soft_wrap=True)
        return
    heads, cells = write_sweep_report(folder.path, read, rows, command)
    show_table(read.report.title or read.name, heads, cells)
    stdout().print(
        f"{folder.path / 'report.html'} has the plot, {folder.results.path} every run",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def finish_search(
    read: SweepRecipe,
    searches: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    folder: SweepFolder,
    command: str,
) -> None:
    """Print what the searches found, and draw the plot."""
    from toolmem.analysis.search_plot import write_csv, write_search_report

    if read.report is None:
        columns = ("seed", "reach", "status", "member", "params_total", "value", "runs_trained")
        heads = [*(axis.name for axis in read.axes), *columns]
        show_table(read.name, heads, [[cell(row.get(head)) for head in heads] for row in searches])
    else:
        heads, cells = write_search_report(folder.path, read, searches, rows, command)
        write_csv(folder.path / "searches.csv", searches)
        show_table(read.report.title or read.name, heads, cells)
        stdout().print(
            f"{folder.path / 'report.html'} has the plot", highlight=False, soft_wrap=True
        )
    stdout().print(
        f"{folder.results.path} has every run in the table runs, every answer in searches",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right" if head not in ("status",) else "left")
    for row in rows:
        table.add_row(*row)
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
