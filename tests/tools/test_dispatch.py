"""Whatever tools do, each call gets exactly one answer, and nothing is left behind."""

import asyncio
import gc
import random
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, wait

import pytest

from toolmem.tools import Answer, Calculator, SqlTool, Toolbox, ToolCalls
from toolmem.tools.base import error_answer

PATIENCE_S = 30.0  # only a test that fails waits that long


def eventually(condition):
    """Whether a condition comes true."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


class Scripted:
    """A tool that does what ``script(query, n)`` says at the n-th call of a query.

    An answer is given, an exception raised, "hang" waits until cancelled, "block" stops the loop
    until the test ends, and a number waits that many seconds and answers in capitals.
    """

    name = "scripted"
    release = threading.Event()

    def __init__(self, script=lambda query, n: 0.0, **switches):
        self.script = script
        self.asked = Counter()
        self.running = self.peak = self.cancelled = 0
        self.lock = threading.Lock()
        vars(self).update(switches)

    def accepts(self, query):
        return True

    async def call(self, query):
        with self.lock:
            self.asked[query] += 1
            n = self.asked[query]
            self.running += 1
            self.peak = max(self.peak, self.running)
        try:
            what = self.script(query, n)
            if isinstance(what, BaseException):
                raise what
            if what == "block":
                self.release.wait(PATIENCE_S)
            elif isinstance(what, str):
                await asyncio.sleep(PATIENCE_S)
            if isinstance(what, Answer):
                return what
            await asyncio.sleep(0.0 if isinstance(what, str) else what)
            return Answer(query.upper(), False, 0.0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            with self.lock:
                self.running -= 1

    def close(self):
        pass


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    Scripted.release = threading.Event()
    yield
    Scripted.release.set()
    assert eventually(lambda: set(threading.enumerate()) <= before), threading.enumerate()


@pytest.fixture
def opened():
    """Opens a tool behind a toolbox and `ToolCalls`, and closes them."""
    things = []

    def open_calls(tool, timeout_s=5.0, **options):
        toolbox = Toolbox([tool], timeout_s=timeout_s)
        calls = ToolCalls(toolbox, **{"backoff_s": 0.001, **options})
        things.extend([calls, toolbox])
        return calls

    yield open_calls
    for thing in things:
        thing.close()


def results(futures):
    return [future.result(PATIENCE_S) for future in futures]


def texts(futures):
    return [answer.text for answer in results(futures)]


def test_quick_tools_answer_at_once_and_in_bulk(factbase):
    class Counting(SqlTool):
        bulks = 0

        def answer_now(self, queries):
            self.bulks += 1
            return super().answer_now(queries)

    tool = Counting(factbase)
    questions = [f"FIND birth_place FOR Person {i}" for i in range(64)]
    with Toolbox([tool, Calculator()]) as toolbox, ToolCalls(toolbox) as calls:
        futures = calls.submit([*questions, "CALCULATE 2 + 3", "what?", "FIND x FOR y"])
        assert all(future.done() for future in futures)
        assert calls._worker is None, "no thread for what needs none"
        answers = results(futures)
        assert [answer.text for answer in answers[:65]] == ["Peru"] * 64 + ["5"]
        assert answers[65].error and answers[66].error
        assert tool.bulks == 1
        [slow] = calls.submit(["SELECT count(*) FROM people WHERE birth_place = 'Peru' AND 2 = 2"])
        assert slow.result(PATIENCE_S).text == "2000"
    stats = calls.stats()
    assert (stats.calls, stats.at_once, stats.failed) == (68, 67, 0)


def test_as_many_at_a_time_as_allowed(opened):
    tool = Scripted(lambda query, n: 0.05)
    calls = opened(tool, max_concurrent=64)
    futures = calls.submit([f"q{i}" for i in range(256)])
    assert eventually(lambda: calls.stats().running == 64)
    assert calls.stats().waiting > 0
    assert texts(futures) == [f"Q{i}" for i in range(256)]
    assert tool.peak == 64
    assert (calls.stats().running, calls.stats().waiting) == (0, 0)


def plan(query):
    """What each of three attempts meets: 20 % fail, 5 % hang."""
    draw = random.Random(query)
    return [draw.choices(["fine", "fail", "hang"], [75, 20, 5])[0] for _ in range(3)]


def test_ten_thousand_calls_with_failing_and_hanging_tools_are_each_answered_once(opened):
    def script(query, n):
        what = plan(query)[n - 1]
        return {"fine": 0.0, "fail": OSError("no route"), "hang": "hang"}[what]

    tool = Scripted(script)
    calls = opened(tool, timeout_s=0.5, max_concurrent=512)
    queries = [f"q{i}" for i in range(10_000)]
    told = Counter()
    futures = []
    for start in range(0, len(queries), 500):
        for future in calls.submit(queries[start : start + 500]):
            future.add_done_callback(lambda future: told.update([id(future)]))
            futures.append(future)
    answers = results(futures)
    failed = {query for query, answer in zip(queries, answers, strict=True) if answer.failed}
    for query, answer in zip(queries, answers, strict=True):
        if query not in failed:
            assert answer.text == query.upper() and not answer.error
        else:
            assert answer.text in (
                "error: scripted failed (OSError)",
                "error: scripted did not answer within 0.5 seconds",
            )
    assert eventually(lambda: len(told) == len(queries)) and set(told.values()) == {1}
    doomed = {query for query in queries if "fine" not in plan(query)}
    # A starved machine may make an answer come late; a call that can only fail fails.
    assert doomed <= failed and len(failed - doomed) < 100
    assert 100 < len(doomed) < 220  # a quarter cubed, of 10,000
    stats = calls.stats()
    assert stats.failed == len(failed)
    assert stats.calls == len(queries) and stats.running == stats.waiting == 0
    assert sum(tool.asked.values()) == len(queries) + stats.retried
    assert max(tool.asked.values()) == 3


def test_a_tool_that_blocks_its_loop_holds_up_nobody_for_good(opened):
    tool = Scripted(lambda query, n: "block" if query.startswith("block") else 0.0)
    calls = opened(tool, timeout_s=0.2, max_concurrent=16, retries=1)
    queries = [f"block {i}" if i % 20 == 7 else f"q{i}" for i in range(100)]
    answers = results(calls.submit(queries))
    for query, answer in zip(queries, answers, strict=True):
        assert answer.failed if query.startswith("block") else answer.text == query.upper()
    [held] = calls.submit(["block again"])
    start = time.perf_counter()
    calls.close()
    calls.toolbox.close()
    assert time.perf_counter() - start < PATIENCE_S / 2, "close waits for no tool"
    assert held.done() and held.result().failed


@pytest.mark.parametrize(
    "failure",
    [OSError("down"), SystemExit(1), asyncio.CancelledError(), error_answer("503", failed=True)],
    ids=["raises", "exits", "cancels", "says so"],
)
def test_failures_are_retried(opened, failure):
    tool = Scripted(lambda query, n: failure if n < 3 else 0.0)
    calls = opened(tool)
    assert texts(calls.submit(["a"])) == ["A"]
    assert tool.asked["a"] == 3 and calls.stats().retried == 2 and calls.stats().failed == 0
    tool.script = lambda query, n: failure
    [answer] = results(calls.submit(["b"]))
    assert answer.failed and answer.error and answer.text.startswith("error: ")
    assert tool.asked["b"] == 3 and calls.stats().failed == 1


def test_errors_about_the_query_are_not_retried_and_not_remembered(opened):
    tool = Scripted(lambda query, n: error_answer("no such column"))
    calls = opened(tool)
    for n in (1, 2):
        assert texts(calls.submit(["a"])) == ["error: no such column"]
        assert tool.asked["a"] == n
    assert calls.stats().retried == calls.stats().failed == 0


def test_a_failing_quick_answer_is_asked_for_again(opened):
    class Quick(Scripted):
        def answer_now(self, queries):
            raise OSError

    tool = Quick()
    calls = opened(tool)
    assert texts(calls.submit(["a", "b"])) == ["A", "B"]
    [answer] = results(opened(Quick(), retries=0).submit(["a"]))
    assert answer.text == "error: scripted failed (OSError)"


def test_identical_calls_are_joined_and_answers_remembered(opened):
    tool = Scripted(lambda query, n: 0.05)
    calls = opened(tool)
    turns = ["a", "Let me see.\n```\na\n```", "b", "a"]
    assert texts(calls.submit(turns)) == ["A", "A", "B", "A"]
    assert tool.asked == {"a": 1, "b": 1}
    [again] = calls.submit(["a"])
    assert again.done() and again.result().text == "A"
    stats = calls.stats()
    assert (stats.calls, stats.joined, stats.cached) == (5, 2, 1)


def test_the_answer_not_asked_for_longest_is_forgotten(opened):
    tool = Scripted()
    calls = opened(tool, cache_size=2)
    for query in "abaca":  # c takes b's place
        results(calls.submit([query]))
    results(calls.submit(["b"]))
    assert tool.asked == {"a": 1, "b": 2, "c": 1}
    without = opened(tool, cache_size=0)
    results(without.submit(["a"]))
    results(without.submit(["a"]))
    assert tool.asked["a"] == 3


@pytest.mark.parametrize(
    ("switches", "asked"),
    [
        ({}, 1),
        ({"cacheable": False}, 2),
        ({"joinable": False}, 2),
        ({"cacheable": False, "joinable": False}, 4),
    ],
)
def test_switches_of_a_tool(opened, switches, asked):
    tool = Scripted(lambda query, n: 0.02, **switches)
    calls = opened(tool)
    for _ in range(2):
        assert texts(calls.submit(["a", "a"])) == ["A", "A"]
    assert tool.asked["a"] == asked


def test_a_call_is_cancelled_with_the_last_who_waits(opened):
    tool = Scripted(lambda query, n: "hang")
    calls = opened(tool, max_concurrent=1)
    first, second, queued = calls.submit(["a", "a", "b"])
    assert eventually(lambda: tool.running == 1)
    assert first.cancel() and first.cancelled()
    with pytest.raises(CancelledError):
        first.result()
    time.sleep(0.02)
    assert tool.running == 1 and not second.done(), "somebody still waits"
    assert second.cancel()
    assert eventually(lambda: tool.cancelled == 1 and tool.asked["b"] == 1), "its turn is free"
    assert queued.cancel()
    assert eventually(lambda: tool.cancelled == 2)
    assert wait([first, second, queued], timeout=PATIENCE_S).not_done == set()
    assert calls.stats().cancelled == 2
    assert eventually(lambda: calls.stats().running == calls.stats().waiting == 0)
    tool.script = lambda query, n: 0.0
    assert texts(calls.submit(["a"])) == ["A"], "a cancelled call is not joined"


def test_cancelling_at_any_moment_loses_nobody_else(opened):
    draw = random.Random(0)
    tool = Scripted(lambda query, n: 0.001 * (len(query) % 3))
    calls = opened(tool, max_concurrent=8, cache_size=0)
    kept, dropped = [], []
    for _ in range(150):
        queries = ["q" * draw.randint(1, 12) for _ in range(10)]
        for query, future in zip(queries, calls.submit(queries), strict=True):
            if draw.random() < 0.5:
                dropped.append(future)
            else:
                kept.append((query, future))
        while len(dropped) > 5:
            dropped.pop(draw.randrange(len(dropped))).cancel()
    assert all(future.result(PATIENCE_S).text == query.upper() for query, future in kept)
    assert eventually(lambda: calls.stats().running == calls.stats().waiting == 0)


def test_close_answers_what_is_under_way(opened):
    tool = Scripted(lambda query, n: "hang")
    calls = opened(tool, max_concurrent=2)
    futures = calls.submit(["a", "b", "c"])
    assert eventually(lambda: tool.running == 2)
    calls.close()
    for future in futures:
        assert future.result(0).text == "error: the tool was closed before it answered"
    assert eventually(lambda: tool.cancelled == 2)
    with pytest.raises(RuntimeError):
        calls.submit(["a"])
    calls.close()


def test_nobody_closes_them():
    with Toolbox([Scripted()]) as toolbox:
        calls = ToolCalls(toolbox)
        assert texts(calls.submit(["a"])) == ["A"]
        thread = calls._worker.thread
        del calls
        assert eventually(lambda: gc.collect() is None or not thread.is_alive())


def test_submitted_from_many_threads_and_from_callbacks(opened):
    tool = Scripted(lambda query, n: 0.001)
    calls = opened(tool)
    chained = []

    def work(number):
        for i in range(50):
            [future] = calls.submit([f"q{i % 7} {number % 2}"])
            future.add_done_callback(lambda _: chained.extend(calls.submit(["then"])))
            assert future.result(PATIENCE_S).text == f"Q{i % 7} {number % 2}"

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert eventually(lambda: len(chained) == 400)
    assert set(texts(chained)) == {"THEN"}
    assert calls.stats().calls == 800


class OnlyMany:
    """What a test may use in a toolbox's place."""

    def __init__(self, behave=None):
        self.batches = []
        self.behave = behave

    def call_many(self, texts):
        self.batches.append(list(texts))
        if self.behave is not None:
            found = self.behave(len(self.batches))
            if found is not None:
                return found
        return [Answer(text.upper(), False, 0.0) for text in texts]


def fails_first(error):
    def behave(n):
        if n == 1:
            raise error

    return behave


@pytest.mark.parametrize(
    "behave",
    [
        None,
        fails_first(OSError("down")),
        fails_first(SystemExit(2)),
        lambda n: [] if n == 1 else None,
        lambda n: ["text", "text"] if n == 1 else None,
    ],
)
def test_a_double_with_call_many_alone(behave):
    double = OnlyMany(behave)
    with ToolCalls(double, backoff_s=0.0) as calls:
        assert texts(calls.submit(["a", "b"])) == ["A", "B"]
        assert double.batches == [["a", "b"]] * (1 + (behave is not None))
        assert texts(calls.submit(["a", "a"])) == ["A", "A"]
        assert double.batches[-1] == ["a", "a"], "nothing is known of it, so nothing is shared"
        double.cacheable = double.joinable = True
        assert texts(calls.submit(["a", "a"])) == ["A", "A"]
        assert double.batches[-1] == ["a"]
        assert calls.submit(["a"])[0].done()


def test_a_double_that_hangs_is_left_behind():
    double = OnlyMany(lambda n: Scripted.release.wait(PATIENCE_S) and None)
    with ToolCalls(double, timeout_s=0.05, retries=0) as calls:
        [answer] = results(calls.submit(["a"]))
        assert answer.text == "error: the tool did not answer within 0.05 seconds"
        double.behave = None
        assert texts(calls.submit(["a"])) == ["A"]


@pytest.mark.parametrize(
    "bad",
    [{"max_concurrent": 0}, {"retries": -1}, {"backoff_s": -1}, {"cache_size": -1},
     {"timeout_s": 0}],
)  # fmt: skip
def test_limits_are_checked(bad):
    with pytest.raises(ValueError):
        ToolCalls(OnlyMany(), **bad)
