"""Batches that grow while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from toolmem.errors import ToolmemError


class BatchSizeWarmup(pl.Callback):
    """Takes more of the loader's batches to a step as training goes on (GPT-3's ramp,
    arXiv 2005.14165, appendix B).

    The loader's batches stay what they are, each a function of the seed and its number: only how many
    make a step changes. Their gradients are averaged over all their loss-bearing tokens, so a step of
    k batches is the step of one batch k times as large. How many a step takes depends on nothing but
    its number, so there is nothing to save, and a resumed run goes on exactly.

    Args:
        batches_per_step: by the step from which it holds, counted from 0: ``{0: 1, 200: 2, 600: 4}``.

    Raises:
        ToolmemError: for numbers that cannot be, or a stage that begins where Lightning, which counts
            batches from the start, would make its first step short.
    """

    def __init__(self, batches_per_step: Mapping[int, int]) -> None:
        super().__init__()
        self.stages = sorted((int(step), int(n)) for step, n in batches_per_step.items())
        if not self.stages or self.stages[0][0] != 0:
            raise ToolmemError("BatchSizeWarmup: batches_per_step must say what step 0 takes")
        if min(n for _, n in self.stages) < 1:
            raise ToolmemError("BatchSizeWarmup: a step takes 1 batch or more")
        used = 0
        for (first, n), (following, larger) in zip(self.stages, self.stages[1:], strict=False):
            used += n * (following - first)
            if used % larger:
                # The stage before began at a multiple of n, so some step of it ends at one of both.
                more = next(k for k in range(larger) if (used + k * n) % larger == 0)
                raise ToolmemError(
                    f"BatchSizeWarmup: step {following} begins after {used} batches, which is no "
                    f"multiple of the {larger} that its steps take: let it begin {more} "
                    f"step{'s' if more > 1 else ''} later"
                )

    def at(self, step: int) -> int:
        """Batches that step ``step`` takes, counted from 0."""
        return next(n for first, n in reversed(self.stages) if first <= step)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a second owner of the number."""
        if stage == "fit" and trainer.accumulate_grad_batches != 1:
            raise ToolmemError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, and "
                "BatchSizeWarmup sets it: leave one of them out"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell Lightning how many batches this step takes."""
        trainer.accumulate_grad_batches = self.at(trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if stage == "fit":
            trainer.accumulate_grad_batches = 1
