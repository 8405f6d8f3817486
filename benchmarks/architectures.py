"""Architectures compared: what each costs, and facts with every one of them.

    python benchmarks/architectures.py [--quick] [--json FILE]
    python benchmarks/architectures.py --facts RUNS [--workers 2] [--only-train] [--json FILE]

Without ``--facts``: the figures of ``measure_moe.py``, ``measure_mamba.py``, ``measure_rnn.py`` and
``measure_norms.py``, one after another on one core.

With ``--facts``: trains every facts recipe (``recipes/facts_in_weight*.yaml``, ``facts_in_tool*.yaml``)
as it stands, same facts and same budget of steps, as ``toolmem fit`` does; then measures them one after
another and prints one row each: recall of 512 questions of known and of unseen people, and speeds.
Seconds to 0.95 are the tokens until then over the speed of a short training of its own, so that what
else the machine did while the runs were trained does not change them. Runs live under RUNS and are
taken up where they were killed; what is trained or measured is not done again. ``--only-train`` leaves
the measuring to a later call, which may want the machine to itself.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from command import arguments, write
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from toolmem.files import write_json

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PARTS = ("measure_moe", "measure_mamba", "measure_rnn", "measure_norms")
REACHED = 0.95
EVERY = 250  # steps between two rounds of questions
ASKED = 128  # questions a round
TIMED = 120  # steps of the short training that tells the speed
LANES, DECODED = 64, 64

COLUMNS = {
    "recipe": "recipe",
    "parameters": "parameters",
    "recall_known": "recall, known",
    "recall_unseen": "unseen",
    "steps_to_0.95": "steps to 0.95",
    "seconds_to_0.95": "seconds to 0.95",
    "bits_per_parameter": "bits / parameter",
    "training_flops_per_token": "training FLOPs / token",
    "cache_bytes_per_token": "cache bytes / token",
    "state_bytes": "state bytes",
    "decode_tokens_per_s": "decode tokens/s",
}


def measure(quick: bool) -> dict[str, Any]:
    """The figures of every part, and what they are made of, by part."""
    figures: dict[str, Any] = {}
    details: dict[str, Any] = {}
    for name in PARTS:
        part = import_module(name).measure(quick)
        figures |= {key: value for key, value in part.items() if isinstance(value, int | float)}
        details[name.removeprefix("measure_")] = part
    return figures | {"details": details}


def train(recipe: Path, runs: Path) -> Path:
    """Run ``toolmem fit`` on a recipe, one thread; the run's folder."""
    folder = runs / recipe.stem
    if not (folder / "finished").exists():
        asking = ["--recall.every_n_steps", str(EVERY), "--recall.n_questions", str(ASKED)]
        asking += ["--recall.n_unseen", "0", "--recall.show", "false"]
        run_command(
            "fit", recipe, ["--runs", str(runs), "--name", recipe.stem, "--resume", "auto", *asking]
        )
        (folder / "finished").write_text("")
    return folder


def run_command(command: str, recipe: Path, words: list[str]) -> None:
    """Run a command on a recipe, one thread."""
    line = [sys.executable, "-m", "toolmem", command, "--config", str(recipe), *words]
    if command == "fit":
        line += ["--trainer.enable_progress_bar", "false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{recipe.name}: {done.stderr.strip()[-800:]}")


def metrics(folder: Path) -> list[dict[str, str]]:
    """What a run logged, row by row."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def first_reached(folder: Path) -> tuple[int | None, float]:
    """Steps, and tokens trained on, until recall was first REACHED; None where it never was."""
    tokens = 0.0
    for row in metrics(folder):
        tokens = float(row.get("train/tokens") or tokens)
        recall = row.get("recall/exact_match")
        if recall and float(recall) >= REACHED:
            return int(row["step"]), tokens
    return None, tokens


def training_speed(recipe: Path) -> float:
    """Tokens a second of training, in a short run of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        short = ["--trainer.max_steps", str(TIMED), "--recall.every_n_steps", "0"]
        run_command("fit", recipe, ["--runs", scratch, "--name", "speed", *short])
        rows = metrics(Path(scratch) / "speed")
    speeds = [row.get("throughput/tokens_per_s") for row in rows]
    return statistics.median(float(speed) for speed in speeds if speed)


def decode_speed(run: Any) -> float:
    """Tokens a second of greedy decoding, LANES dialogues at once, after a short prompt."""
    import torch

    model = run.model
    with torch.no_grad():
        seconds = []
        for _ in range(5):
            cache = model.new_cache(LANES, 32 + DECODED)
            prompt = torch.randint(model.vocab_size, (LANES, 32))
            token = model.logits(model.hidden(prompt, cache=cache)[:, -1:]).argmax(-1)
            start = time.perf_counter()
            for _ in range(DECODED):
                token = model.logits(model.hidden(token, cache=cache)).argmax(-1)
            seconds.append(time.perf_counter() - start)
    return LANES * DECODED / statistics.median(seconds)


def row_of(recipe: Path, folder: Path) -> dict[str, Any]:
    """Everything that the table says of one run."""
    import toolmem
    from toolmem.data import FactsDataModule
    from toolmem.data.information import information_bits
    from toolmem.evaluation.recall import measure_recall

    run = toolmem.load(folder)
    recall = {
        split: measure_recall(
            run.model, run.tokenizer, run.questions(split, 512), toolbox=run.toolbox
        )
        for split in ("known", "unseen")
    }
    scores = {split: result.exact_match for split, result in recall.items()}
    facts = run.checkpoint.data["factbase"]
    population = FactsDataModule(
        people=facts["people"], seed=facts["seed"], alpha=facts["alpha"]
    ).population
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "inspect.json"
        run_command("inspect", recipe, ["--json", str(out)])
        figures = json.loads(out.read_text(encoding="utf-8"))
    steps, tokens = first_reached(folder)
    speed = training_speed(recipe)
    model = run.model
    in_weight = run.checkpoint.data["setting"] == "in_weight"
    known = scores["known"]
    return {
        "recipe": recipe.stem,
        "parameters": figures["params_total"],
        "parameters_active": figures["params_active"],
        "recall_known": known,
        "recall_unseen": scores["unseen"],
        "steps_to_0.95": steps,
        "seconds_to_0.95": None if steps is None else tokens / speed,
        "training_tokens_per_s": speed,
        # what was recalled, as a share of all that there is to know; a tool's facts are not stored
        "bits_per_parameter": known * information_bits(population).facts / figures["params_total"]
        if in_weight
        else None,
        "training_flops_per_token": figures["flops_training_per_token"],
        "cache_bytes_per_token": figures["cache_bytes_per_token"],
        "state_bytes": model.new_cache(1, 1).size_in_bytes(),
        "decode_tokens_per_s": decode_speed(run),
    }


def train_all(recipes: list[Path], runs: Path, workers: int) -> None:
    """Train all recipes, several at once."""
    with Progress() as progress, ThreadPoolExecutor(workers) as pool:
        task = progress.add_task("training", total=len(recipes))

        def one(recipe: Path) -> None:
            train(recipe, runs)
            progress.advance(task)

        list(pool.map(one, recipes))


def row_kept(recipe: Path, folder: Path) -> dict[str, Any]:
    """A run's row: measured once, and kept in its folder."""
    path = folder / "row.json"
    if not path.exists():
        write_json(path, row_of(recipe, folder) | {"circumstances": circumstances()})
    return json.loads(path.read_text(encoding="utf-8"))


def show_facts(rows: list[dict[str, Any]]) -> None:
    """The table, one row a run."""
    table = Table(title="Facts with every architecture", caption=circumstances())
    for name in COLUMNS.values():
        table.add_column(name, justify="left" if name == "recipe" else "right")
    for row in rows:
        table.add_row(*[cell(row[key]) for key in COLUMNS])
    Console().print(table)


def cell(value: Any) -> str:
    """A number as people read it."""
    if value is None:
        return "–"
    if isinstance(value, float) and value < 100:
        return f"{value:.3f}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def circumstances() -> str:
    """Machine, threads, version."""
    import torch

    from toolmem.training.folders import processor_name

    return (
        f"{processor_name()}, {os.cpu_count()} cores, one thread a run, torch {torch.__version__}"
    )


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = arguments(__doc__, quick="rough figures")
    parser.add_argument("--facts", metavar="RUNS", type=Path, help="train every facts recipe")
    parser.add_argument("--workers", type=int, default=2, help="runs at once (default 2)")
    parser.add_argument("--only-train", action="store_true", help="with --facts: measure nothing")
    options = parser.parse_args()
    if options.facts and options.quick:
        parser.error("--quick is for the figures; every recipe of --facts is trained as it stands")
    if options.facts:
        recipes = sorted(RECIPES.glob("facts_in_*.yaml"), reverse=True)
        train_all(recipes, options.facts, options.workers)
        if options.only_train:
            return
        rows = [row_kept(recipe, options.facts / recipe.stem) for recipe in recipes]
        show_facts(rows)
        result: dict[str, Any] = {"facts": rows, "circumstances": circumstances()}
    else:
        result = measure(options.quick)
        table = Table(title="Architectures", caption=circumstances())
        table.add_column("figure")
        table.add_column("measured", justify="right")
        for key, value in result.items():
            if key != "details":
                table.add_row(key, cell(value))
        Console().print(table)
    write(result, options)


if __name__ == "__main__":
    main()
