"""Looks after a run: losses that are no numbers, losses that jump, memory that runs out."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import deque
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from toolmem import checkpoints
from toolmem.errors import ToolmemError
from toolmem.files import write_text
from toolmem.training.callbacks.checkpointing import Checkpointing
from toolmem.training.module import SUM_SCALE, LanguageModelModule
from toolmem.units import bytes_of

Policy = Literal["stop", "skip", "roll_back"]
SHOWN = 3  # rows that a message quotes
QUOTED = 80  # characters of each
NORMAL = 1.4826  # a normal distribution's standard deviation over its median deviation


class Guard(pl.Callback):
    """Ends, mends or reports what goes wrong with a run's loss, and ends a run before memory runs out.

    The loss of each optimizer step is looked at before the step is taken, on all ranks: one number is
    read from the device, and with several ranks one is summed. What was wrong is written to
    ``guard/step_N.json`` in the run's folder, with the rows of the batch as text.

    - *stop*: the run ends with an error; the weights of its last checkpoint are those before.
    - *skip*: the step is not taken; its batch is passed over. ``guard/skipped_steps`` counts.
    - *roll_back*: the step is not taken, and weights and optimizer are those of the last checkpoint again;
      steps, schedule and data go on, so that what was read since is passed over (as of PaLM, arXiv
      2204.02311). ``guard/roll_backs`` counts.

    Args:
        on_nonfinite: what a loss that is infinite or not a number leads to.
        on_spike: what a loss leads to that lies far above those before; ``warn`` writes and goes on.
        spike_deviations: how far: so many robust standard deviations (the median deviation's, of the last
            ``spike_window`` steps) above their median; 0 for no such look.
        spike_window: steps that are looked back on; nothing is a spike before there are so many.
        most: skipped steps and roll-backs within ``spike_window`` steps after which the run ends.
        host_memory_limit: as ``20GB``: a run whose process holds more writes a checkpoint and ends (Linux).

    Raises:
        ToolmemError: for values that cannot be.
    """

    def __init__(
        self,
        on_nonfinite: Policy = "stop",
        on_spike: Policy | Literal["warn"] = "warn",
        spike_deviations: float = 0.0,
        spike_window: int = 200,
        most: int = 10,
        host_memory_limit: str | None = None,
    ) -> None:
        super().__init__()
        if on_nonfinite not in ("stop", "skip", "roll_back"):
            raise ToolmemError(
                f"Guard: on_nonfinite is {on_nonfinite!r}: choose stop, skip or roll_back"
            )
        if on_spike not in ("warn", "stop", "skip", "roll_back"):
            raise ToolmemError(
                f"Guard: on_spike is {on_spike!r}: choose warn, stop, skip or roll_back"
            )
        if spike_deviations < 0 or spike_window < 8 or most < 0:
            raise ToolmemError(
                "Guard: spike_deviations and most must be 0 or more, spike_window 8 or more"
            )
        self.on_nonfinite = on_nonfinite
        self.on_spike = on_spike
        self.spike_deviations = spike_deviations
        self.most = most
        self.memory_limit = (
            None
            if host_memory_limit is None
            else bytes_of(host_memory_limit, "Guard: host_memory_limit")
        )
        self.losses: deque[float] = deque(maxlen=spike_window)
        self.skipped = 0
        self.rolled_back = 0
        self._mended: deque[int] = deque()  # steps that were not taken lately
        self._sum: Tensor | float = 0.0  # of the micro-batches' scaled losses
        self._batches: list[Any] = []
        self._over = 0  # bytes held, of a process that ends for it

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what it cannot look after.

        Raises:
            ToolmemError: for a population, whose members have losses of their own.
        """
        if not isinstance(pl_module, LanguageModelModule) or hasattr(pl_module, "members"):
            raise ToolmemError(
                "Guard looks after the loss of one model: leave it out of trainer.callbacks for a population"
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._checkpointing = next((c for c in callbacks if isinstance(c, Checkpointing)), None)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch until its step is taken.

        Raises:
            ToolmemError: when memory runs out, once the checkpoint is written.
        """
        if self._over and (self._checkpointing is None or not self._checkpointing.asked):
            limit = self.memory_limit or 0.0
            kept = "" if self._checkpointing is None else "; last.ckpt is of this step"
            raise ToolmemError(
                f"step {trainer.global_step}: the process holds {self._over / 1e9:.2f} GB of memory, more "
                f"than Guard's host_memory_limit {limit / 1e9:.2f} GB{kept}: fewer "
                "data.init_args.num_workers, smaller batches or model.activation_checkpointing need less"
            )
        self._batches.append(batch)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Add up the losses of a step's micro-batches."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        self._sum = self._sum + loss.detach() / scale

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the loss, and see to it that a step is not taken that should not be.

        Raises:
            ToolmemError: when the run shall end.
        """
        assert isinstance(pl_module, LanguageModelModule)
        loss = self._loss(pl_module)
        batches, self._batches, self._sum = self._batches, [], 0.0
        policy, why = self._judged(loss)
        if policy is None:
            self.losses.append(loss)
            return
        step = trainer.global_step
        path = self._written(trainer, pl_module, batches, loss, why)
        rows = quoted(pl_module, batches, trainer)
        message = f"step {step}: {why}; its batch has {rows} (all of it: {path})"
        if policy == "warn":
            self.losses.append(loss)
            pl.utilities.rank_zero_warn(f"Guard: {message}")
            return
        if policy == "stop":
            raise ToolmemError(
                f"{message}. Go on from the last checkpoint with a lower learning rate, or let Guard skip "
                "such steps (on_nonfinite, on_spike: skip or roll_back)"
            )
        while self._mended and self._mended[0] <= step - (self.losses.maxlen or 0):
            self._mended.popleft()
        self._mended.append(step)
        if len(self._mended) > self.most:
            raise ToolmemError(
                f"{message}. There are {len(self._mended)} such steps within {self.losses.maxlen}, and "
                f"Guard's most is {self.most}: lower the learning rate, or look at the data"
            )
        for parameter in pl_module.parameters():
            parameter.grad = None  # which the optimizer passes over
        if policy == "roll_back" and self._rolled_back(trainer, pl_module, optimizer):
            self.rolled_back += 1
            done = "weights and optimizer are those of the last checkpoint"
        else:
            self.skipped += 1
            done = "the step is not taken"
        pl.utilities.rank_zero_warn(f"Guard: {message}: {done}")
        pl_module.report(
            {"guard/skipped_steps": self.skipped, "guard/roll_backs": self.rolled_back}
        )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look at the memory, once every ``trainer.log_every_n_steps``."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.memory_limit is None or self._over or trainer.global_step % max(every, 1):
            return
        held = resident()
        if trainer.strategy.reduce_boolean_decision(held > self.memory_limit, all=False):
            self._over = held
            if self._checkpointing is not None:
                self._checkpointing.asked = True

    def state_dict(self) -> dict[str, Any]:
        """The losses that are looked back on, and the counts."""
        return {
            "losses": list(self.losses),
            "skipped": self.skipped,
            "rolled_back": self.rolled_back,
            "mended": list(self._mended),
            "sum": float(self._sum),  # of micro-batches whose gradients the checkpoint has
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.losses.extend(state_dict["losses"])
        self.skipped, self.rolled_back = state_dict["skipped"], state_dict["rolled_back"]
        self._mended = deque(state_dict["mended"])
        self._sum = state_dict["sum"]

    # ---- inside

    def _loss(self, module: LanguageModelModule) -> float:
        """Of all ranks' tokens of this step, in nats."""
        total = torch.as_tensor(self._sum, dtype=torch.float64, device=module.device) / SUM_SCALE
        pending = torch.tensor(module._pending, dtype=torch.float64, device=module.device)
        both = module._sum_over_ranks(torch.stack((total, pending)))
        total, pending = both.tolist()
        return float(total) / max(float(pending), 1.0)

    def _judged(self, loss: float) -> tuple[Policy | Literal["warn"] | None, str]:
        if not math.isfinite(loss):
            return self.on_nonfinite, f"the loss is {loss}"
        if not self.spike_deviations or len(self.losses) < (self.losses.maxlen or 0):
            return None, ""
        middle = statistics.median(self.losses)
        deviation = NORMAL * statistics.median(abs(one - middle) for one in self.losses)
        if loss <= middle + self.spike_deviations * max(deviation, 1e-6 * abs(middle)):
            return None, ""
        away = (loss - middle) / max(deviation, 1e-6 * abs(middle), 1e-12)
        return self.on_spike, (
            f"the loss is {loss:.4g}, {away:.1f} deviations above the median {middle:.4g} of "
            f"{len(self.losses)} steps"
        )

    def _written(
        self,
        trainer: pl.Trainer,
        module: LanguageModelModule,
        batches: list[Any],
        loss: float,
        why: str,
    ) -> Path:
        step = trainer.global_step
        rank = trainer.global_rank
        name = f"step_{step}.json" if trainer.world_size == 1 else f"step_{step}_rank_{rank}.json"
        path = Path(trainer.default_root_dir) / "guard" / name
        found = {
            "step": step,
            "why": why,
            "loss": str(loss),
            "batches": [{"state": batch.state, "rows": texts(batch, trainer)} for batch in batches],
        }
        write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return path

    def _rolled_back(
        self, trainer: pl.Trainer, module: LanguageModelModule, optimizer: Optimizer
    ) -> bool:
        """Take weights and optimizer from the last checkpoint; False where there is none yet."""
        if self._checkpointing is None or self._checkpointing.folder is None:
            return False
        if module.sharded:
            raise ToolmemError(
                "Guard: roll_back needs the whole model in each process: choose skip or stop with "
                "trainer.strategy: ModelParallelStrategy"
            )
        self._checkpointing.finish_writing(trainer)
        last = self._checkpointing.folder / "last.ckpt"
        if not last.is_file():
            return False
        found = checkpoints.read(last)
        module.load_state_dict(found["state_dict"])
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        optimizer.load_state_dict(found["optimizer_states"][0])
        for group, now in zip(optimizer.param_groups, groups, strict=True):
            group.update(now)  # the schedule goes on
        return True


def texts(batch: Any, trainer: pl.Trainer) -> list[str]:
    """The rows of a batch as text; as numbers, where there is no tokenizer."""
    tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
    rows = []
    for row in batch.tokens.tolist():
        try:
            rows.append(str(row) if tokenizer is None else tokenizer.decode(row))
        except Exception:  # whatever a row is, the others are wanted
            rows.append(str(row))
    return rows


@torch.no_grad()
def quoted(module: LanguageModelModule, batches: list[Any], trainer: pl.Trainer) -> str:
    """The rows of the largest loss, or of none, a few of them in words."""
    scored: list[tuple[float, str]] = []
    for batch in batches:
        losses = module.token_losses(batch, module.model.hidden)
        if module.ranks is None:  # else every rank would have to come by here at once
            width = batch.tokens.shape[1]
            numbers = batch.positions().div(width, rounding_mode="floor")
            sums = losses.new_zeros(len(batch.tokens)).index_add_(0, numbers, losses)
            scored += zip(sums.tolist(), texts(batch, trainer), strict=True)
    if not scored:
        return f"{sum(len(batch.tokens) for batch in batches)} rows"
    scored.sort(key=lambda one: -math.inf if not math.isfinite(one[0]) else -one[0])
    named = ", ".join(f"{text[:QUOTED]!r} (loss {loss:.4g})" for loss, text in scored[:SHOWN])
    return f"{len(scored)} rows, the worst {named}"


def resident() -> int:
    """Bytes that this process holds; 0 where nobody tells."""
    if sys.platform != "linux":
        return 0
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    import resource

    return int(pages) * resource.getpagesize()
