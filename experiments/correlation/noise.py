"""How much of a measured curve is the luck of a seed.

Runs that differ by their seed only give the noise directly: residuals around their mean, scaled by
sqrt(n/(n-1)) so that their variance is unbiased, pooled over configurations. With a single seed per
configuration the residuals of a smooth fit (a cubic in log x) stand in, scaled by its degrees of freedom;
what the fit misses then counts as noise, so the intervals are wide rather than narrow. That few residuals tell
the size of the noise poorly widens them further (`Curve.resample`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experiments.correlation.coefficients import Array
from hessdiag.errors import ConfigurationError


@dataclass(frozen=True)
class Curve:
    """One curve: its levels, the mean of the runs at each, how many these are, and residuals to draw noise
    from.
    """

    x: Array
    mean: Array
    count: npt.NDArray[np.int64]
    residuals: Array
    sigma: float
    freedom: int
    from_seeds: bool

    def resample(self, centre: Array, size: int, generator: np.random.Generator) -> Array:
        """`size` curves of means: `centre` plus noise drawn afresh for every run.

        The size of the noise is itself an estimate from few residuals: each curve's is divided by
        sqrt(chi²/freedom), as in Student's t, else intervals from one or two degrees of freedom are far too narrow.
        """
        drawn = np.zeros((size, len(self.x)))
        for level, count in enumerate(self.count):
            drawn[:, level] = generator.choice(self.residuals, size=(size, int(count))).mean(1)
        return centre + drawn / np.sqrt(generator.chisquare(self.freedom, size=(size, 1)) / self.freedom)


def curve(x: npt.ArrayLike, y: npt.ArrayLike) -> Curve:
    """Gather the runs (x, y) of one curve by their level x; runs without a finite y are left out."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    keep = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[keep], ys[keep]
    if (xs <= 0).any():
        raise ConfigurationError("a curve over log x needs positive x")
    levels, member = np.unique(np.round(xs, 9), return_inverse=True)
    if len(levels) < 3:
        raise ConfigurationError(f"a curve needs at least 3 levels, not {len(levels)}: run more of the sweep")
    count = np.bincount(member)
    mean = np.bincount(member, ys) / count
    many = count[member] > 1
    freedom = int(count[count > 1].sum() - (count > 1).sum())
    if freedom >= 2:
        scale = np.sqrt(count[member] / np.maximum(count[member] - 1, 1))
        residuals = ((ys - mean[member]) * scale)[many]
        sigma = float(np.sqrt(((ys - mean[member])[many] ** 2).sum() / freedom))
        from_seeds = True
    else:
        degree = min(3, len(levels) - 2)
        t = np.log(levels)
        t = (t - t.mean()) / t.std()
        design = np.vander(t, degree + 1)
        left = mean - design @ np.linalg.lstsq(design, mean, rcond=None)[0]
        freedom = len(levels) - degree - 1
        residuals = left * np.sqrt(len(levels) / freedom)
        sigma, from_seeds = float(np.sqrt((left**2).sum() / freedom)), False
    return Curve(levels, mean, count, residuals - residuals.mean(), sigma, freedom, from_seeds)
