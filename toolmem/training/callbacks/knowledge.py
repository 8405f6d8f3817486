"""Measures, while training goes on, how many bits of its facts a model's weights hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from toolmem.errors import ToolmemError
from toolmem.models.quantization.formats import Storage, as_stored
from toolmem.models.quantization.round_to_nearest import ScaleFormat
from toolmem.training.callbacks.ema import averaged_weights
from toolmem.training.callbacks.recall import undisturbed
from toolmem.training.callbacks.throughput import not_training
from toolmem.training.module import LanguageModelModule

if TYPE_CHECKING:
    from toolmem.evaluation.knowledge import Knowledge, KnowledgeTest
    from toolmem.models import LanguageModel


class KnowledgeProbe(pl.Callback):
    """Measures bits of knowledge (arXiv 2404.05405, docs/capacity.md), of the weights as they are and
    as they come back from storage.

    Logs ``knowledge/bits``, ``knowledge/bits/ATTRIBUTE``, ``knowledge/bits_per_parameter``,
    ``knowledge/loss`` (bits a fact), ``knowledge/recall`` (share of facts whose every token is the
    likeliest), ``knowledge/error`` (standard error of the bits), ``knowledge/entropy``,
    ``knowledge/facts``, ``knowledge/parameters``, ``knowledge/active_parameters``; and for each storage
    format, int8 for instance, ``knowledge/int8/bits``, ``/bits_per_parameter``, ``/loss``, ``/recall``
    and ``/stored_bits``. Data without facts is passed over in silence. The model's mode and all random
    numbers are left as they were, so training goes the same way with and without it.

    Args:
        every_n_steps: optimizer steps between two rounds; 0 measures at the end alone.
        n_questions: a sample of the facts' questions, the same through the run; all when None.
        storage: formats that weights are rounded to on a copy: float32, bfloat16, float16, int8, int4,
            int3, int2.
        group_size: weights along a row that share a scale, of integers; all of a row when None.
        scale_format: what scales are stored in.
        batch_size: dialogues scored at once.

    Raises:
        ToolmemError: for numbers outside their range.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        n_questions: int | None = None,
        storage: Sequence[Storage] = ("bfloat16", "int8", "int4", "int2"),
        group_size: int | None = None,
        scale_format: ScaleFormat = "float16",
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        if every_n_steps < 0 or batch_size < 1 or (n_questions is not None and n_questions < 1):
            raise ToolmemError(
                "KnowledgeProbe: every_n_steps must be 0 or more, n_questions and batch_size 1 or more"
            )
        if group_size is not None and group_size < 1:
            raise ToolmemError(f"KnowledgeProbe: group_size is {group_size}: it must be 1 or more")
        self.every_n_steps = every_n_steps
        self.n_questions = n_questions
        self.storage = tuple(storage)
        self.group_size = group_size
        self.scale_format: ScaleFormat = scale_format
        self.batch_size = batch_size
        self._measured = 0  # the last step that was
        self._test: KnowledgeTest | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare the questions, which stay the same through the run."""
        from toolmem.evaluation.knowledge import KnowledgeTest

        self._measured = min(self._measured, trainer.global_step)
        self._test = None
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and hasattr(datamodule, "question_table"):
            self._test = KnowledgeTest(
                datamodule.question_table,
                datamodule.tokenizer,
                n_questions=self.n_questions,
                batch_size=self.batch_size,
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure, if it is time."""
        step, every = trainer.global_step, self.every_n_steps
        if (every and step % every == 0) or step == trainer.max_steps:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what training ends with, where it ends before its last step."""
        self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The last step that was measured."""
        return {"measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint: what it had measured is not measured again."""
        self._measured = int(state_dict["measured"])

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One process measures; the others wait for what it found."""
        step = trainer.global_step
        if step == self._measured:
            return
        self._measured = step
        assert isinstance(pl_module, LanguageModelModule)
        metrics: dict[str, float] = {}
        with not_training(trainer):
            with pl_module.whole_model() as model:
                if self._test is not None:
                    with undisturbed(pl_module.model), averaged_weights(trainer, pl_module):
                        metrics = self._metrics(self._test, model)
            metrics = trainer.strategy.broadcast(metrics)
        if metrics:
            pl_module.report(metrics)

    def _metrics(self, test: KnowledgeTest, model: LanguageModel) -> dict[str, float]:
        size = sum(parameter.numel() for parameter in model.parameters())
        found = test.measure(model)
        metrics = {
            **metrics_of(found, "knowledge", size),
            "knowledge/entropy": found.entropy,
            "knowledge/error": found.error,
            "knowledge/facts": float(found.facts),
            "knowledge/parameters": float(size),
            "knowledge/active_parameters": float(model.active_parameters()),
        }
        metrics |= {f"knowledge/bits/{name}": one.bits for name, one in found.attributes.items()}
        for storage in self.storage:
            stored = as_stored(
                model, storage, group_size=self.group_size, scale_format=self.scale_format
            )
            prefix = f"knowledge/{storage}"
            metrics |= metrics_of(test.measure(stored.model), prefix, size)
            metrics[f"{prefix}/stored_bits"] = float(stored.total_bits)
        return metrics


def metrics_of(found: Knowledge, prefix: str, n_parameters: int) -> dict[str, float]:
    """What was found as metrics by name.

    Args:
        found: of one model.
        prefix: of the names.
        n_parameters: all of the model's.
    """
    return {
        f"{prefix}/bits": found.bits,
        f"{prefix}/bits_per_parameter": found.bits / n_parameters,
        f"{prefix}/loss": found.loss,
        f"{prefix}/recall": found.recall,
    }
