"""Ratios of norms with their intervals: shares and angles in one measurement, and one measurement against another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hessdiag.errors import ConfigurationError
from hessdiag.norm.estimates import NormEstimate, check_confidence
from hessdiag.norm.jackknife import Array, pseudo_values, student_quantile


@dataclass(frozen=True)
class Ratio:
    """A ratio and its interval; NaN with bounds 0 and infinity where a norm is not known."""

    value: float
    low: float
    high: float
    error: float
    """Standard error: of the ratio for a share, of its logarithm for a ratio of norms."""
    dof: float
    confidence: float
    paired: bool


def ratio(a: NormEstimate, b: NormEstimate, *, paired: bool = False, confidence: float = 0.95) -> Ratio:
    """rms(a) / rms(b), with an interval on the logarithm (delta method).

    `paired=True`: both measurements used the same random numbers in the same replicates, so that what they
    have in common cancels; groups of replicates are then left out of both at once. Otherwise they count as
    independent, with Welch's degrees of freedom. Two exact norms give an exact ratio.
    """
    check_confidence(confidence)
    if not (a.square > 0.0 and b.square > 0.0):
        return Ratio(math.nan, 0.0, math.inf, math.nan, 0.0, confidence, paired)
    value = a.rms / b.rms
    if paired:
        variance, dof = _paired_variance((a, 1.0 / a.square), (b, -1.0 / b.square))
    else:
        parts = [(0.0 if e.square_error == 0.0 else (e.square_error / e.square) ** 2, e.dof) for e in (a, b)]
        variance = sum(part for part, _ in parts)
        spread = sum(part**2 / max(degrees, 1) for part, degrees in parts)
        dof = variance**2 / spread if spread > 0.0 else math.inf
    error = 0.5 * math.sqrt(variance)
    half = _half_width(error, dof, confidence)
    return Ratio(value, value * math.exp(-half), value * math.exp(half), error, dof, confidence, paired)


def share(part: NormEstimate, whole: NormEstimate, *, confidence: float = 0.95) -> Ratio:
    """|part|^2 / |whole|^2 from the same replicates; more than 1 where the parts of the whole cancel.

    Either may be exact, e.g. the Gauss-Newton part against the total. A negative square of the part is left
    as it is; the lower end is cut at zero, where the quantity itself ends.
    """
    check_confidence(confidence)
    if not whole.square > 0.0:
        return Ratio(math.nan, 0.0, math.inf, math.nan, 0.0, confidence, True)
    value = part.square / whole.square
    variance, dof = _paired_variance((part, 1.0 / whole.square), (whole, -value / whole.square))
    error = math.sqrt(variance)
    half = _half_width(error, dof, confidence)
    return Ratio(value, max(value - half, 0.0), value + half, error, dof, confidence, True)


def cosine(a: NormEstimate, b: NormEstimate, whole: NormEstimate, *, confidence: float = 0.95) -> Ratio:
    """The cosine of the angle between two vectors and their sum `whole`, all from the same replicates or exact:

        <a, b> / (|a| |b|) = (|a + b|^2 - |a|^2 - |b|^2) / (2 |a| |b|).

    Positive where the parts add up, negative where they cancel. The three squares have no bias, so the cosine is
    consistent; its interval is that of its linear part (delta method, groups of replicates left out of all three at
    once), cut at -1 and 1. NaN with bounds -1 and 1 where a part's norm is not known or zero.
    """
    check_confidence(confidence)
    if not (a.square > 0.0 and b.square > 0.0):
        return Ratio(math.nan, -1.0, 1.0, math.nan, 0.0, confidence, True)
    scale = 0.5 / math.sqrt(a.square) / math.sqrt(b.square)
    value = (whole.square - a.square - b.square) * scale
    variance, dof = _paired_variance(
        (whole, scale), (a, -scale - 0.5 * value / a.square), (b, -scale - 0.5 * value / b.square)
    )
    error = math.sqrt(variance)
    half = _half_width(error, dof, confidence)
    low, high = (min(max(end, -1.0), 1.0) for end in (value - half, value + half))
    return Ratio(value, low, high, error, dof, confidence, True)


def _paired_variance(*terms: tuple[NormEstimate, float]) -> tuple[float, float]:
    """Jackknife variance of a weighted sum of squares T, groups left out of all of them at once.

    The plain jackknife: it counts noise of pairs about twice, hence is on the safe side where noise
    dominates.
    """
    known = [e.sizes for e, _ in terms if e.sizes]
    if not known:
        return 0.0, math.inf
    sizes = known[0]
    for other in known[1:]:
        if other != sizes:
            raise ConfigurationError(f"paired ratio of unlike replicates: groups of {sizes} and of {other}")
    with np.errstate(invalid="ignore"):  # squares that underflow leave infinite weights, and are told below
        both = sum(weight * _pseudo(e, sizes) for e, weight in terms)
    n = np.array(sizes, dtype=np.float64)
    m = n.sum()
    if len(sizes) < 2 or not np.all(np.isfinite(both)):
        return math.nan, 0.0
    centred = both - (both * n / m).sum()
    return float((centred**2 * (n / (m - n))).mean()), float(len(sizes) - 1)


def _pseudo(e: NormEstimate, sizes: tuple[int, ...]) -> Array:
    if not e.sizes:
        return np.full(len(sizes), e.square)
    return pseudo_values(np.array(e.square), np.array(e.deleted), sizes)


def _half_width(error: float, dof: float, confidence: float) -> float:
    if error == 0.0:
        return 0.0
    if math.isnan(error) or dof <= 0:
        return math.inf
    # Student's quantile takes fractional degrees; beyond a million it is the normal one.
    return student_quantile(confidence, min(dof, 1e6)) * error
