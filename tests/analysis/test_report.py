"""The report is one page that needs nothing else, and shows text as text."""

from __future__ import annotations

import html.parser
import re

import pytest

from toolmem.analysis.report import png_uri, svg, write_report


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


@pytest.fixture
def page(tmp_path, figure):
    path = tmp_path / "deep" / "report.html"
    write_report(
        path,
        title="A < B & C",
        lead="One <script>alert(1)</script> paragraph.",
        table=(("model", "recall"), [("tiny <b>", "0.5"), ("small", "1.0")]),
        figures=[("A curve.", figure)],
        dialogues=[("tiny", [("user", "Who is <i>Ann</i>?"), ("assistant", "É.")], "right")],
        circumstances=[("seed", "0")],
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
    for text in ("0.5", "1.0", "A curve.", "É.", "right", "seed", "<table", "<svg"):
        assert text in page


def test_figures(figure):
    drawing = svg(figure)
    assert drawing.startswith("<svg")
    assert drawing.rstrip().endswith("</svg>")
    assert png_uri(figure).startswith("data:image/png;base64,iVBOR")
