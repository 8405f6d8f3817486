"""One tiny trained run of each setting for the whole session, and a way to call the command line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from toolmem.cli import main

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


class Called(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def toolmem(capsys) -> Callable[..., Called]:
    """Call the command line in this process."""

    def call(*words: object) -> Called:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Called(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder with the tiny runs ``in_weight`` and ``in_tool``; look, but do not touch."""
    folder = tmp_path_factory.mktemp("runs")
    for setting in ("in_weight", "in_tool"):
        config = changed(data__init_args__setting=setting)
        recipe = write_config(folder / f"{setting}.yaml", config)
        words = ["fit", "--config", str(recipe), "--runs", str(folder), "--name", setting]
        assert main(words) == 0
    return folder
