"""Measures, intervals and comparisons against brute force and counts on paper."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from toolmem.errors import ToolmemError
from toolmem.evaluation.measures import (
    BINS,
    calibration_error,
    compare,
    estimates,
    mcnemar,
    mean,
    ratio,
    share,
)


def rows_of(values, field="accuracy", **others):
    return [
        {"scores": {field: value}, **{key: column[i] for key, column in others.items()}}
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 3), (2, 9), (7, 1), (0, 12)])
def test_mcnemar_against_all_coin_throws(gained, lost):
    n, apart = gained + lost, abs(gained - lost)
    throws = itertools.product((0, 1), repeat=n)
    as_uneven = sum(abs(2 * sum(throw) - n) >= apart for throw in throws)
    assert mcnemar(gained, lost) == pytest.approx(as_uneven / 2**n)


def test_mcnemar_of_many():
    from scipy import stats  # lm-eval brings it

    assert mcnemar(900, 1010) == pytest.approx(stats.binomtest(900, 1910).pvalue, rel=1e-9)


def test_estimate_of_a_share():
    rows = rows_of([1, 0, 1, 1])
    found = estimates([share("accuracy")], rows)["accuracy"]
    assert found.value == 0.75
    assert found.n == 4
    every = sorted(sum(draw) / 4 for draw in itertools.product([1, 0, 1, 1], repeat=4))
    wanted = np.percentile(every, [2.5, 97.5], method="inverted_cdf")
    assert (found.low, found.high) == pytest.approx(tuple(wanted), abs=0.26)


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios():
    rows = [{"loss": 2.0, "tokens": 1}, {"loss": 3.0, "tokens": 9}]
    measure = ratio("perplexity", lambda r: r["loss"], lambda r: r["tokens"], np.exp)
    found = estimates([measure], rows)["perplexity"]
    assert found.value == pytest.approx(math.exp(5 / 10))
    assert found.low == pytest.approx(math.exp(3 / 9))
    assert found.high == pytest.approx(math.exp(2.0))


def test_calibration_error_against_a_loop():
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0, 1, 300)
    confidence[:3] = 0.0, 1.0, 1 / BINS
    right = (draw.uniform(0, 1, 300) < confidence**2).astype(float)
    rows = rows_of(right.tolist(), confidence=confidence.tolist())
    edges = np.linspace(0, 1, BINS + 1)
    wanted = 0.0
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (confidence > low) & (confidence <= high) | ((confidence == 0) & (number == 0))
        if inside.any():
            wanted += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    measure = calibration_error()
    found = measure.value(measure.table(rows).sum(0), len(rows))
    assert found == pytest.approx(wanted, abs=1e-9)


def test_two_models_on_the_same_examples():
    first = rows_of([1, 1, 0, 0, 1, 0] * 20)
    second = rows_of([1, 1, 0, 1, 0, 1] * 20)
    found = compare(share("accuracy"), first, second)
    assert (found.first, found.second) == (pytest.approx(1 / 2), pytest.approx(4 / 6))
    assert (found.gained, found.lost) == (40, 20)
    assert found.p_mcnemar == mcnemar(40, 20)
    # Of pairs drawn together, the mean difference has this standard error.
    apart = np.array(
        [
            b["scores"]["accuracy"] - a["scores"]["accuracy"]
            for a, b in zip(first, second, strict=True)
        ]
    )
    error = apart.std() / math.sqrt(len(apart))
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.02)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.02)
    assert 0 < found.p_bootstrap < 0.05
    same = compare(mean("accuracy"), first, first)
    assert (same.value, same.low, same.high, same.p_bootstrap) == (0, 0, 0, 1)
    assert same.p_mcnemar is None
    with pytest.raises(ToolmemError, match="ask both the same"):
        compare(share("accuracy"), first, second[:-1])
