"""Every block of code in docs/ runs."""

from __future__ import annotations

import sys

import pytest
from docs_blocks import ROOT, Block, blocks, cut_down, run_page

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
AFTER_SHELL = {"quickstart.md", "index.md"}  # their Python needs what their commands made


def languages(page) -> set[str]:
    return {block.language for block in blocks(page) if not block.reason and not block.title}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, whose modules can be imported and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


WITH_PYTHON = [p for p in PAGES if "python" in languages(p) and p.name not in AFTER_SHELL]
WITH_SHELL = [p for p in PAGES if "bash" in languages(p)]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, folder):
    assert run_page(page, folder, ("python",))


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_SHELL, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, folder):
    only = ("python", "bash") if page.name in AFTER_SHELL else ("bash",)
    assert run_page(page, folder, only)


def test_the_guides_have_code():
    names = {page.name for page in WITH_PYTHON}
    assert {"add-a-model.md", "add-a-tool.md", "add-a-task.md", "facts-and-templates.md"} <= names


def test_every_fence_is_understood():
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        assert text.count("\n```") + text.startswith("```") == 2 * len(blocks(page)), page


def test_blocks_are_found_with_their_title_and_their_mark(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        'a\n\n```python title="x.py"\nx = 1\n```\n\n<!-- not run: too long -->\n```bash\nls\n```\n'
    )
    assert blocks(page) == [
        Block(page, 3, "python", "x.py", "x = 1\n", ""),
        Block(page, 8, "bash", "", "ls\n", "too long"),
    ]


def test_a_failing_block_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("\n```python\nassert False\n```\n")
    with pytest.raises(AssertionError, match=r"page.md, line 2"):
        run_page(page, tmp_path)
    page.write_text("\n```bash\nfalse\n```\n")
    with pytest.raises(AssertionError, match=r"page.md, line 2"):
        run_page(page, tmp_path)


def test_commands_are_cut_down():
    assert cut_down("make demo\nmake test") == "toolmem demo --steps 5 --questions 8"
    short = cut_down("toolmem fit --config a.yaml \\\n  --name b  # minutes")
    assert "--trainer.max_steps 4" in short
    assert short.index("--trainer") < short.index("# minutes")
    assert cut_down("toolmem facts show x") == "toolmem facts show x"
