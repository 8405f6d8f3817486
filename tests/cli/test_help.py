"""Help is quick and shows an example, and options change only on purpose."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from toolmem.cli import COMMANDS

OPTIONS = Path(__file__).with_name("options.txt")
HEAVY = {
    "torch",
    "lightning",
    "transformers",
    "wandb",
    "matplotlib",
    "pyarrow",
    "duckdb",
    "jsonargparse",
}
# every command line that has a --help of its own
HELPS = [
    "demo", "fit", "validate", "test", "predict", "sweep", "generate", "serve", "evaluate",
    "evaluate --compare", "evaluate --watch", "inspect",
    "inspect init", "plan", "plot", "plot norms", "plot circuits", "plot DIR", "convert", "facts",
    "facts build", "facts show", "tool", "tool sql", "tool calculator", "tokenizer", "tokenizer train",
    "wandb", "wandb sync",
]  # fmt: skip


def imported(*command: str) -> set[str]:
    """The top-level packages that a fresh process imports."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True
    )
    rows = re.findall(r"^import time:.*\| +(\S+)$", result.stderr, re.MULTILINE)
    return {row.partition(".")[0] for row in rows}


@pytest.mark.parametrize(
    "command", [("-c", "import toolmem; toolmem.ToolmemError"), ("-m", "toolmem", "--help")]
)
def test_what_is_light_stays_light(command):
    packages = imported(*command)
    assert "toolmem" in packages
    assert not packages & HEAVY


def test_the_rooms_are_light_until_they_are_used():
    rooms = "toolmem.data, toolmem.tools, toolmem.models, toolmem.generation, toolmem.evaluation"
    rooms += ", toolmem.training, toolmem.analysis, toolmem.files, toolmem.console, toolmem.cli"
    assert not imported("-c", f"import {rooms}") & HEAVY


def help_of(toolmem, words: str) -> str:
    called = toolmem(*words.split(), "--help")
    assert called.code == 0
    return called.out


def test_the_first_page(toolmem):
    for words in ([], ["-h"], ["--help"], ["help"]):
        called = toolmem(*words)
        assert called.code == 0
        assert "examples:" in called.out
        for command in COMMANDS:
            assert re.search(rf"^  {command} ", called.out, re.MULTILINE)


def test_the_version(toolmem):
    import toolmem as package

    assert toolmem("--version").out == f"toolmem {package.__version__}\n"


def test_every_command_has_a_page():
    assert {words.split()[0] for words in HELPS} == set(COMMANDS)


def options(page: str, words: str) -> list[str]:
    """The options of a page; of Lightning's own keys only the groups."""
    found = set(re.findall(r"(?<![\w-])--[a-zA-Z_][\w.]*", page.partition("options:")[2]))
    found = {name.rstrip(".") for name in found}
    if words in ("fit", "validate", "test", "predict"):
        ours = ("--checkpointing.", "--recall.", "--norms.", "--flops.", "--model.")
        found = {name for name in found if "." not in name or name.startswith(ours)}
        found = {name for name in found if name.count(".") < 2}
    return sorted(found)


def test_each_page_and_the_list_of_options(toolmem):
    lines = []
    for words in HELPS:
        page = help_of(toolmem, words)
        assert "toolmem " + words.split()[0] in page
        assert re.search(r"^ *example|facts build --people", page, re.MULTILINE), words
        if words not in ("plot", "facts", "tool", "tokenizer"):
            lines += [words, *(f"  {option}" for option in options(page, words)), ""]
    current = "\n".join(lines)
    known = OPTIONS.read_text() if OPTIONS.exists() else ""
    new = OPTIONS.with_suffix(".new")
    if current != known:
        new.write_text(current)
    else:
        new.unlink(missing_ok=True)
    assert current == known, f"options changed: if on purpose, move {new.name} to {OPTIONS.name}"
