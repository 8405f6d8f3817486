"""The chat page, in headless Chromium."""

from __future__ import annotations

import asyncio
import re
import threading
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from browser import Browser, find_chromium
from serving_toys import (
    ANSWER,
    IN_TOOL,
    QUERY,
    QUESTION,
    TOKENIZER,
    babbler,
    calculator,
    reciter,
    serving,
    spell,
    wait_until,
)

from toolmem.serving import Limits
from toolmem.tools import Toolbox
from toolmem.tools.base import Answer

PAGE = files("toolmem.serving").joinpath("page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chromium():
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on the PATH: the chat page is not tried in a browser")
    with Browser(program) as browser:
        yield browser


@pytest.fixture
def browser(chromium):
    chromium.events.clear()
    yield chromium
    assert chromium.problems() == []
    chromium.open("about:blank")


class Waits:
    """A tool that answers when it is told to."""

    name = "oracle"
    cacheable = False

    def __init__(self) -> None:
        self.go = threading.Event()

    def accepts(self, query: str) -> bool:
        return True

    async def call(self, query: str) -> Answer:
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        return Answer("37", query != QUERY, 0.0)

    def close(self) -> None:
        self.go.set()


def turns(browser) -> list[list[str]]:
    """(role, text) of every turn that is shown."""
    return browser.run(
        "[...document.querySelectorAll('.turn')].map(t =>"
        " [t.classList.contains('query') ? 'query' : t.querySelector('b').textContent,"
        "  t.querySelector('p').textContent])"
    )


def ends(browser, number: int = 1) -> str:
    """Wait until so many answers are over: what stands below the last."""
    return browser.wait(
        "document.getElementById('stop').hidden && "
        f"document.querySelectorAll('.note')[{number - 1}]?.textContent"
    )


def test_roles_query_and_answer_as_they_stream(browser, engine):
    """The query is on the screen while the tool is still at work."""
    tool = Waits()
    toolbox = Toolbox([tool], timeout_s=60)
    with serving(engine(reciter(IN_TOOL), TOKENIZER, toolbox), toolbox=toolbox) as (
        address,
        service,
    ):
        browser.open(address)
        browser.wait("document.getElementById('model').textContent === 'toy · asks oracle'")
        browser.type("#question", QUESTION, enter=True)
        wait_until(lambda: service.engine.stats().lanes_calling == 1)
        browser.wait(f"document.body.innerText.includes({QUERY!r})")
        assert turns(browser) == [["user", QUESTION], ["assistant", QUERY]]
        tool.go.set()
        assert re.match(r"\d+ tokens written · [\d.]+ s$", ends(browser))
        assert turns(browser) == [
            ["user", QUESTION],
            ["query", QUERY],
            ["database", "37"],
            ["assistant", ANSWER],
        ]
        assert browser.fetched() and all(url.startswith(address) for url in browser.fetched())
    toolbox.close()


def test_what_was_said_before(browser, engine):
    """With the box ticked the model reads the whole dialogue, tool call and all, as it was."""
    again = "Sure?"
    toolbox = calculator()
    whole = [*IN_TOOL, *spell("<user>", again, "<assistant>", "Yes.", "<end>")]
    with serving(engine(reciter(whole), TOKENIZER, toolbox), toolbox=toolbox) as (address, _):
        browser.open(address)
        browser.click("#together")
        browser.type("#question", QUESTION)
        browser.click("#send")
        ends(browser)
        browser.type("#question", again, enter=True)
        ends(browser, 2)
        assert turns(browser)[-2:] == [["user", again], ["assistant", "Yes."]]
    toolbox.close()


def test_text_stays_text(browser, engine):
    evil = "<img src=x onerror=alert(1)><b>"
    dialogue = spell("<user>", evil, "<assistant>", evil, "<end>")
    with serving(engine(reciter(dialogue), TOKENIZER)) as (address, _):
        browser.open(address)
        browser.type("#question", evil, enter=True)
        ends(browser)
        assert turns(browser) == [["user", evil], ["assistant", evil]]
        assert browser.run("document.querySelectorAll('main img, main p b').length") == 0


def test_the_key_is_asked_for(browser, engine):
    with serving(engine(reciter(IN_TOOL), TOKENIZER), api_key="secret") as (address, _):
        browser.open(address)
        browser.wait("!document.getElementById('key-row').hidden")
        browser.type("#question", QUESTION, enter=True)
        assert "API key" in ends(browser)
        browser.type("#key", "secret", enter=True)
        browser.wait("document.getElementById('model').textContent.startsWith('toy')")
        assert browser.run("document.getElementById('key-row').hidden")
        browser.type("#question", QUESTION, enter=True)
        ends(browser, 2)
        assert turns(browser)[-1] == ["assistant", QUERY]
        unauthorised = [text for text in browser.problems() if "401" in text]
        assert len(unauthorised) == len(browser.problems()) == 2
        browser.events.clear()


@pytest.mark.parametrize("leave", ["stop", "close"])
def test_stopping_gives_the_lane_back(browser, engine, leave):
    one = engine(babbler(max_seq_len=20000), TOKENIZER)
    with serving(one, limits=Limits(max_tokens=19000)) as (address, _):
        browser.open(address)
        browser.type("#question", QUESTION, enter=True)
        browser.wait("document.querySelectorAll('.turn').length > 1")
        if leave == "stop":
            browser.click("#stop")
            assert ends(browser) == "stopped"
        else:
            browser.open("about:blank")
        wait_until(lambda: one.stats().lanes_running == 0)
        assert one.stats().requests_cancelled == 1


def test_an_error_is_shown(browser, engine):
    with serving(engine(reciter(IN_TOOL), TOKENIZER)) as (address, _):
        browser.open(address)
        browser.type("#question", "x" * 400, enter=True)
        assert "max_seq_len" in ends(browser)
        assert browser.run("document.querySelector('.note').classList.contains('failed')")
        browser.events.clear()  # the browser logs the 400 itself


def test_it_is_one_file():
    """Nothing of the page is fetched: no script, style, font or picture from elsewhere."""

    class Links(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag, attributes):
            self.found += [value for key, value in attributes if key in ("src", "href", "action")]

    links = Links()
    links.feed(PAGE)
    assert links.found == ["data:,"]
    assert not re.search(r"https?:|@import|url\(", PAGE)
