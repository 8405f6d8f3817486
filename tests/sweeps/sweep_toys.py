"""A sweep whose runs take a second, and rows of results made up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

BASE: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "model": {
            "class_path": "toolmem.models.Transformer",
            "init_args": {"dim": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": 16},
        },
        "optimizer": {"class_path": "toolmem.training.AdamW", "init_args": {"lr": 1e-3}},
        "schedule": {"class_path": "toolmem.training.Constant"},
    },
    "data": {
        "class_path": "toolmem.data.RecallDataModule",
        "init_args": {
            "vocab_size": 32, "seq_len": 16, "n_pairs": 2, "batch_size": 4, "val_batches": 1,
        },
    },
    "trainer": {
        "accelerator": "cpu", "devices": 1, "max_steps": 4, "val_check_interval": 2,
        "log_every_n_steps": 1,
    },
    "checkpointing": {"every_n_steps": 2, "monitor": None},
}  # fmt: skip

SWEEP: dict[str, Any] = {
    "base": BASE,
    "axes": {
        "width": {"key": "model.model.dim", "values": [4, 8]},
        "lr": {"key": "model.optimizer.lr", "values": [1e-3, 1e-2]},
    },
    "metrics": ["val/loss"],
    "report": {"metric": "val/loss", "x": "width", "mode": "min", "best_over": ["lr"]},
}


def sweep_with(**changes: Any) -> dict[str, Any]:
    """The toy sweep with some of its keys changed; None leaves a key out."""
    written = copy.deepcopy(SWEEP) | changes
    return {key: value for key, value in written.items() if value is not None}


def write_sweep(path: Path, written: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    return path


def row(name: str, settings: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A row of results as a worker hands it over."""
    return {
        "name": name, "status": "done", "error": None, "seed": 0, "settings": settings,
        "recipe": {}, **settings, "params_total": 100, "tokens": 1000, "flops": 1e6,
        "seconds": 1.0, "threads": 1, **values,
    }  # fmt: skip
