"""Tools that fail and hang under many prompts: none is lost, none comes twice, nothing is left."""

import asyncio
import random
import threading
from collections import Counter

import pytest
import torch
from test_engine import (
    ROLES,
    TOKENIZER,
    Count,
    always_call,
    assert_equal,
    check_nothing_left,
    ragged_prompts,
    random_model,
)

from toolmem.generation import Engine, Request, Sampling
from toolmem.tools import Toolbox
from toolmem.tools.base import Answer

FAILS, HANGS = 0.20, 0.05


def plan(query):
    """What each of three attempts meets."""
    draw = random.Random(query)
    kinds = ["fine", "fail", "hang"]
    return [draw.choices(kinds, [1 - FAILS - HANGS, FAILS, HANGS])[0] for _ in range(3)]


class Faulty:
    """A tool that does what ``plan`` says."""

    name = "faulty"

    def __init__(self):
        self.asked = Counter()

    def accepts(self, query):
        return True

    async def call(self, query):
        self.asked[query] += 1
        what = plan(query)[self.asked[query] - 1]
        if what == "fail":
            raise ConnectionError("/a/path/that/is/not/for/the/model")
        if what == "hang":
            await asyncio.sleep(1000)
        return Answer(f"is {query}", False, 0.0)

    def close(self):
        pass


def calling(number):
    """A prompt whose assistant has begun to write a query of its own, and now calls."""
    return [ROLES["user"], *b"?", ROLES["assistant"], *f"q{number}".encode()]


def call_then_end(logits, uniform, histories):
    """Calls once, and ends when it has been answered."""
    called = [ROLES["database"] in history.tokens for history in histories]
    return torch.tensor([ROLES["end"] if done else ROLES["database"] for done in called])


call_then_end.random = False
call_then_end.needs_history = True


@pytest.mark.slow
def test_ten_thousand_prompts_come_back_answered_or_marked():
    threads = set(threading.enumerate())
    numbers = range(10_000)
    tool = Faulty()
    requests = (Request(calling(n), sampler=call_then_end, max_new_tokens=4) for n in numbers)
    with (
        Toolbox([tool], timeout_s=0.5) as toolbox,
        Engine(random_model(0), TOKENIZER, toolbox, max_calls=256) as engine,
    ):
        results = list(engine.each(requests, ahead=4096))
        check_nothing_left(engine)
        stats = engine.stats()
    assert len(results) == len(numbers)
    answered = marked = 0
    for number, result in zip(numbers, results, strict=True):
        prompt, query = calling(number), f"q{number}"
        assert result.tokens[: len(prompt)] == prompt, "another's dialogue"
        assert result.finish_reason == "end"
        [(asked, answer)] = result.tool_calls
        assert asked == query
        if answer.error:
            marked += 1
            assert answer.text in (
                "error: faulty failed (ConnectionError)",
                "error: faulty did not answer within 0.5 seconds",
            )
        else:
            answered += 1
            assert answer.text == f"is {query}"
        forced = [*answer.text.encode(), ROLES["assistant"]]
        assert result.tokens[len(prompt) :] == [ROLES["database"], *forced, ROLES["end"]]
    doomed = sum("fine" not in plan(f"q{number}") for number in numbers)
    assert 100 < doomed <= marked < doomed + 100  # a starved machine may be late with an answer
    assert answered + marked == len(numbers)
    assert (stats.tool_calls, stats.tool_errors) == (len(numbers), marked)
    assert stats.requests_finished == len(numbers)
    assert max(tool.asked.values()) == 3
    ended = [thread for thread in threading.enumerate() if thread not in threads]
    for thread in ended:
        thread.join(20)
        assert not thread.is_alive(), thread


@pytest.mark.parametrize("ahead", [1, 3, 50])
def test_each_yields_in_order_what_generate_gives(ahead):
    model = random_model(0)
    prompts = ragged_prompts(9)
    options = {"max_new_tokens": 15, "max_tool_calls": 2, "sampler": Sampling()}
    taken = []

    def requests():
        for seed, prompt in enumerate(prompts):
            taken.append(seed)
            yield Request(prompt, seed=seed, **options)

    with Engine(model, TOKENIZER, Count(), max_lanes=4) as engine:
        results = []
        for result in engine.each(requests(), ahead=ahead):
            results.append(result)
            assert len(taken) < len(results) + ahead
        for ours, theirs in zip(results, engine.generate(prompts, **options), strict=True):
            assert_equal(ours, theirs)
        check_nothing_left(engine)


def test_each_can_be_left():
    requests = [Request(prompt, sampler=Sampling()) for prompt in ragged_prompts(9)]
    with Engine(random_model(0), TOKENIZER, Count(), max_lanes=4) as engine:
        for _ in engine.each(requests):
            break
        check_nothing_left(engine)
        assert len(engine.run(requests)) == 9


def test_one_that_waits_for_its_tool_does_not_hold_up_those_behind_it():
    gate = threading.Event()

    class First:
        name = "first"
        rest = 0

        def accepts(self, query):
            return True

        async def call(self, query):
            if query == "q0":
                while not gate.is_set():
                    await asyncio.sleep(0.001)
            else:
                First.rest += 1
                if First.rest == 19:
                    gate.set()  # all the others have been asked: only now the first is answered
            return Answer("ok", False, 0.0)

        def close(self):
            pass

    requests = [Request(calling(n), sampler=always_call, max_tool_calls=1) for n in range(20)]
    with (
        Toolbox([First()], timeout_s=30) as toolbox,
        Engine(random_model(0), TOKENIZER, toolbox, max_lanes=2) as engine,
    ):
        results = list(engine.each(requests))
    calls = [call for result in results for call in result.tool_calls]
    assert [query for query, _ in calls] == [f"q{number}" for number in range(20)]
    assert all(answer.text == "ok" for _, answer in calls)
