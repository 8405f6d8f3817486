"""How much memory training takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from toolmem.models.activation_memory import body_activations
from toolmem.training.callbacks.throughput import not_training
from toolmem.training.module import LanguageModelModule

DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class MemoryUse(pl.Callback):
    """Logs how much memory training takes, every ``trainer.log_every_n_steps`` steps.

    - ``memory/peak_bytes``: the most that was held: on CUDA of the device since the last time
      (``torch.cuda.max_memory_allocated``), on a CPU by the process since it began (Linux).
    - ``memory/activation_bytes``: what the body of the model keeps for the backward pass of the largest batch
      so far, which is what ``model.activation_checkpointing`` makes less of. It is counted by shapes, so the
      first time takes a second. Not of a model that is split over ranks.

    With several processes it is the first one's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._largest = (0, 0)  # rows, tokens in a row
        self._counted: dict[tuple[int, int], int] = {}
        self._seen = -1

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note the batch; log, when it is time."""
        assert isinstance(pl_module, LanguageModelModule)
        shape = tuple(batch.tokens.shape)
        if shape[0] * shape[1] > self._largest[0] * self._largest[1]:
            self._largest = shape
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self._seen or not every or step % every:
            return
        self._seen = step
        with not_training(trainer):
            metrics = {"memory/peak_bytes": peak(pl_module.device)}
            if not pl_module.sharded:
                metrics["memory/activation_bytes"] = self._activations(trainer, pl_module)
        pl_module.report(metrics)

    def _activations(self, trainer: pl.Trainer, module: LanguageModelModule) -> int:
        if self._largest not in self._counted:
            dtype = DTYPES.get(str(trainer.precision))
            found = body_activations(module.model, *self._largest, dtype=dtype)
            self._counted = {self._largest: found.total}
        return self._counted[self._largest]


def peak(device: torch.device) -> int:
    """The most bytes held: on CUDA since the last call, else by the process since it began; 0 where
    nobody tells.
    """
    if device.type == "cuda":
        found = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return found
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0")
    return int(line.split()[1]) * 1024
