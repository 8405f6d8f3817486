"""What nobody could try without a GPU, tried on the one that is here: one command, one table.

    python benchmarks/gpu.py [--quick] [--json FILE] [--device cuda]

Every check is a few seconds to a minute, goes on after one that fails, and says what it saw:

- *architectures*: losses and gradients of every architecture equal the CPU's in float64.
- *attention kernels*: sdpa, flex and flash equal the plain reference, packed documents and windows too.
- *precision*: 16-mixed (skipped steps counted), and bf16-mixed where the capability is 8.0 or more.
- *checkpointing*: gradients with activation checkpointing equal those without; what each holds at most.
- *memory plan*: what `toolmem plan` reckons beside ``torch.cuda.max_memory_allocated``.
- *compiled blocks*: equal to eager, the graphs counted, the step beside eager's.
- *engine*: greedy texts equal the naive reference; tokens a second, plain and compiled.
- *step*: a training step of a 135M model: tokens a second, share of the matmul rate.
- *ranks*: with two devices or more, DDP, FSDP2 and TP over NCCL train as one device does.

It ends with 1 if a check failed, and 0 otherwise; without a GPU nothing is checked, and it says so.
``--device cpu`` runs the same checks on the CPU, which shows that the script works and nothing else.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command import about, arguments, write
from generate import NoRoles
from rich.console import Console
from rich.table import Table

from toolmem.errors import ToolmemError
from toolmem.generation import Engine, Request
from toolmem.generation.reference import generate_naive
from toolmem.models import (
    RNN,
    Hybrid,
    LanguageModel,
    LinearAttention,
    Mamba,
    Mamba2,
    MoETransformer,
    Transformer,
)
from toolmem.models.model_flops import ModelFlops
from toolmem.models.recompute import ActivationCheckpointing, checkpoint_blocks, release_blocks
from toolmem.training import AdamW, Muon
from toolmem.training.body import Compilations, compile_blocks
from toolmem.training.flops import matmul_rate
from toolmem.training.memory_plan import Layout, MemoryPlan, Step
from toolmem.training.mixed_precision import GradScaler
from toolmem.training.precision import has_fast_bf16

SIZES: dict[str, Any] = {"vocab_size": 96, "dim": 64, "n_layers": 2, "max_seq_len": 128}
ARCHITECTURES: dict[str, Callable[[], LanguageModel]] = {
    "Transformer": lambda: Transformer(
        **SIZES, n_heads=4, n_kv_heads=2, qk_norm=True, conv_width=4
    ),
    "MLA": lambda: Transformer(**SIZES, n_heads=4, attention="mla"),
    "MoE": lambda: MoETransformer(**SIZES, n_heads=4, n_experts=4, top_k=2),
    "Mamba": lambda: Mamba(**SIZES),
    "Mamba2": lambda: Mamba2(**SIZES),
    "minGRU": lambda: RNN(**SIZES, cell="mingru"),
    "LSTM": lambda: RNN(**SIZES, cell="lstm"),
    "gated linear": lambda: LinearAttention(**SIZES, n_heads=4),
    "hybrid": lambda: Hybrid(
        **SIZES, pattern=["mamba2", "attention"], mixers={"attention": {"n_heads": 4}}
    ),
}
SMOLLM = {
    "vocab_size": 49152, "dim": 576, "n_heads": 9, "n_kv_heads": 3, "hidden_dim": 1536,
    "max_seq_len": 2048, "rope_base": 1e5, "tie_embeddings": True,
}  # fmt: skip


class CheckError(Exception):
    """A check that saw something wrong."""


def expect(right: bool, message: str) -> None:
    """Raise when it is not."""
    if not right:
        raise CheckError(message)


class Checks:
    """All checks, on one device.

    Args:
        device: what they run on.
        quick: smaller sizes, fewer steps.
    """

    def __init__(self, device: str, quick: bool) -> None:
        self.device = torch.device(device)
        self.quick = quick

    @property
    def all(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """By name, in order."""
        return {
            "architectures": self.architectures,
            "attention kernels": self.kernels,
            "precision": self.precision,
            "checkpointing": self.checkpointing,
            "memory plan": self.memory_plan,
            "compiled blocks": self.compiled,
            "engine": self.engine,
            "step": self.step,
            "ranks": self.ranks,
        }

    # ---- helpers

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], times: int) -> float:
        """Mean seconds of a run, after one that does not count."""
        run()
        self.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            run()
        self.synchronize()
        return (time.perf_counter() - began) / times

    def peak(self, run: Callable[[], Any]) -> float:
        """Bytes that the device held at most while this ran; nan on a CPU."""
        if self.device.type != "cuda":
            run()
            return float("nan")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return float(torch.cuda.max_memory_allocated())

    def tokens(self, rows: int, seq: int, vocab: int) -> torch.Tensor:
        """Some tokens."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab, (rows, seq), generator=generator).to(self.device)

    def made(self, make: Callable[[], LanguageModel]) -> LanguageModel:
        """A model with the same weights every time, in training."""
        torch.manual_seed(0)
        return make().to(self.device).train()

    # ---- checks

    def architectures(self) -> dict[str, Any]:
        """Against the CPU in float64."""
        found = {}
        for name, make in ARCHITECTURES.items():
            tokens = self.tokens(3, 48, SIZES["vocab_size"])
            documents = (torch.arange(48, device=self.device) // 20).expand(3, 48)
            passes = []
            for device, dtype in (
                (self.device, torch.float32),
                (torch.device("cpu"), torch.float64),
            ):
                torch.manual_seed(0)
                model = make().to(device, dtype).train()
                out = model(tokens.to(device), documents=documents.to(device))
                out.square().mean().backward()
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                passes.append([out.detach(), *grads])
            worst = 0.0
            for one, other in zip(*passes, strict=True):
                other = other.float()
                scale = float(other.abs().max()) or 1.0
                worst = max(worst, float((one.cpu() - other).abs().max()) / scale)
            found[name] = worst
        expect(max(found.values()) < 1e-3, f"differences up to {max(found.values()):.1e}: {found}")
        return {"largest_difference": max(found.values()), **found}

    def kernels(self) -> dict[str, Any]:
        """Each that is installed, against plain attention."""
        found: dict[str, Any] = {}
        for kernel in ("sdpa", "flex", "flash"):
            # flash-attn takes half precision alone
            dtype = torch.float16 if kernel == "flash" else torch.float32
            worst = 0.0
            try:
                for options in ({}, {"window": 16}):
                    for packed in (False, True):
                        worst = max(worst, self._kernel(kernel, dtype, options, packed))
            except (ToolmemError, ImportError) as error:
                found[kernel] = f"not here: {str(error)[:80]}"
                continue
            limit = 2e-2 if dtype == torch.float16 else 1e-4
            expect(worst < limit, f"{kernel} differs from plain attention by {worst:.1e}")
            found[kernel] = worst
        return found

    def _kernel(
        self, kernel: str, dtype: torch.dtype, options: dict[str, Any], packed: bool
    ) -> float:
        tokens = self.tokens(2, 64, SIZES["vocab_size"])
        documents = (torch.arange(64, device=self.device) // 24).expand(2, 64) if packed else None
        results = []
        for choice in (kernel, "plain"):
            torch.manual_seed(0)
            model = Transformer(**SIZES, n_heads=4, **options)
            model = model.to(self.device, dtype).eval()
            model.use_attention(choice)
            with torch.no_grad():
                results.append(model.hidden(tokens, documents=documents).float())
        return float((results[0] - results[1]).abs().max() / results[1].abs().max())

    def precision(self) -> dict[str, Any]:
        """A few steps in half precision come near those in float32; a step that overflows is left out."""
        losses = {"float32": self._losses(None)}
        losses["float16"] = self._losses(torch.float16)
        if self.device.type != "cuda" or has_fast_bf16():
            losses["bfloat16"] = self._losses(torch.bfloat16)
        for name, values in losses.items():
            away = abs(values[-1] - losses["float32"][-1]) / losses["float32"][-1]
            expect(away < 0.05, f"{name}: the loss after {len(values)} steps is {away:.1%} away")
        model = self.made(ARCHITECTURES["Transformer"])
        optimizer = AdamW().build(model)
        scaler = GradScaler(self.device.type, init_scale=2.0**10)
        loss = model(self.tokens(2, 16, 96)).square().mean()
        scaler.scale(loss).backward()
        model.embedding.weight.grad[0, 0] = float("inf")
        before = model.embedding.weight.detach().clone()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        expect(
            torch.equal(model.embedding.weight, before), "a step with infinite gradients was taken"
        )
        expect(scaler.skipped_steps == 1 and scaler.get_scale() == 512, "it was not counted")
        return {name: values[-1] for name, values in losses.items()}

    def _losses(self, dtype: torch.dtype | None, steps: int = 20) -> list[float]:
        model = self.made(ARCHITECTURES["Transformer"])
        optimizer = Muon(lr=1e-2).build(model)
        scaler = GradScaler(self.device.type, init_scale=1024.0)
        tokens = (torch.arange(33) % 17).expand(8, 33).to(self.device)
        losses = []
        for _ in range(steps):
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                logits = model(tokens[:, :-1]).float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            if dtype == torch.float16:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def checkpointing(self) -> dict[str, Any]:
        """Gradients with it equal those without; peaks."""
        layers = 2 if self.quick else 12
        model = self.made(lambda: Transformer(96, 256, layers, 4, max_seq_len=512))
        tokens = self.tokens(4, 512, 96)

        def run() -> list[torch.Tensor]:
            model.zero_grad()
            model.hidden(tokens).square().mean().backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        found: dict[str, Any] = {"none": self.peak(run)}
        plain = run()
        for mode in ("selective", "blocks"):
            checkpoint_blocks(model, ActivationCheckpointing(mode))
            found[mode] = self.peak(run)
            away = max(
                float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
                for a, b in zip(run(), plain, strict=True)
            )
            expect(away < 1e-4, f"{mode}: gradients differ by {away:.1e}")
            release_blocks(model)
        return found

    def memory_plan(self) -> dict[str, Any]:
        """Reckoned over measured, of whole training steps."""
        rows, seq, layers = (2, 128, 2) if self.quick else (8, 512, 8)
        found: dict[str, Any] = {}
        for mode in ("none", "blocks"):
            model = self.made(lambda: Transformer(8192, 512, layers, 8, max_seq_len=seq))
            config = AdamW()
            reckoned = MemoryPlan(model, config, Step(rows, seq, rows * seq)).memory(
                Layout(checkpointing=mode)
            )
            if mode != "none":
                checkpoint_blocks(model, ActivationCheckpointing(mode))
            optimizer = config.build(model)
            tokens = self.tokens(rows, seq + 1, 8192)

            def steps(model: Any = model, optimizer: Any = optimizer, tokens: Any = tokens) -> None:
                for _ in range(3):
                    logits = model(tokens[:, :-1]).flatten(0, 1)
                    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
                    del logits
                    optimizer.zero_grad()  # as Lightning does, between the passes
                    loss.backward()
                    optimizer.step()

            measured = self.peak(steps)
            found[mode] = reckoned.total / measured
            if self.device.type == "cuda":
                expect(
                    0.85 < found[mode] < 1.15,
                    f"{mode}: reckoned {reckoned.total:.3e} bytes, measured {measured:.3e}",
                )
        return found

    def compiled(self) -> dict[str, Any]:
        """Equal to eager over ragged lengths; how fast."""
        layers, dim = (2, 64) if self.quick else (8, 512)
        model = self.made(lambda: Transformer(96, dim, layers, 8, max_seq_len=256))
        lengths = (200, 131, 64, 255)
        eager = [model.hidden(self.tokens(4, n, 96)).detach() for n in lengths]

        def run() -> None:
            model.zero_grad()
            model.hidden(self.tokens(4, 200, 96)).square().mean().backward()

        plain = self.seconds(run, 3)
        counted = Compilations()
        compile_blocks(model)
        began = time.perf_counter()
        away = max(
            float((model.hidden(self.tokens(4, n, 96)).detach() - one).abs().max())
            for n, one in zip(lengths, eager, strict=True)
        )
        run()
        self.synchronize()
        waited = time.perf_counter() - began
        graphs = counted.metrics()["compile/graphs"]
        expect(away < 1e-2, f"compiled blocks differ from eager by {away:.1e}")
        expect(graphs <= 8, f"{graphs} graphs for {len(lengths)} lengths")
        return {
            "difference": away,
            "graphs": graphs,
            "compile_seconds": waited,
            "times_as_fast": plain / self.seconds(run, 3),
        }

    def engine(self) -> dict[str, Any]:
        """Greedy texts equal the naive reference's; how fast."""
        tokenizer: Any = NoRoles()
        found: dict[str, Any] = {}
        new, lanes = (8, 4) if self.quick else (64, 32)
        for name in ("Transformer", "Mamba2", "minGRU"):
            model = self.made(ARCHITECTURES[name]).eval()
            draw = random.Random(0)
            prompts = [[draw.randrange(96) for _ in range(3 + i % 9)] for i in range(lanes)]
            wanted = [
                generate_naive(model, tokenizer, prompt, max_new_tokens=8).tokens
                for prompt in prompts[:4]
            ]
            with Engine(model, tokenizer, max_lanes=lanes) as engine:
                short = [Request(p, max_new_tokens=8, use_tools=False) for p in prompts[:4]]
                texts = [one.tokens for one in engine.run(short)]
                expect(texts == wanted, f"{name}: greedy texts differ from the reference's")
                requests = [Request(p, max_new_tokens=new, use_tools=False) for p in prompts]
                seconds = self.seconds(lambda e=engine, r=requests: e.run(r), 1)  # type: ignore[misc]
            found[f"{name}, tokens/s"] = lanes * new / seconds
        return found

    def step(self) -> dict[str, Any]:
        """A training step of SmolLM2-135M's shape."""
        layers, rows, seq = (2, 1, 128) if self.quick else (30, 8, 2048)
        half = torch.float16
        if self.device.type != "cuda" or has_fast_bf16():
            half = torch.bfloat16
        model = self.made(lambda: Transformer(n_layers=layers, **SMOLLM))
        checkpoint_blocks(model, ActivationCheckpointing("selective"))
        optimizer = AdamW().build(model)
        tokens = self.tokens(rows, seq + 1, SMOLLM["vocab_size"])  # type: ignore[arg-type]

        def run() -> None:
            with torch.autocast(self.device.type, half):
                logits = model(tokens[:, :-1])
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), tokens[:, 1:].flatten()
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = self.seconds(run, 1 if self.quick else 5)
        release_blocks(model)
        flops = ModelFlops(model)
        body = flops.body(rows, seq)
        exact = body.exact(rows * seq, lambda window, n: rows * n * (n + 1) // 2)
        exact += rows * seq * flops.head().both
        return {
            "precision": str(half).removeprefix("torch."),
            "tokens_per_s": rows * seq / seconds,
            "flops_per_s": exact / seconds,
            "utilisation": exact / seconds / matmul_rate(self.device, half),
        }

    def ranks(self) -> dict[str, Any]:
        """DDP, FSDP2 and TP by the command line, against one device."""
        count = torch.cuda.device_count() if self.device.type == "cuda" else 2
        if count < 2:
            return {"skipped": "one device"}
        accelerator = "gpu" if self.device.type == "cuda" else "cpu"
        recipe = Path(__file__).parent.parent / "recipes" / "facts_in_weight.yaml"
        parallel = "lightning.pytorch.strategies.ModelParallelStrategy"
        sizes = "--trainer.strategy.init_args."
        sides = {
            "one": (1, []),
            "ddp": (2, ["--trainer.strategy", "ddp"]),
            "fsdp": (2, ["--trainer.strategy", parallel, f"{sizes}data_parallel_size", "2",
                         f"{sizes}tensor_parallel_size", "1"]),
            "tensor": (2, ["--trainer.strategy", parallel, f"{sizes}data_parallel_size", "1",
                           f"{sizes}tensor_parallel_size", "2"]),
        }  # fmt: skip
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as runs:
            for name, (devices, words) in sides.items():
                command = [
                    sys.executable, "-m", "toolmem", "fit", "--config", str(recipe), "--runs", runs,
                    "--name", name, "--trainer.accelerator", accelerator, "--trainer.devices",
                    str(devices), "--trainer.max_steps", "20", "--trainer.log_every_n_steps", "20",
                    "--trainer.limit_val_batches", "0", "--recall.every_n_steps", "0",
                    "--data.batch_size", "32", "--model.fused", "false",
                    "--trainer.enable_progress_bar", "false", *words,
                ]  # fmt: skip
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=300, env={**os.environ}
                )
                expect(done.returncode == 0, f"{name}: {done.stderr[-400:]}")
                found[name] = last_loss(Path(runs) / name / "metrics.csv")
        for name, loss in found.items():
            away = abs(loss - found["one"]) / found["one"]
            expect(away < 1e-3, f"{name}: the loss is {loss}, on one device {found['one']}")
        return found


def last_loss(path: Path) -> float:
    """The last training loss of a run."""
    from toolmem.sweeps.outcome import Logged

    value = Logged(path).value("train/loss", "last")
    assert value is not None
    return value


def device_of(device: str) -> dict[str, Any]:
    """What is known of a device."""
    if device != "cuda":
        return {"device": device}
    major, minor = torch.cuda.get_device_capability()
    return {
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "devices": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "bfloat16": has_fast_bf16(),
        "memory": torch.cuda.get_device_properties(0).total_memory,
    }


def main() -> int:
    """Run all checks, print a table, write the figures."""
    parser = arguments(__doc__, "smaller sizes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="these checks alone")
    options = parser.parse_args()
    console = Console()
    if options.device == "cuda" and not torch.cuda.is_available():
        console.print("no CUDA device here: nothing was checked (--device cpu tries the script)")
        write({**about(options.quick), "device": None, "checks": {}}, options)
        return 0
    checks = Checks(options.device, options.quick)
    machine = device_of(options.device)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    table = Table("check", "", "seconds", "what was seen")
    results: dict[str, Any] = {}
    for name, check in checks.all.items():
        if options.only and name not in options.only:
            continue
        began = time.perf_counter()
        try:
            seen, status = check(), "ok"
        except CheckError as error:
            seen, status = {"failed": str(error)}, "FAILED"
        except Exception as error:  # whatever it is, the other checks are wanted too
            traceback.print_exc()
            seen, status = {"failed": f"{type(error).__name__}: {error}"}, "FAILED"
        if "skipped" in seen:
            status = "skipped"
        seconds = time.perf_counter() - began
        results[name] = {"status": status, "seconds": seconds, **seen}
        text = ", ".join(f"{key} {shown(value)}" for key, value in seen.items())
        table.add_row(name, status, f"{seconds:.1f}", text)
    console.print(table)
    write({**about(options.quick), **machine, "checks": results}, options)
    return int(any(result["status"] == "FAILED" for result in results.values()))


def shown(value: Any) -> str:
    """A figure as it is read."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
