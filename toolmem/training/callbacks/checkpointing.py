"""Checkpoints: the last, the best, and those to keep."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from toolmem.errors import ToolmemError
from toolmem.files import atomic_path
from toolmem.training.callbacks.throughput import not_training
from toolmem.training.checkpoint_io import AtomicCheckpointIO
from toolmem.training.module import LanguageModelModule


def validation_follows(trainer: pl.Trainer) -> bool:
    """Will Lightning validate after the batch that just ended, before it takes the next one?

    Its loop decides so only after every callback has seen the batch; this asks the same question of
    the same loop.
    """
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and loop._should_check_val_fx(fetcher) and not loop.val_loop.skip


class Checkpointing(Checkpoint):
    """Keeps ``last.ckpt``, ``best.ckpt`` and, if asked, one file every so many steps.

    Lightning's ModelCheckpoint couples the three (its last is saved when its best is, and its names
    change as metrics do); here each is a file of a fixed name, written in one step.

    Args:
        every_n_steps: optimizer steps between two ``last.ckpt``; one is also written when training
            ends.
        monitor: the metric that says which is best; None keeps no best.
        mode: is the smallest or the largest value best?
        keep_every_n_steps: also keep ``step_N.ckpt`` every so many steps; None keeps none.
        folder: where to; ``checkpoints`` in the run's folder (the trainer's root) when None.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        keep_every_n_steps: int | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps < 1 or (keep_every_n_steps is not None and keep_every_n_steps < 1):
            raise ToolmemError(
                "checkpointing: every_n_steps and keep_every_n_steps must be at least 1"
            )
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.keep_every_n_steps = keep_every_n_steps
        self.folder = Path(folder) if folder is not None else None
        self.best: float | None = None
        self.best_step: int | None = None
        self.asked = False  # for ``last.ckpt`` as soon as one can be gone on from
        self._judged = -1  # step of the last value of the monitored metric that was looked at
        self._saved_step = -1  # of the files below, which hold the same, the newest first
        self._saved: list[Path] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the folder, and how files are written."""
        if self.folder is None:
            self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def state_dict(self) -> dict[str, Any]:
        """What the best was, so that a resumed run does not take a worse one for it."""
        return {"best": self.best, "best_step": self.best_step, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best, if it is of the same metric."""
        if state_dict["monitor"] == self.monitor:
            self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step that training starts from is saved already, or not worth saving."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After an optimizer step: save what is due, unless a validation comes first."""
        # A run that goes on from a checkpoint of this moment would take the validation for done.
        if not validation_follows(trainer):
            self._save_due(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what is due, and the best, if it is."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_if_best(trainer, pl_module)
            self._save_due(trainer, pl_module)

    def _save_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step == self._seen:  # accumulating
            return
        self._seen = step
        self._save_if_best(trainer, pl_module)
        if self.asked or step % self.every_n_steps == 0:
            self._save(trainer, "last.ckpt")
            self.asked = False
        if self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0:
            self._save(trainer, f"step_{step}.ckpt")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last."""
        self._save(trainer, "last.ckpt")

    def _save_if_best(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reported = pl_module.reported if isinstance(pl_module, LanguageModelModule) else {}
        if self.monitor not in reported:
            return
        step, value = reported[self.monitor]
        if step == self._judged:
            return
        self._judged = step
        sign = 1 if self.mode == "min" else -1
        # Not "value < best": a nan is never the best, and never keeps a number from being it.
        if value == value and (self.best is None or sign * value < sign * self.best):
            self.best, self.best_step = value, step
            # A file of this step that is there already knows of another best, and is written again.
            stale = self._saved if self._saved_step == trainer.global_step else []
            self._saved = []
            self._save(trainer, "best.ckpt")
            for path in stale:
                self._save(trainer, path.name)

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        assert self.folder is not None
        path = self.folder / name
        if self._saved_step != trainer.global_step:
            self._saved_step, self._saved = trainer.global_step, []
        if trainer.fast_dev_run or path in self._saved:  # type: ignore[attr-defined]
            return
        with not_training(trainer):
            if self._saved:
                if trainer.is_global_zero:
                    with atomic_path(path) as temporary:
                        shutil.copyfile(self._saved[0], temporary)
                trainer.strategy.barrier("checkpoint copied")
            else:
                trainer.save_checkpoint(path, weights_only=False)
        self._saved.append(path)
