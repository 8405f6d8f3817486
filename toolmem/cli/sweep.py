"""``toolmem sweep``: many runs from one recipe, one file of results, a plot."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.cli.functions import call, quiet
from toolmem.console import stderr, stdout
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.sweeps.folder import SweepFolder
    from toolmem.sweeps.grid import Planned
    from toolmem.sweeps.recipe import SweepRecipe
    from toolmem.sweeps.runner import State, SweepRunner

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
        dry_run: only print how many runs there are, their parameters and tokens.
        retry_failed: train also those again that have failed.

    Raises:
        ToolmemError: for a recipe that cannot be, or a folder in which another sweep runs.
    """
    from toolmem.sweeps.folder import SweepFolder
    from toolmem.sweeps.grid import expand
    from toolmem.sweeps.recipe import SweepRecipe
    from toolmem.sweeps.runner import SweepRunner

    read = SweepRecipe.read(recipe)
    runs = expand(read)
    folder = SweepFolder(Path(out))
    n_workers = cores() if workers is None else workers
    runner = SweepRunner(read, runs, folder, WORKER, n_workers)
    if dry_run:
        check(runs)
        show_plan(runs, folder)
        return
    with folder.locked() as lock:
        todo = runner.take_stock(retry_failed)
        check(todo)
        keep_recipe(recipe, folder)
        try:
            train_all(runner, todo, lock)
        except KeyboardInterrupt:
            stderr().print(
                f"{runner.state.to_go} runs are left: the same command goes on with them"
            )
            raise
        finish(read, runs, folder, recipe)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_recipe(recipe: str, folder: SweepFolder) -> None:
    """Leave the recipe beside its results."""
    from toolmem.files import write_text

    write_text(folder.path / "sweep.yaml", Path(recipe).read_text(encoding="utf-8"))


# ---- before training


def check(runs: Sequence[Planned]) -> None:
    """Refuse what cannot be trained before anything is: every value of every axis, every model.

    Raises:
        ToolmemError: naming the run and the key.
    """
    for run in covering(runs):
        try:
            check_recipe(run.recipe)
        except ToolmemError as error:
            raise ToolmemError(f"{run.name}: {error}") from error
    model_sizes(runs)


def covering(runs: Sequence[Planned]) -> list[Planned]:
    """A few of the runs, in which every value of every axis comes up."""
    seen: set[tuple[str, str]] = set()
    chosen = []
    for run in runs:
        values = {(axis, repr(label)) for axis, label in run.settings.items()}
        if not values <= seen:
            seen |= values
            chosen.append(run)
    return chosen


def check_recipe(recipe: dict[str, Any]) -> None:
    """Parse a recipe as ``toolmem fit`` does.

    Raises:
        ToolmemError: for what it refuses.
    """
    import tempfile

    from toolmem.cli.fit import run

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        try:
            with quiet():
                run("fit", ["fit", "--config", str(path), "--print_config"])
        except SystemExit:
            return


def model_sizes(runs: Sequence[Planned]) -> dict[str, int]:
    """Parameters of each run's model; every distinct model is made once.

    Raises:
        ToolmemError: for a model that cannot be, naming the run.
    """
    from toolmem.cli.inspect_recipe import build

    sizes: dict[str, int] = {}
    by_model: dict[str, int] = {}
    for run in runs:
        model = run.recipe.get("model") or {}
        key = json.dumps([model.get("model"), data_shape(run.recipe)], sort_keys=True, default=str)
        if key not in by_model:
            try:
                model = build(run.recipe, "its recipe")
            except ToolmemError as error:
                raise ToolmemError(f"{run.name}: {error}") from error
            by_model[key] = sum(p.numel() for p in model.parameters())
        sizes[run.name] = by_model[key]
    return sizes


def data_shape(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe's data but for its seed, which no model depends on."""
    from toolmem.recipe_files import flattened

    data = flattened(recipe.get("data") or {})
    return {key: value for key, value in data.items() if key.rpartition(".")[2] != "seed"}


def tokens_of(recipe: dict[str, Any]) -> int | None:
    """Tokens that a run trains on, where its recipe tells; None where rows differ in length."""
    from toolmem.recipe_files import get_key

    keys = ("trainer.max_steps", "data.batch_size", "data.seq_len")
    numbers = [get_key(recipe, key) for key in keys]
    accumulated = get_key(recipe, "trainer.accumulate_grad_batches", 1)
    if not all(isinstance(number, int) and number > 0 for number in [*numbers, accumulated]):
        return None
    steps, batch_size, seq_len = numbers
    return steps * batch_size * seq_len * accumulated


def show_plan(runs: Sequence[Planned], folder: SweepFolder) -> None:
    """Print what the sweep would train."""
    sizes = model_sizes(runs)
    known = folder.results.status()
    done = sum(folder.result(run.name) is not None or run.name in known for run in runs)
    tokens = [tokens_of(run.recipe) for run in runs]
    smallest, largest = min(sizes.values()), max(sizes.values())
    total = sum(n for n in tokens if n is not None)
    unknown = sum(n is None for n in tokens)
    lines = [
        f"runs: {len(runs):,}, of which {done:,} have a result",
        f"parameters: {smallest:,} to {largest:,}, {sum(sizes.values()):,} in all runs",
        f"tokens: at most {total:,}"
        + (
            f", and those of {unknown:,} runs that do not tell their rows' length"
            if unknown
            else ""
        ),
    ]
    for line in lines:
        stdout().print(line, highlight=False, soft_wrap=True)


# ---- training


def train_all(runner: SweepRunner, todo: Sequence[Planned], lock: int) -> None:
    """Train with a live display on stderr."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.fields[counts]}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[left]}"),
        progress.TextColumn("[dim]{task.fields[running]}"),
    )
    with progress.Progress(*columns, console=stderr()) as bar:
        task = bar.add_task("", total=runner.state.total, counts="", left="", running="")

        def watch(state: State) -> None:
            bar.update(
                task,
                completed=state.done + state.failed,
                counts=f"{state.done} done, {state.failed} failed, {state.to_go} to go",
                left=time_left(state),
                running=" ".join(state.running),
            )

        watch(runner.state)
        runner.run(todo, lock, watch)


def time_left(state: State) -> str:
    """How long the rest may take, by the mean of the runs so far."""
    if not state.seconds or not state.to_go:
        return ""
    mean = sum(state.seconds.values()) / len(state.seconds)
    seconds = round(mean * state.to_go / state.workers)
    return f"about {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


# ---- afterwards


def finish(read: SweepRecipe, runs: Sequence[Planned], folder: SweepFolder, recipe: str) -> None:
    """Print the results, and draw the plot."""
    from toolmem.analysis.sweep_plot import write_sweep_report

    rows = folder.results.rows([run.name for run in runs])
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
        heads = [*(axis.name for axis in read.axes), "seed", "status", *read.metrics, "seconds"]
        show_table(read.name, heads, [[cell(row.get(head)) for head in heads] for row in rows])
        stdout().print(f"{folder.results.path} has every run", highlight=False, soft_wrap=True)
        return
    command = f"toolmem sweep {shlex.quote(recipe)} --out {shlex.quote(str(folder.path))}"
    heads, cells = write_sweep_report(folder.path, read, rows, command)
    show_table(read.report.title or read.name, heads, cells)
    stdout().print(
        f"{folder.path / 'report.html'} has the plot, {folder.results.path} every run",
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
