"""A probe that looks at the model every so often: what all such have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from toolmem.data.modules.population import PopulationDataModule
from toolmem.errors import ToolmemError
from toolmem.training.callbacks.ema import averaged_weights
from toolmem.training.callbacks.recall import undisturbed
from toolmem.training.callbacks.rounds import Rounds
from toolmem.training.callbacks.throughput import not_training
from toolmem.training.module import LanguageModelModule

if TYPE_CHECKING:
    from toolmem.models import LanguageModel


class RoundProbe(pl.Callback):
    """Measures the whole model at its rounds and logs what it finds.

    One process measures, on averaged weights where the run keeps some; the others wait for what it found.
    The model's mode, gradients and all random numbers are left as they were, so training goes the same way
    with and without it.

    Args:
        key: of the probe's options, for messages.
        every_n_steps: optimizer steps between two rounds; 0 for none so.
        steps: rounds at these steps; 0 is before the first.
        steps_per_decade: rounds between a power of ten of steps and the next, evenly by ratio. Where there
            is any round, there is one at the last step, too.

    Raises:
        ToolmemError: for numbers below 0.
    """

    def __init__(
        self,
        key: str,
        every_n_steps: int = 0,
        steps: list[int] | None = None,
        steps_per_decade: int = 0,
    ) -> None:
        super().__init__()
        self.key = key
        self.rounds = Rounds(key, every_n_steps, steps, steps_per_decade)

    @abstractmethod
    def prepare(self, trainer: pl.Trainer, module: LanguageModelModule) -> bool:
        """Get ready for a run's rounds.

        Returns:
            whether there is anything to measure; the same on every rank.
        """

    @abstractmethod
    def measure(
        self, trainer: pl.Trainer, module: LanguageModelModule, model: LanguageModel
    ) -> dict[str, float]:
        """Metrics by name.

        Args:
            trainer: at the step of the round.
            module: that is trained.
            model: the whole of it, in evaluation mode.
        """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse data of many models.

        Raises:
            ToolmemError: for a population.
        """
        if self.rounds and isinstance(trainer.datamodule, PopulationDataModule):  # type: ignore[attr-defined]
            raise ToolmemError(
                f"{self.key} looks at one model, not at a population: leave it out, or train alone"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get ready; what is asked stays the same through the run."""
        self.rounds.begin(trainer.global_step)
        assert isinstance(pl_module, LanguageModelModule)
        self._ready = bool(self.rounds) and self.prepare(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure before the first step, if asked to."""
        if trainer.global_step == 0:
            self._round(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure, if it is time."""
        self._round(trainer, pl_module)

    def _round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._ready or not self.rounds.due(trainer.global_step, trainer.max_steps):
            return
        assert isinstance(pl_module, LanguageModelModule)
        metrics: dict[str, float] = {}
        with not_training(trainer):
            with pl_module.whole_model() as model:
                if trainer.is_global_zero:
                    with undisturbed(pl_module.model), averaged_weights(trainer, pl_module):
                        metrics = self.measure(trainer, pl_module, model)
            metrics = trainer.strategy.broadcast(metrics)
            pl_module.report(metrics)
