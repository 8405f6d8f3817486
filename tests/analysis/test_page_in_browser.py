"""A sweep's page in headless Chromium: nothing is fetched, nothing goes wrong, and it fits a telephone."""

from __future__ import annotations

import base64

import pytest
from browser import Browser, find_chromium
from plot_toys import ACC, grid, write_folder

from toolmem.analysis.page import plot


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    written = grid(report=grid()["report"] | {"title": "Accuracy by width, two seeds"})
    write_folder(folder, written, lambda run: {ACC: run.settings["lr"] + 0.1 * run.seed})
    return plot(folder)[0].as_uri()


@pytest.fixture(scope="module")
def chromium():
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on the PATH: the report is not tried in a browser")
    with Browser(program) as browser:
        yield browser


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1200, 900)])
def test_it_opens(chromium, address, width, height):
    chromium.events.clear()
    mobile = width < 600
    chromium.send(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=1,
        mobile=mobile,
    )
    chromium.open(address)
    assert (
        chromium.run("document.querySelector('h1').textContent") == "Accuracy by width, two seeds"
    )
    pictures = "[...document.querySelectorAll('img')]"
    assert chromium.run(f"{pictures}.map(i => i.complete && i.naturalWidth > 100)") == [True]
    shown = chromium.run(f"{pictures}[0].getBoundingClientRect().width")
    assert 300 < shown <= width
    assert chromium.run("document.documentElement.scrollWidth") <= width
    assert chromium.run("window.innerWidth") == width
    fetched = [one for one in chromium.fetched() if not one.startswith("data:")]
    assert fetched == [address]
    assert chromium.problems() == []


def test_its_files_can_be_taken(chromium, address, tmp_path):
    """A click on each link writes the file."""
    chromium.open(address)
    links = chromium.run("[...document.querySelectorAll('a[download]')].map(a => a.download)")
    assert links == ["toy.svg", "toy.png", "toy.pdf", "toy.csv"]
    for kind, begins in (
        ("csv", b"kind,width,lr"),
        ("png", b"\x89PNG"),
        ("pdf", b"%PDF"),
        ("svg", b"<?xml"),
    ):
        uri = chromium.run(f"document.querySelector('a[download$=\".{kind}\"]').href")
        assert base64.b64decode(uri.partition("base64,")[2]).startswith(begins)
    chromium.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    chromium.run("document.querySelector('a[download$=\".csv\"]').click()")
    chromium.wait("new Promise(done => setTimeout(() => done(true), 500))")
    assert (tmp_path / "toy.csv").read_text().startswith("kind,width,lr")
    assert chromium.problems() == []
