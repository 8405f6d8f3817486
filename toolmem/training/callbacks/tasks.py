"""Tasks and texts asked while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from toolmem.errors import ToolmemError
from toolmem.evaluation.suite import (
    Asking,
    TaskSpec,
    make_examples,
    measure_part,
    parse_tasks,
)
from toolmem.training.callbacks.round_probe import RoundProbe
from toolmem.training.module import LanguageModelModule

if TYPE_CHECKING:
    from toolmem.models import LanguageModel


class TaskProbe(RoundProbe):
    """Every so often asks the model tasks, and has it read texts.

    Logs ``TASK/MEASURE`` for each measure of each, ``arc_easy/accuracy`` for instance, and writes every
    example, as it comes, to ``evaluations/TASK_step_N.jsonl``: a run that is killed in the midst of a round
    does not ask again what was answered. Training waits for it; ``toolmem evaluate --watch RUN`` does the
    same in a process of its own.

    Args:
        tasks: ``NAME=FILE`` each, as of ``toolmem evaluate --tasks``: tasks, and perplexity=TEXT.
        every_n_steps: optimizer steps between two rounds; 0 for none so.
        steps: rounds at these steps; 0 is before the first.
        steps_per_decade: rounds between a power of ten of steps and the next, evenly by ratio. Where there
            is any round, there is one at the last step, too.
        limit: the first so many questions of each task, and windows of each text; all when None.
        n_shots: examples before each question; what the task's recipe says when None.
        chat: ask in the tokenizer's chat format; what the recipe says when None.
        batch_size: questions asked at once.

    Raises:
        ToolmemError: for numbers that cannot be, files that are not there or malformed, and what training
            cannot ask (recall has a probe of its own, divergence a base).
    """

    def __init__(
        self,
        tasks: list[str],
        every_n_steps: int = 1000,
        steps: list[int] | None = None,
        steps_per_decade: int = 0,
        limit: int | None = None,
        n_shots: int | None = None,
        chat: bool | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__("tasks", every_n_steps, steps, steps_per_decade)
        if batch_size < 1 or (limit is not None and limit < 1):
            raise ToolmemError("tasks: batch_size and limit must be 1 or more")
        self.specs = parse_tasks(tasks)
        for spec in self.specs:
            if spec.kind in ("recall", "divergence"):
                raise ToolmemError(
                    f"tasks: {spec.name} is not asked in training: recall is by recall.every_n_steps, "
                    "divergence by toolmem evaluate --watch"
                )
        self.asking = Asking(batch_size=batch_size, limit=limit, n_shots=n_shots, chat=chat)

    def prepare(self, trainer: pl.Trainer, module: LanguageModelModule) -> bool:
        """Read every file once, so that what is wrong with one is told before the first step."""
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        for spec in self.specs:
            make_examples(spec, module.model, tokenizer, self.asking)
        return True

    def measure(
        self, trainer: pl.Trainer, module: LanguageModelModule, model: LanguageModel
    ) -> dict[str, float]:
        """Ask them all."""
        metrics: dict[str, float] = {}
        for spec in self.specs:
            metrics |= self._ask(trainer, model, spec)
        return metrics

    def _ask(self, trainer: pl.Trainer, model: LanguageModel, spec: TaskSpec) -> dict[str, float]:
        from toolmem.evaluation.answers import Answers, weights_digest

        step = trainer.global_step
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        examples = make_examples(spec, model, tokenizer, self.asking)
        about = {
            "step": step,
            "weights": weights_digest(model),
            "asked": examples.digest(),
            "batch_size": self.asking.batch_size,
        }
        folder = Path(trainer.default_root_dir) / "evaluations"
        with Answers(folder / f"{spec.name}_step_{step}.jsonl", about) as answers:
            result = measure_part(spec, examples, self.asking, answers=answers)
        return {f"{spec.name}/{name}": one.value for name, one in result.estimates.items()}
