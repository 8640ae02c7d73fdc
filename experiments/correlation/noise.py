"""How much of a measured curve is the luck of a seed.

Runs that differ by their seed only give the noise directly: residuals around their mean, scaled by
sqrt(n/(n-1)) so that their variance is unbiased, pooled over configurations. Where the levels share their seeds, each
seed's own effect is taken away first: it shifts a curve and bends none. The rest is inflated as in `contrasts`, for
neighbouring levels move together. With a single seed per
configuration the residuals of a smooth fit (a cubic in log x) stand in, scaled by its degrees of freedom;
what the fit misses then counts as noise, so the intervals are wide rather than narrow. That few residuals tell
the size of the noise poorly widens them further (`Curve.resample`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experiments.correlation.coefficients import Array
from experiments.correlation.contrasts import INFLATION, Layout
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


def curve(x: npt.ArrayLike, y: npt.ArrayLike, seed: Sequence[Hashable] | None = None) -> Curve:
    """Gather the runs (x, y) of one curve by their level x; runs without a finite y are left out. `seed` says which
    runs belong together.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    keep = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[keep], ys[keep]
    seeds = None if seed is None else [s for s, k in zip(seed, keep, strict=True) if k]
    if (xs <= 0).any():
        raise ConfigurationError("a curve over log x needs positive x")
    levels, member = np.unique(np.round(xs, 9), return_inverse=True)
    if len(levels) < 3:
        raise ConfigurationError(f"a curve needs at least 3 levels, not {len(levels)}: run more of the sweep")
    count = np.bincount(member)
    mean = np.bincount(member, ys) / count
    many = count[member] > 1
    freedom = int(count[count > 1].sum() - (count > 1).sum())
    paired = None if seeds is None else _paired(levels, member, seeds, ys)
    if paired is not None:
        mean, residuals, sigma, freedom = paired
        from_seeds = True
    elif freedom >= 2:
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


def _paired(
    levels: Array, member: npt.NDArray[np.intp], seeds: Sequence[Hashable], y: Array
) -> tuple[Array, Array, float, int] | None:
    """Means of the levels at one and the same seeds, and what cell and seed leave; None where seeds are not shared."""
    layout = Layout(member.tolist(), seeds, y)
    if layout.freedom < 2 or len(layout.seeds) < 2:
        return None
    relative = layout.relative()
    if relative is None:
        return None
    mean = float(y.mean()) + np.array([relative[i] for i in range(len(levels))])
    residuals = layout.residuals() * np.sqrt(INFLATION * len(y) / layout.freedom)
    sigma = float(np.sqrt(INFLATION * (layout.residuals() ** 2).sum() / layout.freedom))
    return mean, residuals, sigma, layout.freedom
