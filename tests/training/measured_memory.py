"""Trains one case for a few steps and prints the most memory that it took, in bytes, beside the plan's.

python measured_memory.py CASE
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from training_toys import ToyData, make_module, make_trainer, tiny

from toolmem.data.batch import Batch
from toolmem.models import Mamba2, MoETransformer, Transformer
from toolmem.models.recompute import ActivationCheckpointing
from toolmem.training import AdamW, Muon
from toolmem.training.memory_plan import Layout, MemoryPlan, Step
from toolmem.training.mixed_precision import MixedPrecision

VOCAB, SEQ, ROWS = 4096, 256, 8


def transformer(**changes: Any) -> Transformer:
    options: dict[str, Any] = {"dim": 384, "n_layers": 8, "n_heads": 6, "max_seq_len": SEQ}
    return Transformer(VOCAB, **(options | changes))


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "blocks": {"checkpointing": "blocks"},
    "selective": {"checkpointing": "selective"},
    "muon, large weights": {
        "model": lambda: transformer(dim=768, n_layers=4),
        "optimizer": Muon(),
        "rows": 2,
    },
    "bfloat16": {"dtype": torch.bfloat16},
    "mamba2": {"model": lambda: Mamba2(VOCAB, 256, 4, max_seq_len=SEQ)},
    "experts": {
        "model": lambda: MoETransformer(
            VOCAB, 256, 4, n_heads=4, n_experts=8, top_k=2, hidden_dim=512, max_seq_len=SEQ
        )
    },
}  # fmt: skip


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def batches(rows: int) -> Any:
    def make(index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCAB, (rows, SEQ + 1), generator=generator)
        return Batch(
            tokens[:, :-1].contiguous(),
            tokens[:, 1:].contiguous(),
            torch.ones(rows, SEQ, dtype=torch.bool),
            n_tokens=rows * SEQ,
            state={"batch": index + 1},
        )

    return make


def main(name: str) -> None:
    """Warm up, train, compare."""
    case = CASES[name]
    rows, dtype = case.get("rows", ROWS), case.get("dtype")
    mode = case.get("checkpointing", "none")
    optimizer = case.get("optimizer") or AdamW()
    plugins = [] if dtype is None else [MixedPrecision("bf16-mixed", "cpu")]

    def trained(model: Any, data: ToyData, steps: int) -> None:
        module = make_module(
            model, optimizer=optimizer, fused=False,
            activation_checkpointing=ActivationCheckpointing(mode),
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(folder, steps, plugins=plugins, limit_val_batches=0).fit(module, data)

    trained(tiny(), ToyData(), 2)  # whatever is imported and kept at the first step
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    make = case.get("model") or transformer
    trained(make(), ToyData(batches(rows)), 3)
    measured = status("VmHWM") - before
    step = Step(rows, SEQ, rows * SEQ, dtype=dtype)
    plan = MemoryPlan(make().train(), optimizer, step)
    memory = plan.memory(Layout(checkpointing=mode))
    print(json.dumps({"measured": measured, "planned": memory.total, "parts": vars(memory)}))


if __name__ == "__main__":
    main(sys.argv[1])
