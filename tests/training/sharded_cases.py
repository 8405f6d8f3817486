"""Runs that save and go on under one layout or another, in as many processes as there are."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from parallel_cases import MODELS, RowsData, quiet, transformer, whole_weights

from toolmem.training import TRAINER_DEFAULTS, WSD, AdamW, Checkpointing, LanguageModelModule

STEPS = 8


@dataclass
class Run:
    """One training run.

    Args:
        folder: the run's.
        data: ranks over data; 0 is one process without a strategy.
        tensor: ranks over tensors.
        stop: step to stop after; the schedule is that of 8 steps.
        resume: a checkpoint.
        dropout: of the model.
        options: of Checkpointing.
        whole: save one file for all ranks.
        model: of ``parallel_cases.MODELS``; the plain Transformer when None.
        ddp: so many processes with a copy of the model each.
        accumulate: batches a step.
        cut: batch after which ``cut.ckpt`` is saved, also within a step.
    """

    folder: str
    data: int = 0
    tensor: int = 1
    stop: int = STEPS
    resume: str | None = None
    dropout: float = 0.0
    options: dict[str, Any] | None = None
    whole: bool = False
    model: str | None = None
    ddp: int = 0
    accumulate: int = 1
    cut: int | None = None


class Cut(pl.Callback):
    """A checkpoint after some batch."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        if index + 1 == self.batch:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/cut.ckpt")


class Stop(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def fit(run: Run) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = (
        MODELS[run.model]() if run.model else transformer(dim=32, n_heads=8, dropout=run.dropout)
    )
    # An epsilon of the size of gradients' noise: AdamW's first steps divide noise by noise.
    module = LanguageModelModule(
        model, AdamW(lr=1e-3, weight_decay=0.1), WSD(warmup_steps=2), fused=False
    )
    strategy: Any = "auto"
    if run.data:
        strategy = ModelParallelStrategy(
            run.data, run.tensor, save_distributed_checkpoint=not run.whole
        )
    elif run.ddp:
        strategy = "ddp"
    keep = Checkpointing(every_n_steps=2, **(run.options or {}))
    trainer = pl.Trainer(
        **(
            TRAINER_DEFAULTS
            | {
                "max_steps": STEPS,
                "default_root_dir": run.folder,
                "accelerator": "cpu",
                "devices": run.ddp or max(run.data, 1) * run.tensor,
                "strategy": strategy,
                "logger": False,
                "enable_checkpointing": True,
                "enable_progress_bar": False,
                "gradient_clip_val": 0.5,
                "limit_val_batches": 0,
                "accumulate_grad_batches": run.accumulate,
                "callbacks": [Cut(run.cut), Stop(run.stop), keep],
            }
        )
    )
    with quiet():
        trainer.fit(module, RowsData(), ckpt_path=run.resume)
        return whole_weights(module)


def work(rank: int, size: int, port: int, runs: list[Run], out: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }
    torch.set_num_threads(1)
    for index, run in enumerate(runs):
        weights = fit(run)
        if rank == 0:
            torch.save(weights, f"{out}/{size}.{index}.pt")
        torch.distributed.barrier()
    Path(out, f"{size}.{rank}.json").write_text(json.dumps("done"))


def in_processes(size: int, runs: list[Run], out: str) -> list[dict[str, torch.Tensor]]:
    """Every run in ``size`` processes that are started once: the final weights of each."""
    import socket

    import torch.multiprocessing as multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (size, port, runs, out), nprocs=size)
    return [torch.load(f"{out}/{size}.{index}.pt", weights_only=True) for index in range(len(runs))]
