"""Fits against sums written out in Python, exact data, and how often intervals hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from toolmem.analysis.scaling import fit, try_fit
from toolmem.errors import ToolmemError

X = [3.0, 5.0, 5.0, 9.0, 14.0]
Y = [2.0, 4.5, 3.5, 8.0, 11.0]


def by_hand(x, y):
    """Slope and offset by the normal equations, in plain sums."""
    n, sx, sy = len(x), sum(x), sum(y)
    sxx, sxy = sum(a * a for a in x), sum(a * b for a, b in zip(x, y, strict=True))
    slope = (n * sxy - sx * sy) / (n * sxx - sx * sx)
    return slope, (sy - slope * sx) / n


def test_a_line_is_the_least_squares_line():
    slope, offset = by_hand(X, Y)
    found = fit("linear", X, Y)
    assert math.isclose(found.a, slope) and math.isclose(found.b, offset)
    left = [y - slope * x - offset for x, y in zip(X, Y, strict=True)]
    mean = sum(Y) / 5
    r2 = 1 - sum(r * r for r in left) / sum((y - mean) ** 2 for y in Y)
    assert math.isclose(found.r2, r2) and np.allclose(found.residuals, left)
    assert math.isclose(found([2.0])[0], 2 * slope + offset)


def test_a_power_law_is_a_line_of_logarithms():
    exponent, log_factor = by_hand([math.log(x) for x in X], [math.log(y) for y in Y])
    found = fit("power", X, Y)
    assert math.isclose(found.b, exponent) and math.isclose(found.a, math.exp(log_factor))
    assert math.isclose(found([7.0])[0], math.exp(log_factor) * 7**exponent)


def test_exact_data_give_their_law_and_no_width():
    x = [10.0, 20.0, 40.0, 80.0]
    found = fit("power", x, [3 * one**0.7 for one in x])
    assert math.isclose(found.a, 3) and math.isclose(found.b, 0.7) and math.isclose(found.r2, 1)
    assert np.allclose(found.interval("b"), 0.7) and np.allclose(found.band(x, seed=1)[0], found(x))
    found = fit("linear", x, [2 * one - 5 for one in x])
    assert math.isclose(found.a, 2) and math.isclose(found.b, -5)
    assert found.formula() == "2 [2, 2] · x + -5 [-5, -5]"


def test_the_bootstrap_is_a_fit_of_what_was_drawn_and_its_seed_counts():
    one, again, other = (fit("linear", X, Y, n_resamples=50, seed=seed) for seed in (1, 1, 2))
    assert (one.resamples == again.resamples).all() and (one.resamples != other.resamples).any()
    drawn = np.random.default_rng(1).integers(5, size=(50, 5))
    rows = [row for row in drawn if len({X[i] for i in row}) > 1]
    assert len(rows) > 40
    known = {tuple(np.round(by_hand([X[i] for i in r], [Y[i] for i in r]), 9)) for r in rows}
    assert known <= {tuple(row) for row in np.round(one.resamples, 9)}
    assert np.isfinite(one.resamples).all()


@pytest.mark.parametrize("law", ["power", "linear"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(law):
    """24 runs, 80 times over, with noise of one size in what the law is a line of."""
    rng = np.random.default_rng(0)
    x = np.geomspace(1e3, 1e5, 8).repeat(3)
    hits = {"a": 0, "b": 0, "band": 0, "run": 0}
    for trial in range(80):
        if law == "power":
            a, b = 2.5, 0.9
            truth = a * x**b
            y, new = (truth * np.exp(0.2 * rng.standard_normal(24)) for _ in range(2))
        else:
            a, b = 1.8, -900.0
            truth = a * x + b
            y, new = (truth + 4000 * rng.standard_normal(24) for _ in range(2))
        found = fit(law, x, y, n_resamples=400, seed=trial)
        for name, value in (("a", a), ("b", b)):
            low, high = found.interval(name)
            hits[name] += low <= value <= high
        low, high = found.band([x[10]])
        hits["band"] += low[0] <= truth[10] <= high[0]
        low, high = found.band([x[10]], seed=trial)
        hits["run"] += low[0] <= new[10] <= high[0]
    # 76 of 80 are expected; the bootstrap of 24 points is known to be a little narrow
    assert all(n >= 64 for n in hits.values()), hits
    assert sum(hits.values()) < 4 * 80  # and they are not so wide that they say nothing


def test_what_no_law_can_have_is_refused():
    with pytest.raises(ToolmemError, match="2 points"):
        fit("linear", [1, 2], [1, 2])
    with pytest.raises(ToolmemError, match="3 points at 1 places"):
        fit("linear", [2, 2, 2], [1, 2, 3])
    with pytest.raises(ToolmemError, match="learned nothing"):
        fit("power", [1, 2, 3], [0, 1, 2])
    with pytest.raises(ToolmemError, match="finite"):
        fit("linear", [1, 2, 3], [1, math.nan, 2])
    with pytest.raises(ToolmemError, match="unknown 'cubic'"):
        fit("cubic", X, Y)
    assert try_fit("power", [1, 2, 3], [0, 1, 2]) is None
    assert try_fit("power", [*X, 20], [*Y, 0]).a == fit("power", X, Y).a
