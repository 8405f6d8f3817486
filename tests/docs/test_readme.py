"""The README's commands and code run, on a cut-down budget."""

from __future__ import annotations

import re

import pytest
from docs_blocks import ROOT, blocks, run_page

README = ROOT / "README.md"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_page(README, tmp_path) >= 3
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()


def test_it_shows_both_commands_and_the_api():
    code = "\n".join(block.code for block in blocks(README))
    for words in ("make demo", "make test", "toolmem.load(", "toolmem fit"):
        assert words in code


def test_every_command_is_in_the_table():
    from toolmem.cli import COMMANDS

    text = README.read_text(encoding="utf-8")
    named = " ".join(re.findall(r"^\| (`toolmem [^|]+) \|", text, re.MULTILINE))
    for command in COMMANDS:
        assert re.search(rf"`toolmem [^`]*\b{command}\b", named), command


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "recipes.md"])
def test_every_recipe_is_in_the_table(page):
    text = page.read_text(encoding="utf-8")
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"`{recipe.name}`" in text, recipe.name


def test_pictures_and_pages_that_it_points_to_exist():
    for target in re.findall(r"\]\(([^)#\s]+)", README.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_blocks_that_are_not_run_say_why():
    for block in blocks(README):
        assert block.language in ("bash", "python", "text"), block
