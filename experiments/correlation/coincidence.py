"""Do several curves coincide over a range, up to a stated margin?

Not finding a difference shows nothing. Each curve is fitted by a quadratic in log x over the range; the
largest vertical distance between any two fits is compared with the margin. The curves *coincide* when the
upper bound of that distance, from curves with seed noise drawn afresh, is below the margin: drawing noise
on top of noise makes the distance larger, so this errs to the safe side. They *differ* when, at some shared
level, the difference of the means lies beyond the margin by its own t-interval, corrected for the number of
comparisons (Bonferroni). Otherwise the data do not say.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from experiments.correlation.noise import Curve, curve
from experiments.correlation.shapes import quadratic
from hessdiag.errors import ConfigurationError

BELOW, CONFIDENCE = 15.0, 0.95


@dataclass(frozen=True)
class Coincidence:
    """`verdict` is "coincide", "differ" or "undecided"; distances in the unit of y."""

    verdict: str
    margin: float
    distance: float
    upper: float
    worst: float
    worst_low: float
    worst_at: float
    comparisons: int
    curves: int
    confidence: float


def coincide(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    group: Sequence[object],
    *,
    margin: float,
    resamples: int = 1000,
    generator: np.random.Generator,
) -> Coincidence:
    """Compare the curves of all groups for x < `BELOW`."""
    if not margin > 0:
        raise ConfigurationError(f"margin {margin}: an equivalence margin is positive")
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    labels = list(dict.fromkeys(group))
    if len(labels) < 2:
        raise ConfigurationError("one curve has nothing to coincide with; run the sweep for more values of beta")
    member = np.array([labels.index(label) for label in group])
    curves = [
        curve(xs[chosen], ys[chosen]) for i in range(len(labels)) if (chosen := (member == i) & (xs < BELOW)).any()
    ]
    span = max(c.x[0] for c in curves), min(c.x[-1] for c in curves)
    if span[0] >= span[1] or len(curves) < len(labels):
        raise ConfigurationError("the curves share no range; run the sweep over common curvatures")
    t = np.linspace(float(np.log(span[0])), float(np.log(span[1])), 33)
    basis = np.stack([np.ones_like(t), t, t**2])
    point = _distance([quadratic(c.x, c.mean, c.count.astype(float)) @ basis for c in curves])
    drawn = [quadratic(c.x, c.resample(c.mean, resamples, generator), c.count.astype(float)) @ basis for c in curves]
    upper = float(np.quantile(_distance(drawn), CONFIDENCE))
    worst, worst_low, worst_at, comparisons = _levels(curves)
    verdict = "coincide" if upper < margin else "differ" if worst_low > margin else "undecided"
    return Coincidence(
        verdict, margin, float(point), upper, worst, worst_low, worst_at, comparisons, len(curves), CONFIDENCE
    )


def _distance(values: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    pairs = [np.abs(a - b).max(-1) for a, b in itertools.combinations(values, 2)]
    distance: npt.NDArray[np.float64] = np.max(pairs, axis=0)
    return distance


def _levels(curves: list[Curve]) -> tuple[float, float, float, int]:
    """The difference of means, over pairs and shared levels, that is largest beyond its own uncertainty."""
    differences = []
    for a, b in itertools.combinations(curves, 2):
        for i, level in enumerate(a.x):
            for j in np.flatnonzero(np.isclose(b.x, level, rtol=1e-6)):
                variance = a.sigma**2 / a.count[i] + b.sigma**2 / b.count[j]
                differences.append((abs(a.mean[i] - b.mean[j]), np.sqrt(variance), a.freedom + b.freedom, level))
    if not differences:
        return float("nan"), float("-inf"), float("nan"), 0
    tail = (1 - CONFIDENCE) / (2 * len(differences))
    bounds = [(d - stats.t.isf(tail, freedom) * error, d, level) for d, error, freedom, level in differences]
    low, worst, level = max(bounds)
    return float(worst), float(low), float(level), len(differences)
