"""How fast facts are made and loaded, on one core.

    python benchmarks/data.py [--quick] [--json FILE]

- *build*: 32,768 people, and both settings' dialogues about them (131,072 each) tokenised, in a fresh
  process each time; its peak memory above its size after imports is given beside the time.
- *loader*: tokens that are not padding per second that the training DataLoader yields alone, 128
  dialogues a batch, in-weight, 32,768 people; over whole epochs, so their shuffling is in it.
- *growth*: the loader's cost per batch at 131,072 people over that at 1,000, the two taking turns.

The first figure of each is the median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from command import arguments, write
from rich.console import Console
from rich.table import Table

from toolmem.training.folders import processor_name

PEOPLE = 32_768
BATCH_SIZE = 128
TARGETS = {
    "facts_build_seconds_32768": "≤ 5",
    "facts_build_peak_mb_32768": "≤ 500",
    "facts_loader_tokens_per_s": "≥ 10,000,000",
    "loader_cost_ratio_131072_over_1000": "≤ 1.3",
}


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build() -> dict[str, float]:
    """People and both settings' tokens, once, in this process."""
    import duckdb  # noqa: F401  (what a run imports anyway)
    import torch

    from toolmem.data.dialogues import TemplateSet
    from toolmem.data.modules import FactsDataModule  # noqa: F401
    from toolmem.data.people import make_population
    from toolmem.data.text.token_table import TokenTable
    from toolmem.data.tokenizers import ByteTokenizer

    torch.set_num_threads(1)
    before = peak_bytes()
    start = time.perf_counter()
    population = make_population(PEOPLE)
    people_seconds = time.perf_counter() - start
    tables = [
        TokenTable.build(TemplateSet.load(setting).questions(population), ByteTokenizer())
        for setting in ("in_weight", "in_tool")
    ]
    seconds = time.perf_counter() - start
    assert all(len(table) == 4 * PEOPLE for table in tables)
    return {
        "seconds": seconds,
        "people_seconds": people_seconds,
        "peak_mb": (peak_bytes() - before) / 1e6,
        "tokens": float(sum(len(table.codes) for table in tables)),
    }


def build_apart() -> dict[str, float]:
    """`build` in a fresh process, whose peak is its own."""
    command = [sys.executable, __file__, "--build"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def make_epoch(people: int, layout: str = "bucketed") -> Callable[[int], tuple[int, float]]:
    """A function that takes so many batches from a training loader: (tokens, seconds)."""
    from toolmem.data.modules import FactsDataModule

    data = FactsDataModule(
        people=people, batch_size=BATCH_SIZE, unseen_people=0, layout=layout, seq_len=256
    )
    data.setup()
    batches = iter(data.train_dataloader())

    def run(n: int) -> tuple[int, float]:
        tokens = 0
        start = time.perf_counter()
        for _ in range(n):
            tokens += next(batches).n_tokens
        return tokens, time.perf_counter() - start

    run(64)
    return run


def loader_rate(repeats: int, layout: str = "bucketed") -> list[float]:
    """Tokens per second of whole epochs (1,024 batches) at 32,768 people."""
    run = make_epoch(PEOPLE, layout)
    rates = []
    for _ in range(repeats):
        tokens, seconds = run(4 * PEOPLE // BATCH_SIZE)
        rates.append(tokens / seconds)
    return rates


def growth(repeats: int, batches: int) -> tuple[list[float], list[float]]:
    """Seconds per batch at 1,000 and at 131,072 people, taking turns."""
    small, large = make_epoch(1000), make_epoch(131_072)
    costs: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, found in zip((small, large), costs, strict=True):
            found.append(run(batches)[1] / batches)
    return costs


def measure(quick: bool) -> dict[str, Any]:
    """All figures and their circumstances."""
    import torch

    torch.set_num_threads(1)
    builds = [build_apart() for _ in range(2 if quick else 5)]
    rates = loader_rate(3 if quick else 15)
    packed = loader_rate(1 if quick else 5, "packed")
    small, large = growth(3 if quick else 15, 2048 if quick else 4096)
    middle = statistics.median
    ratios = [b / a for a, b in zip(small, large, strict=True)]
    return {
        "facts_build_seconds_32768": middle(b["seconds"] for b in builds),
        "facts_build_peak_mb_32768": max(b["peak_mb"] for b in builds),
        "facts_loader_tokens_per_s": middle(rates),
        "loader_cost_ratio_131072_over_1000": middle(ratios),
        "details": {
            "build": builds,
            "loader_tokens_per_s": rates,
            "loader_tokens_per_s_packed": packed,
            "microseconds_per_batch_1000": [1e6 * cost for cost in small],
            "microseconds_per_batch_131072": [1e6 * cost for cost in large],
        },
        "about": {
            "processor": processor_name(),
            "threads": 1,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "quick": quick,
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    details, about = result["details"], result["about"]
    table = Table(title=f"{about['processor']}, 1 thread, torch {about['torch']}")
    for column in ("figure", "value", "range", "target"):
        table.add_column(column, no_wrap=True)

    def row(name: str, values: list[float], form: str) -> None:
        spread = f"{format(min(values), form)} – {format(max(values), form)}"
        table.add_row(name, format(result[name], form), spread, TARGETS[name])

    row("facts_build_seconds_32768", [b["seconds"] for b in details["build"]], ".2f")
    row("facts_build_peak_mb_32768", [b["peak_mb"] for b in details["build"]], ".0f")
    row("facts_loader_tokens_per_s", details["loader_tokens_per_s"], ",.0f")
    small, large = (details[f"microseconds_per_batch_{n}"] for n in (1000, 131_072))
    ratios = [b / a for a, b in zip(small, large, strict=True)]
    row("loader_cost_ratio_131072_over_1000", ratios, ".2f")
    packed = statistics.median(details["loader_tokens_per_s_packed"])
    table.add_row("layout packed, tokens/s", f"{packed:,.0f}", "", "")
    for people, costs in (("1,000", small), ("131,072", large)):
        table.add_row(f"µs a batch at {people} people", f"{statistics.median(costs):.0f}", "", "")
    Console(width=110).print(table)


def main() -> None:
    """Measure, print, and write."""
    parser = arguments(__doc__)
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        print(json.dumps(build()))
        return
    result = measure(options.quick)
    show(result)
    write(result, options)


if __name__ == "__main__":
    main()
