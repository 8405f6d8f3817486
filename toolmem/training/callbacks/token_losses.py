"""Loss by kind of token while training goes on."""

from __future__ import annotations

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
    from toolmem.evaluation.token_losses import TokenLossTest
    from toolmem.models import LanguageModel


class TokenLossProbe(pl.Callback):
    """Every so often measures what the assistant's tokens cost the model, by kind, nothing generated.

    Logs ``loss/known/KIND``, a mean in nats a token, and ``accuracy/known/KIND``, the share of tokens that
    are the likeliest, on people that training knows, and ``loss/unseen/KIND`` and ``accuracy/unseen/KIND``
    on people that it does not. Kinds are ``query``, ``name``, ``copied``, ``memorised`` and ``other``
    (`toolmem.evaluation.token_losses`), as far as the dialogues have them. The model's mode, gradients and
    all random numbers are left as they were; on averaged weights where the run keeps some. Data without
    questions is passed over in silence.

    Args:
        every_n_steps: optimizer steps between two rounds; 0 for none so.
        steps: rounds at these steps; 0 is before the first.
        steps_per_decade: rounds between a power of ten of steps and the next, evenly by ratio. Where there
            is any round, there is one at the last step, too.
        n_questions: of known people, a round.
        n_unseen: of unseen people, a round.
        batch_size: dialogues scored at once.

    Raises:
        ToolmemError: for numbers that cannot be.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        steps: list[int] | None = None,
        steps_per_decade: int = 0,
        n_questions: int = 256,
        n_unseen: int = 256,
        batch_size: int = 128,
    ) -> None:
        super().__init__()
        self.rounds = Rounds("token_losses", every_n_steps, steps, steps_per_decade)
        if n_questions < 1 or n_unseen < 0 or batch_size < 1:
            raise ToolmemError(
                "token_losses: n_questions and batch_size must be 1 or more, n_unseen 0 or more"
            )
        self.n_questions = n_questions
        self.n_unseen = n_unseen
        self.batch_size = batch_size
        self._tests: dict[str, TokenLossTest] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse data of many models.

        Raises:
            ToolmemError: for a population.
        """
        if self.rounds and isinstance(trainer.datamodule, PopulationDataModule):  # type: ignore[attr-defined]
            raise ToolmemError(
                "token_losses looks at one model, not at a population: leave it out, or train alone"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the questions, which stay the same through the run."""
        self.rounds.begin(trainer.global_step)
        self._tests = {}
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not self.rounds or not hasattr(datamodule, "questions"):
            return
        from toolmem.evaluation.token_losses import TokenLossTest

        for split, n in (("known", self.n_questions), ("unseen", self.n_unseen)):
            if n and (questions := datamodule.questions(split, n)):
                self._tests[split] = TokenLossTest(questions, datamodule.tokenizer, self.batch_size)

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
        """One process measures; the others wait for what it found."""
        if not self._tests or not self.rounds.due(trainer.global_step, trainer.max_steps):
            return
        assert isinstance(pl_module, LanguageModelModule)
        metrics: dict[str, float] = {}
        with not_training(trainer):
            with pl_module.whole_model() as model:
                if trainer.is_global_zero:
                    metrics = self._measure(trainer, pl_module, model)
            metrics = trainer.strategy.broadcast(metrics)
            pl_module.report(metrics)

    def _measure(
        self, trainer: pl.Trainer, module: LanguageModelModule, model: LanguageModel
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        with undisturbed(module.model), averaged_weights(trainer, module):
            for split, test in self._tests.items():
                for kind, found in test.measure(model).items():
                    metrics[f"loss/{split}/{kind}"] = found.loss
                    metrics[f"accuracy/{split}/{kind}"] = found.accuracy
        return metrics
