"""Contrasts within seeds, and the relation among runs of one activation: by hand, against other programs, and their
level on curves that are smooth and seeds that are dependent.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from experiments.correlation import Contrast, Layout, within
from experiments.correlation.association import shuffled
from experiments.correlation.contrasts import INFLATION
from experiments.correlation.forecast import equal_of, half_width, power_of, seeds_needed
from hessdiag.errors import ConfigurationError

LEVELS = np.array([0.5, 1, 2, 4, 7, 10, 20, 50])
LOW, BAND, HIGH = LEVELS[:3], LEVELS[3:6], LEVELS[6:]


def smooth(generator: np.random.Generator, size: int, scale: float = 0.7) -> np.ndarray:
    """Random curves over log x of unit variance."""
    t = np.log(LEVELS)
    covariance = np.exp(-((t[:, None] - t) ** 2) / (2 * scale**2)) + 1e-9 * np.eye(len(t))
    return generator.normal(size=(size, len(t))) @ np.linalg.cholesky(covariance).T


def runs(values: np.ndarray, inflation: float = INFLATION) -> Layout:
    seeds = np.repeat(np.arange(len(values)), values.shape[1])
    return Layout(list(LEVELS) * len(values), list(seeds), values.ravel(), inflation=inflation)


def test_two_cells_are_the_paired_t_test():
    """Differences 2 and 4: mean 3, standard error sqrt(2)/sqrt(2) = 1, one degree of freedom."""
    found = Layout("abab", [0, 0, 1, 1], [1.0, 3.0, 2.0, 6.0]).difference("b", "a")
    assert (found.value, found.freedom, found.note) == (pytest.approx(3), 1, "")
    assert found.error == pytest.approx(1)
    y = np.random.default_rng(0).normal(size=(5, 2))
    found = Layout("ab" * 5, np.repeat(range(5), 2), y.ravel()).difference("b", "a")
    other = stats.ttest_rel(y[:, 1], y[:, 0], alternative="greater")
    assert found.above() == pytest.approx(other.pvalue, rel=1e-12)
    assert found.below() == pytest.approx(1 - other.pvalue, rel=1e-12)
    interval = stats.ttest_rel(y[:, 1], y[:, 0]).confidence_interval(0.95)
    assert found.interval(0.05) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_the_variance_by_hand():
    """Seeds (0, 1, 5), (2, 3, 1): cell means 1, 2, 3, seed means 2, 2; residuals -1 -1 2 and 1 1 -2, so the residual
    sum is 12 with 2 degrees of freedom. Contrast b - a: 1 and 1, so the seeds' own part is 0 with 1, and what is beside
    it 12 with 1. k = 1.5: variance (1 * 1.5 * 12 + 0) / 2 = 9, times c'c/n = 1: error 3 at 2 degrees of freedom.
    """
    made = {"inflation": 1.5}
    found = Layout("abcabc", [0, 0, 0, 1, 1, 1], [0.0, 1, 5, 2, 3, 1], **made).difference("b", "a")
    assert (found.value, found.error, found.freedom) == (pytest.approx(1), pytest.approx(3), 2)
    found = Layout("abcabc", [0, 0, 0, 1, 1, 1], [0.0, 1, 5, 2, 3, 1]).difference("b", "a")
    assert found.error == pytest.approx(np.sqrt(6))  # k = 1


def test_two_one_sided_tests_by_hand():
    """Value 0.2, error 0.4, 10 degrees of freedom, δ = 1: t = 2.0 and 3.0; the larger p is that of 2.0."""
    found = Contrast(0.2, 0.4, 10.0, 3)
    assert found.within(1.0) == pytest.approx(stats.t.sf(2.0, 10))
    assert found.half(0.05) == pytest.approx(2.2281388519649385 * 0.4)
    assert Contrast(0.0, 0.0, 3.0, 2).within(0.1) == 0
    assert Contrast(0.0, 0.0, 3.0, 2).above() == 1


def test_what_all_cells_of_a_seed_share_changes_nothing():
    generator = np.random.default_rng(1)
    y = generator.normal(size=(4, 8))
    one, two = (runs(values).difference(BAND, LOW) for values in (y, y + 100 * generator.normal(size=(4, 1))))
    assert (two.value, two.error) == (pytest.approx(one.value), pytest.approx(one.error))


def test_missing_cells_are_bridged_by_least_squares():
    generator = np.random.default_rng(2)
    y = generator.normal(size=(4, 8)) + 5 * generator.normal(size=(4, 1))
    y[0, 1] = y[2, 5] = y[3, 7] = y[3, 0] = np.nan
    found = runs(y).difference(BAND, LOW)
    keep = np.isfinite(y.ravel())
    seed, cell = (i.ravel()[keep] for i in np.indices(y.shape))
    design = np.hstack([np.eye(8)[cell], np.eye(4)[seed][:, 1:]])
    means = np.linalg.lstsq(design, y.ravel()[keep], rcond=None)[0][:8]
    assert found.value == pytest.approx(means[3:6].mean() - means[:3].mean())
    assert abs(found.value - (np.nanmean(y[:, 3:6]) - np.nanmean(y[:, :3]))) > 0.01
    assert found.freedom == 6  # one seed alone has all cells of the contrast, so the pool is all there is


def test_cells_without_common_seeds_are_compared_unpaired():
    generator = np.random.default_rng(3)
    a, b = generator.normal(size=(2, 4))
    found = Layout("aaaabbbb", range(8), [*a, *b], inflation=1.5).difference("b", "a")
    assert found.above() == pytest.approx(stats.ttest_ind(b, a, alternative="greater").pvalue)
    assert found.note.startswith("unpaired")
    assert found.freedom == 6


def test_one_seed_has_the_roughness_of_its_curve_or_nothing():
    y = np.random.default_rng(4).normal(size=(1, 8))
    assert runs(y).difference(BAND, LOW) is None
    place = {level: level for level in LEVELS}
    found = Layout(list(LEVELS), [0] * 8, y[0], inflation=1.5, place=place).difference(BAND, LOW)
    assert found.note.startswith("one seed")
    assert found.freedom == 4
    design = np.vander(np.log(LEVELS), 4)
    left = y[0] - design @ np.linalg.lstsq(design, y[0], rcond=None)[0]
    assert found.error == pytest.approx(np.sqrt(1.5 * (left**2).sum() / 4 * (2 / 3)))
    assert runs(y).difference(BAND, [3.3]) is None


@pytest.mark.statistical
@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_contrasts_keep_their_level_where_neighbours_move_together(seeds):
    """400 curves without a truth, seeds' effects, 0.4 of each run's variance a smooth curve of its seed: band less low
    and band less high are called different in at most 5% (fails once in 10,000); independent runs in fewer.
    """
    generator, alarms = np.random.default_rng([5, seeds]), np.zeros((2, 2))
    for _ in range(400):
        for i, part in enumerate((0.0, 0.4)):
            own = np.sqrt(1 - part) * generator.normal(size=(seeds, 8)) + np.sqrt(part) * smooth(generator, seeds)
            layout = runs(own + 2 * generator.normal(size=(seeds, 1)))
            for j, side in enumerate((LOW, HIGH)):
                found = layout.difference(BAND, side)
                alarms[i, j] += min(found.above(), found.below()) <= 0.025
    assert (alarms <= stats.binom.isf(1e-4, 400, 0.05)).all()
    assert alarms[0].sum() <= alarms[1].sum() + 10


@pytest.mark.statistical
@pytest.mark.parametrize("seeds", [3, 6])
def test_the_formula_of_power_agrees_with_what_the_contrasts_do(seeds):
    """600 sweeps of independent runs (a contrast's variance is 1 times the pooled one) with a true bump of 1.2: mean
    half-width within 4% and power within four standard errors of the formulas; where there is no bump, equivalence
    within 1.5 too, up to 4% for the error that is taken at its mean.
    """
    generator = np.random.default_rng([6, seeds])
    weights = dict(zip(LEVELS, [-1 / 3] * 3 + [1 / 3] * 3 + [0] * 2, strict=True))
    halves, seen, equal, plan = [], 0, 0, None
    bump = np.where((LEVELS >= 4) & (LEVELS <= 10), 1.2, 0.0)
    for _ in range(600):
        layout = runs(bump + generator.normal(size=(seeds, 8)) + generator.normal(size=(seeds, 1)))
        found = layout.contrast(weights)
        plan = layout.planned(weights)
        halves.append(found.half(0.05))
        seen += found.interval(0.05)[0] > 0
        equal += Contrast(found.value - 1.2, found.error, found.freedom, seeds).within(1.5) <= 0.05
    assert plan.factor == pytest.approx((2 / 3) / seeds)
    assert np.mean(halves) == pytest.approx(half_width(plan, 1.0, 0.05, ratio=1.0), rel=0.04)
    expected = power_of(plan, 1.0, 1.2, 0.05, ratio=1.0)
    assert abs(seen / 600 - expected) < 4 * np.sqrt(expected * (1 - expected) / 600) + 0.005
    expected = equal_of(plan, 1.0, 1.5, 0.05, ratio=1.0)
    assert abs(equal / 600 - expected) < 4 * np.sqrt(expected * (1 - expected) / 600) + 0.04


def test_seeds_needed_are_the_first_that_reach_the_power():
    """Two cells, k = 1: the paired t-test. Effect 1, scatter 1 a run, so sqrt(2) a difference: 24 pairs give 90%."""
    number = seeds_needed({"a": 1.0, "b": -1.0}, 2, 1.0, 1.0, 0.05, 1.0)

    def power(n: int) -> float:
        return float(stats.nct.sf(stats.t.isf(0.025, n - 1), n - 1, np.sqrt(n / 2)))

    assert number == 24
    assert power(number) >= 0.9 > power(number - 1)
    assert seeds_needed({"a": 1.0, "b": -1.0}, 2, 100.0, 1.0, 0.05, 1.0) == 0


def test_the_slope_within_cells_is_the_regression_with_dummies():
    generator = np.random.default_rng(7)
    x, y = generator.normal(size=(2, 3, 8))
    seeds, cells = np.indices((3, 8))
    found = within(list(LEVELS) * 3, list(seeds.ravel()), x.ravel(), y.ravel())
    design = np.hstack([x.reshape(-1, 1), np.eye(8)[cells.ravel()], np.eye(3)[seeds.ravel()][:, 1:]])
    solution, rss, *_ = np.linalg.lstsq(design, y.ravel(), rcond=None)
    error = np.sqrt(rss[0] / (24 - 11) * np.linalg.inv(design.T @ design)[0, 0])
    span = np.ptp(x.mean(0))
    assert (found.slope.value, found.slope.error) == (pytest.approx(solution[0] * span), pytest.approx(error * span))
    assert found.slope.freedom == 13
    assert found.along == pytest.approx(stats.spearmanr(x.mean(0), y.mean(0))[0])
    assert found.matched is None
    with pytest.raises(ConfigurationError, match="too few seeds"):
        within(list(LEVELS), [0] * 8, x[0], y[0])


def test_matchings_are_all_permutations_of_whole_curves():
    generator = np.random.default_rng(8)
    x, y = generator.normal(size=(2, 5, 8))
    y -= 0.5 * x
    found = within(list(LEVELS) * 5, list(np.repeat(range(5), 8)), x.ravel(), y.ravel())
    left = [v - v.mean(0) - v.mean(1, keepdims=True) + v.mean() for v in (x, y)]
    sums = np.array([(left[0] * left[1][list(order)]).sum() for order in itertools.permutations(range(5))])
    observed = sums[0]
    assert found.matched == (
        pytest.approx((sums <= observed + 1e-9).mean()),
        pytest.approx((sums >= observed - 1e-9).mean()),
    )


@pytest.mark.statistical
@pytest.mark.parametrize("seeds", [3, 6])
def test_two_independent_smooth_curves_are_no_relation_and_a_true_one_is_seen(seeds):
    """Independent smooth curves of the cells' means, 20 times the runs' scatter: permuting the eight levels calls more
    than a quarter of them related at 5%; within cells at most 5% of 250 (fails once in 10,000), also with runs that
    depend on their neighbours. Where each run's robustness falls with its own norm, four of five are seen.
    """
    generator = np.random.default_rng([9, seeds])
    permuted = alarms = seen = 0
    cells, labels = list(LEVELS) * seeds, list(np.repeat(range(seeds), 8))

    def p_of(x: np.ndarray, y: np.ndarray) -> float:
        found = within(cells, labels, x.ravel(), y.ravel())
        if found.matched is None:
            return found.p_value
        return max(found.p_value, 2 * min(found.matched))

    for _ in range(250):
        curves = 20 * smooth(generator, 2, 1.5)
        own = [np.sqrt(0.7) * generator.normal(size=(seeds, 8)) + np.sqrt(0.3) * smooth(generator, seeds) for _ in "xy"]
        permuted += stats.spearmanr(*curves).pvalue <= 0.05
        alarms += p_of(curves[0] + own[0], curves[1] + own[1]) <= 0.05
        seen += p_of(curves[0] + own[0], curves[1] + own[1] - own[0]) <= 0.05
    assert permuted > 63
    assert alarms <= stats.binom.isf(1e-4, 250, 0.05)
    assert seen > 200


def test_shuffles_within_cells_are_all_that_there_are():
    """Two seeds, four cells: 16 shuffles, each drawn about as often as any other."""
    generator = np.random.default_rng(10)
    x, y = generator.normal(size=(2, 2, 4))
    y -= x
    every = [
        np.array([[x[int(turn[k] ^ row), k] for k in range(4)] for row in (0, 1)])
        for turn in itertools.product((False, True), repeat=4)
    ]

    def relation(values: np.ndarray) -> float:
        left = [v - v.mean(0) - v.mean(1, keepdims=True) + v.mean() for v in (values, y)]
        return abs(np.corrcoef(left[0].ravel(), left[1].ravel())[0, 1])

    share = np.mean([relation(values) >= relation(x) - 1e-9 for values in every])
    assert shuffled(x, y) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 20_000) + 1e-4)


@pytest.mark.statistical
def test_unequal_scatter_is_no_relation_where_runs_are_shuffled_and_a_true_one_is_seen():
    """One level scatters four times as much in x and in y, independently: Student's t calls more than a tenth of 400
    related at 5%, the shuffles about 5% (fails once in 10,000); a relation in all levels is seen.
    """
    generator = np.random.default_rng(11)
    wide = np.array([4.0, 1, 1, 1, 1, 1, 1, 1])
    cells, labels = list(LEVELS) * 3, list(np.repeat(range(3), 8))
    plain = alarms = seen = 0
    for _ in range(400):
        x, y = wide * generator.normal(size=(2, 3, 8))
        plain += within(cells, labels, x.ravel(), y.ravel()).p_value <= 0.05
        alarms += shuffled(x, y, number=499) <= 0.05
        x, y = generator.normal(size=(2, 3, 8))
        seen += shuffled(x, y - 1.5 * x, number=499) <= 0.05
    assert plain > 40
    assert alarms <= stats.binom.isf(1e-4, 400, 0.05)
    assert seen > 320
