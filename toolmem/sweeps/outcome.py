"""What a run left, as its row of results."""

from __future__ import annotations

import functools
import json
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toolmem
from toolmem.errors import ToolmemError
from toolmem.files import write_json
from toolmem.recipe_files import get_key
from toolmem.training.folders import processor_name
from toolmem.training.loggers import read_rows

if TYPE_CHECKING:
    from toolmem.models import LanguageModel

OUTSIDE = ("embedding", "head")  # groups of parameters that are tables of tokens


class RunClock:
    """Seconds that a run took, over all processes that worked on it.

    What a killed process did counts up to the checkpoint that the next goes on from: the rest is done
    again.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "clock.json"
        self.before = self._seconds_before()
        self.started = time.time()
        write_json(self.path, {"started": self.started, "seconds_before": self.before})

    def _seconds_before(self) -> float:
        checkpoint = self.path.parent / "checkpoints" / "last.ckpt"
        try:
            last = json.loads(self.path.read_text(encoding="utf-8"))
            saved = checkpoint.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        return last["seconds_before"] + max(0.0, saved - last["started"])

    def seconds(self) -> float:
        """Seconds until now."""
        return self.before + time.time() - self.started


def seconds_spent(folder: str | Path) -> float:
    """Seconds that processes of a run have taken which all have died, up to the last that it logged.

    Args:
        folder: the run's.
    """
    path = Path(folder)
    try:
        clock = json.loads((path / "clock.json").read_text(encoding="utf-8"))
        last = max((path / name).stat().st_mtime for name in ("clock.json", "metrics.csv"))
    except FileNotFoundError:
        return 0.0
    return clock["seconds_before"] + max(0.0, last - clock["started"])


def result_row(
    job: Mapping[str, Any],
    *,
    seconds: float,
    threads: int,
    error: str | None = None,
    model: LanguageModel | None = None,
    stopped: str | None = None,
) -> dict[str, Any]:
    """The row of a run that is done, or has failed.

    Args:
        job: what the worker was told: name, settings, seed, recipe, metrics, runs, and of a run that is
            judged before its end, ``until``, the step, and ``judged``, the metric and all steps.
        seconds: that it took.
        threads: that it had.
        error: why it failed; None when it did not.
        model: what it trained, if it came so far.
        stopped: why it ended before its last step; None when it did not.
    """
    row: dict[str, Any] = {
        "name": job["name"],
        "status": "done",
        "error": None,
        "seed": job["seed"],
        "settings": job["settings"],
        "recipe": job["recipe"],
        **job["settings"],
        **dict.fromkeys(job["metrics"]),
        "seconds": round(seconds, 3),
        "threads": threads,
        "processor": hardware(job["recipe"]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "toolmem_version": toolmem.__version__,
        "git_commit": git_commit(),
        "stopped": stopped,
    }
    if model is not None:
        counts = model.parameter_counts()
        row["params_total"] = sum(counts.values())
        row["params_non_embedding"] = row["params_total"] - sum(counts.get(g, 0) for g in OUTSIDE)
        tied = model.embedding.weight.numel() if model.tie_embeddings else 0
        row["params_untied"] = row["params_total"] + tied
    logged = Logged(Path(job["runs"]) / job["name"] / "metrics.csv")
    row["steps"] = logged.steps
    for column, name in (("tokens", "train/tokens"), ("flops", "flops/total")):
        value = logged.value(name, "last")
        row[column] = int(value) if column == "tokens" and value is not None else value
    if "judged" in job:
        metric, steps = job["judged"]
        last = job.get("until") or max(*steps, row["steps"])
        row["judged"] = {
            str(step): logged.value(metric, job["metrics"][metric], until=step)
            for step in steps
            if step <= last
        }
    for name, reduction in job["metrics"].items():
        row[name] = logged.value(name, reduction)
        if error is None and row[name] is None:
            error = f"metrics: {name} was never logged; there are {', '.join(logged.names)}"
    if error is not None:
        row["status"], row["error"] = "failed", error
    return row


def write_failure(job: Mapping[str, Any], **values: Any) -> None:
    """Write the ``result.json`` of a run whose process can no more.

    Args:
        job: what it was told.
        values: of ``result_row``, an ``error`` among them.
    """
    write_json(Path(job["runs"]) / job["name"] / "result.json", result_row(job, **values))


def hardware(recipe: Mapping[str, Any]) -> str:
    """The processor that a run is trained on, and the accelerators where its recipe lets it use them."""
    import torch

    name = processor_name()
    if get_key(recipe, "trainer.accelerator", "auto") == "cpu" or not torch.cuda.is_available():
        return name
    kinds = dict.fromkeys(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    return " and ".join([name, *kinds])


class Logged:
    """A run's ``metrics.csv``.

    Args:
        path: the file; nothing was logged where there is none.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.rows = read_rows(path)
        except ToolmemError:
            self.rows = []
        self.steps = int(self.rows[-1]["step"]) if self.rows else 0
        self.names = list(self.rows[0])[1:] if self.rows else []

    def value(self, name: str, reduction: str, until: int | None = None) -> float | None:
        """One number of a metric's column: the ``last``, the ``min`` or the ``max``; None for none.

        Args:
            name: the metric.
            reduction: which.
            until: the last step that counts; None for all.
        """
        values = [
            float(row[name])
            for row in self.rows
            if row.get(name) and (until is None or int(row["step"]) <= until)
        ]
        if not values:
            return None
        return {"last": values[-1], "min": min(values), "max": max(values)}[reduction]


@functools.cache
def git_commit() -> str | None:
    """The commit of the library's own checkout, ``+`` behind it where files differ; None without one."""
    folder = Path(toolmem.__file__).parent
    words = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run([*words, "--exclude=*"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
