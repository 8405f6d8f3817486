"""How many documents training has passed over because they cannot be read."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from toolmem.console import stderr
from toolmem.training.metrics import TokenCount
from toolmem.training.module import LanguageModelModule


class SkippedDocuments(pl.Callback):
    """Logs ``data/bad_documents``, over all ranks and since the run's first step, and says it at the end.

    The DataModule's ``bad_documents`` is a function of how far training is, so a resumed run logs the
    same.
    """

    def __init__(self) -> None:
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step that training starts from is logged already."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Every ``trainer.log_every_n_steps`` steps, log."""
        step = trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step != self._step and every and step % every == 0:
            self._step = step
            if isinstance(pl_module, LanguageModelModule):
                pl_module.report({"data/bad_documents": float(self._count(trainer, pl_module))})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how many there were."""
        n = self._count(trainer, pl_module)
        if n and trainer.is_global_zero:
            stderr().print(
                f"{n:,} documents could not be read and were passed over; the first are told of above"
            )

    @staticmethod
    def _count(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        ranks = getattr(pl_module, "ranks", None)
        count = TokenCount(process_group=ranks and ranks.data_group).to(pl_module.device)
        count.update(int(getattr(trainer.datamodule, "bad_documents", 0)))  # type: ignore[attr-defined]
        return int(count.compute())
