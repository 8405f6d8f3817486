"""Endless streams of batches in which every batch is a function of its number.

Where such a stream stands is one integer, so resuming, sharding over ranks and sharing the work
among DataLoader workers are arithmetic, and any number of them gives the same batches.
"""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from toolmem.data.batch import Batch
from toolmem.errors import ToolmemError
from toolmem.processes import end_with

PATIENCE_S = 600.0  # with a worker that gives nothing: a cold remote file may take minutes


class IndexedBatches(IterableDataset, ABC):
    """An endless stream whose batch number ``i`` depends on nothing but ``i`` and the settings.

    Args:
        seed: of everything random in it.
        rank: this process's number; it gets its share of the rows of every batch.
        world_size: number of processes.

    Attributes:
        position: number of the batch that iteration begins with.
        stop: number of the batch that it ends before; None is never.
    """

    def __init__(self, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if seed < 0:
            raise ToolmemError(f"seed is {seed}: it must be 0 or more")
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self.stop: int | None = None

    @abstractmethod
    def batch_at(self, index: int) -> Batch:
        """The share of this rank of batch ``index``, its state naming batch ``index + 1``."""

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        index, step = self.position, 1
        if worker is not None:  # the DataLoader takes one batch from each worker in turn
            index, step = index + worker.id, worker.num_workers
        while self.stop is None or index < self.stop:
            yield self.batch_at(index)
            index += step

    def share(self, rows: np.ndarray) -> np.ndarray:
        """The entries of ``rows`` that are this rank's: every ``world_size``-th."""
        return rows[self.rank :: self.world_size]

    def state_dict(self) -> dict[str, Any]:
        """Where iteration begins, as in `Batch.state`."""
        return {"batch": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin where ``state`` (a `Batch.state`) says."""
        if not isinstance(state.get("batch"), int):
            raise ToolmemError(f"not the state of a {type(self).__name__}: {state!r}")
        self.position = state["batch"]


def _as_is(batch: Any) -> Any:
    return batch


def _end_with_training(worker: int) -> None:
    """A worker must not outlive its loader's process, whatever it is doing when that one is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with(parent.pid)


class _Watched:
    """A loader's batches; when one does not come, it is told whose it was.

    Args:
        batches: of a DataLoader with workers, which takes one from each in turn.
        n_workers: their number.
        seconds: that one may take.
    """

    def __init__(self, batches: Any, n_workers: int, seconds: float) -> None:
        self.batches = batches
        self.n_workers = n_workers
        self.seconds = seconds
        self.taken = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            batch: Batch = next(self.batches)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            worker = self.taken % self.n_workers
            pid = self.batches._workers[worker].pid
            raise ToolmemError(
                f"data worker {worker} of {self.n_workers} (process {pid}) gave no batch for "
                f"{self.seconds:g} s: a file system that hangs, or a batch that takes longer; look where it "
                f"stands with `py-spy dump --pid {pid}`, set data.init_args.num_workers: 0 to make batches "
                "in this process, or go on by --resume auto"
            ) from error
        self.taken += 1
        return batch


class _Loader(DataLoader):
    def __iter__(self) -> Any:
        batches = super().__iter__()
        return _Watched(batches, self.num_workers, self.timeout) if self.num_workers else batches


def make_loader(
    batches: IterableDataset, num_workers: int = 0, patience_s: float = PATIENCE_S
) -> DataLoader:
    """A DataLoader that hands the stream's batches through as they are.

    Args:
        batches: a stream of `Batch`es.
        num_workers: processes that make them; 0 makes them in this one.
        patience_s: seconds without a batch after which a worker is taken to hang; then
            iteration raises ``ToolmemError``, naming it.

    Raises:
        ToolmemError: for a negative number of processes.
    """
    if num_workers < 0:
        raise ToolmemError(f"data.init_args.num_workers is {num_workers}: it must be 0 or more")
    return _Loader(
        batches,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=num_workers,
        worker_init_fn=_end_with_training,
        pin_memory=torch.cuda.is_available(),
        timeout=patience_s if num_workers else 0,
    )
