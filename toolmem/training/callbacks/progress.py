"""How training goes, on the terminal."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from toolmem import console
from toolmem.training.module import LanguageModelModule


class Progress(ProgressBar):
    """A bar with the step, the loss, tokens a second and the time left.

    It costs nothing between two refreshes but a look at the clock. Where stderr is no terminal, a
    plain line is written every so often instead.

    Args:
        refresh_s: seconds between two refreshes of the bar, at least 0.2.
        line_s: seconds between two lines where there is no terminal.
    """

    def __init__(self, refresh_s: float = 0.25, line_s: float = 30.0) -> None:
        super().__init__()
        self.refresh_s = max(refresh_s, 0.2)
        self.line_s = line_s
        self._enabled = True
        self._bar: Any = None
        self._next = 0.0

    def disable(self) -> None:
        """Show nothing (Lightning calls it on all ranks but zero)."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without breaking the bar."""
        if self._enabled:
            console.stderr().print(*args)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the bar up."""
        self._began, self._first = time.perf_counter(), trainer.global_step
        self._next = self._began + self.line_s
        if self._enabled and console.stderr().is_terminal:
            self._next = 0.0
            self._bar = make_bar()
            total = trainer.max_steps if trainer.max_steps and trainer.max_steps > 0 else None
            self._task = self._bar.add_task(
                "training", total=total, completed=self._first, loss="", speed=""
            )
            self._bar.start()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Refresh, if it is time."""
        now = time.perf_counter()
        if self._enabled and now >= self._next:
            self._next = now + (self.line_s if self._bar is None else self.refresh_s)
            self._show(trainer, pl_module)

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reported = pl_module.reported if isinstance(pl_module, LanguageModelModule) else {}
        loss = speed = ""
        if "train/loss" in reported:
            loss = f"loss {reported['train/loss'][1]:.3f}"
        if "throughput/tokens_per_s" in reported:
            speed = f"{reported['throughput/tokens_per_s'][1]:,.0f} tokens/s"
        step = trainer.global_step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, speed=speed)
            self._bar.refresh()
            return
        of = f"/{trainer.max_steps}" if trainer.max_steps and trainer.max_steps > 0 else ""
        seconds = time.perf_counter() - self._began
        console.stderr().print(
            f"step {step}{of}  {loss}  {speed}  {seconds:.0f} s", highlight=False
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show how it ended, and take the bar down."""
        if self._enabled:
            self._show(trainer, pl_module)
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Take the bar down, so that what follows can be read."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def make_bar() -> Any:
    """The bar; refreshed by hand, since rich's own thread would take time from the training."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[loss]}"),
        progress.TextColumn("{task.fields[speed]}"),
        progress.TimeRemainingColumn(),
        console=console.stderr(),
        auto_refresh=False,
    )
