"""Norms of weights, gradients, updates and activations while training goes on, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from toolmem.errors import ToolmemError
from toolmem.training.callbacks.norm_activations import measure_activations
from toolmem.training.callbacks.norm_files import NormFile
from toolmem.training.callbacks.norm_measures import (
    ALL,
    Parameters,
    Row,
    changes,
    sum_of_squares,
    sums_of_squares,
)
from toolmem.training.callbacks.recall import undisturbed
from toolmem.training.callbacks.throughput import not_training
from toolmem.training.module import LanguageModelModule


@dataclass
class Before:
    """What is known just before an optimizer step.

    Args:
        gradients: of each parameter, its gradient's sum of squares.
        weights: each parameter's copy.
    """

    gradients: list[float]
    weights: list[Tensor]


class NormProbe(pl.Callback):
    """Every so often measures weights, gradients, updates and activations, for any architecture.

    Measures, of each layer (``blocks.0.mixer``), each kind of layers (``attention``, ...), and all:

    - ``weight``: the norm of the parameters after the step.
    - ``gradient``: the norm of the mean loss's gradient, before clipping.
    - ``update_ratio``: the norm of what the step changed over that of the weights before it.
    - ``activation_rms``, ``activation_max``: the root mean square and the largest magnitude of what
      enters the first block (``embedding``), what branches add to the stream (``blocks.0.mixer``),
      the stream after a block (``blocks.0``), what the head reads (``norm``), and the logits (``head``).
    - ``dead_units``: the share of units inside feed-forwards whose magnitude is at most a thousandth of
      the root mean square of their layer's at every token.
    - ``attention_entropy``: the mean entropy of attention's weights in nats, over queries and heads.
    - ``attention_logit_max``: the largest number that attention's softmax is given.

    Activations are measured after the step, in a pass of their own without dropout over the first rows
    of its (last) batch; padding does not count, but for the units of routed experts. The model's mode
    and all random numbers are left as they were, so training goes the same way with and without it; a
    compiled body stays as it is, since the pass runs the model itself. Over ranks, sums are summed and
    maxima taken; parameters that are split over ranks count as a whole.

    Loggers get ``norms/MEASURE`` and ``norms/MEASURE/kind/KIND``; ``norms.parquet`` in the run's folder
    gets all (columns step, layer, kind, measure, value). ``toolmem plot norms RUN`` draws it.

    Args:
        every_n_steps: optimizer steps between two rounds, one more at the last step; 0 never measures.
        rows: rows of the batch that activations are measured on, of each rank; 0 leaves them out.
        per_layer: send each layer's figures to the loggers too, as ``norms/MEASURE/LAYER``.

    Raises:
        ToolmemError: for numbers below 0.
    """

    def __init__(self, every_n_steps: int = 0, rows: int = 16, per_layer: bool = False) -> None:
        super().__init__()
        if every_n_steps < 0 or rows < 0:
            raise ToolmemError(
                f"norms: every_n_steps is {every_n_steps}, rows {rows}: each must be 0 (off) or more"
            )
        self.every_n_steps = every_n_steps
        self.rows = rows
        self.per_layer = per_layer
        self._before: Before | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get to know the model; forget what a dead run measured after the checkpoint."""
        self._before = None
        if not self.every_n_steps:
            return
        assert isinstance(pl_module, LanguageModelModule)
        if self.rows and pl_module.sequence_parallel:
            raise ToolmemError(
                "norms.rows measures activations, of which model.sequence_parallel leaves each rank some "
                "tokens only: set norms.rows: 0, or model.sequence_parallel: false"
            )
        self._file = NormFile(trainer.default_root_dir)
        self._parameters = Parameters(pl_module.model)
        if trainer.is_global_zero:
            self._file.rewind(trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure gradients, and keep the weights, if it is time."""
        step = trainer.global_step + 1
        if not self.every_n_steps or (step % self.every_n_steps and step != trainer.max_steps):
            return
        assert isinstance(pl_module, LanguageModelModule)
        with not_training(trainer):
            # Gradients are sums over tokens still: the module divides them after its callbacks.
            factor = float(pl_module._sum_to_mean())
            tensors = self._parameters.tensors
            squares = self._squares(pl_module, [parameter.grad for parameter in tensors])
            self._before = Before(
                [value * factor**2 for value in squares],
                [parameter.detach().clone() for parameter in tensors],
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure the rest, after the step."""
        if self._before is None:
            return
        assert isinstance(pl_module, LanguageModelModule)
        before, self._before = self._before, None
        with not_training(trainer):
            rows = self._parameter_rows(pl_module, before)
            del before
            if self.rows:
                rows += self._activation_rows(trainer, pl_module, batch)
            pl_module.report(self._metrics(rows))
            if trainer.is_global_zero:
                self._file.add(trainer.global_step, rows)

    def _squares(
        self, module: LanguageModelModule, tensors: Iterable[Tensor | None]
    ) -> list[float]:
        """Sums of squares, of whole tensors where ranks hold pieces."""
        if not module.sharded:
            return sums_of_squares(tensors)
        from toolmem.training.parallel.gradients import sums_of_squares_over_ranks

        return sums_of_squares_over_ranks(tensors, sum_of_squares)

    def _parameter_rows(self, module: LanguageModelModule, before: Before) -> list[Row]:
        parameters = self._parameters
        old = self._squares(module, before.weights)
        changed = self._squares(module, changes(parameters.tensors, before.weights))
        return [
            *parameters.figures("weight", self._squares(module, parameters.tensors)),
            *parameters.figures("gradient", before.gradients),
            *parameters.figures("update_ratio", changed, old),
        ]

    def _activation_rows(
        self, trainer: pl.Trainer, module: LanguageModelModule, batch: Any
    ) -> list[Row]:
        with undisturbed(module.model), trainer.precision_plugin.forward_context():
            found = measure_activations(module.model, batch, self.rows)
        if trainer.world_size > 1:

            def over_ranks(values: Tensor, how: str) -> Tensor:
                return trainer.strategy.reduce(values, reduce_op=how)

            ranks = module.ranks
            if ranks is not None and ranks.tensor_group is not None and ranks.tensor_size > 1:
                from toolmem.training.parallel.collectives import joined

                # ranks that share layers have different units of them
                found.join_units(partial(joined, dim=0, group=ranks.tensor_group))
            found.reduce(over_ranks)
        return found.rows(self._parameters.layer_kinds)

    def _metrics(self, rows: list[Row]) -> dict[str, float]:
        metrics = {}
        for layer, kind, measure, value in rows:
            if layer != ALL:
                if self.per_layer:
                    metrics[f"norms/{measure}/{layer}"] = value
            elif kind == ALL:
                metrics[f"norms/{measure}"] = value
            else:
                metrics[f"norms/{measure}/kind/{kind}"] = value
        return metrics

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make one file of what was measured."""
        if self.every_n_steps and trainer.is_global_zero:
            self._file.merge()
