"""A recipe small enough to train in a second, and how to change it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

TINY: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "model": {
            "class_path": "toolmem.models.Transformer",
            "init_args": {"dim": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": 256},
        },
        "optimizer": {"class_path": "toolmem.training.AdamW", "init_args": {"lr": 1e-3}},
        "schedule": {"class_path": "toolmem.training.Linear", "init_args": {"warmup_steps": 2}},
    },
    "data": {
        "class_path": "toolmem.data.FactsDataModule",
        "init_args": {
            "people": 12,
            "setting": "in_weight",
            "batch_size": 8,
            "unseen_people": 4,
            "n_val_questions": 8,
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 6,
        "val_check_interval": 3,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
    },
    "recall": {"n_questions": 4, "n_unseen": 2, "show": False},
}


def changed(**changes: Any) -> dict[str, Any]:
    """The tiny config with some dotted keys (``data__init_args__people``) set to other values."""
    config = copy.deepcopy(TINY)
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return config


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path
