"""Decoding by ``torch.compile`` beside the engine without it.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py [--quick] [--json FILE] [--only MODEL ...]

One core, float32, random weights, greedy, short prompts; both engines decode the same dialogues, in turn.
A step is what a token more of all lanes costs: a long run less a short one, over the tokens between. The
seconds that compiling takes are told apart.

- *facts*: 2 layers, dim 64, bytes: the engine without compile runs a whole step as one call of C.
- *window*, *mamba2*: as large; the engine without compile runs torch's operations one by one.
- *135M*: the shape of SmolLM2-135M.
"""

from __future__ import annotations

import os
import random
import statistics
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from command import about, arguments, write
from generate import NoRoles, in_turn, ratio
from rich.console import Console
from rich.table import Table

from toolmem.generation import Engine, Request
from toolmem.models import LanguageModel, Mamba2, Transformer

LANES = (1, 16, 128)
PROMPT = 16  # tokens
TINY = {"vocab_size": 260, "dim": 64, "n_layers": 2, "max_seq_len": 256}


def model_of(name: str, quick: bool) -> LanguageModel:
    """A model with random weights."""
    torch.manual_seed(0)
    if name == "mamba2":
        return Mamba2(**TINY).eval()
    if name == "135M":
        return Transformer(
            49152, 576, 4 if quick else 30, 9, 3, hidden_dim=1536, max_seq_len=2048, rope_base=1e5,
            tie_embeddings=True,
        ).eval()  # fmt: skip
    options = {"window": {"window": 32}, "facts": {"hidden_dim": 192}}[name]
    return Transformer(n_heads=2, **TINY, **options).eval()


def lengths_of(name: str, lanes: int, quick: bool) -> tuple[int, int]:
    """New tokens of a long run and of a short one."""
    if quick:
        return (9, 1)
    if name == "135M":
        return (33, 1) if lanes == 1 else (13, 1) if lanes == 16 else (5, 1)
    return (129, 1)


def steps(name: str, lanes: int, quick: bool) -> dict[str, Any]:
    """Seconds of a step, with and without."""
    model, draw = model_of(name, quick), random.Random(0)
    prompts = [[draw.randrange(model.vocab_size) for _ in range(PROMPT)] for _ in range(lanes)]
    long, short = lengths_of(name, lanes, quick)

    def run(engine: Engine, new: int) -> list[list[int]]:
        requests = [Request(prompt, max_new_tokens=new, use_tools=False) for prompt in prompts]
        return [one.tokens for one in engine.run(requests)]

    options = {"max_lanes": lanes, "prefix_sharing": False}
    with (
        Engine(model, NoRoles(), **options) as plain,  # type: ignore[arg-type]
        Engine(model, NoRoles(), compile=True, **options) as compiled,  # type: ignore[arg-type]
    ):
        seconds = compiled.warm_up()
        equal = sum(a == b for a, b in zip(run(plain, long), run(compiled, long), strict=True))
        sides = {
            f"{side}, {length}": lambda e=engine, n=new: run(e, n)
            for side, engine in (("plain", plain), ("compiled", compiled))
            for length, new in (("long", long), ("short", short))
        }
        found = in_turn(sides, 1 if quick else 3 if name == "135M" else 7)
        graphs = compiled.stats().compilations
    each = {
        side: [
            (a - b) / (long - short)
            for a, b in zip(found[f"{side}, long"], found[f"{side}, short"], strict=True)
        ]
        for side in ("plain", "compiled")
    }
    return {
        "model": name,
        "lanes": lanes,
        "plain_ms": 1e3 * statistics.median(each["plain"]),
        "compiled_ms": 1e3 * statistics.median(each["compiled"]),
        "times_as_fast": ratio(each, "plain", "compiled"),
        "compile_seconds": seconds,
        "graphs": graphs,
        "equal": equal,
        "seconds_a_step": each,
    }


def main() -> None:
    """Measure, print, and write."""
    parser = arguments(__doc__, quick="rough figures, within some minutes")
    names = ["facts", "window", "mamba2", "135M"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these models")
    parser.add_argument("--lanes", nargs="+", type=int, default=LANES, help="these batches")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [steps(name, lanes, options.quick) for name in options.only for lanes in options.lanes]
    machine = about(options.quick)
    table = Table(title=f"{machine['processor']}, 1 thread, torch {machine['torch']}")
    columns = ("model", "lanes", "step, ms", "compiled, ms", "times as fast", "compile, s", "equal")
    for column in columns:
        table.add_column(column, justify="right")
    for row in found:
        table.add_row(
            row["model"],
            str(row["lanes"]),
            f"{row['plain_ms']:.2f}",
            f"{row['compiled_ms']:.2f}",
            f"{row['times_as_fast']:.2f}",
            f"{row['compile_seconds']:.0f}",
            f"{row['equal']}/{row['lanes']}",
        )
    Console(width=110).print(table)
    write({"rows": found, "about": machine}, options)


if __name__ == "__main__":
    main()
