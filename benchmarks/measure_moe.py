"""What a mixture of experts costs beside the dense model of the same active size.

    OMP_NUM_THREADS=1 python benchmarks/measure_moe.py [--quick] [--json FILE]

A training step (8,192 tokens: forward, loss, backward, fused AdamW) of a mixture of 64 experts, of
which a token uses two of width 512, beside that of a dense Transformer of width 1,024: per token both
do the same arithmetic but for the router's. What may cost more is moving tokens to their experts and
back, smaller matrices, and an optimizer with 31 times the weights of the feed-forward to update. Both
sides run in turns in one process; the ratio is the median over turns.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from command import arguments, write
from rich.console import Console
from rich.table import Table

from toolmem.data.batch import Batch
from toolmem.models import LanguageModel, Transformer
from toolmem.models.context import Extras
from toolmem.models.moe import MoETransformer
from toolmem.training import AdamW, Constant, LanguageModelModule
from toolmem.training.folders import processor_name

VOCAB, DIM, HEADS, HIDDEN = 260, 256, 4, 512
EXPERTS, TOP_K = 64, 2
ROWS, SEQ = 64, 128
TARGET = 1.6


def dense_model(layers: int) -> Transformer:
    """The dense model of the active size."""
    torch.manual_seed(0)
    return Transformer(VOCAB, DIM, layers, HEADS, hidden_dim=TOP_K * HIDDEN, max_seq_len=SEQ)


def sparse_model(layers: int) -> MoETransformer:
    """The mixture of experts."""
    torch.manual_seed(0)
    return MoETransformer(
        VOCAB,
        DIM,
        layers,
        HEADS,
        hidden_dim=HIDDEN,
        n_experts=EXPERTS,
        top_k=TOP_K,
        max_seq_len=SEQ,
    )


def random_batch() -> Batch:
    """Random tokens, all of which bear loss."""
    tokens = torch.randint(VOCAB, (ROWS, SEQ + 1), generator=torch.Generator().manual_seed(0))
    return Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        torch.ones(ROWS, SEQ, dtype=torch.bool),
        n_tokens=ROWS * SEQ,
    )


class Training:
    """Our loss and optimizer in a plain loop, its parts timed apart."""

    def __init__(self, model: LanguageModel, batch: Batch) -> None:
        self.module = LanguageModelModule(model, AdamW(lr=1e-3), Constant())
        self.optimizer = self.module.optimizer_config.build(model)
        self.batch = batch
        self.extras = Extras()

    def step(self) -> dict[str, float]:
        """Seconds of one training step, and of its parts."""
        self.extras = Extras()
        clock = [time.perf_counter()]
        loss, count = self.module.loss_sum(self.batch, extras=self.extras)
        clock.append(time.perf_counter())
        (loss / count).backward()
        clock.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module.model.after_optimizer_step(lambda value: value)
        clock.append(time.perf_counter())
        names = ("forward", "backward", "optimizer")
        parts = {name: b - a for name, (a, b) in zip(names, pairwise(clock), strict=True)}
        return parts | {"step": clock[-1] - clock[0]}


def compare(layers: int, rounds: int) -> dict[str, Any]:
    """Both sides in turns, the first turn left out."""
    batch = random_batch()
    sides = {
        "dense": Training(dense_model(layers), batch),
        "moe": Training(sparse_model(layers), batch),
    }
    for side in sides.values():
        side.step()
    turns: list[dict[str, dict[str, float]]] = []
    for index in range(rounds):
        order: Callable[[Any], Any] = reversed if index % 2 else iter
        turns.append({name: sides[name].step() for name in order(list(sides))})
    result: dict[str, Any] = {
        f"{name}_{part}_ms": 1e3 * statistics.median(turn[name][part] for turn in turns)
        for name in sides
        for part in ("forward", "backward", "optimizer", "step")
    }
    ratios = sorted(turn["moe"]["step"] / turn["dense"]["step"] for turn in turns)
    result |= {"ratio": statistics.median(ratios), "ratio_range": [ratios[0], ratios[-1]]}
    for name, side in sides.items():
        model = side.module.model
        result[f"{name}_parameters"] = sum(p.numel() for p in model.parameters())
        result[f"{name}_active_parameters"] = model.active_parameters()
    result["load_max_over_mean"] = float(sides["moe"].extras.metrics["moe/load_max_over_mean"])
    return result


def measure(quick: bool) -> dict[str, Any]:
    """The ratio, and what it is made of, as plain data; key ``moe_cost_ratio``."""
    layers, rounds = (1, 3) if quick else (4, 11)
    details = compare(layers, rounds)
    circumstances = {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "layers": layers,
        "tokens": ROWS * SEQ,
        "rounds": rounds,
    }
    return {"moe_cost_ratio": details["ratio"], "details": details, "circumstances": circumstances}


def show(result: dict[str, Any]) -> None:
    """One table: the parts of a step, side by side."""
    about, details = result["circumstances"], result["details"]
    title = (
        f"{about['processor']}, {about['threads']} thread, float32, torch {about['torch']}; "
        f"{about['layers']} layers, {about['tokens']:,} tokens a step, median of {about['rounds']}"
    )
    table = Table("", "dense", f"{EXPERTS} experts, k = {TOP_K}", "ratio", title=title)
    for name in ("parameters", "active_parameters"):
        dense, moe = details[f"dense_{name}"], details[f"moe_{name}"]
        table.add_row(name, f"{dense:,}", f"{moe:,}", f"{moe / dense:.2f}")
    for part in ("forward", "backward", "optimizer"):
        dense, moe = details[f"dense_{part}_ms"], details[f"moe_{part}_ms"]
        table.add_row(f"{part}, ms", f"{dense:,.0f}", f"{moe:,.0f}", f"{moe / dense:.2f}")
    low, high = details["ratio_range"]
    table.add_row(
        "step, ms",
        f"{details['dense_step_ms']:,.0f}",
        f"{details['moe_step_ms']:,.0f}",
        f"{result['moe_cost_ratio']:.2f} ({low:.2f} to {high:.2f}; goal ≤ {TARGET})",
    )
    console = Console()
    console.print(table)
    console.print(f"load, max over mean: {details['load_max_over_mean']:.2f}")


def main() -> None:
    """Measure, print, and write if asked to."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    result = measure(options.quick)
    show(result)
    write(result, options)


if __name__ == "__main__":
    main()
