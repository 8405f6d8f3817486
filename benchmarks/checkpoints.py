"""What a checkpoint costs: how long training waits for one, and how fast files are written and read.

    python benchmarks/checkpoints.py [--quick] [--json FILE]

Three questions, each answered by figures of this run, the sides taking turns:

- *share waited*: the time that training stands still for a save in the background
  (`checkpointing.background`), over that of the same save in the foreground. What stands still is all that
  the callback does at a save, and what it waits for before the next optimizer step. The first save, which
  makes the buffers, is given apart.
- *MB/s* of writing and reading our file, and of `torch.save` and `torch.load` of the same content, all synced
  to disk; ours have checksums, which reading verifies.
- *a tiny model's* save and load in milliseconds, beside torch's: sweeps save thousands of them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as pl
import torch
from command import about, arguments, write
from rich.console import Console
from rich.table import Table

from toolmem import checkpoints
from toolmem.data.batch import Batch
from toolmem.data.modules.base import StatefulDataModule
from toolmem.data.stream import IndexedBatches, make_loader
from toolmem.files import atomic_path
from toolmem.models import Transformer
from toolmem.training import TRAINER_DEFAULTS, WSD, AdamW, Checkpointing, LanguageModelModule

VOCAB = 260


class Rows(IndexedBatches):
    """Random tokens."""

    def __init__(self, rows: int, seq: int) -> None:
        super().__init__()
        self.shape = (rows, seq + 1)

    def batch_at(self, index: int) -> Batch:
        """Rows of random tokens."""
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCAB, self.shape, generator=generator)
        mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
        return Batch(
            tokens[:, :-1].contiguous(),
            tokens[:, 1:].contiguous(),
            mask,
            n_tokens=mask.numel(),
            state={"batch": index + 1},
        )


class Data(StatefulDataModule):
    """An endless stream of them."""

    def __init__(self, rows: int, seq: int) -> None:
        super().__init__()
        self.rows = Rows(rows, seq)

    def signature(self) -> dict[str, Any]:
        """It has no options."""
        return {}

    def train_dataloader(self) -> Any:
        """From the start."""
        return make_loader(self.rows)


class Timed(Checkpointing):
    """Notes how long training stands still for each save, in seconds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.waits: list[float] = []

    def _save(self, trainer: pl.Trainer, names: list[str]) -> None:
        began = time.perf_counter()
        super()._save(trainer, names)
        if names:
            self.waits.append(time.perf_counter() - began)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits until what was saved may be changed."""
        began = time.perf_counter()
        super().on_after_backward(trainer, pl_module)
        if self.waits:
            self.waits[-1] += time.perf_counter() - began


def model_of(dim: int, n_layers: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(VOCAB, dim=dim, n_layers=n_layers, n_heads=4, max_seq_len=256)


def waits(folder: Path, dim: int, n_layers: int, saves: int, background: bool) -> list[float]:
    """Seconds that training stands still for each save; the one at the end, which is waited for, left out."""
    keep = Timed(every_n_steps=6, monitor=None, background=background)
    module = LanguageModelModule(model_of(dim, n_layers), AdamW(), WSD(), fused=False)
    trainer = pl.Trainer(
        **TRAINER_DEFAULTS
        | {
            "max_steps": 6 * saves + 1,
            "default_root_dir": str(folder),
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [keep],
        }
    )
    trainer.fit(module, Data(4, 64))
    return keep.waits[:saves]


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def torch_save(checkpoint: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


def files(checkpoint: dict[str, Any], folder: Path, times: int) -> dict[str, float]:
    """Median seconds of each way to write and to read."""
    ours, theirs = folder / "ours.ckpt", folder / "theirs.pt"
    ways: dict[str, Callable[[], Any]] = {
        "save": lambda: checkpoints.write(checkpoint, ours, durable=False),
        "torch_save": lambda: torch_save(checkpoint, theirs),
        "load": lambda: checkpoints.read(ours),
        "torch_load": lambda: torch.load(theirs, weights_only=True),
        "check": lambda: checkpoints.check(ours),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(times):
        for name, way in ways.items():
            taken[name].append(seconds(way))
    return {name: statistics.median(found) for name, found in taken.items()}


def measure(quick: bool) -> dict[str, Any]:
    dim, n_layers, saves = (256, 4, 4) if quick else (512, 12, 8)
    result: dict[str, Any] = {"about": about(quick)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        foreground = waits(folder / "foreground", dim, n_layers, saves, background=False)
        background = waits(folder / "background", dim, n_layers, saves, background=True)
        last = folder / "background" / "checkpoints" / "last.ckpt"
        megabytes = last.stat().st_size / 1e6
        result["model"] = {
            "parameters": sum(p.numel() for p in model_of(dim, n_layers).parameters()),
            "checkpoint_mb": megabytes,
            "save_s": statistics.median(foreground),
            "waited_s": statistics.median(background[1:]),
            "first_waited_s": background[0],
        }
        result["share_waited"] = result["model"]["waited_s"] / result["model"]["save_s"]
        found = files(checkpoints.read(last), folder, 3 if quick else 7)
        result["mb_per_s"] = {name: megabytes / taken for name, taken in found.items()}
        waits(folder / "tiny", 32, 1, 1, background=False)
        tiny = checkpoints.read(folder / "tiny" / "checkpoints" / "last.ckpt")
        found = files(tiny, folder, 15 if quick else 60)
        result["tiny_ms"] = {name: 1e3 * taken for name, taken in found.items()}
        result["tiny_ms"]["parameters"] = sum(
            value.numel() for value in tiny["state_dict"].values()
        )
    return result


def show(result: dict[str, Any]) -> None:
    model, rates, tiny = result["model"], result["mb_per_s"], result["tiny_ms"]
    table = Table("figure", "ours", "torch.save, torch.load")
    table.add_row(
        f"training waits, of a save of {model['save_s']:.2f} s",
        f"{result['share_waited']:.1%} ({1e3 * model['waited_s']:.1f} ms)",
        "",
    )
    for name, other in (("save", "torch_save"), ("load", "torch_load"), ("check", None)):
        of_torch = f"{rates[other]:.0f} MB/s" if other else ""
        table.add_row(
            f"{name}, {model['checkpoint_mb']:.0f} MB", f"{rates[name]:.0f} MB/s", of_torch
        )
        of_torch = f"{tiny[other]:.1f} ms" if other else ""
        table.add_row(
            f"{name}, {tiny['parameters']:,} parameters", f"{tiny[name]:.1f} ms", of_torch
        )
    Console().print(table)


def main() -> None:
    options = arguments(__doc__, quick="a smaller model, fewer saves").parse_args()
    warnings.filterwarnings("ignore")
    result = measure(options.quick)
    show(result)
    write(result, options)


if __name__ == "__main__":
    main()
