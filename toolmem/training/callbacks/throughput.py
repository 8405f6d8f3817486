"""Tokens a second, of training alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from toolmem.training.metrics import TokenCount
from toolmem.training.module import LanguageModelModule


class Throughput(pl.Callback):
    """Logs ``throughput/tokens_per_s``: tokens that are not padding, over all ranks, per second.

    The time of loading counts; that of validation, recall and checkpoints does not. The first step,
    in which compilation happens, is left out and logged apart as ``throughput/first_step_s``.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._began: float | None = None  # when the span that is measured began
        self._paused = 0.0  # seconds in it that are not training's
        self._step = 0
        self._first_step_s: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the first step."""
        self._started = time.perf_counter()
        self._began, self._paused = None, 0.0
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the batch; every ``trainer.log_every_n_steps`` steps, log."""
        if self._began is None:
            paused = self._paused
            self._begin()
            self._first_step_s = self._began_at() - self._started - paused
            self._step = trainer.global_step
            return
        self._tokens += batch.n_tokens
        step = trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step != self._step and every and step % every == 0:
            self._step = step
            self._log(pl_module)

    def _begin(self) -> None:
        self._began, self._paused, self._tokens = time.perf_counter(), 0.0, 0

    def _began_at(self) -> float:
        assert self._began is not None
        return self._began

    def _log(self, pl_module: pl.LightningModule) -> None:
        seconds = time.perf_counter() - self._began_at() - self._paused
        ranks = getattr(pl_module, "ranks", None)
        tokens = TokenCount(process_group=ranks and ranks.data_group).to(pl_module.device)
        tokens.update(self._tokens)
        rate = float(tokens.compute()) / max(seconds, 1e-9)
        metrics = {"throughput/tokens_per_s": rate}
        if self._first_step_s is not None:
            metrics["throughput/first_step_s"] = self._first_step_s
            self._first_step_s = None
        if isinstance(pl_module, LanguageModelModule):
            pl_module.report(metrics)
        self._begin()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._pause_began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the clock go on."""
        self._paused += time.perf_counter() - self._pause_began


@contextmanager
def not_training(trainer: pl.Trainer) -> Iterator[None]:
    """What happens in here takes time that is not training's."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - began
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback._paused += seconds
