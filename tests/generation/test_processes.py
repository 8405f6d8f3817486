"""Processes generate what one does; one that dies costs only its own, and nothing of them is left."""

import multiprocessing
import os
import signal
from functools import partial

import pytest
import torch
from test_engine import TOKENIZER, Count, assert_equal, ragged_prompts, random_model

from toolmem.errors import ToolmemError
from toolmem.generation import Engine, Ranks, Request, Sampling
from toolmem.generation.parallel import own_places
from toolmem.tools.base import Answer

PROMPTS = ragged_prompts(11)
REQUESTS = [
    Request(prompt, max_new_tokens=10, sampler=Sampling(), seed=i)
    for i, prompt in enumerate(PROMPTS)
]


class Threads(Count):
    """A toolbox that tells how many threads its process has, or kills it."""

    def __init__(self, deadly):
        super().__init__()
        self.deadly = deadly

    def call_many(self, texts):
        if self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return [Answer(str(torch.get_num_threads()), False, 0.0) for _ in texts]


def make_engine(rank, toolbox="count", deadly=()):
    if rank in deadly and toolbox == "none":
        raise ToolmemError("no memory is left")
    box = Count() if toolbox == "count" else Threads(rank in deadly)
    return Engine(random_model(0), TOKENIZER, box, max_lanes=3)


def alone(requests):
    with Engine(random_model(0), TOKENIZER, Count()) as engine:
        return engine.run(requests)


def test_places_are_shared_evenly():
    for n, n_ranks in ((0, 3), (2, 3), (11, 3), (12, 4)):
        shares = [list(own_places(rank, n_ranks, n)) for rank in range(n_ranks)]
        assert sorted(place for share in shares for place in share) == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_they_equal_one_process_call_after_call():
    with Ranks(make_engine, 2) as ranks:
        first, second = list(ranks.each(REQUESTS)), list(ranks.each(REQUESTS[:3]))
        assert list(ranks.each([])) == []
        unwanted = ranks.each(REQUESTS)
        next(unwanted)
        unwanted.close()  # nobody waits for the others: they end
        assert not multiprocessing.active_children()
    assert len(first) == 11 and len(second) == 3
    wanted = alone(REQUESTS)
    for ours, theirs in zip([*first, *second], [*wanted, *wanted[:3]], strict=True):
        assert_equal(ours, theirs)
        with pytest.raises(ToolmemError, match="closed"):
            list(ranks.each(REQUESTS))


def test_threads_are_shared_out_and_one_that_dies_costs_its_own():
    """Rank 1 dies at its first call; what it had not handed over says so, and the next call goes without
    it. No dialogue of rank 1 is answered before one of its own calls.
    """
    with Ranks(partial(make_engine, toolbox="threads", deadly=(1,)), 2, threads=3) as ranks:
        results = list(ranks.each(REQUESTS))
        again = list(ranks.each(REQUESTS))
    said = {answer.text for result in results for _, answer in result.tool_calls}
    assert said == {"2"}  # rank 0 has the odd one of three
    for place, (first, second) in enumerate(zip(results, again, strict=True)):
        assert second.finish_reason != "error"
        if place % 2 == 0:
            assert_equal(first, second)
        else:
            assert first.finish_reason == "error"
            assert first.error == "rank 1 was killed by signal 9 (Killed)"
            assert first.tokens == PROMPTS[place] and first.prompt_length == len(PROMPTS[place])
    assert not multiprocessing.active_children()


def test_none_is_left():
    with Ranks(partial(make_engine, toolbox="none", deadly=(0,)), 1) as ranks:
        results = list(ranks.each(REQUESTS))
        assert {result.error for result in results} == {"rank 0 failed: no memory is left"}
        with pytest.raises(ToolmemError, match=r"no rank is left.*no memory is left"):
            list(ranks.each(REQUESTS))
    with pytest.raises(ToolmemError, match="at least 1"):
        Ranks(make_engine, 0)
