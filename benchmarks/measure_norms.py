"""What the norms probe costs, every 100 steps.

    OMP_NUM_THREADS=1 python benchmarks/measure_norms.py [--quick] [--json FILE]

Trains with our trainer, its CSV logger and the probe, rounds of 100 steps with and without a probe in
turns, on random tokens that all bear loss. ``norms_overhead`` is what a probe adds to the step that it
comes after and to the next (over the median of the round's other steps), as a share of 100 of them:
the median over rounds, of the shape where it is the largest. It is steadier than the ratio of whole
rounds with a probe to those without, which is given beside it and needs an idle machine.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as pl
import torch
from command import arguments, write
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, IterableDataset

from toolmem.cli.fit import be_quiet
from toolmem.data.batch import Batch
from toolmem.models import Transformer
from toolmem.training import (
    TRAINER_DEFAULTS,
    AdamW,
    Constant,
    CSVLogger,
    LanguageModelModule,
    NormProbe,
)
from toolmem.training.folders import processor_name

EVERY, VOCAB = 100, 260
TARGET = 0.02


@dataclass(frozen=True)
class Shape:
    """A model, and the rows of a step."""

    dim: int
    layers: int
    rows: int
    seq: int


QUICK = {"tiny": Shape(48, 2, 8, 70)}
SHAPES = {"small": Shape(48, 2, 32, 70), "medium": Shape(128, 4, 32, 128)}


class Random(IterableDataset):
    """One random batch without end."""

    def __init__(self, shape: Shape) -> None:
        tokens = torch.randint(VOCAB, (shape.rows, shape.seq + 1))
        mask = torch.ones(shape.rows, shape.seq, dtype=torch.bool)
        size = shape.rows * shape.seq
        self.batch = Batch(tokens[:, :-1].clone(), tokens[:, 1:].clone(), mask, n_tokens=size)

    def __iter__(self) -> Iterator[Batch]:
        """The batch, again and again."""
        while True:
            yield self.batch


class Turns(pl.Callback):
    """Lets the probe alone in every other round, and times every step, all that follows it included."""

    def __init__(self, probe: NormProbe) -> None:
        super().__init__()
        self.probe = probe
        self.seconds: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A step begins where the one before it ended."""
        now = time.perf_counter()
        if batch_idx:
            self.seconds.append(now - self.began)
        self.began = now
        self.probe.every_n_steps = EVERY if (trainer.global_step // EVERY) % 2 == 0 else 10**9

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last step ends here."""
        self.seconds.append(time.perf_counter() - self.began)


def of_shape(shape: Shape, pairs: int) -> dict[str, Any]:
    """What a probe costs at one shape, over pairs of rounds, the first pair left out."""
    be_quiet()
    torch.manual_seed(0)
    model = Transformer(VOCAB, shape.dim, shape.layers, 2, max_seq_len=shape.seq)
    module = LanguageModelModule(model, AdamW(lr=1e-3), Constant())
    probe = NormProbe(EVERY)
    turns = Turns(probe)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = TRAINER_DEFAULTS | {
            "max_steps": 2 * EVERY * (pairs + 1) + 1,
            "default_root_dir": folder,
            "accelerator": "cpu",
            "logger": CSVLogger(folder),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "callbacks": [turns, probe],
        }
        loader = DataLoader(Random(shape), batch_size=None)
        pl.Trainer(**options).fit(module, loader)
    shares, ratios, probes = [], [], []
    for first in range(2 * EVERY, 2 * EVERY * (pairs + 1), 2 * EVERY):
        # with the probe's step go the 50 before it and the 49 after it: what follows it counts too
        middle = first + EVERY - 1
        around = turns.seconds[middle - EVERY // 2 : middle + EVERY // 2]
        usual = statistics.median(around)
        extra = turns.seconds[middle] + turns.seconds[middle + 1] - 2 * usual
        probes.append(extra)
        shares.append(extra / (EVERY * usual))
        without = turns.seconds[first + EVERY + EVERY // 2 : first + 2 * EVERY + EVERY // 2]
        ratios.append(sum(around) / sum(without) - 1)
    return {
        "overhead": statistics.median(shares),
        "overhead_range": [min(shares), max(shares)],
        "whole_rounds": statistics.median(ratios),
        "probe_ms": 1e3 * statistics.median(probes),
        "step_ms": 1e3 * statistics.median(turns.seconds),
        "tokens": shape.rows * shape.seq,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def measure(quick: bool) -> dict[str, Any]:
    """Every shape as plain data; key ``norms_overhead``."""
    details = {}
    for name, shape in (QUICK if quick else SHAPES).items():
        details[name] = of_shape(shape, {"tiny": 2, "small": 12, "medium": 2}[name])
    return {
        "norms_overhead": max(part["overhead"] for part in details.values()),
        "details": details,
        "circumstances": {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


def show(result: dict[str, Any]) -> None:
    """One row a shape."""
    about = result["circumstances"]
    title = (
        f"A probe every {EVERY} steps: {about['processor']}, {about['threads']} thread, float32, "
        f"torch {about['torch']}"
    )
    columns = ("model", "parameters", "tokens a step", "step ms", "probe ms", "share", "rounds")
    table = Table(*columns, title=title)
    for name, row in result["details"].items():
        table.add_row(
            name,
            f"{row['parameters']:,}",
            f"{row['tokens']:,}",
            f"{row['step_ms']:.1f}",
            f"{row['probe_ms']:.1f}",
            f"{100 * row['overhead']:.2f} %",
            f"{100 * row['whole_rounds']:+.2f} %",
        )
    Console().print(table)
    good = "reached" if result["norms_overhead"] <= TARGET else "missed"
    Console().print(f"norms_overhead {result['norms_overhead']:.4f}, goal ≤ {TARGET}: {good}")


def main() -> None:
    """Measure, print, and write if asked to."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    result = measure(options.quick)
    show(result)
    write(result, options)


if __name__ == "__main__":
    main()
