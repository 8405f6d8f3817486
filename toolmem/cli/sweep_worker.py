"""The process that trains a sweep's runs, one after another, by the code of ``toolmem fit``.

``toolmem.sweeps.workers`` starts it and says what it is told, and what it answers.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from toolmem.class_path import OPTION, only_packages
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

FLOPS = "toolmem.training.Flops"
STOP_AT = "toolmem.training.callbacks.StopAt"
PREEMPTION = "toolmem.training.callbacks.Preemption"
# how torch's allocators and the C library say so
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


def fit_config(job: dict[str, Any]) -> dict[str, Any]:
    """The config of ``toolmem fit`` for a job: its recipe, quiet, resumable, and its FLOPs counted."""
    config = copy.deepcopy(job["recipe"])
    trainer = config.setdefault("trainer", {})
    trainer.setdefault("enable_progress_bar", False)
    callbacks = trainer.get("callbacks") or []
    callbacks = [callbacks] if isinstance(callbacks, dict) else list(callbacks)
    if FLOPS not in [callback.get("class_path") for callback in callbacks]:
        # Utilisation would take time to measure, and mean little beside other workers.
        callbacks.append({"class_path": FLOPS, "init_args": {"utilisation": False}})
    if job.get("until") is not None:
        callbacks.append({"class_path": STOP_AT, "init_args": {"step": job["until"]}})
    if job.get("preemptible"):
        callbacks.append({"class_path": PREEMPTION})
    trainer["callbacks"] = callbacks
    return {**config, "name": job["name"], "runs": job["runs"], "resume": "auto"}


def train(job: dict[str, Any], threads: int) -> None:
    """Train one run and write its ``result.json``, whatever happens."""
    from toolmem.cli.fit import run
    from toolmem.files import write_json
    from toolmem.sweeps.outcome import RunClock, result_row

    folder = Path(job["runs"]) / job["name"]
    folder.mkdir(parents=True, exist_ok=True)
    clock = RunClock(folder)
    error = model = stopped = None
    with output_to(folder / "log.txt"):
        try:
            fitted = run("fit", fit_config(job))
            model = fitted.model.model
            stopped = why_stopped(fitted.trainer, job.get("until"))
        except ToolmemError as refused:
            error = str(refused)
            print(f"toolmem fit: {error}", file=sys.stderr)
        except (Exception, SystemExit) as failure:
            traceback.print_exc()
            error = explain(failure)
    row = result_row(
        job, seconds=clock.seconds(), threads=threads, error=error, model=model, stopped=stopped
    )
    write_json(folder / "result.json", row)


def why_stopped(trainer: Trainer, until: int | None) -> str | None:
    """Why a run ended before its last step; None when it did not, or for reasons of its own.

    Args:
        trainer: that has trained it.
        until: the step at which it was to pause.
    """
    from toolmem.sweeps.recipe import HALVED
    from toolmem.training import RecallProbe

    probes = [one for one in trainer.callbacks if isinstance(one, RecallProbe)]  # type: ignore[attr-defined]
    for probe in probes:
        if probe.ended is not None:
            return probe.ended
    return (
        HALVED if until is not None and until <= trainer.global_step < trainer.max_steps else None
    )


def explain(failure: BaseException) -> str:
    """An error as a row of results tells it."""
    text = f"{type(failure).__name__}: {failure}"
    if isinstance(failure, MemoryError) or any(word in text.lower() for word in OUT_OF_MEMORY):
        return (
            "out of memory: make the model or the batch smaller, or take fewer --workers (on Slurm, a "
            f"larger slurm.mem_gb) ({text})"
        )
    return text


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append to a file all that this process prints, its libraries' own prints among it."""
    before = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with open(path, "ab", buffering=0) as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, kept in zip((1, 2), before, strict=True):
            os.dup2(kept, descriptor)
            os.close(kept)


class Orders:
    """The lines of a stream as they come; ends the process when the stream ends in mid-work.

    Args:
        stream: where they come from.
    """

    def __init__(self, stream: TextIO) -> None:
        self._unanswered = 0
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: TextIO) -> None:
        for line in stream:
            self._unanswered += 1
            self._lines.put(line)
        if self._unanswered:  # the sweep was killed: the next must find nobody at its runs
            os._exit(1)
        self._lines.put(None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (line := self._lines.get()) is not None:
            yield json.loads(line)

    def answered(self) -> None:
        """The last one is done: the sweep, told so, gives no other before."""
        self._unanswered = 0


def main(argv: list[str] | None = None) -> int:
    """Entry of the process.

    Args:
        argv: its words; those of the process when None.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--cores", type=lambda text: [int(core) for core in text.split(",")])
    parser.add_argument(OPTION, action="append", default=[])
    words = parser.parse_args(argv)
    cores = words.cores
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes to the sweep
    orders = Orders(sys.stdin)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    import torch

    torch.set_num_threads(len(cores))
    for job in orders:
        with only_packages(words.allow_packages):
            train(job, len(cores))
        gc.collect()
        orders.answered()
        answers.write(json.dumps({"name": job["name"]}) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
