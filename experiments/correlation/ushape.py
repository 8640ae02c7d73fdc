"""Is a curve U-shaped, or does a monotone one merely bend?

Two tests over t = log x on the means of the configurations. The two-lines test (Simonsohn 2018) asks for
slopes of opposite sign, both significant, on either side of a break that is set by his "Robin Hood" rule;
it holds its level on monotone curves of any bend. The quadratic test (Lind and Mehlum 2010) asks for slopes
of opposite sign at both ends of the range; it has more power where the curve is quadratic, and false alarms
where it is not. The first decides.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from experiments.correlation.coefficients import Array
from experiments.correlation.noise import Curve, curve


@dataclass(frozen=True)
class Slope:
    """A slope over log x with its one-sided p-value in the direction that a U needs."""

    value: float
    error: float
    p_value: float


@dataclass(frozen=True)
class UShape:
    """Both tests; `p_value` of each is the larger of its two slopes', so it is the p-value of "no U"."""

    inverted: bool
    break_at: float
    left: Slope
    right: Slope
    p_value: float
    quadratic_p_value: float
    levels: int

    def holds(self, level: float = 0.05) -> bool:
        """Whether the two-lines test finds the shape at this level."""
        return self.p_value < level


def u_shape(
    x: npt.ArrayLike, y: npt.ArrayLike, *, inverted: bool = False, seed: Sequence[Hashable] | None = None
) -> UShape:
    """Test whether y falls and then rises over log x (rises and then falls when `inverted`); `seed` pairs the runs."""
    values = np.asarray(y, dtype=float)
    measured = curve(x, -values if inverted else values, seed)
    t, weight = np.log(measured.x), measured.count.astype(float)
    point, left, right = _two_lines(t, measured, weight)
    ends = _quadratic_slopes(t, measured, weight)
    return UShape(
        inverted,
        float(np.exp(point)),
        left,
        right,
        max(left.p_value, right.p_value),
        max(ends[0].p_value, ends[1].p_value),
        len(t),
    )


def _least_squares(design: Array, y: Array, weight: Array, measured: Curve) -> tuple[Array, Array, float]:
    """Coefficients, their covariance and degrees of freedom.

    The noise is the seeds' own where these tell it and the fit is no worse, else the fit's residuals: a
    wrong shape must not make the slopes look certain.
    """
    root = np.sqrt(weight)
    coefficients = np.asarray(np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0], dtype=float)
    spread = np.asarray(np.linalg.pinv((design * weight[:, None]).T @ design), dtype=float)
    freedom = len(y) - np.linalg.matrix_rank(design)
    variance, used = 0.0, np.inf
    if freedom > 0:
        variance, used = float((weight * (y - design @ coefficients) ** 2).sum() / freedom), float(freedom)
    if measured.from_seeds and measured.sigma**2 >= variance:
        variance, used = measured.sigma**2, float(measured.freedom)
    return coefficients, variance * spread, used


def _slope(value: float, variance: float, freedom: float, *, negative: bool) -> Slope:
    error = float(np.sqrt(max(variance, 0.0)))
    ratio = value / error if error > 0 else float(np.copysign(np.inf, value)) if value else 0.0
    p = stats.t.cdf(ratio, freedom) if negative else stats.t.sf(ratio, freedom)
    return Slope(float(value), error, float(p) if np.isfinite(ratio) or ratio != 0 else 0.5)


def _two_lines(t: Array, measured: Curve, weight: Array) -> tuple[float, Slope, Slope]:
    y = measured.mean
    degree = min(3, len(t) - 2)
    smooth = np.vander(t, degree + 1)
    coefficients, covariance, _ = _least_squares(smooth, y, weight, measured)
    fitted = smooth @ coefficients
    error = np.sqrt(np.clip(np.einsum("ij,jk,ik->i", smooth, covariance, smooth), 0.0, None))
    inner = np.arange(1, len(t) - 1)
    lowest = inner[np.argmin(fitted[inner])]
    flat = t[inner][fitted[inner] <= fitted[lowest] + error[lowest]]
    flat = np.clip(flat, t[2], t[max(2, len(t) - 2)])  # two levels on either side: one bears no slope
    point = float(np.median(flat))
    left, right = _interrupted(t, y, weight, point, measured)
    strength = [abs(slope.value) / slope.error if slope.error > 0 else 1e6 for slope in (left, right)]
    if sum(strength) > 0 and len(flat) > 1:  # the flat stretch goes to the side whose slope is less certain
        point = float(np.quantile(flat, strength[1] / sum(strength)))
        left, right = _interrupted(t, y, weight, point, measured)
    return point, left, right


def _interrupted(t: Array, y: Array, weight: Array, point: float, measured: Curve) -> tuple[Slope, Slope]:
    """Two lines with a jump between: y = a + b (t-p)[t<p] + c (t-p)[t>=p] + d [t>=p]."""
    after = (t >= point).astype(float)
    design = np.stack([np.ones_like(t), (t - point) * (1 - after), (t - point) * after, after], axis=1)
    coefficients, covariance, freedom = _least_squares(design, y, weight, measured)
    sides = ((t < point).sum(), (t >= point).sum())
    slopes = []
    for index, negative in ((1, True), (2, False)):
        if sides[index - 1] < 2 or freedom == np.inf:  # no line through one point
            slopes.append(Slope(float("nan"), float("nan"), 1.0))
        else:
            variance = float(covariance[index, index])
            slopes.append(_slope(float(coefficients[index]), variance, freedom, negative=negative))
    return slopes[0], slopes[1]


def _quadratic_slopes(t: Array, measured: Curve, weight: Array) -> tuple[Slope, Slope]:
    design = np.stack([np.ones_like(t), t, t**2], axis=1)
    coefficients, covariance, freedom = _least_squares(design, measured.mean, weight, measured)
    slopes = []
    for end, negative in ((t[0], True), (t[-1], False)):
        direction = np.array([0.0, 1.0, 2 * end])
        variance = float(direction @ covariance @ direction)
        slopes.append(_slope(float(direction @ coefficients), variance, freedom, negative=negative))
    return slopes[0], slopes[1]
