"""Contrasts of configurations within seeds: their value, their standard error and its degrees of freedom.

Runs of one seed share initialisation, order and noise over all configurations, so the model is

    y[seed, cell] = mean[cell] + effect[seed] + rest[seed, cell]

fitted by least squares, missing cells and all; a cell is a level of a curve or an activation of a table. A contrast is
sum_j c_j mean[j] with sum_j c_j = 0: the seeds' effects leave it. Were the rest independent, its variance would be
s² v with s² the residual variance and v = c (X'X)⁺ c. It is not quite: neighbouring levels move together within a
seed. Over 135 contrasts of the stored runs on digits the variance of seeds' own contrasts was 1.39 times that of the
independent model (`python -m experiments.correlation.scatter`). Each seed's own contrast d_s knows this, but three
seeds tell a variance badly. So the two are pooled, as moderated t-statistics are (Smyth 2004):

    variance = v (F k s² + (n - 1) o²) / (F + n - 1),    F = 6 (fewer if s² has fewer),
                                                         k = 1.5 along curves, 1 for cells without neighbours,
    o² = sum_s (d_s - mean d)² / ((n - 1) sum_j c_j²),    over the n seeds that have every cell of the contrast,

with Student's t at F + n - 1 degrees of freedom; s² is what the residuals hold beside the contrast itself. Cells that
share no seeds are compared unpaired: one-way analysis of variance, scatter pooled over seeds, and a note says so. A
single seed tells no scatter; along a curve the residuals of a cubic in log x stand in (k s² again), with a note.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from experiments.correlation.coefficients import Array

INFLATION = 1.5
PRIOR_FREEDOM = 6.0
TINY = 1e-12


@dataclass(frozen=True)
class Contrast:
    """A difference between means with its standard error; `note` says what was not as it should be."""

    value: float
    error: float
    freedom: float
    seeds: int
    note: str = ""

    def above(self, bound: float = 0.0) -> float:
        """One-sided p-value of "the true value is at most `bound`"."""
        return self._tail(self.value - bound)

    def below(self, bound: float = 0.0) -> float:
        """One-sided p-value of "the true value is at least `bound`"."""
        return self._tail(bound - self.value)

    def two_sided(self) -> float:
        """p-value of "the true value is 0", in both directions."""
        return min(1.0, 2 * min(self.above(), self.below()))

    def within(self, delta: float) -> float:
        """p-value of "the true value lies `delta` or more from 0": two one-sided tests (Schuirmann 1987)."""
        return max(self.above(-delta), self.below(delta))

    def half(self, level: float) -> float:
        """Half of the interval at 1 - level."""
        return float(stats.t.isf(level / 2, self.freedom)) * self.error

    def interval(self, level: float) -> tuple[float, float]:
        """Student's interval."""
        half = self.half(level)
        return self.value - half, self.value + half

    def power(self, effect: float, level: float) -> float:
        """The chance of a two-sided test at `level` to see a true value of `effect`, on its side."""
        if not self.error > 0:
            return 1.0
        return power(effect / self.error, self.freedom, level)

    def times(self, factor: float) -> Contrast:
        """The contrast in another unit or turned over."""
        return Contrast(self.value * factor, self.error * abs(factor), self.freedom, self.seeds, self.note)

    def _tail(self, distance: float) -> float:
        if not self.error > 0:
            return 0.0 if distance > 0 else 1.0
        return float(stats.t.sf(distance / self.error, self.freedom))


def power(shift: float, freedom: float, level: float) -> float:
    """P(T > t) of a noncentral t with `shift` standard errors, t the two-sided critical value."""
    if shift > 37:  # scipy's noncentral t gives up there, and the answer is 1
        return 1.0
    return float(stats.nct.sf(stats.t.isf(level / 2, freedom), freedom, shift))


@dataclass(frozen=True)
class Plan:
    """A contrast's variance in units of one run's (`factor`), the weights of the pooled scatter and of the seeds' own,
    and what the pooled scatter is multiplied by.
    """

    factor: float
    prior: float
    own: int
    inflation: float = INFLATION

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the standard error."""
        return self.prior + self.own

    def overstated(self, ratio: float) -> float:
        """How much too large the variance is on average, where a contrast's own is `ratio` times the pooled one."""
        return (self.prior * self.inflation + self.own * ratio) / (self.freedom * ratio)


class Layout:
    """Runs by cell and seed, fitted once; contrasts are then cheap. Values that are not finite are left out."""

    def __init__(
        self,
        cells: Sequence[Hashable],
        seeds: Sequence[Hashable],
        values: npt.ArrayLike,
        *,
        inflation: float = 1.0,
        place: Mapping[Hashable, float] | None = None,
    ) -> None:
        """`inflation` is k: 1 unless the cells are levels of curves; `place` gives each level's x."""
        y = np.asarray(values, dtype=float)
        keep = np.isfinite(y)
        kept = [(c, s) for c, s, k in zip(cells, seeds, keep, strict=True) if k]
        self.cells: list[Hashable] = list(dict.fromkeys(c for c, _ in kept))
        self.seeds: list[Hashable] = list(dict.fromkeys(s for _, s in kept))
        self.y: Array = y[keep]
        self._cell = np.array([self.cells.index(c) for c, _ in kept], dtype=int)
        self._seed = np.array([self.seeds.index(s) for _, s in kept], dtype=int)
        self._place, self.inflation = place, inflation
        within = np.eye(len(self.cells))[self._cell]
        self._two = _Fit(np.hstack([within, np.eye(len(self.seeds))[self._seed]]), self.y)
        self._one = _Fit(within, self.y)
        self._scale = float(np.abs(self.y).max()) if len(self.y) else 0.0

    @property
    def means(self) -> dict[Hashable, float]:
        """Mean of every cell, over the seeds that it has."""
        return {cell: float(self.y[self._cell == i].mean()) for i, cell in enumerate(self.cells)}

    def table(self, cells: Sequence[Hashable]) -> Array:
        """Seeds by cells, NaN where there is no run."""
        found = np.full((len(self.seeds), len(self.cells)), np.nan)
        found[self._seed, self._cell] = self.y
        return found[:, [self.cells.index(cell) for cell in cells]]

    def relative(self) -> dict[Hashable, float] | None:
        """Every cell's mean less the mean of all cells, within seeds; None where these do not tell it."""
        number = len(self.cells)
        found: dict[Hashable, float] = {}
        for i, cell in enumerate(self.cells):
            c = np.concatenate([np.eye(number)[i] - 1 / number, np.zeros(len(self.seeds))])
            if number > 1 and not self._two.estimable(c):
                return None
            found[cell] = self._two.combine(c)[0]
        return found

    def residuals(self) -> Array:
        """What cell and seed leave of every run, in the order of the finite values."""
        return self._two.residuals

    @property
    def freedom(self) -> int:
        """Degrees of freedom of `residuals`."""
        return self._two.freedom

    def difference(self, high: Sequence[Hashable], low: Sequence[Hashable]) -> Contrast | None:
        """The mean of some cells less that of others; None where either side or the scatter is missing."""
        sides = [[cell for cell in side if cell in self.cells] for side in (high, low)]
        if not all(sides):
            return None
        weights = {cell: 1 / len(sides[0]) for cell in sides[0]}
        for cell in sides[1]:
            weights[cell] = weights.get(cell, 0.0) - 1 / len(sides[1])
        return self.contrast(weights)

    def contrast(self, weights: Mapping[Hashable, float]) -> Contrast | None:
        """The contrast with these weights; None where a cell has no run, or where nothing tells the scatter."""
        if any(cell not in self.cells for cell, weight in weights.items() if weight):
            return None
        c = np.array([float(weights.get(cell, 0.0)) for cell in self.cells])
        if not np.abs(c).max() > 0 or abs(c.sum()) > 1e-9 * np.abs(c).sum():
            return None
        plan = self._plan(c)
        if plan is not None:
            return self._paired(c, plan)
        if self._one.freedom > 0:
            value, factor = self._one.combine(c)
            variance = self._one.rss / self._one.freedom
            note = "unpaired: the levels share too few seeds"
            return self._made(value, variance * factor, float(self._one.freedom), note)
        return self._single(c)

    def planned(self, weights: Mapping[Hashable, float]) -> Plan | None:
        """What the design alone says of a contrast within seeds: nothing of it depends on the values."""
        if any(cell not in self.cells for cell in weights):
            return None
        return self._plan(np.array([float(weights.get(cell, 0.0)) for cell in self.cells]))

    def _plan(self, c: Array) -> Plan | None:
        longer = np.concatenate([c, np.zeros(len(self.seeds))])
        if self._two.freedom < 1 or len(self.seeds) < 2 or not self._two.estimable(longer):
            return None
        own = max(len(self._own(c)) - 1, 0)
        prior = min(PRIOR_FREEDOM, float(self._two.freedom - own))
        return Plan(self._two.combine(longer)[1], prior, own, self.inflation) if prior + own > 0 else None

    def _paired(self, c: Array, plan: Plan) -> Contrast:
        value, _ = self._two.combine(np.concatenate([c, np.zeros(len(self.seeds))]))
        own = self._own(c)
        spent = float(((own - own.mean()) ** 2).sum()) / float((c**2).sum()) if plan.own else 0.0
        rest = self._two.freedom - plan.own
        beside = max(self._two.rss - spent, 0.0) / rest if rest > 0 else 0.0
        variance = (plan.prior * plan.inflation * beside + spent) / plan.freedom
        return self._made(value, variance * plan.factor, plan.freedom, "")

    def _single(self, c: Array) -> Contrast | None:
        """One run a level: the roughness of the curve, a cubic in log x taken away, is all there is."""
        if self._place is None or len(self.cells) < 6:
            return None
        t = np.log([self._place[cell] for cell in self.cells])
        smooth = _Fit(np.vander((t - t.mean()) / t.std(), 4), self._one.coefficients)
        value, factor = self._one.combine(c)
        freedom = float(min(PRIOR_FREEDOM, smooth.freedom))
        variance = self.inflation * smooth.rss / smooth.freedom
        return self._made(value, variance * factor, freedom, "one seed: scatter from the roughness of the curve")

    def _own(self, c: Array) -> Array:
        """The contrast of every seed that has all of its cells."""
        found = []
        for seed in range(len(self.seeds)):
            mine = self._seed == seed
            sums = np.bincount(self._cell[mine], self.y[mine], len(self.cells))
            counts = np.bincount(self._cell[mine], minlength=len(self.cells))
            if (counts[c != 0] > 0).all():
                found.append(float((c * sums / np.maximum(counts, 1)).sum()))
        return np.array(found)

    def _made(self, value: float, variance: float, freedom: float, note: str) -> Contrast:
        error = float(np.sqrt(max(variance, 0.0)))
        if error < TINY * self._scale:  # every run gave the same
            error = 0.0
        if abs(value) < TINY * self._scale:
            value = 0.0
        return Contrast(value, error, freedom, len(self.seeds), note)


class _Fit:
    """Least squares of y on a design that need not have full rank."""

    def __init__(self, design: Array, y: Array) -> None:
        gram = design.T @ design
        self._gram = gram
        self._inverse = np.linalg.pinv(gram, rcond=1e-10, hermitian=True) if gram.size else gram
        self.coefficients: Array = self._inverse @ (design.T @ y)
        self.residuals: Array = y - design @ self.coefficients
        self.rss = float((self.residuals**2).sum())
        rank = round(float(np.trace(self._inverse @ gram))) if gram.size else 0
        self.freedom = len(y) - rank

    def estimable(self, c: Array) -> bool:
        """Whether the data determine the contrast."""
        return bool(np.abs(c @ self._inverse @ self._gram - c).max() < 1e-6 * np.abs(c).max())

    def combine(self, c: Array) -> tuple[float, float]:
        """The contrast's value, and its variance in units of one run's."""
        return float(c @ self.coefficients), float(c @ self._inverse @ c)
