"""How much faster two processes train than one, each on a core of its own.

    python benchmarks/ddp.py [--quick] [--json FILE]

A Transformer of 3 million parameters learns people's dialogues by our trainer (``toolmem fit``'s module,
logger and callbacks), 16 dialogues a process. Three sides take turns, in the same two processes, each
pinned to a core with one thread:

- *one*: one process trains, the other waits.
- *apart*: both train, each by itself: what the machine could give.
- *ddp*: both train one model by ``DDPStrategy`` over gloo.

``ddp_scaling`` is tokens a second of *ddp* over *one*, ``machine_scaling`` of *apart* over *one*,
``ddp_efficiency`` of *ddp* over *apart*. What else runs on the machine takes from two cores more than from
one, so that on a busy machine the first two are lower bounds. Two processes also need two cores: on fewer
the script says so and ends.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from command import about, arguments, write
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table

from toolmem.data.modules import FactsDataModule
from toolmem.models import Transformer
from toolmem.training import (
    TRAINER_DEFAULTS,
    AdamW,
    Constant,
    CSVLogger,
    LanguageModelModule,
    Throughput,
)

TARGETS = {"ddp_scaling": "≥ 1.7", "machine_scaling": "", "ddp_efficiency": ""}
SIDES = ("one", "apart", "ddp")
ROWS, QUICK_ROWS = 16, 4  # dialogues of a process
WARM_UP = 2  # steps: DDP makes its buckets anew after the first


class Stopwatch(pl.Callback):
    """Tokens of this process, and seconds, from the end of the warm-up to the end of the last step."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Start, and read."""
        if trainer.global_step > WARM_UP:
            self.tokens += batch.n_tokens
            self.ended = time.perf_counter()
        elif trainer.global_step == WARM_UP:
            self.began = time.perf_counter()


def tokens_per_second(side: str, rows: int, steps: int) -> tuple[float, int]:
    """Train for ``steps`` steps of ``rows`` dialogues a process.

    Returns:
        this process's tokens a second, and the model's parameters.
    """
    together = side == "ddp"
    torch.manual_seed(0)
    model = Transformer(260, dim=192, n_layers=5, n_heads=6, max_seq_len=256)
    strategy: Any = "auto"
    if together:
        strategy = DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            **TRAINER_DEFAULTS,
            max_steps=WARM_UP + steps,
            default_root_dir=folder,
            accelerator="cpu",
            devices=2 if together else 1,
            strategy=strategy,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_checkpointing=False,
            logger=[CSVLogger(folder)],
            callbacks=[watch, Throughput()],
        )
        data = FactsDataModule(
            people=1000,
            setting="in_tool",
            batch_size=rows * (2 if together else 1),
            unseen_people=0,
        )
        trainer.fit(LanguageModelModule(model, AdamW(lr=1e-3), Constant(), fused=False), data)
    return watch.tokens / (watch.ended - watch.began), sum(p.numel() for p in model.parameters())


def work(
    rank: int, turns: Any, rates: Any, port: int, rounds: int, rows: int, steps: int, file: str
) -> None:
    """One of the two processes: takes part in every side of every round.

    They take turns by a barrier that is no process group: with one, metrics of a process that trains by
    itself would wait for the other's.

    Args:
        rank: 0 or 1.
        turns: a barrier of both.
        rates: what each found last.
        port: where they meet in the first round, and so on.
        rounds: how often the sides take turns.
        rows: dialogues of each process.
        steps: of each.
        file: where rank zero writes all tokens a second.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    os.sched_setaffinity(0, {cores()[rank]})
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    measured: dict[str, list[float]] = {side: [] for side in SIDES}
    parameters = 0
    for number in range(rounds):
        os.environ["MASTER_PORT"] = str(port + number)
        for side in SIDES:
            turns.wait()
            rates[rank] = 0.0
            if side != "one" or rank == 0:
                rates[rank], parameters = tokens_per_second(side, rows, steps)
            if dist.is_initialized():
                dist.destroy_process_group()
            turns.wait()
            measured[side].append(rates[0] + rates[1])
    if rank == 0:
        torch.save({"measured": measured, "parameters": parameters}, file)


def cores() -> list[int]:
    """Cores that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def measure(quick: bool) -> dict[str, Any]:
    """Everything, as plain data."""
    rounds, rows, steps = (1, QUICK_ROWS, 2) if quick else (7, ROWS, 20)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/rates.pt"
        context = multiprocessing.get_context("spawn")
        shared = (context.Barrier(2, timeout=600), context.Array("d", 2))
        multiprocessing.spawn(work, (*shared, port, rounds, rows, steps, file), nprocs=2)
        found = torch.load(file, weights_only=True)
    rates = found["measured"]

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[above], rates[below], strict=True))

    return {
        "ddp_scaling": ratio("ddp", "one"),
        "machine_scaling": ratio("apart", "one"),
        "ddp_efficiency": ratio("ddp", "apart"),
        "details": {
            "parameters": found["parameters"],
            "rows_per_process": rows,
            "steps": steps,
            "rounds": rounds,
            "tokens_per_s": rates,
        },
        "circumstances": about(quick),
    }


def show(result: dict[str, Any]) -> None:
    """A table of the ratios."""
    table = Table(title="two processes on two cores")
    for column in ("figure", "measured", "goal"):
        table.add_column(column)
    for name, target in TARGETS.items():
        table.add_row(name, f"{result[name]:.2f}", target)
    Console().print(table)


def main() -> None:
    """Entry."""
    options = arguments(__doc__, "rough figures within a minute").parse_args()
    if len(cores()) < 2:
        sys.exit("benchmarks/ddp.py needs two cores, and this process may use one")
    result = measure(options.quick)
    show(result)
    write(result, options)


if __name__ == "__main__":
    main()
