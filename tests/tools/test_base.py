"""The toolbox finds query and tool, and nothing that a tool does reaches the one who asks."""

import asyncio
import threading
import time

import pytest

from toolmem.tools import Answer, Calculator, SqlTool, Tool, Toolbox, extract_query, in_thread
from toolmem.tools.base import cut, plain_line


class Echo:
    """Answers in capitals after a while; ``behave`` says what else it does."""

    name = "echo"

    def __init__(self, word="ECHO", delay=0.0, behave=None):
        self.word, self.delay, self.behave = word, delay, behave
        self.closed = 0
        self.loops = set()

    def accepts(self, query):
        return query.startswith(self.word)

    async def call(self, query):
        self.loops.add(id(asyncio.get_running_loop()))
        await asyncio.sleep(self.delay)
        if self.behave is not None:
            return self.behave()
        return Answer(query.upper(), False, self.delay)

    def close(self):
        self.closed += 1


def raises(error):
    def behave():
        raise error

    return behave


@pytest.mark.parametrize(
    ("turn", "query"),
    [
        ("FIND a FOR b", "FIND a FOR b"),
        ("  FIND a FOR b \n", "FIND a FOR b"),
        ("I look it up.\n```\nFIND a FOR b\n```", "FIND a FOR b"),
        ("I look it up.\n```sql\nSELECT 1\nFROM people\n```\nThen.", "SELECT 1\nFROM people"),
        ("```FIND a FOR b```", "FIND a FOR b"),
        ("```one``` and ```two```", "two"),
        ("```\r\nFIND a FOR b\r\n```", "FIND a FOR b"),
        ("```sql SELECT 1```", "sql SELECT 1"),
        ("``` unclosed FIND a", "``` unclosed FIND a"),
        ("", ""),
        ("``````", ""),
    ],
)
def test_extract_query(turn, query):
    assert extract_query(turn) == query


def test_plain_line_and_cut():
    assert plain_line(" a\x00\x01b\r\nc\u2028d\ud800 ") == "a b c d"
    assert cut("aé", 2) == "a"
    assert cut("aé", 3) == "aé"
    assert cut("日本", 5) == "日"


def test_protocol():
    assert isinstance(Calculator(), Tool)
    assert isinstance(Echo(), Tool)
    assert not isinstance(object(), Tool)


@pytest.fixture
def toolbox(factbase):
    with Toolbox([SqlTool(factbase), Calculator(), Echo()], timeout_s=1.0) as toolbox:
        yield toolbox


def test_routes_by_the_querys_words(toolbox):
    turns = [
        "ECHO hello",
        "Let me see.\n```\nFIND birth_date FOR Ann Smith\n```",
        "CALCULATE 1987 - 1950",
        "SELECT count(*) FROM people WHERE name < 'B'",
        "What?",
        "FIND birth_place FOR Cé Zoë",
    ]
    texts = ["ECHO HELLO", "12 March 1987", "37", "1", None, "Chile"]
    many = toolbox.call_many(turns)
    one = [asyncio.run(toolbox.call(turn)) for turn in turns]
    for answers in (many, one):
        for answer, text in zip(answers, texts, strict=True):
            assert answer.error == (text is None)
            assert text is None or answer.text == text
    assert many[4].text == "error: no tool understands this query (tools: sql, calculator, echo)"
    assert toolbox.call_many([]) == []


def test_slow_tools_answer_concurrently():
    tool = Echo(delay=0.2)
    with Toolbox([tool]) as toolbox:
        start = time.perf_counter()
        answers = toolbox.call_many([f"ECHO {i}" for i in range(50)])
        assert time.perf_counter() - start < 2.0  # one after the other: 10 s
        assert [answer.text for answer in answers] == [f"ECHO {i}" for i in range(50)]
        toolbox.call_many(["ECHO"])
    assert len(tool.loops) == 1, "a tool lives on one loop, whatever the number of calls"
    assert tool.closed == 1


def test_callable_within_a_running_loop():
    async def work(toolbox):
        return toolbox.call_many(["ECHO a", "ECHO b"]), await toolbox.call("ECHO c")

    with Toolbox([Echo()]) as toolbox:
        many, one = asyncio.run(work(toolbox))
    assert [answer.text for answer in (*many, one)] == ["ECHO A", "ECHO B", "ECHO C"]


@pytest.mark.parametrize(
    ("behave", "words"),
    [
        (raises(ValueError("/secret/path")), "echo failed (ValueError)"),
        (raises(RecursionError()), "echo failed"),
        (raises(SystemExit(3)), "echo failed"),
        (raises(KeyboardInterrupt()), "echo failed"),
        (raises(TimeoutError()), "did not answer"),
        (raises(asyncio.CancelledError()), "echo failed (CancelledError)"),
        (lambda: None, "echo failed"),
        (lambda: "text", "echo failed"),
        (lambda: Answer("x" * 513, False, 0.0), "answer too long (513 bytes, at most 512)"),
    ],
)
def test_a_failing_tool_gives_an_error_answer(behave, words):
    with Toolbox([Echo(behave=behave), Calculator()], timeout_s=0.5) as toolbox:
        answers = [*toolbox.call_many(["ECHO"]), asyncio.run(toolbox.call("ECHO"))]
        for answer in answers:
            assert answer.error and words in answer.text
            assert "secret" not in answer.text
        assert toolbox.call_many(["CALCULATE 1 + 1"])[0].text == "2"


@pytest.mark.parametrize(
    "text", ["a\nb\x00c", "a\r\nb c", "a\u2028b\x1bc"]
)  # a tool's control characters never reach the dialogue
def test_answers_are_one_plain_line(text):
    with Toolbox([Echo(behave=lambda: Answer(text, False, 0.0))]) as toolbox:
        assert toolbox.call_many(["ECHO"])[0].text == "a b c"


def test_a_long_error_is_cut():
    tool = Echo(behave=lambda: Answer("error: " + "é" * 500, True, 0.0))
    with Toolbox([tool], max_answer_bytes=64) as toolbox:
        [answer] = toolbox.call_many(["ECHO"])
    assert answer.error and len(answer.text.encode()) == 63


def test_a_hanging_tool_times_out_and_the_next_call_works():
    with Toolbox([Echo(delay=60), Echo("QUICK")], timeout_s=0.2) as toolbox:
        start = time.perf_counter()
        answers = toolbox.call_many(["ECHO", "QUICK a", "ECHO"])
        assert time.perf_counter() - start < 2.0
        assert [answer.error for answer in answers] == [True, False, True]
        assert "did not answer within 0.2 seconds" in answers[0].text
        assert asyncio.run(toolbox.call("ECHO")).error
        assert toolbox.call_many(["QUICK b"])[0].text == "QUICK B"


def test_a_tool_that_blocks_its_loop_is_left_behind():
    release = threading.Event()
    blocking = Echo(behave=lambda: release.wait(60))
    try:
        with Toolbox([blocking, Echo("QUICK")], timeout_s=0.2) as toolbox:
            start = time.perf_counter()
            [answer] = toolbox.call_many(["ECHO"])
            assert answer.error and "did not answer" in answer.text
            assert toolbox.call_many(["QUICK b"])[0].text == "QUICK B"
            assert asyncio.run(toolbox.call("ECHO")).error
            assert asyncio.run(toolbox.call("QUICK c")).text == "QUICK C"
            assert time.perf_counter() - start < 5.0
    finally:
        release.set()


def test_a_tool_that_cannot_say_what_it_accepts_is_passed_over():
    class Broken(Echo):
        def accepts(self, query):
            raise RuntimeError

    with Toolbox([Broken(), Calculator()]) as toolbox:
        assert toolbox.call_many(["CALCULATE 2"])[0].text == "2"
        assert toolbox.call_many(["ECHO"])[0].error


@pytest.mark.parametrize("found", [[], [None, None], 3])
def test_a_broken_bulk_answer_is_an_error_answer(found):
    class Bulk(Echo):
        def answer_now(self, queries):
            return found

    with Toolbox([Bulk()]) as toolbox:
        assert toolbox.call_many(["ECHO"])[0].error
        assert asyncio.run(toolbox.call("ECHO")).error


def test_in_thread_passes_results_and_errors_on():
    async def both():
        assert await in_thread(lambda a, b: a + b, 1, 2) == 3
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 / 0)

    asyncio.run(both())


@pytest.mark.parametrize("bad", [{"timeout_s": 0}, {"max_answer_bytes": 3}, {"tools": []}])
def test_limits_are_checked(bad):
    with pytest.raises(ValueError):
        Toolbox(**{"tools": [Calculator()], **bad})
