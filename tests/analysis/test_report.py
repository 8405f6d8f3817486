"""The report is one page that needs nothing else, and shows text as text."""

from __future__ import annotations

import base64
import html.parser
import re

import pytest

from toolmem.analysis.pictures import picture_bytes
from toolmem.analysis.report import Panel, data_uri, write_files, write_report


class Reader(html.parser.HTMLParser):
    """Collects every address that a browser would fetch, and tags that are left open."""

    VOID = {"meta", "br", "hr", "img", "link", "input", "path", "use"}

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "poster", "action"):
                self.addresses.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def figure():
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(3, 2))
    drawing.subplots().plot([0, 1], [1, 0], label="<curve>")
    return drawing


def panel_of(figure):
    return Panel(
        "curve",
        "A curve.",
        figure,
        (("model", "recall"), [("tiny <b>", "0.5"), ("small", "1.0")]),
        (("model", "recall"), [("tiny, <b>", 0.5), ("small", None)]),
        heading="Curves",
        text="It falls.",
        made="By 1 run.",
    )


@pytest.fixture
def page(tmp_path, figure):
    path = tmp_path / "deep" / "report.html"
    write_report(
        path,
        title="A < B & C",
        lead="One <script>alert(1)</script> paragraph.",
        panels=[panel_of(figure)],
        dialogues=[("tiny", [("user", "Who is <i>Ann</i>?"), ("assistant", "É.")], "right")],
        circumstances=[("seed", "0")],
        recipe="model: <none>",
    )
    assert list(path.parent.iterdir()) == [path]
    return path.read_text(encoding="utf-8")


def test_it_needs_nothing_else(page):
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert all(address.startswith(("#", "data:")) for address in reader.addresses)
    assert not {"script", "iframe", "object"} & set(reader.tags)
    assert not re.search(r"url\((?!['\"]?#)|@import", page)


def test_it_shows_what_it_was_given_as_text(page):
    assert "A &lt; B &amp; C" in page
    assert "<script>" not in page
    assert "tiny &lt;b&gt;" in page
    assert "Who is &lt;i&gt;Ann&lt;/i&gt;?" in page
    assert "model: &lt;none&gt;" in page
    for text in (
        "0.5",
        "1.0",
        "A curve.",
        "É.",
        "right",
        "seed",
        "<table",
        "Curves",
        "It falls.",
        "By 1 run.",
    ):
        assert text in page


def test_every_file_can_be_taken_from_the_page(page, figure):
    links = dict(re.findall(r'<a download="curve\.(\w+)" href="data:([^"]+)"', page))
    assert list(links) == ["svg", "png", "pdf", "csv"]
    content = {kind: base64.b64decode(uri.partition("base64,")[2]) for kind, uri in links.items()}
    assert content["csv"] == b'model,recall\n"tiny, <b>",0.5\nsmall,\n'
    assert content["png"].startswith(b"\x89PNG")
    assert content["pdf"].startswith(b"%PDF")
    assert b"<svg" in content["svg"]
    assert f'src="{data_uri(content["svg"], "svg")}"' in page


def test_the_files_beside(figure, tmp_path):
    written = write_files([panel_of(figure)], tmp_path / "new", ("csv", "pdf", "svg"))
    assert [path.name for path in written] == ["curve.csv", "curve.pdf", "curve.svg"]
    assert written[0].read_text() == panel_of(figure).csv()
    table = Panel("table", "Words alone.", table=(["a"], [["1"]]))
    assert [path.name for path in write_files([table], tmp_path, ("csv", "png"))] == ["table.csv"]


@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_a_figure_is_the_same_file_whenever_it_is_drawn(kind, figure):
    first = picture_bytes(figure, kind)
    assert picture_bytes(figure, kind) == first
    if kind == "pdf":  # letters stay letters: TrueType fonts, not outlines of type 3
        assert b"/Type3" not in first
        assert b"/FontFile2" in first
