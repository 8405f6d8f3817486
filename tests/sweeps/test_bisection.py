"""The smallest member that reaches a value, against looking at every one of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolmem.sweeps.bisection import next_step, trial_run


def search(n, outcome, guess=None, check=True):
    """Run a search whose runs end as ``outcome(member, try)`` says; its answer, and what it tried."""
    tries: dict[int, list[bool]] = {}
    order = []
    while (step := next_step(tries, n, guess, check)).wanted:
        for member, number in step.wanted:
            assert 0 <= member < n
            assert len(tries.setdefault(member, [])) == number < 3
            order.append(member)
            tries[member].append(outcome(member, number))
    return step, order


@given(st.integers(2, 40), st.data())
def test_in_a_family_in_order_it_finds_the_smallest(n, data):
    smallest = data.draw(st.integers(0, n))
    guess = data.draw(st.none() | st.integers(0, n - 1))
    step, order = search(n, lambda member, _: member >= smallest, guess)
    assert step.answer == (smallest if smallest < n else None)
    assert step.monotone
    assert len(set(order)) == len(order)  # nothing is tried twice where nothing contradicts
    bound = math.ceil(math.log2(n + 1)) + 1  # halves, and the member above
    assert len(order) <= (bound if guess is None else 2 * bound)
    if smallest + 1 < n:
        assert smallest + 1 in order
    assert order == trial_run(smallest, n, guess, True)


@pytest.mark.parametrize(("n", "most"), [(7, 3), (15, 4), (31, 5)])
def test_it_takes_log2_of_the_runs(n, most):
    for smallest in range(n + 1):
        assert len(trial_run(smallest, n, None, False)) <= most


def test_a_good_guess_takes_two_runs():
    for smallest in range(1, 20):
        assert trial_run(smallest, 20, smallest, False) == [smallest, smallest - 1]
        assert len(trial_run(smallest, 20, smallest, True)) <= 3
        for off in (-1, 1):
            assert len(trial_run(smallest, 20, min(max(smallest + off, 0), 19), False)) <= 4


def test_bad_luck_of_the_larger_is_told_by_further_seeds():
    def outcome(member, number):
        return number > 0 if member == 4 else member >= 3  # 4 fails by its first seed alone

    step, order = search(8, outcome)
    assert (step.answer, step.monotone) == (3, True)
    assert sorted(order) == [1, 2, 3, 3, 4, 4, 4]


def test_good_luck_of_the_smaller_is_told_by_further_seeds():
    def outcome(member, number):
        return number == 0 if member == 3 else member >= 5

    step, order = search(8, outcome)
    assert (step.answer, step.monotone) == (5, True)
    assert order.count(3) == 3


def test_what_stays_out_of_order_is_said_to_be():
    step, order = search(8, lambda member, _: member in (3, 5, 6, 7))
    assert (step.answer, step.monotone) == (3, False)
    assert order.count(3) == order.count(4) == 2


@given(st.integers(2, 12), st.randoms(use_true_random=False), st.data())
def test_whatever_comes_it_ends(n, source, data):
    guess = data.draw(st.none() | st.integers(0, n - 1))
    chance = {(member, number): source.random() < 0.5 for member in range(n) for number in range(3)}
    step, order = search(n, lambda member, number: chance[member, number], guess)
    if step.answer is not None:
        found = [chance[step.answer, number] for number in range(order.count(step.answer))]
        assert 2 * sum(found) > len(found)
        if step.answer > 0:  # the one below failed
            assert step.answer - 1 in order
