"""Numbers over the examples of an evaluation, with intervals; and of two evaluations, compared.

A measure is a function of sums over examples: a mean, a ratio of sums, a perplexity. So it is resampled by
drawing examples (``bootstrap.py``), and two models that were asked the same are compared by drawing the
same examples of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolmem.errors import ToolmemError
from toolmem.evaluation.bootstrap import percentile_interval, sum_resamples

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """A number over examples.

    Args:
        name: as in results.
        columns: what is summed of an example, (m,) numbers.
        value: from sums (..., m) and the number of examples to the number (...).
        binary: each example is right (1) or wrong (0), and the number is the share.
    """

    name: str
    columns: Callable[[Row], Sequence[float]]
    value: Callable[[np.ndarray, int], np.ndarray]
    binary: bool = False

    def table(self, rows: Sequence[Row]) -> np.ndarray:
        """(k, m) float64, what is summed."""
        return np.array([self.columns(row) for row in rows], np.float64)


def share(name: str, field: str | None = None) -> Measure:
    """The share of examples that are right: the mean of a field of ``scores`` that is 0 or 1."""
    return mean(name, field, binary=True)


def mean(name: str, field: str | None = None, binary: bool = False) -> Measure:
    """The mean of a field of ``scores``."""
    key = name if field is None else field
    return Measure(name, lambda row: [row["scores"][key]], _mean, binary)


def _mean(sums: np.ndarray, n: int) -> np.ndarray:
    return sums[..., 0] / n


def ratio(
    name: str,
    over: Callable[[Row], float],
    under: Callable[[Row], float],
    then: Callable[[np.ndarray], np.ndarray] = lambda found: found,
) -> Measure:
    """A function of the ratio of two sums.

    Args:
        name: as in results.
        over: what is summed above the line.
        under: what is summed below it.
        then: of the ratio.
    """

    def value(sums: np.ndarray, n: int) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return then(sums[..., 0] / sums[..., 1])

    return Measure(name, lambda row: [over(row), under(row)], value)


def mean_over(name: str, over: str, under: str) -> Measure:
    """The ratio of the sums of two fields of rows: a mean a token, say."""
    return ratio(name, lambda row: row[over], lambda row: row[under])


BINS = 15


def calibration_error(name: str = "calibration_error") -> Measure:
    """Expected calibration error over 15 equal bins of confidence (arXiv 1706.04599).

    Of examples with ``confidence``, the probability of the choice that is taken, and whether it is right
    (``scores.accuracy``): the mean distance of the two, by bin.
    """

    def columns(row: Row) -> list[float]:
        found = [0.0] * BINS
        place = min(BINS - 1, max(0, math.ceil(row["confidence"] * BINS) - 1))
        found[place] = row["scores"]["accuracy"] - row["confidence"]
        return found

    return Measure(name, columns, lambda sums, n: np.abs(sums).sum(-1) / n)


def _finite(value: float) -> float | None:
    """A number that JSON has; None for others."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval by the bootstrap.

    Args:
        value: of all examples.
        low: lower end.
        high: upper end.
        n: examples.
    """

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        value, low, high = map(_finite, (self.value, self.low, self.high))
        return {"value": value, "interval_95": [low, high], "n": self.n}


def estimates(measures: Sequence[Measure], rows: Sequence[Row]) -> dict[str, Estimate]:
    """All measures of an evaluation.

    Args:
        measures: by which.
        rows: its examples, one at least.
    """
    found = {}
    for measure in measures:
        table = measure.table(rows)
        value = float(measure.value(table.sum(0), len(rows)))
        low, high = percentile_interval(measure.value(sum_resamples(table), len(rows)))
        found[measure.name] = Estimate(value, low, high, len(rows))
    return found


@dataclass(frozen=True)
class Difference:
    """How two models differ that were asked the same.

    Args:
        first: the first's number.
        second: the second's.
        low: of second - first, the lower end of the 95 % interval by the paired bootstrap.
        high: its upper end.
        p_bootstrap: twice the smaller share of resamples on either side of no difference.
        gained: examples that only the second has right; None for what is not right or wrong.
        lost: examples that only the first has right.
        p_mcnemar: of McNemar's exact test (1947) on these; None likewise.
        n: examples.
    """

    first: float
    second: float
    low: float
    high: float
    p_bootstrap: float
    n: int
    gained: int | None = None
    lost: int | None = None
    p_mcnemar: float | None = None

    @property
    def value(self) -> float:
        """Second - first."""
        return self.second - self.first

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = {
            "first": _finite(self.first),
            "second": _finite(self.second),
            "difference": _finite(self.value),
            "interval_95": [_finite(self.low), _finite(self.high)],
            "p_bootstrap": self.p_bootstrap,
            "n": self.n,
        }
        if self.p_mcnemar is not None:
            found |= {"gained": self.gained, "lost": self.lost, "p_mcnemar": self.p_mcnemar}
        return found


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided test: how often a fair coin parts so many cases so unevenly.

    Args:
        gained: cases that changed one way.
        lost: cases that changed the other way.

    Returns:
        its p-value.
    """
    n, few = gained + lost, min(gained, lost)
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(few + 1)
    ]
    tail = math.fsum(math.exp(log - n * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)


def compare(measure: Measure, first: Sequence[Row], second: Sequence[Row]) -> Difference:
    """Compare two models by a measure.

    Args:
        measure: by which.
        first: examples of the first model.
        second: the same examples of the second, in the same order.

    Raises:
        ToolmemError: when they are not as many.
    """
    if len(first) != len(second) or not first:
        raise ToolmemError(
            f"{len(first)} examples cannot be compared with {len(second)}: ask both the same"
        )
    n = len(first)
    tables = [measure.table(first), measure.table(second)]
    width = tables[0].shape[1]
    sums = sum_resamples(np.concatenate(tables, axis=1))
    apart = measure.value(sums[:, width:], n) - measure.value(sums[:, :width], n)
    low, high = percentile_interval(apart)
    p = min(1.0, 2 * min(float((apart <= 0).mean()), float((apart >= 0).mean())))
    before, after = (float(measure.value(table.sum(0), n)) for table in tables)
    if not measure.binary:
        return Difference(before, after, low, high, p, n)
    right = [table[:, 0] > 0.5 for table in tables]
    gained, lost = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    return Difference(before, after, low, high, p, n, gained, lost, mcnemar(gained, lost))
