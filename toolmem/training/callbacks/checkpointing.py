"""Checkpoints: the last, those before it, the best, and those to keep."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from toolmem.checkpoints import places
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path, remove_unfinished
from toolmem.training.callbacks.throughput import not_training
from toolmem.training.checkpoint_io import AtomicCheckpointIO, Saving
from toolmem.training.module import LanguageModelModule
from toolmem.training.sharded_checkpoints import take_over

LAST = places.LAST


def validation_follows(trainer: pl.Trainer) -> bool:
    """Will Lightning validate after the batch that just ended, before it takes the next one?

    Its loop decides so only after every callback has seen the batch; this asks the same question of
    the same loop.
    """
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and loop._should_check_val_fx(fetcher) and not loop.val_loop.skip


class Checkpointing(Checkpoint):
    """Keeps ``last.ckpt`` and what was it before, ``best.ckpt`` and, if asked, one every so many steps.

    Lightning's ModelCheckpoint couples them (its last is saved when its best is, and its names
    change as metrics do); here each has a fixed name, and takes it in one step. A save that fails (the
    disk is full) is warned of and training goes on; only at its end it is an error.

    Args:
        every_n_steps: optimizer steps between two ``last.ckpt``; one is also written when training
            ends.
        monitor: the metric that says which is best; None keeps no best.
        mode: is the smallest or the largest value best?
        keep_every_n_steps: also keep ``step_N.ckpt`` every so many steps; None keeps none.
        folder: where to; ``checkpoints`` in the run's folder (the trainer's root) when None.
        keep_last: how many of the newest to keep: ``last.ckpt``, ``last-1.ckpt``, ...; should the newest be
            damaged, a run goes on from the one before.
        background: only copy weights and states (which takes as much memory on the host as they do), and
            write them while training goes on.
        when_busy: a save that comes while another is being written waits for it (``wait``), or is kept
            ready beside it, which takes that memory twice, until a newer one comes (``replace``).
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        keep_every_n_steps: int | None = None,
        folder: str | None = None,
        keep_last: int = 2,
        background: bool = True,
        when_busy: Literal["wait", "replace"] = "wait",
    ) -> None:
        super().__init__()
        if every_n_steps < 1 or (keep_every_n_steps is not None and keep_every_n_steps < 1):
            raise ToolmemError(
                "checkpointing: every_n_steps and keep_every_n_steps must be at least 1"
            )
        if keep_last < 1:
            raise ToolmemError(f"checkpointing: keep_last is {keep_last}: it must be at least 1")
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.keep_every_n_steps = keep_every_n_steps
        self.folder = Path(folder) if folder is not None else None
        self.keep_last = keep_last
        self.background = background
        self.when_busy = when_busy
        self.best: float | None = None
        self.best_step: int | None = None
        self.asked = False  # for ``last.ckpt`` as soon as one can be gone on from
        self._judged = -1  # step of the last value of the monitored metric that was looked at
        self._saved_step = -1  # of the files below, which hold the same, the newest first
        self._saved: list[Path] = []
        self._last_step: int | None = None  # of the ``last.ckpt`` that is there
        self._failed = False  # the newest save
        self._io: AtomicCheckpointIO | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the folder, and how files are written."""
        if self.folder is None:
            self.folder = Path(trainer.default_root_dir) / "checkpoints"
        self._io = take_over(trainer.strategy, self.when_busy)

    def state_dict(self) -> dict[str, Any]:
        """What the best was, so that a resumed run does not take a worse one for it."""
        return {"best": self.best, "best_step": self.best_step, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best, if it is of the same metric."""
        if state_dict["monitor"] == self.monitor:
            self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step that training starts from is saved already, or not worth saving."""
        assert self.folder is not None
        self._seen = trainer.global_step
        self._last_step = trainer.global_step if trainer.ckpt_path else None
        if trainer.is_global_zero:
            remove_unfinished(self.folder)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The optimizer may step now: nobody needs the weights that were saved any more."""
        if self._io is not None:
            self._io.writer.copied()

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
        self._tell(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what is due, and the best, if it is."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_due(trainer, pl_module)

    def _save_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        names = self._best_due(trainer, pl_module)
        asked = False
        if step != self._seen:  # else accumulating
            self._seen = step
            asked = self.asked
            if asked or step % self.every_n_steps == 0:
                names.append(LAST)
            if self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0:
                names.append(f"step_{step}.ckpt")
        self._save(trainer, names)
        if asked:  # whoever asked may end the process next
            self._wait(trainer)
            self.asked = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last, and see to it that all is written.

        Raises:
            ToolmemError: when it could not be.
        """
        self._wait(trainer)
        if trainer.strategy.reduce_boolean_decision(self._failed, all=False):
            self._saved = []  # on every rank: what is not there is not to be copied
        self._save(trainer, [LAST])
        if self._io is not None:
            self._io.writer.wait()
            error = self._io.writer.take_error()
            message = trainer.strategy.broadcast(None if error is None else _words(error))
            if message is not None:
                raise ToolmemError(message)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """What was begun is written to its end."""
        self._wait(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """What was begun is written to its end."""
        self._wait(trainer)

    def finish_writing(self, trainer: pl.Trainer) -> None:
        """Wait until what was begun is written."""
        self._wait(trainer)

    def _wait(self, trainer: pl.Trainer) -> None:
        if self._io is not None:
            self._io.writer.wait()
        self._tell(trainer)

    def _tell(self, trainer: pl.Trainer) -> None:
        """Warn of a save that failed."""
        error = self._io.writer.take_error() if self._io is not None else None
        if error is None:
            return
        self._failed, self._last_step = True, None
        warnings.warn(
            f"step {trainer.global_step}: a checkpoint was not written: {_words(error)}. Training goes on, "
            "and the checkpoint before stands",
            RuntimeWarning,
            stacklevel=2,
        )

    def _best_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        """Names of the files to write because there is a new best."""
        reported = pl_module.reported if isinstance(pl_module, LanguageModelModule) else {}
        if self.monitor not in reported:
            return []
        step, value = reported[self.monitor]
        if step == self._judged:
            return []
        self._judged = step
        sign = 1 if self.mode == "min" else -1
        # Not "value < best": a nan is never the best, and never keeps a number from being it.
        if value == value and (self.best is None or sign * value < sign * self.best):
            self.best, self.best_step = value, step
            # A file of this step that is there already knows of another best, and is written again.
            stale = self._saved if self._saved_step == trainer.global_step else []
            self._saved = []
            return ["best.ckpt", *(path.name for path in stale)]
        return []

    def _save(self, trainer: pl.Trainer, names: list[str]) -> None:
        """Save what training has now under several names."""
        assert self.folder is not None
        if self._saved_step != trainer.global_step:
            self._saved_step, self._saved = trainer.global_step, []
        paths = [self.folder / name for name in dict.fromkeys(names)]
        paths = [path for path in paths if path not in self._saved]
        if trainer.fast_dev_run or not paths:  # type: ignore[attr-defined]
            return
        # The last first: what was the last before must be kept before another takes its name.
        paths.sort(key=lambda path: path.name != LAST)
        with not_training(trainer):
            if self._io is None:
                self._save_lightnings_way(trainer, paths)
            elif self._saved:
                self._copy(trainer, self._saved[0], paths)
            else:
                self._failed = False
                saving = Saving(
                    also=tuple(paths[1:]),
                    keep_last=self._earlier(trainer) if paths[0].name == LAST else 1,
                    background=self.background,
                    later=_unchanged_until_step(trainer.lightning_module),
                    replaceable=[path.name for path in paths] == [LAST],
                )
                trainer.save_checkpoint(paths[0], weights_only=False, storage_options=saving)
        self._saved += paths
        if paths[0].name == LAST:
            self._last_step = trainer.global_step

    def _earlier(self, trainer: pl.Trainer) -> int:
        """How many of the last to keep: one of the same step is not an earlier one."""
        return 1 if self._last_step == trainer.global_step else self.keep_last

    def _copy(self, trainer: pl.Trainer, source: Path, paths: list[Path]) -> None:
        """Give what was saved at this step already other names too."""
        assert self._io is not None
        self._io.writer.wait()
        if trainer.is_global_zero and self._io.writer.error is None:
            try:
                for path in paths:
                    if path.name == LAST:
                        places.keep_earlier(path, self._earlier(trainer))
                    places.copy(source, path)
            except ToolmemError as error:
                self._io.writer.error = error
        trainer.strategy.barrier("checkpoint copied")

    def _save_lightnings_way(self, trainer: pl.Trainer, paths: list[Path]) -> None:
        """For strategies with files of their own: one after the other, in the foreground."""
        trainer.save_checkpoint(paths[0], weights_only=False)
        for path in paths[1:]:
            if not paths[0].is_file():
                trainer.save_checkpoint(path, weights_only=False)
            elif trainer.is_global_zero:
                with atomic_path(path) as temporary:
                    shutil.copyfile(paths[0], temporary)
        trainer.strategy.barrier("checkpoint copied")


def _unchanged_until_step(module: pl.LightningModule) -> Callable[[str], bool]:
    """Tells, by its name in a checkpoint, whether nothing but the optimizer's step changes a tensor."""
    names = {name for name, _ in module.named_parameters()}

    def unchanged(name: str) -> bool:
        part, _, rest = name.partition(".")
        return part == "optimizer_states" or (
            part in ("state_dict", "current_model_state") and rest in names
        )

    # A module that steps by itself may do so without telling.
    return unchanged if module.automatic_optimization else lambda name: False


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, ToolmemError) else f"{type(error).__name__}: {error}"
