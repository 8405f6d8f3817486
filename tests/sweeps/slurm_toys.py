"""Jobs of a sweep that take no time: what they do, their axis ``act`` says."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from sweep_toys import row, sweep_with

from toolmem.files import write_json
from toolmem.sweeps import SweepRecipe


class ToyJob:
    """Writes its run's result at once; or dies, or waits for a file first: ``wait2`` for ``go2``."""

    def __init__(self, words: dict[str, Any], options: Any) -> None:
        self.words = words

    def __call__(self) -> None:
        folder = Path(self.words["runs"]) / self.words["name"]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder.parent.parent / "calls.txt", "a") as calls:
            calls.write(self.words["name"] + "\n")
        act = self.words["settings"]["act"]
        if act == "stillborn":
            print("No module named toolmem", file=sys.stderr, flush=True)
            os._exit(3)
        write_json(folder / "clock.json", {"started": time.time(), "seconds_before": 0.0})
        (folder / "metrics.csv").write_text("step,val/loss\n1,2.0\n")
        if act == "die":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(3)
        go = folder.parent.parent / act.replace("wait", "go")
        while act.startswith("wait") and not go.exists():
            time.sleep(0.02)
        result = row(self.words["name"], self.words["settings"], **{"val/loss": 2.0})
        write_json(
            folder / "result.json", result | {"steps": 1, "finished": "2026", "stopped": None}
        )

    def checkpoint(self) -> None:
        raise AssertionError("nobody preempts these")


def toy_recipe(*acts: str, **changes: Any) -> SweepRecipe:
    """A sweep of a run for each act; several of one are several seeds."""
    values = {act: {"model.model.dim": 4 + len(act) + ord(act[0])} for act in acts}
    axes = {"act": values}
    return SweepRecipe.parse(sweep_with(axes=axes, report=None, **changes), "toy")


def calls(out: Path) -> list[str]:
    """The runs whose jobs were called, each as often as it was."""
    path = out / "calls.txt"
    return path.read_text().split() if path.exists() else []


def jobs_file(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "slurm" / "jobs.json").read_text())["batches"]
