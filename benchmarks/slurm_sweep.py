"""How much faster a sweep of populations is on a Slurm of one node with two jobs at a time than with one.

    tests/cluster/slurm.sh start DIR; export SLURM_CONF=DIR/slurm.conf
    python benchmarks/slurm_sweep.py [--quick] [--json FILE]

Any Slurm does that has two idle CPUs on this machine's file system; ``tests/cluster/slurm.sh`` starts one as
root. Four populations of eight models each (recipes/population.yaml, 300 steps, batches of 6 to 9), a core
each. ``sweep_scaling`` is the seconds of the command with one job at a time over those with two, waiting for
Slurm and starting Python and all; ``jobs_slowdown`` the seconds that the runs themselves take, two at a time
over one.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from command import about, arguments, write
from rich.console import Console
from rich.table import Table

from toolmem.sweeps import Results

RECIPE = Path(__file__).parent.parent / "recipes" / "population.yaml"
BATCHES = (6, 7, 8, 9)


def recipe(steps: int) -> dict[str, Any]:
    """A sweep of four populations."""
    base = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    base["trainer"] |= {"max_steps": steps, "val_check_interval": steps}
    base["recall"] = {"every_n_steps": 0, "show": False}
    key = "data.init_args.data.init_args.batch_size"
    return {
        "base": base,
        "axes": {"batch": {"key": key, "values": list(BATCHES)}},
        "seed_keys": ["seed_everything"],
        "metrics": ["val/loss"],
    }


def seconds_of(written: Path, out: Path, jobs: int) -> tuple[float, float]:
    """Seconds of the command, and of its runs together."""
    words = ["--executor", "slurm", "--slurm.poll_s", "1", "--slurm.array_parallelism", str(jobs)]
    command = [sys.executable, "-m", "toolmem", "sweep", str(written), "--out", str(out), *words]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - began
    rows = Results(out / "results.duckdb").rows()
    assert [row["status"] for row in rows] == ["done"] * len(BATCHES)
    return took, sum(row["seconds"] for row in rows)


def main() -> None:
    """Measure, show, write."""
    options = arguments(__doc__, "20 steps, once").parse_args()
    if shutil.which("sbatch") is None:
        sys.exit("benchmarks/slurm_sweep.py: there is no sbatch here: it needs a Slurm")
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="toolmem-slurm-sweep-") as folder:
        written = Path(folder) / "sweep.yaml"
        written.write_text(yaml.safe_dump(recipe(20 if options.quick else 300), sort_keys=False))
        for turn in range(1 if options.quick else 2):
            for jobs in found:
                found[jobs].append(seconds_of(written, Path(folder) / f"{turn}_{jobs}", jobs))
    one, two = found[1], found[2]
    result: dict[str, Any] = {
        "sweep_scaling": statistics.median(a[0] / b[0] for a, b in zip(one, two, strict=True)),
        "jobs_slowdown": statistics.median(b[1] / a[1] for a, b in zip(one, two, strict=True)),
        "details": {"seconds": found},
        "circumstances": about(options.quick),
    }
    table = Table("figure", "measured", title="four populations on Slurm, two jobs at a time")
    for name in ("sweep_scaling", "jobs_slowdown"):
        table.add_row(name, f"{result[name]:.2f}")
    Console().print(table)
    write(result, options)


if __name__ == "__main__":
    main()
