"""Whether decoding with a recurrent state stays as cheap as the text grows, and what attention pays.

    OMP_NUM_THREADS=1 python benchmarks/measure_rnn.py [--quick] [--json FILE]

For both Mambas, every recurrent cell, both rules of linear attention, and attention (for comparison:
its cost may grow): seconds a token of decoding after 10,000 tokens over those after 100, two layers of
width 256, one lane. ``rnn_decode_flatness`` is the worst of all but attention.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from command import arguments, write
from decoding import LONG, ROOM, SHORT, flatness
from rich.console import Console
from rich.table import Table

from toolmem.models import RNN, LanguageModel, LinearAttention, Mamba, Mamba2, Transformer
from toolmem.training.folders import processor_name

VOCAB, DIM, LAYERS, HEADS = 260, 256, 2, 4
MAMBAS = {"mamba1": Mamba, "mamba2": Mamba2}
CELLS = ("lstm", "gru", "mingru", "minlstm", "rglru")
RULES = ("gated", "gated_delta")
TARGET = 1.15


def models() -> dict[str, Callable[[], LanguageModel]]:
    """What makes each model, by name."""
    made: dict[str, Callable[[], LanguageModel]] = {}
    for kind in MAMBAS:
        made[kind] = lambda kind=kind: MAMBAS[kind](VOCAB, DIM, LAYERS, max_seq_len=ROOM)
    for cell in CELLS:
        made[cell] = lambda cell=cell: RNN(VOCAB, DIM, LAYERS, cell=cell, max_seq_len=ROOM)
    for rule in RULES:
        made[rule] = lambda rule=rule: LinearAttention(
            VOCAB, DIM, LAYERS, HEADS, rule=rule, max_seq_len=ROOM
        )
    made["attention"] = lambda: Transformer(VOCAB, DIM, LAYERS, HEADS, max_seq_len=ROOM)
    return made


def measure(quick: bool) -> dict[str, Any]:
    """Everything, as plain data."""
    details = {}
    for name, make in models().items():
        torch.manual_seed(0)
        details[name] = flatness(make(), *((10, 8) if quick else (20, 50)))
    return {
        "rnn_decode_flatness": max(
            row["flatness"] for name, row in details.items() if name != "attention"
        ),
        "attention_decode_flatness": details["attention"]["flatness"],
        "details": details,
        "circumstances": {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dim": DIM,
            "layers": LAYERS,
        },
    }


def show(result: dict[str, Any]) -> None:
    """One row a mixer."""
    about = result["circumstances"]
    title = (
        f"Decoding, {about['processor']}, {about['threads']} thread, float32, {about['layers']} "
        f"layers of width {about['dim']}, torch {about['torch']}"
    )
    columns = ("mixer", f"ms after {SHORT:,}", f"ms after {LONG:,}", "ratio", "cache bytes")
    table = Table(*columns, title=title)
    for name, row in result["details"].items():
        near, far = row[f"ms_per_token_after_{SHORT}"], row[f"ms_per_token_after_{LONG}"]
        table.add_row(
            name, f"{near:.3f}", f"{far:.3f}", f"{row['flatness']:.2f}", f"{row['cache_bytes']:,}"
        )
    console = Console()
    console.print(table)
    worst = result["rnn_decode_flatness"]
    console.print(f"rnn_decode_flatness {worst:.2f} (target ≤ {TARGET}): the worst but attention")


def main() -> None:
    """Measure, print, and write if asked to."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    result = measure(options.quick)
    show(result)
    write(result, options)


if __name__ == "__main__":
    main()
