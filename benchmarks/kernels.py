"""How near the kernels for decoding on a CPU come to reading the weights as fast as memory allows.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py [--quick] [--json FILE]

All products with a weight that SmolLM2-135M computes for one token a row, random weights, float32: by
``kernels.linear`` and by ``F.linear``, turn about, with a plain sum over the same weights (in C, four
streams at a time, the fastest of the ways tried) as the measure of what can be read. A share is the
sum's seconds over the product's: 1 where the products take no longer than reading the weights once. Medians
over the rounds, of seconds of this thread's processor time, so that on a busy
machine the others' turns are not counted.
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
from command import arguments, write
from rich.console import Console
from rich.table import Table
from torch import Tensor

from toolmem.models import kernels
from toolmem.models.kernels.build import library
from toolmem.training.folders import processor_name

LAYERS, DIM, HIDDEN, HEADS, KV_HEADS, VOCAB = 30, 576, 1536, 9, 3, 49152
ROWS = (1, 2, 4, 8, 16, 32)
TARGET = 0.7


def weights() -> list[Tensor]:
    """Every matrix that a token meets, in order."""
    head = DIM // HEADS
    layer = [
        ((HEADS + 2 * KV_HEADS) * head, DIM),
        (DIM, HEADS * head),
        (2 * HIDDEN, DIM),
        (DIM, HIDDEN),
    ]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in [*layer * LAYERS, (VOCAB, DIM)]]


def reader(tensors: list[Tensor]) -> Callable[[], None]:
    """A sum over all numbers, which takes as long as it takes to read them."""
    built = library()

    def with_kernel() -> None:
        assert built is not None
        for tensor in tensors:
            built.read_all(tensor.data_ptr(), tensor.numel())

    def with_torch() -> None:
        for tensor in tensors:
            tensor.sum()

    return with_torch if built is None else with_kernel


def seconds(run: Callable[[], None]) -> float:
    """Of processor time that a call takes."""
    began = time.thread_time()
    run()
    return time.thread_time() - began


@torch.inference_mode()
def measure(quick: bool) -> dict[str, Any]:
    """All figures as plain data; keys ``kernel_bandwidth_share_b1`` and, by rows, of both sides."""
    tensors = weights()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    rows = (1, 16) if quick else ROWS
    inputs = {m: {n: torch.randn(m, n) for n in (DIM, HIDDEN)} for m in rows}
    read = reader(tensors)
    reads: list[float] = []
    taken: dict[tuple[str, int], list[float]] = {}
    sides = {"kernel": kernels.linear, "torch": F.linear}
    for round_ in range(4 if quick else 16):
        now = [seconds(read)]
        for m in rows:
            for name, product in sides.items():

                def run(m: int = m, product: Any = product) -> None:
                    for weight in tensors:
                        product(inputs[m][weight.shape[1]], weight)

                spent = seconds(run)
                if round_:  # the first warms up
                    taken.setdefault((name, m), []).append(spent)
        now.append(seconds(read))
        if round_:
            reads += now
    reading = statistics.median(reads)
    by_rows = {}
    for m in rows:
        row: dict[str, float] = {}
        for name in sides:
            middle = statistics.median(taken[name, m])
            row |= {
                f"{name}_ms": 1e3 * middle,
                f"{name}_share": reading / middle,
                f"{name}_gflop_per_s": m * size / 2 / middle / 1e9,
            }
        ratios = [b / a for a, b in zip(taken["kernel", m], taken["torch", m], strict=True)]
        row |= {
            "speedup": statistics.median(ratios),
            "speedup_range": [min(ratios), max(ratios)],  # type: ignore[dict-item]
        }
        by_rows[str(m)] = row
    return {
        "kernel_bandwidth_share_b1": by_rows["1"]["kernel_share"],
        "read_gb_per_s": size / reading / 1e9,
        "read_gb_per_s_range": [size / max(reads) / 1e9, size / min(reads) / 1e9],
        "weight_bytes": size,
        "rows": by_rows,
        "circumstances": {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "kernels": kernels.available(),
        },
    }


def show(result: dict[str, Any]) -> None:
    """One row a number of rows."""
    about = result["circumstances"]
    title = (
        f"Products of SmolLM2-135M: {about['processor']}, {about['threads']} thread, float32, torch "
        f"{about['torch']}; reading {result['read_gb_per_s']:.1f} GB/s"
    )
    columns = ("rows", "kernel ms", "share", "GFLOP/s", "F.linear ms", "share", "GFLOP/s", "times")
    table = Table(*columns, title=title)
    for m, row in result["rows"].items():
        cells = [
            cell
            for name in ("kernel", "torch")
            for cell in (
                f"{row[f'{name}_ms']:.1f}",
                f"{row[f'{name}_share']:.2f}",
                f"{row[f'{name}_gflop_per_s']:.0f}",
            )
        ]
        table.add_row(m, *cells, f"{row['speedup']:.2f}")
    Console().print(table)
    share = result["kernel_bandwidth_share_b1"]
    good = "reached" if share >= TARGET else "missed"
    Console().print(f"kernel_bandwidth_share_b1 {share:.2f}, goal ≥ {TARGET}: {good}")


def main() -> None:
    """Measure, print, and write if asked to."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    result = measure(options.quick)
    show(result)
    write(result, options)


if __name__ == "__main__":
    main()
