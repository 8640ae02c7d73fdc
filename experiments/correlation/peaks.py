"""Where a curve over max|σ''| is highest (or lowest), with an interval, by two fits that share no assumption.

The interval is a percentile interval over curves with seed noise drawn afresh: around the measured means
for the quadratic, whose vertex is a smooth function of them; around the fitted steps for the unimodal fit,
whose argmax would otherwise count the noise twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experiments.correlation.noise import curve
from experiments.correlation.shapes import quadratic, quadratic_peak, unimodal
from hessdiag.errors import UnknownNameError, nearest

FITS = ("quadratic", "unimodal")


@dataclass(frozen=True)
class Peak:
    """Where the curve has its extreme; `edge` says that the fit puts it at an end of the measured range."""

    fit: str
    lowest: bool
    at: float
    low: float
    high: float
    edge: bool
    levels: int
    runs: int
    from_seeds: bool
    confidence: float


def locate(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    fit: str = "quadratic",
    lowest: bool = False,
    seed: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    generator: np.random.Generator,
) -> Peak:
    """The x at which the curve of the runs (x, y) is highest, or lowest; `seed` pairs the runs."""
    if fit not in FITS:
        raise UnknownNameError(f"fit {fit!r}: {nearest(fit, list(FITS))}")
    values = np.asarray(y, dtype=float)
    measured = curve(x, -values if lowest else values, seed)
    levels, weight = measured.x, measured.count.astype(float)
    ends = float(levels[0]), float(levels[-1])
    if fit == "quadratic":
        at = float(quadratic_peak(quadratic(levels, measured.mean, weight), *ends))
        drawn = measured.resample(measured.mean, resamples, generator)
        peaks = quadratic_peak(quadratic(levels, drawn, weight), *ends)
    else:
        steps, first, last = unimodal(measured.mean, weight)
        at = float(np.sqrt(levels[first] * levels[last]))
        drawn = measured.resample(steps, resamples, generator)
        tops = [unimodal(row, weight)[1:] for row in drawn]
        peaks = np.array([np.sqrt(levels[i] * levels[j]) for i, j in tops])
    low, high = np.quantile(peaks, [(1 - confidence) / 2, (1 + confidence) / 2])
    if fit == "unimodal":  # the peak of a step function is a whole step: its neighbours bound it
        low = min(low, levels[max(first - 1, 0)])
        high = max(high, levels[min(last + 1, len(levels) - 1)])
    edge = at <= ends[0] * (1 + 1e-9) or at >= ends[1] * (1 - 1e-9)
    return Peak(
        fit,
        lowest,
        at,
        float(low),
        float(high),
        bool(edge),
        len(levels),
        int(measured.count.sum()),
        measured.from_seeds,
        confidence,
    )
