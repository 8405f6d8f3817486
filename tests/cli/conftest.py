"""One tiny trained run of each setting for the whole session, and a way to call the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from toolmem.cli import main

sys.path.insert(0, str(Path(__file__).parent))


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
    from cli_toys import changed, write_config

    folder = tmp_path_factory.mktemp("runs")
    for setting in ("in_weight", "in_tool"):
        config = changed(data__init_args__setting=setting)
        recipe = write_config(folder / f"{setting}.yaml", config)
        words = ["fit", "--config", str(recipe), "--runs", str(folder), "--name", setting]
        assert main(words) == 0
    return folder
