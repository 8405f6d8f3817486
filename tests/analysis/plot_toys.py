"""Sweeps that are only results: what is plotted, without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from sweep_toys import row, sweep_with

from toolmem.analysis.sources import SweepSource
from toolmem.sweeps import Results, SweepRecipe, expand

ACC = "val/accuracy"


def source_of(
    sweep: SweepRecipe, rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]] = ()
) -> SweepSource:
    return SweepSource(Path("sweeps/toy"), sweep, rows, answers, "toolmem sweep x.yaml --out y")


def write_folder(folder: Path, written: dict[str, Any], values, **columns: Any) -> Path:
    """A sweep's folder whose runs are made up.

    Args:
        folder: to be made.
        written: the recipe.
        values: a run (Planned) -> the columns of its row.
        columns: of every row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    sweep = SweepRecipe.read(folder / "sweep.yaml")
    rows = []
    for run in expand(sweep):
        about = {"toolmem_version": "0", "git_commit": "c", "finished": "then", "steps": 4}
        about |= {"params_non_embedding": 60, "params_untied": 140, "processor": "A processor"}
        made = row(run.name, run.settings, seed=run.seed, **about | columns | values(run))
        rows.append(made | {"recipe": run.recipe, "stopped": None})
    Results(folder / "results.duckdb").write(rows)
    return folder


def grid(**changes: Any) -> dict[str, Any]:
    """A recipe of two kinds, two widths, two rates and two seeds."""
    written = {
        "name": "toy",
        "axes": {
            "kind": {"b": {"model.model.n_heads": 1}, "a": {"model.model.n_heads": 2}},
            "width": {"key": "model.model.dim", "values": [4, 8]},
            "lr": {"key": "model.optimizer.lr", "values": [0.1, 0.2]},
        },
        "seeds": 2,
        "metrics": [ACC],
        "report": {"metric": ACC, "x": "width", "line": "kind", "best_over": ["lr"]},
    }
    return sweep_with(**written | changes)
