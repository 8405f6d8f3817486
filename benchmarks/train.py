"""How fast training is, on one core in float32.

    python benchmarks/train.py [--quick] [--json FILE]

Four questions, each answered by a ratio measured in this run, the two sides taking turns:

- *speed-up over naive*: tokens that are not padding per second, ours over `naive_training.py`, at
  the published study's shape (2 layers, 2 heads, SwiGLU of 4 dim, untied vocabulary of 260, batches
  of 128 dialogues, 1,000 people). Ours: rows bucketed by length, head and loss only where loss is
  borne, the body compiled (with `--quick` it is not: compiling alone takes longer than the rest).
  Compilation is timed apart. Both sides are plain loops; what Lightning adds is the next figure.
- *speed-up by fused kernels* (`model.fused`): a whole training step of the figure1 sweeps' model (Muon,
  batches of 32 dialogues) with its blocks in C, over the same step without. In seconds of the
  processor, which other work on the machine disturbs least.
- *Lightning's overhead*: our trainer, with its logger and callbacks, over a bare loop of the same
  model, batches and loss.
- *share of matmul*: 6 N FLOPs a token (N: weights in matmuls) per second, over what the machine's
  float32 matmul reaches on exactly those products, forward and backward. Attention's own products
  are not in it and are given apart.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as pl
import torch
from command import arguments, write
from naive_training import NaiveTraining
from rich.console import Console
from rich.table import Table
from torch import nn

from toolmem.data.batch import Batch
from toolmem.data.modules import FactsDataModule
from toolmem.models import Transformer
from toolmem.training import (
    TRAINER_DEFAULTS,
    AdamW,
    Checkpointing,
    Constant,
    CSVLogger,
    LanguageModelModule,
    Muon,
    Progress,
    Throughput,
)
from toolmem.training.folders import processor_name

TEMPLATES = {"in_weight": "in_weight", "in_tool": "in_tool_long"}
TARGETS = {
    "in_weight_speedup_over_naive": "≥ 6",
    "in_tool_speedup_over_naive": "≥ 2",
    "in_weight_fused_speedup": "≥ 2",
    "in_tool_fused_speedup": "≥ 2",
    "lightning_overhead": "≤ 0.10",
    "matmul_share": "≥ 0.50",
}


def facts(setting: str, batch_size: int) -> FactsDataModule:
    """1,000 people's dialogues."""
    return FactsDataModule(
        people=1000,
        setting=setting,
        templates=TEMPLATES[setting],
        batch_size=batch_size,
        unseen_people=0,
    )


def study_model(dim: int) -> Transformer:
    """The published study's shape."""
    torch.manual_seed(0)
    return Transformer(260, dim, n_layers=2, n_heads=2, hidden_dim=4 * dim, max_seq_len=512)


def make_module(model: Transformer, compile: bool = False) -> LanguageModelModule:
    """The model with the optimizer that all sides use, its blocks as torch runs them."""
    return LanguageModelModule(model, AdamW(lr=1e-3), Constant(), compile=compile, fused=False)


class BareTraining:
    """Our loss in a plain loop.

    Args:
        module: model, loss and optimizer.
        batches: the loader.
        compile: with the compiled body.
    """

    def __init__(
        self, module: LanguageModelModule, batches: Iterator[Batch], compile: bool = False
    ) -> None:
        self.module = module
        self.hidden = (
            torch.compile(module.model.hidden, dynamic=True) if compile else module._hidden
        )
        self.optimizer = module.optimizer_config.build(module.model)
        self.batches = batches

    def step(self) -> int:
        """One training step; returns the number of its tokens that are not padding."""
        batch = next(self.batches)
        loss, count = self.module.loss_sum(batch, self.hidden)
        self.optimizer.zero_grad()
        (loss / count).backward()
        self.optimizer.step()
        return batch.n_tokens


def tokens_per_second(step: Callable[[], int], seconds: float) -> float:
    """Run steps for about ``seconds``."""
    began, tokens = time.perf_counter(), 0
    while True:
        tokens += step()
        if (passed := time.perf_counter() - began) >= seconds:
            return tokens / passed


def speedup(setting: str, dim: int, rounds: int, seconds: float, compile: bool) -> dict[str, Any]:
    """Ours over naive, in turns of ``seconds`` each."""
    data = facts(setting, 128)
    naive = NaiveTraining(study_model(dim), data.table)
    ours = BareTraining(make_module(study_model(dim)), iter(data.train_dataloader()), compile)
    began = time.perf_counter()
    ours.step()
    first = time.perf_counter() - began
    for side in (ours, naive, ours):
        side.step()
    pairs = []
    for _ in range(rounds):
        slow = tokens_per_second(naive.step, seconds)
        pairs.append((slow, tokens_per_second(ours.step, seconds)))
    return {
        "naive_tokens_per_s": statistics.median(a for a, _ in pairs),
        "ours_tokens_per_s": statistics.median(b for _, b in pairs),
        "speedup": statistics.median(b / a for a, b in pairs),
        "first_step_s": first,
        "parameters": sum(p.numel() for p in ours.module.model.parameters()),
    }


def fused_speedup(setting: str, dim: int, rounds: int, steps: int) -> dict[str, Any]:
    """A step with fused blocks over one without, in turns of ``steps`` each."""
    sides = {}
    for fused in (False, True):
        torch.manual_seed(0)
        model = Transformer(
            260, dim, n_layers=2, n_heads=2, max_seq_len=256, feed_forward="silu", conv_width=4,
            tie_embeddings=True, embedding_scale=True,
        )  # fmt: skip
        module = LanguageModelModule(model, Muon(lr=1e-2), Constant(), fused=fused)
        data = FactsDataModule(people=64, setting=setting, batch_size=32)
        sides[fused] = BareTraining(module, iter(data.train_dataloader()))
    times: dict[bool, list[float]] = {False: [], True: []}
    for index in range(rounds + 1):
        for fused, side in sides.items():
            began = time.process_time()
            for _ in range(steps):
                side.step()
            if index:
                times[fused].append((time.process_time() - began) / steps)
    return {
        "plain_ms_per_step": 1e3 * statistics.median(times[False]),
        "fused_ms_per_step": 1e3 * statistics.median(times[True]),
        "speedup": statistics.median(a / b for a, b in zip(*times.values(), strict=True)),
        "parameters": sum(p.numel() for p in sides[True].module.model.parameters()),
    }


class Stopwatch(pl.Callback):
    """Seconds from the end of step ``warmup`` to the end of the last."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start, and read."""
        if trainer.global_step == self.warmup:
            self.began = time.perf_counter()
        self.seconds = time.perf_counter() - self.began if trainer.global_step > self.warmup else 0


def lightning_seconds(setting: str, steps: int, warmup: int) -> float:
    """Seconds of ``steps`` steps of our trainer as ``toolmem fit`` sets it up."""
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch(warmup)
        trainer = pl.Trainer(
            **TRAINER_DEFAULTS,
            max_steps=warmup + steps,
            default_root_dir=folder,
            accelerator="cpu",
            devices=1,
            limit_val_batches=0,
            logger=[CSVLogger(folder)],
            callbacks=[watch, Throughput(), Progress(), Checkpointing()],
        )
        trainer.fit(make_module(study_model(16)), facts(setting, 64))
        return watch.seconds


def bare_seconds(setting: str, steps: int, warmup: int) -> float:
    """Seconds of the same steps in a bare loop."""
    data = facts(setting, 64)
    bare = BareTraining(make_module(study_model(16)), iter(data.train_dataloader()))
    for _ in range(warmup):
        bare.step()
    began = time.perf_counter()
    for _ in range(steps):
        bare.step()
    return time.perf_counter() - began


def lightning_overhead(rounds: int, steps: int) -> dict[str, float]:
    """What Lightning adds to a bare loop, as a fraction, at dim 16 and batches of 64 dialogues."""
    times: dict[Callable[..., float], list[float]] = {bare_seconds: [], lightning_seconds: []}
    for index in range(rounds):
        for side in list(times)[:: 1 if index % 2 else -1]:
            times[side].append(side("in_weight", steps, 5) / steps)
    # The fastest round of each: whatever else the machine does can only add to a time.
    bare, lightning = (min(seconds) for seconds in times.values())
    return {
        "bare_ms_per_step": 1e3 * bare,
        "lightning_ms_per_step": 1e3 * lightning,
        "overhead": lightning / bare - 1,
    }


def matmul_products(model: nn.Module, tokens: int) -> list[tuple[int, int, int]]:
    """(tokens, in, out) of every product with a weight."""
    return [
        (tokens, module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]


class Matmuls:
    """The products of a training step and nothing else: forward, input's and weight's gradient."""

    def __init__(self, products: list[tuple[int, int, int]]) -> None:
        self.operands = [
            (torch.randn(t, i), torch.randn(o, i), torch.randn(t, o)) for t, i, o in products
        ]
        self.flops = sum(6 * t * i * o for t, i, o in products)

    def seconds(self) -> float:
        """Of one pass."""
        began = time.perf_counter()
        for x, weight, gradient in self.operands:
            x @ weight.T
            gradient @ weight
            gradient.T @ x
        return time.perf_counter() - began


def matmul_share(rounds: int, rows: int, compile: bool) -> dict[str, float]:
    """The training step's rate of arithmetic over that of its matmuls alone."""
    torch.manual_seed(0)
    seq, dim, layers = 256, 384, 6
    model = Transformer(260, dim, n_layers=layers, n_heads=6, max_seq_len=seq)
    tokens = torch.randint(256, (rows, seq + 1))
    batch = Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        torch.ones(rows, seq, dtype=torch.bool),
        n_tokens=rows * seq,
    )
    ours = BareTraining(make_module(model), iter(lambda: batch, None), compile=compile)
    began = time.perf_counter()
    ours.step()
    first = time.perf_counter() - began
    products = matmul_products(model, rows * seq)
    matmuls = Matmuls(products)
    matmuls.seconds()
    ours.step()
    pairs = []
    for _ in range(rounds):
        alone = matmuls.seconds()
        began = time.perf_counter()
        ours.step()
        pairs.append((alone, time.perf_counter() - began))
    # Half of the square counts: attention is causal. Two products, forward and twice backward.
    attention = layers * rows * 6 * seq * seq * dim
    step = statistics.median(b for _, b in pairs)
    return {
        "matmul_gflops_per_s": matmuls.flops / statistics.median(a for a, _ in pairs) / 1e9,
        "step_gflops_per_s": matmuls.flops / step / 1e9,
        "attention_gflops_per_s": attention / step / 1e9,
        "share": statistics.median(a / b for a, b in pairs),
        "first_step_s": first,
    }


def measure(quick: bool) -> dict[str, Any]:
    """Everything, as plain data."""
    details: dict[str, Any] = {}
    for dim in (32,) if quick else (32, 64):
        for setting in TEMPLATES:
            rounds, seconds = (2, 0.8) if quick else (7, 3.0)
            details[f"{setting}_dim_{dim}"] = speedup(setting, dim, rounds, seconds, not quick)
    for dim in (16, 32):
        for setting in TEMPLATES:
            rounds, steps = (2, 5) if quick else (15, 10)
            details[f"{setting}_fused_dim_{dim}"] = fused_speedup(setting, dim, rounds, steps)
    details["lightning"] = lightning_overhead(2 if quick else 6, 25 if quick else 150)
    details["matmul"] = matmul_share(3 if quick else 10, 2 if quick else 16, compile=not quick)
    result: dict[str, Any] = {
        f"{setting}_{figure}": min(
            value["speedup"] for name, value in details.items() if name.startswith(setting + part)
        )
        for figure, part in (("speedup_over_naive", "_dim"), ("fused_speedup", "_fused"))
        for setting in TEMPLATES
    }
    result["lightning_overhead"] = details["lightning"]["overhead"]
    result["matmul_share"] = details["matmul"]["share"]
    circumstances = {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "compiled": not quick,
    }
    return result | {"details": details, "circumstances": circumstances}


def show(result: dict[str, Any]) -> None:
    """Two tables: the figures, and what they are made of."""
    console = Console()
    about = result["circumstances"]
    compiled = "compiled" if about["compiled"] else "not compiled (--quick)"
    title = f"{about['processor']}, {about['threads']} thread, float32, torch {about['torch']}, {compiled}"
    table = Table("figure", "measured", "target", title=title)
    for name, target in TARGETS.items():
        table.add_row(name, f"{result[name]:.2f}", target)
    console.print(table)
    table = Table("part", "value", "measured")
    for part, values in result["details"].items():
        for name, value in values.items():
            table.add_row(part, name, f"{value:,.3f}" if value < 100 else f"{value:,.0f}")
    console.print(table)


def main() -> None:
    """Measure, print, and write if asked to."""
    options = arguments(__doc__).parse_args()
    warnings.filterwarnings("ignore")
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    result = measure(options.quick)
    show(result)
    write(result, options)


if __name__ == "__main__":
    main()
