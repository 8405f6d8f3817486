"""How fast a population trains, against its members one after another, on one core in float32.

    python benchmarks/population.py [--quick] [--json FILE]

Each cell is a ratio measured in this run, the sides taking turns: the seconds that the members' runs take
one after another, over those of the population, both by Lightning's trainer as ``toolmem fit`` sets it up
(loggers, callbacks, optimizer, schedule, loader and all), steps alone. Above 1 the population is faster.
One member against itself shows what a population costs beside.

Members 1, 4 and 16, widths 8, 16 and 32, at two sizes of batch. Three ways to run them: ``together`` (all
members in one pass), ``one by one`` (a pass each, one optimizer for all), and ``auto`` (what
``model.at_once`` left out chooses).
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as pl
import torch
from command import arguments, write
from rich.console import Console
from rich.table import Table

from toolmem.data import FactsDataModule, PopulationDataModule
from toolmem.models import Transformer
from toolmem.training import (
    TRAINER_DEFAULTS,
    WSD,
    Checkpointing,
    CSVLogger,
    LanguageModelModule,
    Member,
    Muon,
    PopulationModule,
    Progress,
    Throughput,
)
from toolmem.training.folders import processor_name

FACTS = {"people": 64, "unseen_people": 0}
WAYS = {"together": 10**6, "one by one": 1, "auto": None}


def model(dim: int) -> Transformer:
    """The shape of ``recipes/facts_in_weight.yaml``, of another width."""
    torch.manual_seed(0)
    return Transformer(
        260, dim, n_layers=2, n_heads=2, hidden_dim=3 * dim, max_seq_len=256, feed_forward="silu",
        tie_embeddings=True, embedding_scale=True, conv_width=4,
    )  # fmt: skip


class Clock(pl.Callback):
    """Seconds of each step after the first few, in which memory and kernels are found."""

    warmup = 3

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Read."""
        now = time.process_time()
        if trainer.global_step > self.warmup:
            self.seconds.append(now - self.last)
        self.last = now


def fit(module: LanguageModelModule, data: pl.LightningDataModule, steps: int) -> float:
    """Median CPU seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        pl.Trainer(
            **TRAINER_DEFAULTS,
            max_steps=steps + clock.warmup,
            default_root_dir=folder,
            accelerator="cpu",
            devices=1,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            logger=[CSVLogger(folder)],
            callbacks=[clock, Throughput(), Progress(), Checkpointing()],
        ).fit(module, data)
        return statistics.median(clock.seconds)


class Sides:
    """The ways to train some members.

    Args:
        members: how many.
        dim: their width.
        batch_size: dialogues of each member's batch.
        steps: that are measured, a turn.
    """

    def __init__(self, members: int, dim: int, batch_size: int, steps: int) -> None:
        self.members = members
        self.dim = dim
        self.options = {**FACTS, "batch_size": batch_size}
        self.steps = steps

    def alone(self, number: int) -> float:
        """Seconds of a step of one member's run."""
        module = LanguageModelModule(model(self.dim), Muon(lr=1e-2), WSD())
        return fit(module, FactsDataModule(**self.options, seed=number), self.steps)

    def population(self, at_once: int | None) -> float:
        """Seconds of a step of them all."""
        members = [Member(seed=number) for number in range(self.members)]
        module = PopulationModule(
            model(self.dim), Muon(lr=1e-2), WSD(), members=members, at_once=at_once
        )
        facts = {"class_path": "toolmem.data.FactsDataModule", "init_args": self.options}
        seeds = [{"seed": number} for number in range(self.members)]
        return fit(module, PopulationDataModule(facts, seeds), self.steps)


def cell(members: int, dim: int, batch_size: int, rounds: int, steps: int) -> dict[str, float]:
    """One row of the table: medians over rounds, in each of which every side has its turn."""
    sides = Sides(members, dim, batch_size, steps)
    turns: list[Callable[[], float]] = [lambda: sides.alone(0)]
    turns += [lambda at_once=at_once: sides.population(at_once) for at_once in WAYS.values()]  # type: ignore[misc]
    found: list[list[float]] = []
    for index in range(rounds):
        order = list(range(len(turns)))[:: -1 if index % 2 else 1]
        seconds = [0.0] * len(turns)
        for side in order:
            seconds[side] = turns[side]()
        found.append(seconds)
    alone = [members * seconds[0] for seconds in found]
    ratios = {
        way: statistics.median(a / seconds[1 + i] for a, seconds in zip(alone, found, strict=True))
        for i, way in enumerate(WAYS)
    }
    return {"alone_ms": 1e3 * statistics.median(alone), **ratios}


def measure(quick: bool) -> dict[str, Any]:
    """Everything, as plain data."""
    rounds, steps = (1, 4) if quick else (3, 8)
    numbers = (1, 4) if quick else (1, 4, 16)
    widths = (8, 32) if quick else (8, 16, 32)
    cells = {
        f"members_{members}_dim_{dim}_batch_{batch_size}": cell(
            members, dim, batch_size, rounds, steps
        )
        for batch_size in (8, 32)
        for dim in widths
        for members in numbers
    }
    circumstances = {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
    }
    return {"details": cells, "circumstances": circumstances}


def show(result: dict[str, Any]) -> None:
    """A table: a row a population, a column a way to run it."""
    about = result["circumstances"]
    title = (
        f"{about['processor']}, {about['threads']} thread, float32, torch {about['torch']}: "
        "times as fast as one after another"
    )
    table = Table("population", "one after another, ms a step", *WAYS, title=title)
    for name, values in result["details"].items():
        ratios = [f"{values[way]:.2f}" for way in WAYS]
        table.add_row(name.replace("_", " "), f"{values['alone_ms']:.1f}", *ratios)
    Console().print(table)


def main() -> None:
    """Measure, print, and write if asked to."""
    options = arguments(__doc__).parse_args()
    warnings.filterwarnings("ignore")
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    result = measure(options.quick)
    show(result)
    write(result, options)


if __name__ == "__main__":
    main()
