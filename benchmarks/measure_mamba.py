"""How fast the Mambas train beside transformers' own, on one core.

    python benchmarks/measure_mamba.py [--quick] [--json FILE]

The speed-up over transformers: seconds of a training step (forward, cross-entropy, backward) of
transformers' `MambaForCausalLM` and `Mamba2ForCausalLM` over ours, at dim 256 and rows of 1,024
tokens, same sizes, same tokens, float32, the two sides taking turns. Both are on torch's operations
alone: the CUDA kernels are installed for neither. transformers' Mamba-1 loops over tokens, and its
backward pass makes a gradient as large as all states for each of them, so that it grows with the
square of the length; with `--quick` its rows are 128 tokens long, where the ratio is smaller. Its
Mamba-2 is timed with its default chunks of 256 tokens and with our 64, and the faster counts.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
import transformers
from command import arguments, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from toolmem.models import LanguageModel
from toolmem.models.mamba import Mamba
from toolmem.models.mamba2 import Mamba2
from toolmem.training.folders import processor_name

VOCAB, DIM, LENGTH = 260, 256, 1024
TARGETS = {
    "mamba1_speedup_over_transformers": "≥ 5",
    "mamba2_speedup_over_transformers": "≥ 1.2",
}


def ours(kind: type[LanguageModel], layers: int, length: int = LENGTH) -> LanguageModel:
    """Our model, sizes as by default."""
    torch.manual_seed(0)
    return kind(VOCAB, DIM, layers, max_seq_len=length, tie_embeddings=True)


def theirs(kind: type[LanguageModel], layers: int, chunk_size: int = 256) -> nn.Module:
    """Transformers' model of the same sizes."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": DIM,
        "num_hidden_layers": layers,
        "use_cache": False,
        "tie_word_embeddings": True,
    }
    if kind is Mamba:
        return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            **sizes, head_dim=64, num_heads=8, n_groups=1, state_size=128, chunk_size=chunk_size
        )
    )


def training_step(model: nn.Module, tokens: Tensor) -> Callable[[], float]:
    """A step that returns its seconds."""

    def step() -> float:
        model.zero_grad()
        began = time.perf_counter()
        output = model(tokens[:, :-1])
        logits = output if isinstance(output, Tensor) else output.logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return time.perf_counter() - began

    return step


def speedup(
    kind: type[LanguageModel], layers: int, batch: int, length: int, rounds: int
) -> dict[str, Any]:
    """Theirs over ours, in turns; the fastest of their settings counts."""
    tokens = torch.randint(VOCAB, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    mine = ours(kind, layers)
    others = [theirs(kind, layers, chunk) for chunk in ((256, 64) if kind is Mamba2 else (0,))]
    parameters = {sum(p.numel() for p in model.parameters()) for model in (mine, *others)}
    assert len(parameters) == 1, f"models of different sizes: {parameters}"
    step, steps = training_step(mine, tokens), [training_step(model, tokens) for model in others]
    step()
    if kind is Mamba2:
        for other in steps:
            other()
    times = [([other() for other in steps], min(step(), step())) for _ in range(rounds)]
    return {
        "layers": layers,
        "batch": batch,
        "length": length,
        "rounds": rounds,
        "ours_s": statistics.median(b for _, b in times),
        "theirs_s": statistics.median(min(a) for a, _ in times),
        "speedup": statistics.median(min(a) / b for a, b in times),
    }


def measure(quick: bool) -> dict[str, Any]:
    """Everything, as plain data."""
    transformers.logging.set_verbosity_error()
    details: dict[str, Any] = {
        "mamba1": speedup(Mamba, 1, 1, 128 if quick else LENGTH, 1),
        "mamba2": speedup(Mamba2, 1 if quick else 2, 2, LENGTH, 2 if quick else 7),
    }
    circumstances = {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dim": DIM,
    }
    return {
        "mamba1_speedup_over_transformers": details["mamba1"]["speedup"],
        "mamba2_speedup_over_transformers": details["mamba2"]["speedup"],
        "details": details,
        "circumstances": circumstances,
    }


def show(result: dict[str, Any]) -> None:
    """Two tables: the figures, and what they are made of."""
    console = Console()
    about = result["circumstances"]
    title = (
        f"{about['processor']}, {about['threads']} thread, float32, dim {DIM}, torch "
        f"{about['torch']}, transformers {about['transformers']}"
    )
    table = Table("figure", "measured", "target", title=title)
    for name, target in TARGETS.items():
        table.add_row(name, f"{result[name]:.2f}", target)
    console.print(table)
    table = Table("part", "value", "measured")
    for part, values in result["details"].items():
        for name, value in values.items():
            table.add_row(part, name, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)


def main() -> None:
    """Measure, print, and write if asked to."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    result = measure(options.quick)
    show(result)
    write(result, options)


if __name__ == "__main__":
    main()
