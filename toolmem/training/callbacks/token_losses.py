"""Loss by kind of token while training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl

from toolmem.errors import ToolmemError
from toolmem.training.callbacks.round_probe import RoundProbe
from toolmem.training.module import LanguageModelModule

if TYPE_CHECKING:
    from toolmem.evaluation.token_losses import TokenLossTest
    from toolmem.models import LanguageModel


class TokenLossProbe(RoundProbe):
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
        super().__init__("token_losses", every_n_steps, steps, steps_per_decade)
        if n_questions < 1 or n_unseen < 0 or batch_size < 1:
            raise ToolmemError(
                "token_losses: n_questions and batch_size must be 1 or more, n_unseen 0 or more"
            )
        self.n_questions = n_questions
        self.n_unseen = n_unseen
        self.batch_size = batch_size
        self._tests: dict[str, TokenLossTest] = {}

    def prepare(self, trainer: pl.Trainer, module: LanguageModelModule) -> bool:
        """Draw the questions."""
        from toolmem.evaluation.token_losses import TokenLossTest

        self._tests = {}
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(datamodule, "questions"):
            for split, n in (("known", self.n_questions), ("unseen", self.n_unseen)):
                if n and (questions := datamodule.questions(split, n)):
                    test = TokenLossTest(questions, datamodule.tokenizer, self.batch_size)
                    self._tests[split] = test
        return bool(self._tests)

    def measure(
        self, trainer: pl.Trainer, module: LanguageModelModule, model: LanguageModel
    ) -> dict[str, float]:
        """Loss and accuracy by split and kind."""
        metrics: dict[str, float] = {}
        for split, test in self._tests.items():
            for kind, found in test.measure(model).items():
                metrics[f"loss/{split}/{kind}"] = found.loss
                metrics[f"accuracy/{split}/{kind}"] = found.accuracy
        return metrics
