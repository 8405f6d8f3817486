"""Intervals of means, against all resamples counted out."""

from __future__ import annotations

import itertools
from statistics import fmean

import numpy as np
import pytest

from toolmem.evaluation.bootstrap import (
    chance_of_largest,
    mean_interval,
    mean_resamples,
    sum_resamples,
)


def test_resamples_against_all_of_them():
    """Of three values, the 27 draws with replacement are equally likely."""
    values = [1.0, 2.0, 6.0]
    every = sorted(fmean(draw) for draw in itertools.product(values, repeat=3))
    means = mean_resamples(values, 60_000, seed=1)
    assert set(np.round(means, 9)) == set(np.round(every, 9))
    for level in (0.5, 0.8):
        tail = 50 * (1 - level)
        wanted = np.percentile(every, [tail, 100 - tail], method="inverted_cdf")
        found = mean_interval(values, level, 60_000, seed=1)
        assert found == pytest.approx(tuple(wanted), abs=1e-9)
    assert mean_interval([3.0]) == (3.0, 3.0)
    assert mean_interval(values) == mean_interval(values)


def test_how_often_a_group_is_the_largest():
    """Against all pairs of draws: {0, 4} beats {1, 2} where its mean is above."""
    first, second = [0.0, 4.0], [1.0, 2.0]
    draws = [[fmean(d) for d in itertools.product(g, repeat=2)] for g in (first, second)]
    pairs = list(itertools.product(*draws))
    ahead = fmean((a > b) + 0.5 * (a == b) for a, b in pairs)
    found = chance_of_largest([first, second], 40_000)
    assert found == pytest.approx([ahead, 1 - ahead], abs=0.01)
    assert chance_of_largest([[1.0], [1.0], [0.0]]) == pytest.approx([0.5, 0.5, 0.0])


def test_sums_of_rows_drawn_together(monkeypatch):
    """The ratio of two columns, whose rows stay together; in parts as at once."""
    columns = np.array([[1.0, 1.0], [6.0, 3.0], [2.0, 4.0]])
    every = {
        tuple(columns[list(draw)].sum(axis=0)) for draw in itertools.product(range(3), repeat=3)
    }
    sums = sum_resamples(columns, 20_000, seed=1)
    assert {tuple(row) for row in sums} == every
    means = mean_resamples(columns[:, 0].tolist(), 20_000, seed=1)
    assert sums[:, 0] / 3 == pytest.approx(means)
    monkeypatch.setattr("toolmem.evaluation.bootstrap.CHUNK", 50)
    assert np.array_equal(sum_resamples(columns, 20_000, seed=1), sums)
