"""Corpora under load: how soon many shards are listed, and what the loader's memory does over many tokens.

    python benchmarks/data_load.py [--quick] [--json FILE]

- *listed*: seconds until a run over 10,000 shards could begin, the size and a digest of head and tail of each
  taken; of JSONL and of Parquet, whose footers are read too. The files are in the page cache.
- *memory*: the loader's resident memory over 10⁷ tokens (10⁶ with --quick) after a warm-up of a fifth of
  that; what it grew by, and what a line through all its samples would make of that over 10⁹ tokens. Documents
  are spread over 64 shards, and groups of 1 MB are shuffled, so that epochs and groups come and go.
- *rate*: tokens a second that it yields alone meanwhile, byte tokens, batches of 32 rows of 512.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from command import about, arguments, write
from rich.console import Console
from rich.table import Table

SHARDS = 10_000
TARGETS = {
    "jsonl_listed_s_10000": "≤ 2",
    "parquet_listed_s_10000": "≤ 2",
    "memory_growth_mb_per_1e9_tokens": "≤ 100",
}


def make_shards(folder: Path, n: int, kind: str) -> None:
    """So many files of one short document."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for i in range(n):
        sub = folder / f"{i // 1000:03}"
        sub.mkdir(parents=True, exist_ok=True)
        path = sub / f"{i:05}.{kind}"
        if kind == "jsonl":
            path.write_text(json.dumps({"text": f"document {i}"}) + "\n")
        else:
            pq.write_table(pa.table({"text": [f"document {i}"]}), path)


def listing(n: int, kind: str, repeats: int) -> list[float]:
    """Seconds to list so many shards, warm."""
    from toolmem.data.text.documents import Documents

    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), n, kind)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            documents = Documents(folder)
            assert len(documents.shards) == n
            seconds.append(time.perf_counter() - start)
    return seconds


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory(n_tokens: int) -> dict[str, Any]:
    """Tokens drawn against resident memory."""
    from toolmem.data.text.documents import Documents
    from toolmem.data.text.tokens import TokenGenerator
    from toolmem.data.tokenizers import ByteTokenizer

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(64):
            with open(Path(folder) / f"{shard:02}.jsonl", "w") as stream:
                for length in rng.lognormal(6, 1, 120).astype(int) + 1:
                    text = "".join(map(chr, rng.integers(97, 123, min(int(length), 20_000))))
                    stream.write(json.dumps({"text": text}) + "\n")
        documents = Documents(folder, shuffle_bytes=1 << 20)
        batches = iter(TokenGenerator(documents, ByteTokenizer(), 512, 32))
        seen, samples, start, warm = 0, [], time.perf_counter(), 0
        while seen < n_tokens:
            batch = next(batches)
            seen += batch.n_tokens
            if seen >= n_tokens // 5:
                warm = warm or seen
                if len(samples) < (seen - warm) * 100 // n_tokens:
                    gc.collect()
                    samples.append((seen, resident_bytes()))
        seconds = time.perf_counter() - start
        epochs = batch.state["place"]["document"]["epoch"]
    tokens, resident = np.array(samples, float).T
    slope = float(np.polyfit(tokens, resident, 1)[0])
    return {
        "tokens": seen,
        "epochs": epochs,
        "tokens_per_s": seen / seconds,
        "growth_mb": (resident[-1] - resident[0]) / 1e6,
        "growth_mb_per_1e9_tokens": slope * 1e9 / 1e6,
        "resident_mb": [round(value / 1e6, 2) for value in resident.tolist()],
    }


def measure(quick: bool) -> dict[str, Any]:
    """All figures and their circumstances."""
    n = 1000 if quick else SHARDS
    listed = {kind: listing(n, kind, 3 if quick else 5) for kind in ("jsonl", "parquet")}
    loader = memory(10**6 if quick else 10**7)
    return {
        **{f"{kind}_listed_s_{n}": float(np.median(listed[kind])) for kind in listed},
        "memory_growth_mb_per_1e9_tokens": loader["growth_mb_per_1e9_tokens"],
        "details": {"listed": listed, "loader": loader},
        "about": about(quick),
    }


def show(result: dict[str, Any]) -> None:
    """The figures as a table."""
    table = Table("figure", "value", "target", title=f"{result['about']['processor']}, 1 thread")
    for name, value in result.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:,.3g}", TARGETS.get(name, ""))
    loader = result["details"]["loader"]
    table.add_row("tokens drawn", f"{loader['tokens']:,}", "")
    table.add_row("memory grew by, MB", f"{loader['growth_mb']:.2f}", "")
    table.add_row("tokens per second", f"{loader['tokens_per_s']:,.0f}", "")
    Console().print(table)


def main() -> None:
    """Measure, show, and write."""
    options = arguments(__doc__).parse_args()
    result = measure(options.quick)
    show(result)
    write(result, options)


if __name__ == "__main__":
    main()
