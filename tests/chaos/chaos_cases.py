"""The runs that are killed: tiny models, with all that has a state (dropout, schedules, workers, ranks)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def base(steps: int) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "model": {
            "model": {
                "class_path": "toolmem.models.Transformer",
                "init_args": {
                    "dim": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 256, "dropout": 0.1,
                },
            },
            "optimizer": {"class_path": "toolmem.training.Muon", "init_args": {"lr": 1e-2}},
            "schedule": {"class_path": "toolmem.training.WSD", "init_args": {"warmup_steps": 20}},
        },
        "trainer": {
            "accelerator": "cpu", "max_steps": steps, "val_check_interval": 40, "log_every_n_steps": 10,
            "gradient_clip_val": 1.0, "enable_progress_bar": False,
        },
        # No multiple of the validations' interval: checkpoints come at, and between, validations.
        "checkpointing": {"every_n_steps": 25, "keep_every_n_steps": 500},
        "recall": {"every_n_steps": 0},
    }  # fmt: skip


def facts() -> dict[str, Any]:
    return {
        "class_path": "toolmem.data.FactsDataModule",
        "init_args": {
            "people": 200, "setting": "in_tool", "batch_size": 8, "unseen_people": 20,
            "n_val_questions": 32,
        },
    }  # fmt: skip


def facts_in_tool(folder: Path, steps: int) -> dict[str, Any]:
    return base(steps) | {"data": facts()}


def text_workers(folder: Path, steps: int) -> dict[str, Any]:
    """Documents in shards, read by two DataLoader workers."""
    shards = folder / "text"
    if not shards.exists():
        shards.mkdir()
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(500)]
        for shard in range(4):
            lines = [
                json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(5, 60)))})
                for _ in range(400)
            ]
            (shards / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    data = {
        "class_path": "toolmem.data.TextDataModule",
        "init_args": {
            "path": str(shards), "seq_len": 64, "batch_size": 8, "num_workers": 2, "val_batches": 4,
        },
    }  # fmt: skip
    return base(steps) | {"data": data}


def ddp(folder: Path, steps: int) -> dict[str, Any]:
    """Two processes over gloo, started by Lightning's launcher."""
    config = base(steps) | {"data": facts()}
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    return config


def online_evaluation(folder: Path, steps: int) -> dict[str, Any]:
    """Questions while training goes on, which take most of the time."""
    config = base(steps) | {"data": facts()}
    config["recall"] = {"every_n_steps": 30, "n_questions": 48, "n_unseen": 16, "batch_size": 8}
    config["recall"] |= {"show": False}
    return config


CASES = {case.__name__: case for case in (facts_in_tool, text_workers, ddp, online_evaluation)}
