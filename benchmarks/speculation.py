"""What speculation gains or loses, by where drafts come from: prompt lookup, a draft model, Medusa, EAGLE.

    OMP_NUM_THREADS=1 python benchmarks/speculation.py [--quick] [--json FILE] [--runs FOLDER]

One core, sides in turn, same weights, the real tool. The model is generate.py's facts model (2 layers,
dim 64); Medusa's and EAGLE's heads are trained on it by their recipes, the draft model (1 layer, dim 16)
by recipes/facts_in_tool.yaml. Runs live in --runs and are not trained again. Sides that the engine itself
reckons not to pay (``planning.draft_costs``) are measured twice: as they are, and made to draft.

A row is a drafter and a number of lanes: times as fast as no drafts, tokens of a pass with a draft, passes
as a share of those without drafts, and how many of the dialogues are the same, token for token.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from command import about, arguments, write
from generate import RECIPE, facts_run, in_turn, ratio
from rich.console import Console
from rich.table import Table

import toolmem
from toolmem.generation import DraftHeads, DraftModel, Engine, PromptLookup
from toolmem.generation.speculative import Drafter
from toolmem.run import Run

LANES = (1, 16)
DRAFT_SIZES = {"dim": 16, "n_layers": 1, "hidden_dim": 48}
STEPS = {"medusa": 2000, "eagle": 600, "draft": 1500}


def trained(folder: Path, base: str, quick: bool) -> dict[str, Run]:
    """The runs that draft, trained where they are not there."""
    sizes = [f"--model.model.{name}={value}" for name, value in DRAFT_SIZES.items()]
    options = {
        "medusa": [str(RECIPE.with_name("medusa.yaml")), "--model.init_from", base],
        "eagle": [str(RECIPE.with_name("eagle.yaml")), "--model.init_from", base],
        "draft": [str(RECIPE), *sizes, "--recall.every_n_steps", "0"],
    }
    for name, (recipe, *rest) in options.items():
        if not (folder / name).exists():
            steps = "5" if quick else str(STEPS[name])
            command = [sys.executable, "-m", "toolmem", "fit", "--config", recipe, *rest]
            command += ["--runs", str(folder), "--name", name, "--trainer.max_steps", steps]
            command += ["--trainer.val_check_interval", steps]
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
    return {name: toolmem.load(str(folder / name)) for name in options}


def made_to_draft(drafter: Drafter) -> Drafter:
    """The same, with drafts wherever there is one, whatever they cost."""
    drafter.seconds = lambda lanes: (-1.0, -1.0)  # type: ignore[method-assign]
    return drafter


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rows and their circumstances."""
    torch.set_num_threads(1)
    quick = options.quick
    folder = Path(options.runs or tempfile.mkdtemp(prefix="toolmem-speculation-"))
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "facts"
    run = facts_run(str(base) if base.exists() else None, quick, folder)
    runs = trained(folder, str(base), quick)
    rows = []
    for lanes in LANES:
        n = 8 if quick else 40 + 10 * lanes
        rows += sides(run, runs, lanes, n, 1 if quick else 5)
    return {"rows": rows, "about": about(quick)}


def sides(run: Run, runs: dict[str, Run], lanes: int, n: int, repeats: int) -> list[dict[str, Any]]:
    """Every drafter, at so many lanes."""
    prompts = [run.prompt(question.question) for question in run.questions("known", n)]
    draft = runs["draft"].model
    makers: dict[str, tuple[Run, Callable[[], Drafter | None]]] = {
        "none": (run, lambda: None),
        "prompt lookup": (run, PromptLookup),
        "prompt lookup, own dialogue": (run, lambda: PromptLookup(pool_tokens=0)),
        "draft model": (run, lambda: DraftModel(draft, max_lanes=lanes)),
    }
    for name in ("medusa", "eagle"):
        makers[name] = (runs[name], functools.partial(DraftHeads, runs[name].model))
    for name in ("draft model", "medusa", "eagle"):
        which, make = makers[name]
        makers[f"{name}, made to draft"] = (which, lambda make=make: made_to_draft(make()))  # type: ignore[misc]
    reports: dict[str, dict[str, Any]] = {}

    def ask(side: str) -> list[list[int]]:
        which, make = makers[side]
        with Engine(
            which.model, run.tokenizer, run.toolbox, max_lanes=lanes, drafter=make()
        ) as each:
            parts = [prompts] if lanes > 1 else [[prompt] for prompt in prompts]
            found = [d.tokens for part in parts for d in each.generate(part, max_new_tokens=160)]
            reports[side] = {**each.acceptance(), "steps": each.stats().steps}
            return found

    plain = ask("none")
    equal = {side: sum(a == b for a, b in zip(ask(side), plain, strict=True)) for side in makers}
    seconds = in_turn({side: functools.partial(ask, side) for side in makers}, repeats)
    return [
        {
            "drafter": side,
            "lanes": lanes,
            "speedup": ratio(seconds, "none", side),
            "tokens_per_pass": reports[side]["tokens_per_pass"],
            "steps_share": reports[side]["steps"] / reports["none"]["steps"],
            "dialogues": n,
            "dialogues_equal": equal[side],
            "seconds": seconds[side],
            "acceptance": reports[side],
        }
        for side in makers
    ]


def main() -> None:
    """Measure, print, and write."""
    parser = arguments(__doc__)
    parser.add_argument("--runs", metavar="FOLDER", help="where the trained runs are, or go")
    options = parser.parse_args()
    result = measure(options)
    machine = result["about"]
    table = Table(title=f"{machine['processor']}, 1 thread, torch {machine['torch']}")
    for column in ("lanes", "drafter", "times as fast", "tokens a pass", "steps", "equal"):
        table.add_column(column, no_wrap=True)
    for row in result["rows"]:
        figures = [f"{row[key]:.2f}" for key in ("speedup", "tokens_per_pass", "steps_share")]
        equal = f"{row['dialogues_equal']}/{row['dialogues']}"
        table.add_row(str(row["lanes"]), row["drafter"], *figures, equal)
    Console(width=110).print(table)
    write(result, options)


if __name__ == "__main__":
    main()
