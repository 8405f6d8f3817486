"""Laws fitted to runs, with intervals by the bootstrap: y = a x^b, and y = a x + c.

Both are straight lines, in logarithms and as they are, by ordinary least squares in closed form. The
bootstrap (Efron 1979) draws runs with replacement and fits again; its seed is given, so an interval is
the same whenever it is drawn. Runs of one setting with several seeds are points of their own. An interval
from few runs is too narrow: below some ten points take it for a lower bound of what is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from toolmem.errors import ToolmemError

Law = Literal["power", "linear"]
LAWS: tuple[Law, ...] = ("power", "linear")
RESAMPLES = 2000
MOST_TRIES = 50  # for each resample, to draw one with two different x


@dataclass(frozen=True)
class Fit:
    """A law fitted to points.

    Args:
        law: ``power``, y = a x^b, or ``linear``, y = a x + b.
        a: the factor, or the slope.
        b: the exponent, or the offset.
        resamples: (n, 2) float64, a and b of each resample.
        residuals: (points,) float64, of the fit; of a power law those of log y.
        r2: share of y's variance that the law tells; of a power law that of log y.
    """

    law: Law
    a: float
    b: float
    resamples: np.ndarray
    residuals: np.ndarray
    r2: float

    def __call__(self, x: Sequence[float] | np.ndarray) -> np.ndarray:
        """The law's y at these x."""
        return _value(self.law, np.asarray(x, np.float64), self.a, self.b)

    def interval(self, which: Literal["a", "b"], level: float = 0.95) -> tuple[float, float]:
        """The percentile interval of a parameter.

        Args:
            which: ``a`` or ``b``.
            level: share of resamples in it.
        """
        tail = 50 * (1 - level)
        low, high = np.percentile(self.resamples[:, "ab".index(which)], [tail, 100 - tail])
        return float(low), float(high)

    def band(
        self, x: Sequence[float] | np.ndarray, level: float = 0.95, seed: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the law lies at these x; with a seed, where a further run would.

        Args:
            x: (n,).
            level: share of resamples between the two.
            seed: of the deviations from the law that a run has, drawn from those seen; None leaves them out.

        Returns:
            (n,) lower and (n,) upper ends.
        """
        xs = np.asarray(x, np.float64)
        a, b = self.resamples[:, :1], self.resamples[:, 1:]
        values = _value(self.law, xs[None, :], a, b)
        if seed is not None:
            points = len(self.residuals)
            # residuals of a fit of two parameters are smaller than what they are residuals of
            spread = self.residuals * np.sqrt(points / max(points - 2, 1))
            drawn = np.random.default_rng(seed).choice(spread, size=values.shape)
            values = values * np.exp(drawn) if self.law == "power" else values + drawn
        tail = 50 * (1 - level)
        low, high = np.percentile(values, [tail, 100 - tail], axis=0)
        return low, high

    def formula(self) -> str:
        """The law in words, with 95 % intervals."""
        (a0, a1), (b0, b1) = self.interval("a"), self.interval("b")
        first, second = f"{self.a:.3g} [{a0:.3g}, {a1:.3g}]", f"{self.b:.3g} [{b0:.3g}, {b1:.3g}]"
        return f"{first} · x^{second}" if self.law == "power" else f"{first} · x + {second}"


def _value(law: Law, x: np.ndarray, a: float | np.ndarray, b: float | np.ndarray) -> np.ndarray:
    return a * x**b if law == "power" else a * x + b


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and offset of the least-squares line along the last axis."""
    mx, my = x.mean(-1, keepdims=True), y.mean(-1, keepdims=True)
    slope = ((x - mx) * (y - my)).sum(-1) / ((x - mx) ** 2).sum(-1)
    return slope, my[..., 0] - slope * mx[..., 0]


def fit(
    law: Law,
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    *,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Fit:
    """Fit a law to runs.

    Args:
        law: ``power`` or ``linear``.
        x: (points,), of a power law above 0.
        y: (points,), of a power law above 0.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ToolmemError: for fewer than three points, one x alone, or numbers that a law cannot have.
    """
    if law not in LAWS:
        raise ToolmemError(f"law: unknown {law!r}; choose from {', '.join(LAWS)}")
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if xs.shape != ys.shape or xs.ndim != 1:
        raise ValueError(f"x {xs.shape} and y {ys.shape} must be of one length")
    if len(xs) < 3 or len(np.unique(xs)) < 2:
        raise ToolmemError(
            f"law: {len(xs)} points at {len(np.unique(xs))} places: a law of two parameters needs three, "
            "at two places at least"
        )
    if not (np.isfinite(xs).all() and np.isfinite(ys).all()):
        raise ToolmemError("law: a point is not a finite number: leave failed runs out")
    if law == "power":
        if xs.min() <= 0 or ys.min() <= 0:
            raise ToolmemError(
                "law: a power law has x and y above 0: leave out runs that learned nothing, or fit a "
                "linear law"
            )
        xs, ys = np.log(xs), np.log(ys)
    drawn = _resampled(xs, n_resamples, seed)
    slope, offset = _line(xs, ys)
    slopes, offsets = _line(xs[drawn], ys[drawn])
    residuals = ys - (slope * xs + offset)
    total = ((ys - ys.mean()) ** 2).sum()
    r2 = 1.0 - float((residuals**2).sum() / total) if total > 0 else 1.0
    if law == "power":
        pairs = np.stack([np.exp(offsets), slopes], 1)
        return Fit(law, float(np.exp(offset)), float(slope), pairs, residuals, r2)
    pairs = np.stack([slopes, offsets], 1)
    return Fit(law, float(slope), float(offset), pairs, residuals, r2)


def _resampled(x: np.ndarray, n: int, seed: int) -> np.ndarray:
    """(n, points) int64 numbers of points drawn with replacement, two different x among each."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(x), size=(n, len(x)))
    for _ in range(MOST_TRIES * len(x)):
        chosen = x[drawn]
        bad = np.flatnonzero(chosen.min(1) == chosen.max(1))
        if not len(bad):
            break
        drawn[bad] = rng.integers(len(x), size=(len(bad), len(x)))
    return drawn


def try_fit(law: Law, x: Sequence[float], y: Sequence[float], seed: int = 0) -> Fit | None:
    """The fit, over points that the law can have; None where they are too few.

    Args:
        law: ``power`` or ``linear``.
        x: (points,).
        y: (points,).
        seed: of the bootstrap.
    """
    pairs = [
        (one, other)
        for one, other in zip(x, y, strict=True)
        if np.isfinite([one, other]).all() and (law == "linear" or min(one, other) > 0)
    ]
    if len(pairs) < 3 or len({one for one, _ in pairs}) < 2:
        return None
    return fit(law, [one for one, _ in pairs], [other for _, other in pairs], seed=seed)
