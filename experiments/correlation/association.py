"""Does one measured quantity go with another, among runs that differ by their luck alone?

Along a curve it cannot be told from one experiment: two independent smooth curves over eight curvatures correlate
significantly in more than a quarter of cases by a test that permutes levels (`tests/experiments/test_contrasts.py`),
for they hold two or three independent numbers each.
So every run is set against the others of its own cell (its activation): cell and seed are taken away from both
quantities, and what is left of y is regressed on what is left of x. Whatever the cells' means are, smooth curves or
not, they are gone. Coefficients along the curve are given as descriptions, without a p-value.

Student's t takes what is left as independent. From five seeds on whole residual curves of y are also matched with the
curves of other seeds, all of them or 5,000: exact for residuals that are dependent along the curve in any way.

Student's t also takes what is left to scatter alike in every cell. `shuffled` does not; no rule asks for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from experiments.correlation.coefficients import Array
from experiments.correlation.contrasts import Contrast, Layout
from hessdiag.errors import ConfigurationError

MATCHINGS = 5000
SHUFFLES = 20_000


@dataclass(frozen=True)
class Within:
    """`slope` in y's unit over x's range along the curve; Pearson's `correlation` of what is left, with the two-sided
    p-value of the slope; Spearman's of the cells' means (`along`); and the shares of matchings with other seeds whose
    cross product is at most, and at least, the observed one.
    """

    slope: Contrast
    correlation: float
    p_value: float
    along: float
    cells: int
    matched: tuple[float, float] | None


def within(cells: Sequence[Hashable], seeds: Sequence[Hashable], x: Array, y: Array) -> Within:
    """Regress what cell and seed leave of y on what they leave of x; runs without both are left out."""
    keep = np.isfinite(x) & np.isfinite(y)
    cells, seeds = ([value for value, k in zip(values, keep, strict=True) if k] for values in (cells, seeds))
    one, two = (Layout(cells, seeds, values[keep]) for values in (x, y))
    if one.freedom < 3 or len(one.seeds) < 2:
        raise ConfigurationError("too few seeds: runs of the same activation have nothing to be compared with")
    a, b = one.residuals(), two.residuals()
    spread, total = float((a**2).sum()), float((b**2).sum())
    means = np.array([[layout.means[cell] for cell in one.cells] for layout in (one, two)])
    span = float(np.ptp(means[0]))
    if spread < 1e-20 * float((x[keep] ** 2).sum()) or not span > 0:
        raise ConfigurationError("the first quantity does not vary")
    slope = float((a * b).sum()) / spread
    freedom = one.freedom - 1
    error = float(np.sqrt(((b - slope * a) ** 2).sum() / freedom / spread))
    correlation = float((a * b).sum() / np.sqrt(spread * total)) if total > 0 else float("nan")
    flat = len(one.cells) < 3 or not (np.ptp(means, axis=1) > 0).all()
    contrast = Contrast(slope * span, error * span, float(freedom), len(one.seeds))
    return Within(
        contrast,
        correlation,
        contrast.two_sided(),
        float("nan") if flat else float(stats.spearmanr(*means)[0]),
        len(one.cells),
        _matched(a, b, cells, seeds),
    )


def shuffled(x: Array, y: Array, *, number: int = SHUFFLES, seed: int = 0) -> float:
    """The two-sided p-value of the correlation that seed and cell leave of x and y [seeds, cells], x shuffled over the
    seeds of every cell by itself: whatever x and y scatter in one cell or another, if they do not go together.
    """
    generator = np.random.default_rng([seed, *x.shape])
    left = _left(y)
    observed = abs(float(_correlation(_left(x), left)))
    drawn = np.abs(_correlation(_left(generator.permuted(np.repeat(x[None], number, 0), axis=1)), left))
    return float((1 + (drawn >= observed * (1 - 1e-9)).sum()) / (1 + number))


def _left(values: Array) -> Array:
    """What the means of seeds and cells leave of [..., seeds, cells]."""
    whole = values.mean((-1, -2), keepdims=True)
    found: Array = values - values.mean(-1, keepdims=True) - values.mean(-2, keepdims=True) + whole
    return found


def _correlation(a: Array, b: Array) -> Array:
    found: Array = (a * b).sum((-1, -2)) / np.sqrt((a**2).sum((-1, -2)) * (b**2).sum())
    return found


def _matched(a: Array, b: Array, cells: Sequence[Hashable], seeds: Sequence[Hashable]) -> tuple[float, float] | None:
    """Cross products of whole residual curves with those of other seeds; complete data of five seeds and more."""
    names, places = list(dict.fromkeys(seeds)), list(dict.fromkeys(cells))
    number = len(names)
    if number < 5 or len(a) != number * len(places):
        return None
    tables = np.zeros((2, number, len(places)))
    for value, other, cell, seed in zip(a, b, cells, seeds, strict=True):
        tables[:, names.index(seed), places.index(cell)] = value, other
    products = tables[0] @ tables[1].T
    if number <= 7:
        orders = np.array(list(itertools.permutations(range(number))))
    else:
        orders = np.argsort(np.random.default_rng(number).random((MATCHINGS, number)), axis=1)
        orders[0] = np.arange(number)  # the observed one counts
    drawn = products[np.arange(number), orders].sum(1)
    observed, slack = float(np.trace(products)), 1e-9 * float(np.abs(products).sum())
    return float((drawn <= observed + slack).mean()), float((drawn >= observed - slack).mean())
