"""Pages and pictures that are written from the code are what the code says today."""

from __future__ import annotations

import importlib
import os
import re
import sys

import pytest
import yaml
from docs_blocks import FENCE, ROOT

DOCS = ROOT / "docs"
ADVICE = "run `python docs/{0}.py` and look at what changed"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    yield importlib.import_module
    for name in ("make_reference", "make_figures"):
        sys.modules.pop(name, None)


def test_the_command_line_page_is_current(script):
    page = script("make_reference").page()
    written = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert page == written, ADVICE.format("make_reference")


@pytest.mark.parametrize(
    "name", ["dialogue_in_weight", "dialogue_in_tool", "masks", "synthetic_tasks"]
)
def test_the_pictures_are_current(script, name):
    figures = script("make_figures")
    draw = {"masks": figures.draw_masks, "synthetic_tasks": figures.draw_tasks}.get(name)
    picture = draw() if draw else figures.draw(name.removeprefix("dialogue_"))
    written = (DOCS / "assets" / f"{name}.svg").read_text(encoding="utf-8")
    assert picture == written, ADVICE.format("make_figures")


def test_the_pictures_show_loss_where_training_has_it(script):
    from toolmem.data import FactsDataModule

    for setting in ("in_weight", "in_tool"):
        data = FactsDataModule(people=1, setting=setting, attributes=["birth_date"], batch_size=1)
        data.setup()
        batch = data._generator(data.table, None, training=False).batch_at(0)
        cells = script("make_figures").cells(setting)
        assert [loss for _, _, loss, _ in cells[1:]] == batch.loss_mask[0].tolist()
        assert not cells[0][2]


def test_every_command_has_a_section(script):
    from toolmem.cli import COMMANDS

    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    headings = " ".join(re.findall(r"^##+ (.*)$", text, re.MULTILINE))
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", headings), command


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(yaml.safe_load(text)["nav"])))
    assert pages == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def test_every_dependency_has_its_reason():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Dependencies")[2]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", text, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(set(wanted))
    assert all(len(reason) > 10 for _, reason in rows)


def test_every_recipe_is_in_the_tables():
    for page in (ROOT / "README.md", DOCS / "recipes.md"):
        text = page.read_text(encoding="utf-8")
        for recipe in (ROOT / "recipes").glob("*.yaml"):
            assert recipe.name in text, f"{page.name} does not name {recipe.name}"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    assert "WARNING " not in done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img)[^>]+src="(https?:[^"]+)"', text)
        fetched += re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="(https?:[^"]+)"', text)
        assert not fetched, f"{page.name} fetches {fetched}"
