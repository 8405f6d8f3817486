"""Ends a run that its cluster wants to end, with a checkpoint that loses nothing."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from toolmem.errors import ToolmemError
from toolmem.training.callbacks.checkpointing import Checkpointing

# what Slurm sends before it kills, and what submitit has it send some time before that
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class Preempted(BaseException):
    """A signal asked the process to end; what was trained can be gone on from.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"asked to end by {signal.Signals(signum).name}")
        self.signum = signum


def end_on_signals() -> None:
    """From now on the first signal to end raises ``Preempted``, wherever this process is."""

    def end(signum: int, frame: FrameType | None) -> None:
        for one in SIGNALS:
            signal.signal(one, _ignore)
        raise Preempted(signum)

    for one in SIGNALS:
        signal.signal(one, end)


def _ignore(signum: int, frame: FrameType | None) -> None:
    """Unlike ``SIG_IGN`` this is not inherited by programs that are started."""


class Preemption(pl.Callback):
    """In training, a signal to end writes ``last.ckpt`` after the optimizer step, then raises ``Preempted``.

    A run that goes on from it is the run that was never asked. Only for training in one process: others
    would wait for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what it cannot do.

        Raises:
            ToolmemError: for several processes.
        """
        if trainer.world_size > 1:
            raise ToolmemError(
                f"Preemption: there are {trainer.world_size} processes, and it is for one: leave it out, or "
                "set trainer.devices to 1"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over; Lightning would end at once, without a checkpoint."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self.checkpointing = next(one for one in callbacks if isinstance(one, Checkpointing))
        self._before = {one: signal.signal(one, self._receive) for one in SIGNALS}

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
            self.checkpointing.asked = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End, once the checkpoint is written.

        Raises:
            Preempted: then.
        """
        if self.received is not None and not self.checkpointing.asked:
            raise Preempted(self.received)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        while self._before:
            signal.signal(*self._before.popitem())

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back, but for one who is ending: what comes then would only disturb."""
        if not isinstance(exception, Preempted):
            self.on_train_end(trainer, pl_module)
