"""An exponential moving average of the weights, which is what is validated and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from toolmem.errors import ToolmemError


class EMA(WeightAveraging):
    """Averages weights over steps (DeepSeek-V3 keeps such an average, arXiv 2412.19437, section 3.2.2).

    After each step ``average = decay * average + (1 - decay) * weights``, beginning with the weights
    after ``start_step``. Validation and the recall probe run on the average, and checkpoints hold it
    where their weights are looked for, so ``toolmem generate`` and ``evaluate`` use it; the weights
    that training goes on with lie beside it, and a resumed run is the run that was not stopped.

    Args:
        decay: share of the average that a step keeps.
        every_n_steps: steps between two updates.
        start_step: the average begins with the weights after this step.

    Raises:
        ToolmemError: for options outside their range.
    """

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1, start_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ToolmemError(f"EMA: decay is {decay}: it must be at least 0 and below 1")
        if every_n_steps < 1 or start_step < 0:
            raise ToolmemError("EMA: every_n_steps must be 1 or more, start_step 0 or more")
        # Buffers are no weights: the average's follow the model's.
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.start_step = start_step

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Lightning's question after each step (counted from 0) and epoch."""
        if step_idx is None:
            return False
        step = step_idx + 1
        return step >= self.start_step and step % self.every_n_steps == 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing yet: the last checkpoint, written after this, must hold the weights themselves
        too, or training could not go on from it (Lightning's own loses them here).
        """

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in the model."""
        if self._average_model is not None:
            self._copy_average_to_current(pl_module)
            self._average_model = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average where weights are looked for, and the weights beside it."""
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up both, in training."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


@contextmanager
def averaged_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """In here the model's weights are their average, where the run keeps one."""
    keepers = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, EMA) and callback._average_model is not None
    ]
    for keeper in keepers:
        keeper._swap_models(pl_module)
    try:
        yield
    finally:
        for keeper in keepers:
            keeper._swap_models(pl_module)
