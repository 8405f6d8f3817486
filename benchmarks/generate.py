"""What the engine gains: tools off the critical path, ragged batches, shared pages, copied answers.

    OMP_NUM_THREADS=1 python benchmarks/generate.py [--quick] [--json FILE] [--checkpoint RUN] [--only PART]

One core a side, sides in turn, same weights. Parts:

- *facts*: 1,000 questions to an in-tool model (2 layers, dim 64, bytes, trained here by
  recipes/facts_in_tool.yaml unless --checkpoint names a run), DuckDB answering. The naive side is
  naive_generation.py: lockstep, padded, tool calls in turn; the engine has 256 lanes. Both with the tool
  as it is (0 ms), and with one that takes 50 ms.
- *lookup*: the same model, one dialogue at a time, with and without prompt lookup.
- *decode*: SmolLM2-135M's shape, random weights, float32, beside ``transformers.generate``: one prompt, and
  16 ragged ones; and the share of the measured read bandwidth at one.
- *pages*: 64 samples of one 1,024-token prompt, and a tree of 4 turns by 4 under a tenth of its memory.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from command import about, arguments, write
from kernels import reader
from naive_generation import generate_in_lockstep
from rich.console import Console
from rich.table import Table

import toolmem
from toolmem.generation import Engine, PromptLookup, Request, Sampling, fork_all
from toolmem.models import Transformer
from toolmem.models.interop import llama
from toolmem.run import Run
from toolmem.tools import Toolbox
from toolmem.tools.base import Answer, Tool

LANES = 256
TOOL_S = 0.05
RECIPE = Path(__file__).parent.parent / "recipes" / "facts_in_tool.yaml"
TARGETS = {
    "speedup_over_synchronous_50ms": "≥ 20",
    "speedup_over_synchronous_0ms": "≥ 3",
    "latency_hiding_ratio": "≤ 1.3",
    "prompt_lookup_speedup": "≥ 1.5",
    "prompt_lookup_tokens_per_pass": "",
    "prompt_lookup_own_speedup": "",
    "prompt_lookup_own_tokens_per_pass": "",
    "decode_speedup_over_transformers_b1": "≥ 1.3",
    "decode_speedup_over_transformers_b16": "≥ 2",
    "bandwidth_share_b1": "≥ 0.7",
    "decode_tokens_per_s_b1": "",
    "decode_tokens_per_s_b16": "",
    "samples_kv_over_shared": "≤ 1.2",
    "tree_equal_under_a_tenth": "1",
}


class Delayed:
    """A tool that takes its time over every answer."""

    def __init__(self, tool: Tool, seconds: float) -> None:
        self.name, self.tool, self.seconds = tool.name, tool, seconds

    def accepts(self, query: str) -> bool:
        """As the tool itself."""
        return self.tool.accepts(query)

    async def call(self, query: str) -> Answer:
        """The tool's answer, later."""
        await asyncio.sleep(self.seconds)
        return await self.tool.call(query)

    def close(self) -> None:
        """The tool is another's."""


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of wall time, and what came of it."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def in_turn(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, the sides taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(timed(side)[0])
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    """The median of a round's ratios."""
    pairs = zip(seconds[above], seconds[below], strict=False)
    return statistics.median(a / b for a, b in pairs)


def facts_run(checkpoint: str | None, quick: bool, folder: Path | None = None) -> Run:
    """The in-tool model, trained here, in a folder, unless there is one."""
    if checkpoint is None:
        folder = folder or Path(tempfile.mkdtemp(prefix="toolmem-generate-"))
        steps = 40 if quick else 1000
        sizes = ["--model.model.dim", "64", "--model.model.hidden_dim", "192"]
        trainer = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
        command = [sys.executable, "-m", "toolmem", "fit", "--config", str(RECIPE)]
        command += ["--runs", str(folder), "--name", "facts", *sizes, *trainer]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        checkpoint = f"{folder}/facts"
    return toolmem.load(checkpoint)


def facts(run: Run, quick: bool) -> dict[str, Any]:
    """The engine beside lockstep, with a quick tool and a slow one."""
    n = 64 if quick else 1000
    prompts = [run.prompt(question.question) for question in run.questions("known", n)]
    limit = 64 if quick else 160
    plain = run.toolbox
    assert plain is not None
    slow = Toolbox([Delayed(tool, TOOL_S) for tool in plain.tools])

    def engine(toolbox: Toolbox) -> list[list[int]]:
        with Engine(run.model, run.tokenizer, toolbox, max_lanes=LANES, max_calls=LANES) as each:
            return [one.tokens for one in each.generate(prompts, max_new_tokens=limit)]

    def lockstep(toolbox: Toolbox) -> list[list[int]]:
        found = []
        for start in range(0, n, LANES):
            part = prompts[start : start + LANES]
            found += generate_in_lockstep(run.model, run.tokenizer, part, toolbox, limit)
        return found

    equal = sum(a == b for a, b in zip(engine(plain), lockstep(plain), strict=True))
    sides: dict[str, Callable[[], Any]] = {
        "engine": lambda: engine(plain),
        "lockstep": lambda: lockstep(plain),
        "engine, 50 ms": lambda: engine(slow),
    }
    seconds = in_turn(sides, 1 if quick else 5)
    seconds["lockstep, 50 ms"] = [timed(lambda: lockstep(slow))[0]]
    slow.close()
    engine_50 = statistics.median(seconds["engine, 50 ms"])
    return {
        "speedup_over_synchronous_50ms": seconds["lockstep, 50 ms"][0] / engine_50,
        "speedup_over_synchronous_0ms": ratio(seconds, "lockstep", "engine"),
        "latency_hiding_ratio": ratio(seconds, "engine, 50 ms", "engine"),
        "details": {"seconds": seconds, "prompts": n, "dialogues_equal": equal},
    }


def lookup(run: Run, quick: bool) -> dict[str, Any]:
    """Prompt lookup, one dialogue at a time: as it is, and copying from the dialogue alone."""
    n = 8 if quick else 60
    prompts = [run.prompt(question.question) for question in run.questions("known", n)]
    limit = 64 if quick else 160
    drafters: dict[str, Callable[[], PromptLookup | None]] = {
        "plain": lambda: None,
        "lookup": PromptLookup,
        "own": lambda: PromptLookup(pool_tokens=0),
    }
    reports: dict[str, dict[str, Any]] = {}

    def alone(side: str) -> list[list[int]]:
        drafter = drafters[side]()
        with Engine(run.model, run.tokenizer, run.toolbox, max_lanes=1, drafter=drafter) as engine:
            found = [engine.generate([p], max_new_tokens=limit)[0].tokens for p in prompts]
            reports[side] = {**engine.acceptance(), "steps": engine.stats().steps}
            return found

    plain = alone("plain")
    equal = all(alone(side) == plain for side in drafters)
    sides = {side: functools.partial(alone, side) for side in drafters}
    seconds = in_turn(sides, 1 if quick else 7)
    found: dict[str, Any] = {"details": {"seconds": seconds, "equal": equal, "reports": reports}}
    for side, name in (("lookup", "prompt_lookup"), ("own", "prompt_lookup_own")):
        found[f"{name}_speedup"] = ratio(seconds, "plain", side)
        found[f"{name}_tokens_per_pass"] = reports[side]["tokens_per_pass"]
    return found


class NoRoles:
    """A tokenizer whose role tokens no model writes: dialogues end by their limits alone."""

    role_ids = {"user": -1, "assistant": -1, "database": -1, "end": -1}


def smollm(layers: int, vocab: int) -> tuple[Transformer, Any]:
    """Our model and transformers', of SmolLM2-135M's shape with the same random weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=576,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = Transformer(
        vocab,
        576,
        layers,
        9,
        3,
        hidden_dim=1536,
        max_seq_len=2048,
        rope_base=1e5,
        tie_embeddings=True,
    ).eval()
    state = theirs.state_dict()
    weights = {
        rule.ours: rule.whole([state[name] for name in rule.theirs])
        for rule in llama.rules(ours.init_args)
    }
    weights["head.weight"] = weights["embedding.weight"]
    ours.load_state_dict(weights)
    return ours, theirs


@torch.no_grad()
def decode(quick: bool) -> dict[str, Any]:
    """Decoding beside ``transformers.generate``."""
    ours, theirs = smollm(4 if quick else 30, 49152)
    draw = random.Random(0)
    short, new = [draw.randrange(49152) for _ in range(16)], 16 if quick else 64
    rows = 4 if quick else 16
    prompts = [
        [draw.randrange(49152) for _ in range(draw.randint(16, 64 if quick else 512))]
        for _ in range(rows)
    ]
    limits = [draw.randint(32, 256) // (8 if quick else 1) for _ in range(rows)]

    def engine_side(some: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        requests = [Request(p, max_new_tokens=m) for p, m in zip(some, most, strict=True)]
        return [one.tokens for one in engine.run(requests)]

    def their_side(some: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in some])
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
        out = theirs.generate(
            ids, attention_mask=real, max_new_tokens=max(most), do_sample=False, use_cache=True
        )
        trimmed = zip(out.tolist(), some, most, strict=True)
        return [row[width - len(p) : width + m] for row, p, m in trimmed]

    def first(side: Callable[..., Any], n: int) -> Callable[[], Any]:
        return lambda: side([short], [n])

    with Engine(
        ours,
        NoRoles(),
        max_lanes=rows,
        prefix_sharing=False,  # type: ignore[arg-type]
    ) as engine:
        equal = engine_side([short], [new]) == their_side([short], [new])
        rounds = 2 if quick else 7
        tensors = [p for name, p in ours.named_parameters() if name != "embedding.weight"]
        tensors = [p.data for p in tensors if p.ndim == 2] + [ours.embedding.weight.data]
        size = sum(t.numel() * t.element_size() for t in tensors)
        read = reader(tensors)
        # what one token costs: many tokens, less the prompt and the first one
        seconds = in_turn(
            {
                "engine, long": first(engine_side, new + 1),
                "engine, short": first(engine_side, 1),
                "transformers, long": first(their_side, new + 1),
                "transformers, short": first(their_side, 1),
                "read": read,
            },
            rounds,
        )
        batch = in_turn(
            {
                "engine": lambda: engine_side(prompts, limits),
                "transformers": lambda: their_side(prompts, limits),
            },
            1 if quick else 2,
        )
    each = {
        side: [
            (a - b) / new
            for a, b in zip(seconds[f"{side}, long"], seconds[f"{side}, short"], strict=True)
        ]
        for side in ("engine", "transformers")
    }
    reads, a_token = seconds["read"], statistics.median(each["engine"])
    shares = [a / b for a, b in zip(reads, each["engine"], strict=True)]
    return {
        "decode_speedup_over_transformers_b1": ratio(each, "transformers", "engine"),
        "decode_speedup_over_transformers_b16": ratio(batch, "transformers", "engine"),
        "bandwidth_share_b1": statistics.median(shares),
        "decode_tokens_per_s_b1": 1 / a_token,
        "decode_tokens_per_s_b16": sum(limits) / statistics.median(batch["engine"]),
        "details": {
            "seconds_a_token": each,
            "seconds_batch": batch,
            "gigabytes_per_s": size / statistics.median(reads) / 1e9,
            "equal": equal,
        },
    }


def pages(quick: bool) -> dict[str, Any]:
    """Shared prefixes, and a tree that does not fit."""
    torch.manual_seed(0)
    n, length, new = 64, 256 if quick else 1024, 16 if quick else 64
    model = Transformer(260, 64, 2, 2, max_seq_len=2048).eval()
    tokenizer = toolmem.data.ByteTokenizer()
    prompt = [random.Random(1).randrange(256) for _ in range(length)]
    with Engine(model, NoRoles(), max_lanes=n) as engine:  # type: ignore[arg-type]
        engine.generate([prompt] * n, max_new_tokens=new, sampler=Sampling(), use_tools=False)
        stats = engine.stats()
        token = engine.pager.bytes_each["page"] / engine.pager.page_size
    share = stats.bytes_peak / token / (length + n * new)

    def tree(**options: Any) -> tuple[list[list[int]], Any]:
        with Engine(model, tokenizer, prefix_sharing=False, **options) as engine:
            root = engine.root(prompt)
            level = [root]
            for turn in range(3 if quick else 4):
                asked = level if turn == 0 else [node.say("go on") for node in level]
                pairs = fork_all(
                    [node for node in asked for _ in range(4)],
                    seed=1000 * turn,
                    sampler=Sampling(),
                    max_new_tokens=16,
                )
                level = [child for _, child in pairs]
            return [node.tokens for node in root], engine.stats()

    roomy, whole = tree()
    tight, held = tree(memory_limit=whole.bytes_used // 10)
    return {
        "samples_kv_over_shared": share,
        "tree_equal_under_a_tenth": float(roomy == tight),
        "details": {
            "prompt_tokens_read": stats.tokens_prefilled,
            "tree_nodes": len(roomy),
            "tree_bytes": whole.bytes_used,
            "tree_bytes_peak_tight": held.bytes_peak,
            "tree_pieces_paged_out": held.pieces_paged_out,
        },
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures and their circumstances."""
    torch.set_num_threads(1)
    quick = options.quick
    wanted = options.only or ["facts", "lookup", "decode", "pages"]
    found: dict[str, dict[str, Any]] = {}
    if {"facts", "lookup"} & set(wanted):
        run = facts_run(options.checkpoint, quick)
        for name, part in (("facts", facts), ("lookup", lookup)):
            if name in wanted:
                found[name] = part(run, quick)
    for name, alone in (("decode", decode), ("pages", pages)):
        if name in wanted:
            found[name] = alone(quick)
    details = {name: part.pop("details") for name, part in found.items()}
    figures = {key: value for part in found.values() for key, value in part.items()}
    return {**figures, "details": details, "about": about(quick)}


def main() -> None:
    """Measure, print, and write."""
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", metavar="RUN", help="a trained in-tool run to ask")
    parser.add_argument(
        "--only", nargs="+", choices=["facts", "lookup", "decode", "pages"], help="these parts"
    )
    options = parser.parse_args()
    result = measure(options)
    machine = result["about"]
    table = Table(title=f"{machine['processor']}, 1 thread, torch {machine['torch']}")
    for column in ("figure", "value", "target"):
        table.add_column(column, no_wrap=True)
    for name, target in TARGETS.items():
        if name in result:
            table.add_row(name, f"{result[name]:.2f}", target)
    Console(width=110).print(table)
    write(result, options)


if __name__ == "__main__":
    main()
