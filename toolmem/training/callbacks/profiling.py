"""What a few steps of training spend their time and memory on."""

from __future__ import annotations

import csv
import io
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from toolmem.console import stderr
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path, write_text

SKIPPED = 3  # steps before: what is made at the first ones is not what a step costs
LISTED = 20  # operations in the table
# Kinds of operations by what their names contain, the first that fits.
KINDS = (
    ("attention", ("scaled_dot_product", "flash_attn", "flex_attention", "efficient_attention")),
    ("fused blocks", ("_Blocks", "FusedBlocks")),
    ("optimizer", ("Optimizer.step", "_fused_adam", "aten::_foreach_")),
    ("communication", ("c10d::", "nccl:", "gloo:", "all_reduce", "all_gather", "reduce_scatter")),
    (
        "matmuls",
        ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "gemm", "grouped_product", "cutlass",
         "mkldnn_linear"),
    ),
    ("loss", ("log_softmax", "nll_loss", "cross_entropy")),
    ("normalisation", ("norm",)),
    ("copies", ("aten::copy_", "aten::cat", "aten::index", "aten::clone", "Memcpy", "aten::fill_")),
)  # fmt: skip
WAITING = "toolmem: waiting for data"


@dataclass(frozen=True)
class Operation:
    """One kind of operation in the steps that were looked at.

    Args:
        name: torch's, or a kernel's.
        calls: a step.
        milliseconds: a step, in it and in nothing that it called.
        bytes: allocated by it, a step, less what it freed.
    """

    name: str
    calls: float
    milliseconds: float
    bytes: float

    @property
    def kind(self) -> str:
        """What it is for."""
        return next(
            (kind for kind, parts in KINDS if any(part in self.name for part in parts)), "other"
        )


class Profiling(pl.Callback):
    """Profiles a few steps by torch's profiler, then lets training go on.

    Writes into ``profile`` in the run's folder: ``trace.json`` (for https://ui.perfetto.dev),
    ``operations.csv``, the costliest first, ``summary.txt``, a paragraph, and on CUDA
    ``memory_snapshot.pickle`` (for https://pytorch.org/memory_viz). With several processes the first one's.

    Args:
        steps: how many.
    """

    def __init__(self, steps: int = 5) -> None:
        super().__init__()
        if steps < 1:
            raise ToolmemError(f"profile is {steps}: it is a number of steps, 1 or more")
        self.steps = steps
        self._profiler: Any = None
        self._waiting: Any = None
        self._first = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know when to begin.

        Raises:
            ToolmemError: when training ends before.
        """
        self._first = trainer.global_step + SKIPPED
        last = trainer.max_steps if trainer.max_steps and trainer.max_steps > 0 else None
        if last is not None and self._first + self.steps > last:
            raise ToolmemError(
                f"profile: {self.steps} steps after the first {SKIPPED} are more than the "
                f"{last - trainer.global_step} that are left of trainer.max_steps {last}: raise that, or "
                "profile fewer"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin, once it is time."""
        self._end_waiting()
        if self._profiler is None and trainer.global_step == self._first and trainer.is_global_zero:
            self._first = -1
            self._cuda = pl_module.device.type == "cuda"
            if self._cuda:
                torch.cuda.memory._record_memory_history(max_entries=100_000)
                torch.cuda.reset_peak_memory_stats()
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            self._profiler = profile(activities=activities, profile_memory=True, acc_events=True)
            self._profiler.__enter__()
            self._until = trainer.global_step + self.steps
            self._began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """End, and write what was seen."""
        if self._profiler is None:
            return
        if trainer.global_step < self._until:
            self._waiting = record_function(WAITING)
            self._waiting.__enter__()
            return
        if self._cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        self._write(Path(trainer.default_root_dir) / "profile", profiler, seconds)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let go of the profiler; what it saw is of an unfinished step."""
        self._end_waiting()
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.__exit__(None, None, None)

    def _end_waiting(self) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.__exit__(None, None, None)

    def _write(self, folder: Path, profiler: Any, seconds: float) -> None:
        with atomic_path(folder / "trace.json") as temporary:
            profiler.export_chrome_trace(str(temporary))
        operations = operations_of(profiler, self.steps, self._cuda)
        write_text(folder / "operations.csv", as_csv(operations))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        if self._cuda:
            peak = torch.cuda.max_memory_allocated()
            with atomic_path(folder / "memory_snapshot.pickle") as temporary:
                torch.cuda.memory._dump_snapshot(str(temporary))
            torch.cuda.memory._record_memory_history(enabled=None)
        where = "the device" if self._cuda else "the process"
        text = summary(operations, self.steps, seconds, f"{where} held {peak / 1e9:.2f} GB at most")
        write_text(folder / "summary.txt", text + "\n")
        stderr().print(f"{text}\nprofile: {folder}", highlight=False, soft_wrap=True)


def operations_of(profiler: Any, steps: int, cuda: bool = False) -> list[Operation]:
    """What ran, the costliest first, waiting for data among it.

    Args:
        profiler: that has ended.
        steps: that it saw.
        cuda: take the device's time, not the host's.
    """
    found = [
        Operation(
            event.key,
            event.count / steps,
            (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / steps,
            (event.self_device_memory_usage if cuda else event.self_cpu_memory_usage) / steps,
        )
        for event in profiler.key_averages()
    ]
    return sorted(found, key=lambda one: one.milliseconds, reverse=True)


def as_csv(operations: Iterable[Operation]) -> str:
    """A table: operation, kind, calls a step, milliseconds a step, bytes a step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["operation", "kind", "calls", "milliseconds", "bytes"])
    for one in operations:
        writer.writerow(
            [one.name, one.kind, f"{one.calls:g}", f"{one.milliseconds:.4f}", f"{one.bytes:.0f}"]
        )
    return text.getvalue()


def summary(operations: list[Operation], steps: int, seconds: float, memory: str) -> str:
    """What was seen, as a paragraph.

    Args:
        operations: the costliest first.
        steps: that were looked at.
        seconds: that they took, the profiler's own work included.
        memory: a sentence on it.
    """
    step = 1e3 * seconds / steps
    waiting = sum(one.milliseconds for one in operations if one.name == WAITING)
    work = [one for one in operations if one.name != WAITING]
    kinds: dict[str, float] = {}
    for one in work:
        kinds[one.kind] = kinds.get(one.kind, 0.0) + one.milliseconds
    other = kinds.pop("other", 0.0)
    ordered = sorted(kinds.items(), key=lambda item: item[1], reverse=True)
    outside = max(0.0, step - waiting - other - sum(kinds.values()))
    parts = [f"{100 * ms / step:.0f} % in {kind}" for kind, ms in ordered if ms >= step / 100]
    parts += [f"{100 * other / step:.0f} % in other operations"]
    parts += [f"{100 * waiting / step:.0f} % waiting for data"]
    parts += [
        f"{100 * outside / step:.0f} % outside of operations (Python, Lightning, the profiler)"
    ]
    dear = ", ".join(
        f"{one.name} ({one.milliseconds:.2f} ms in {one.calls:g} calls)" for one in work[:3]
    )
    return (
        f"A step took {step:.1f} ms while it was watched, the mean of {steps}: {', '.join(parts)}. The "
        f"costliest operations of a step: {dear}. {memory[0].upper()}{memory[1:]}."
    )
