"""FLOPs of training, exact and executed, and how well they use the machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from toolmem.data.batch import Batch
from toolmem.models.model_flops import ModelFlops, Pairs, run_lengths, seen_pairs, span_pairs
from toolmem.models.multi_token import TokensAhead
from toolmem.training.callbacks.throughput import Throughput, not_training
from toolmem.training.flops import matmul_rate, optimizer_flops
from toolmem.training.module import LanguageModelModule

if TYPE_CHECKING:
    from toolmem.training.parallel.ranks import Ranks

COUNTS = ("tokens", "exact", "executed", "optimizer")


class Flops(Throughput):
    """Logs what training has cost in FLOPs; nothing is counted twice, so that it costs next to nothing.

    - ``flops/total``: the model's, forward and backward, exact: padding costs nothing, and attention
      is counted by the pairs of tokens that see each other, from the rows' actual lengths.
    - ``flops/per_token``: the same for a token that is not padding, since the last time.
    - ``flops/executed_total``: what the machine was given to do: padding, whole blocks of attention,
      scores computed again in its backward pass.
    - ``flops/optimizer``: the optimizer's, which is in none of the above.
    - ``flops/utilisation``: exact FLOPs a second as a share of ``flops/matmul_rate`` (the MFU of
      arXiv 2204.02311), ``flops/hardware_utilisation`` of those executed, the optimizer's among them.
    - ``flops/matmul_rate``: FLOPs a second of one large matmul on this machine, measured once.

    Totals are over all ranks and over all of the run, whatever it was resumed from; of ranks that share
    layers (tensor parallelism) the model's work is counted once. Time is counted as by ``Throughput``. An
    operation that has no formula is named in a warning.

    Args:
        utilisation: measure the machine, for about a third of a second, and log utilisation.
    """

    def __init__(self, utilisation: bool = True) -> None:
        super().__init__()
        self.utilisation = utilisation
        self.totals = dict.fromkeys(COUNTS, 0)  # of all ranks, at the last time that they met
        self._reported = dict(self.totals)  # when it was last logged
        self._mine = dict.fromkeys(COUNTS, 0)  # of this rank since then
        self._timed = dict.fromkeys(COUNTS, 0)  # of this rank in the span that is timed
        self._ranks: Ranks | None = None
        self._rate: float | None = None
        self._trainer: pl.Trainer | None = None
        self._named: set[str] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get to know model and optimizer."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, LanguageModelModule)
        self._trainer = trainer
        self._ranks = pl_module.ranks
        self._flops = ModelFlops(pl_module.model)
        if pl_module.sharded:
            from toolmem.training.parallel.twins import shapes_of

            # Of the whole model: what its ranks do adds up to it, and is not counted on each.
            self._flops = ModelFlops(shapes_of(pl_module.model))
        found = [optimizer_flops(optimizer) for optimizer in trainer.optimizers]
        self._of_optimizer = sum(one.total for one in found)
        self._name_unknown({name: 1 for one in found for name in one.unknown})
        self._steps = self._logged = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the batch; every ``trainer.log_every_n_steps`` steps, log."""
        with not_training(trainer):
            # a population's batch has one for each member
            parts = [step_flops(self._flops, part) for part in getattr(batch, "parts", [batch])]
        exact, executed = (sum(counts) for counts in zip(*parts, strict=True))
        steps, self._steps = trainer.global_step - self._steps, trainer.global_step
        of_optimizer = round(self._of_optimizer * getattr(pl_module, "active_share", 1))
        counts = (batch.n_tokens, exact, executed, steps * of_optimizer)
        for name, value in zip(COUNTS, counts, strict=True):
            self._mine[name] += value
            self._timed[name] += value
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _begin(self) -> None:
        super()._begin()
        self._timed = dict.fromkeys(COUNTS, 0)

    def _log(self, pl_module: pl.LightningModule) -> None:
        assert self._trainer is not None
        seconds = time.perf_counter() - self._began_at() - self._paused
        metrics: dict[str, float] = {}
        if self.utilisation:
            if self._rate is None:
                self._rate = metrics["flops/matmul_rate"] = self._measured_rate(pl_module)
            available = max(seconds, 1e-9) * self._rate
            share = 1 if self._ranks is None else self._ranks.tensor_size
            timed: dict[str, float] = dict(self._timed)
            for name in ("exact", "executed"):
                timed[name] /= share
            metrics["flops/utilisation"] = timed["exact"] / available
            hardware = timed["executed"] + timed["optimizer"]
            metrics["flops/hardware_utilisation"] = hardware / available
        self._report(pl_module, metrics)
        self._begin()

    def _measured_rate(self, pl_module: pl.LightningModule) -> float:
        assert self._trainer is not None
        with not_training(self._trainer):
            return matmul_rate(pl_module.device, dtype_of(str(self._trainer.precision)))

    def _report(self, pl_module: pl.LightningModule, metrics: dict[str, float]) -> None:
        assert isinstance(pl_module, LanguageModelModule)
        self._meet(pl_module.device)
        tokens, exact = (self.totals[name] - self._reported[name] for name in ("tokens", "exact"))
        self._reported = dict(self.totals)
        pl_module.report(
            {
                "flops/total": self.totals["exact"],
                "flops/per_token": exact / max(tokens, 1),
                "flops/executed_total": self.totals["executed"],
                "flops/optimizer": self.totals["optimizer"],
                **metrics,
            }
        )
        self._logged = pl_module.trainer.global_step
        self._name_unknown(self._flops.unknown)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was counted since the last time."""
        if trainer.global_step != self._logged:
            self._report(pl_module, {})

    def _meet(self, device: torch.device) -> None:
        """Add what every rank has counted to the totals; every rank must call it."""
        counts = torch.tensor([self._mine[name] for name in COUNTS], dtype=torch.int64)
        if self._ranks is not None and self._ranks.tensor_rank:
            # The batch and the model are counted on the first of the ranks that share them.
            counts[:-1] = 0
        if self._trainer is not None and self._trainer.world_size > 1:
            counts = self._trainer.strategy.reduce(counts.to(device), reduce_op="sum")
        for name, value in zip(COUNTS, counts.tolist(), strict=True):
            self.totals[name] += value
            self._mine[name] = 0

    def _name_unknown(self, unknown: dict[str, int]) -> None:
        new = sorted(set(unknown) - self._named)
        self._named.update(new)
        if new:
            rank_zero_warn(
                f"flops: there is no formula for {', '.join(new)}: not counted. "
                "toolmem.models.flops.register_flops gives it one"
            )

    def state_dict(self) -> dict[str, Any]:
        """The totals, over all ranks; every rank must call it."""
        if self._trainer is not None:
            self._meet(self._trainer.strategy.root_device)
        return {"totals": dict(self.totals), "reported": dict(self._reported)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the totals of a checkpoint."""
        self.totals = dict(state_dict["totals"])
        self._reported = dict(state_dict["reported"])


def step_flops(flops: ModelFlops, batch: Batch) -> tuple[int, int]:
    """FLOPs of a batch forward and backward, exact and executed.

    Args:
        flops: of the model.
        batch: what it is trained on.
    """
    rows, seq = batch.tokens.shape
    model = flops.model
    spans = batch.spans if model.attention_mask == "prefix" else None
    body = flops.body(rows, seq, documents=batch.documents is not None, spans=spans is not None)
    of_head = batch.positions().numel() * flops.head().both
    multi_token = getattr(model, "multi_token", None)
    if multi_token is not None:
        of_head += ahead_tokens(multi_token, batch) * flops.head_ahead().both
    exact = body.exact(batch.n_tokens, pairs_of(batch, spans))
    return exact + of_head, body.executed() + of_head


def pairs_of(batch: Batch, spans: torch.Tensor | None) -> Pairs:
    """How many pairs of a batch's tokens see each other.

    Args:
        batch: the batch.
        spans: (batch, seq) ids of spans that are seen both ways, -1 elsewhere; None for none.
    """
    rows, width = batch.tokens.shape

    def pairs(window: int, seq: int) -> int:
        whole = seq == width  # else these are modules that predict more tokens, causally
        ahead = width - seq  # how far on the token lies that such a module needs beside each
        if batch.documents is not None and not (whole and batch.lengths is not None):
            known = batch.documents[:, ahead:] >= 0
            lengths = run_lengths(batch.documents[:, :seq].masked_fill(~known, -1))
        elif batch.lengths is not None:
            lengths = (batch.lengths - ahead).clamp(min=0)
        else:
            lengths = torch.full((rows,), seq)
        found = seen_pairs(lengths, window)
        return found + span_pairs(spans, window) if spans is not None and whole else found

    return pairs


def ahead_tokens(modules: TokensAhead, batch: Batch) -> int:
    """How many tokens beyond the next are predicted where that bears loss."""
    return sum(
        int(modules.bearing(batch.loss_mask, batch.documents, ahead).sum())
        for ahead in range(1, min(len(modules.blocks) + 1, batch.tokens.shape[1]))
    )


def dtype_of(precision: str) -> torch.dtype:
    """What a trainer of this precision multiplies in."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return {"16": torch.float16, "64": torch.float64}.get(precision[:2], torch.float32)
