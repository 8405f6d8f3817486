"""How many runs an hour a search for the smallest model trains here, and what it finds.

    python benchmarks/scaling_laws.py [--quick] [--json FILE]

By the code of ``toolmem sweep``, in a folder that is thrown away: ``recipes/sweeps/figure1_quick.yaml``, or
with ``--quick`` that figure cut down to two small populations, three models, few steps and a recall of one
half. A worker a core. Seconds are those of the whole command: starting workers, checking every recipe,
training, asking questions.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml
from command import about, arguments, write
from rich.console import Console
from rich.table import Table

from toolmem.cli.sweep import cores, sweep
from toolmem.recipe_files import read_mapping
from toolmem.sweeps import Results

FIGURE = Path(__file__).resolve().parent.parent / "recipes" / "sweeps" / "figure1_quick.yaml"
# of the quick figure: how many people, members of the family, steps by setting, and the recall to reach
PEOPLE = (8, 16)
MEMBERS = 3
STEPS = {"in_weight": 500, "in_tool": 800}
REACH = 0.5


def recipe(quick: bool) -> dict[str, Any]:
    """The sweep, its base written out.

    Args:
        quick: cut it down.
    """
    written = read_mapping(FIGURE)
    written["base"] = read_mapping(FIGURE.parent / written["base"])
    if not quick:
        return written
    for setting, steps in STEPS.items():
        keys = written["axes"]["setting"][setting]
        keys |= {"trainer.max_steps": steps, "recall.stop_at": REACH, "recall.every_n_steps": 100}
    written["axes"]["people"] = {n: {"data.people": n} for n in PEOPLE}
    family = written["search"]["family"]
    sizes = list(family)
    written["search"]["family"] = {
        one: family[one] for one in sizes[:: max(1, len(sizes) // MEMBERS)][-MEMBERS:]
    }
    written["search"]["reach"] = REACH
    return written


def measure(quick: bool) -> dict[str, Any]:
    """Everything, as plain data."""
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "figure1.yaml", Path(folder) / "out"
        file.write_text(yaml.safe_dump(recipe(quick), sort_keys=False), encoding="utf-8")
        began = time.perf_counter()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            sweep(str(file), str(out))
        seconds = time.perf_counter() - began
        rows = Results(out / "results.duckdb").rows()
        searches = Results(out / "results.duckdb").rows(table="searches")
    found = [
        {
            **search["settings"],
            "reach": search["reach"],
            **{
                key: search[key]
                for key in ("status", "member", "params_total", "value", "runs_trained")
            },
        }
        for search in searches
    ]
    return {
        "runs": len(rows),
        "runs_failed": sum(row["status"] == "failed" for row in rows),
        "seconds": seconds,
        "runs_per_hour": 3600 * len(rows) / seconds,
        "steps_per_second": sum(row["steps"] for row in rows) / seconds,
        "found": found,
        "circumstances": {**about(quick), "workers": cores()},
    }


def show(result: dict[str, Any]) -> None:
    """Print the rate, and a row a search."""
    where = result["circumstances"]
    table = Table(
        "setting", "people", "recall", "smallest model", "parameters", "runs",
        title=f"{where['processor']}, {where['workers']} workers, torch {where['torch']}: "
        f"{result['runs']} runs in {result['seconds']:.0f} s, {result['runs_per_hour']:.0f} runs an hour",
    )  # fmt: skip
    for one in result["found"]:
        size = "none reached it" if one["params_total"] is None else f"{one['params_total']:,}"
        table.add_row(
            one["setting"], str(one["people"]), f"≥ {one['reach']:g}", one["member"] or "", size,
            str(one["runs_trained"]),
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    """Measure, print, and write if asked to."""
    options = arguments(__doc__, quick="a figure cut down to a few minutes").parse_args()
    result = measure(options.quick)
    show(result)
    write(result, options)


if __name__ == "__main__":
    main()
