"""The tools that a model in training asks."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from toolmem.data.factbase import Factbase
from toolmem.errors import ToolmemError
from toolmem.tools import Toolbox, open_toolbox

FACTBASE = "facts.duckdb"


def open_run_tools(trainer: pl.Trainer) -> Toolbox | None:
    """Open the tools of a run's data, its facts written to the run's folder first if they are not there.

    Every rank must call it. Close it after use.

    Args:
        trainer: whose datamodule has ``checkpoint_info`` and ``write_factbase``.

    Returns:
        None when the data's setting is not ``in_tool``.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    info = datamodule.checkpoint_info()
    if info.get("setting") != "in_tool":
        return None
    path = write_run_facts(trainer)
    trainer.strategy.barrier("factbase written")
    return open_toolbox(info.get("tools"), path)


def write_run_facts(trainer: pl.Trainer) -> Path:
    """Where the facts of a run's data are: in its folder, written there by the first rank if need be."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    path = Path(trainer.default_root_dir) / FACTBASE
    fingerprint = datamodule.checkpoint_info()["factbase"]["fingerprint"]
    if trainer.is_global_zero and not _holds(path, fingerprint):
        datamodule.write_factbase(path)
    return path


def _holds(path: Path, fingerprint: str) -> bool:
    """Is this a factbase of these facts?"""
    if not path.is_file():
        return False
    try:
        with Factbase.open(path) as factbase:
            return factbase.fingerprint == fingerprint
    except ToolmemError:
        return False
