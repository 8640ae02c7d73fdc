"""Correlations, peaks, U-shapes and coincidence on synthetic data whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from experiments.correlation import coincide, locate, u_shape
from experiments.correlation.coefficients import KINDS, correlation, partial
from experiments.correlation.noise import curve
from experiments.correlation.shapes import quadratic, quadratic_peak, unimodal
from hessdiag.errors import ConfigurationError, UnknownNameError

LEVELS = np.array([0.5, 1, 2, 4, 7, 10, 15, 25])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def within(count: int, total: int, rate: float) -> bool:
    """Whether a count agrees with a binomial rate; a false alarm once in 10,000 seeds."""
    return bool(stats.binomtest(count, total, rate).pvalue > 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ties", [False, True])
def test_coefficients_agree_with_scipy(kind, ties):
    generator = rng(1)
    x, y = generator.normal(size=(2, 5, 17))
    if ties:
        x, y = np.round(x), np.round(y)
    reference = {"spearman": stats.spearmanr, "kendall": stats.kendalltau, "pearson": stats.pearsonr}[kind]
    expected = [reference(a, b)[0] for a, b in zip(x, y, strict=True)]
    found = [correlation(kind, a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_partial_coefficients_equal_the_residuals_and_the_published_formula():
    generator = rng(2)
    z, w, x, y = generator.normal(size=(4, 40))
    x, y = x + z - w, y + 2 * z + w
    design = np.stack([np.ones(40), z, w], axis=1)
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    assert partial("pearson", x, y, [z, w]) == pytest.approx(stats.pearsonr(*left)[0], abs=1e-12)
    xy, xz, yz = (correlation("kendall", a, b) for a, b in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial("kendall", x, y, [z]) == pytest.approx(float(expected), abs=1e-12)
    assert np.isnan(partial("pearson", x, y, [x]))


def test_a_misspelt_kind_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'spearman'"):
        correlation("spaerman", np.ones(3), np.ones(3))


def test_unimodal_fit_is_the_best_of_all_splits():
    """Against brute force: for every mode, isotonic regression by scipy on either side with the mode above
    both.
    """
    generator = rng(8)
    for _ in range(40):
        size = int(generator.integers(3, 9))
        y, weight = generator.normal(size=size), generator.integers(1, 4, size=size).astype(float)
        fit, first, last = unimodal(y, weight)
        best = np.inf
        for split in range(size + 1):
            parts = []
            if split:
                parts.append(stats_isotonic(y[:split], weight[:split], True))
            if split < size:
                parts.append(stats_isotonic(y[split:], weight[split:], False))
            best = min(best, float((weight * (y - np.concatenate(parts)) ** 2).sum()))
        assert (weight * (y - fit) ** 2).sum() == pytest.approx(best, abs=1e-10)
        assert (np.diff(fit[: first + 1]) >= 0).all()
        assert (np.diff(fit[last:]) <= 0).all()
        assert fit[first] == fit.max() == fit[last]


def stats_isotonic(y, weight, increasing):
    from scipy.optimize import isotonic_regression

    return isotonic_regression(y, weights=weight, increasing=increasing).x


def test_quadratic_peaks_are_exact_without_noise_and_stay_in_the_range():
    y = 3 - 2 * (np.log(LEVELS) - np.log(6)) ** 2
    fit = quadratic(LEVELS, np.stack([y, np.log(LEVELS), -np.log(LEVELS)]), np.ones(8))
    np.testing.assert_allclose(quadratic_peak(fit, 0.5, 25), [6, 25, 0.5], rtol=1e-9)
    with_vertex_outside = 1 - (np.log(LEVELS) - np.log(100)) ** 2
    assert quadratic_peak(quadratic(LEVELS, with_vertex_outside, np.ones(8)), 0.5, 25) == pytest.approx(25)


@pytest.mark.statistical
@pytest.mark.parametrize("fit", ["quadratic", "unimodal"])
@pytest.mark.parametrize(
    ("levels", "seeds"), [(LEVELS, 1), (LEVELS, 3), (LEVELS[1::2], 3), (LEVELS[[1, 2, 3, 4, 6, 7]], 1)]
)
def test_peak_intervals_cover(fit, levels, seeds):
    """True peak at 6, three points of noise against a fall of 18: 95% intervals (120 of them) hold it as often as
    they say, or more often (fails once in 10,000 seeds at 94%), even where one seed leaves two degrees of freedom.
    """
    generator, covered = rng(9), 0
    for _ in range(120):
        x = np.repeat(levels, seeds)
        y = 50 - 3 * (np.log(x) - np.log(6)) ** 2 + generator.normal(size=len(x)) * 1.5
        peak = locate(x, y, fit=fit, resamples=200, generator=generator)
        covered += peak.low <= 6 <= peak.high
        assert peak.low <= peak.at <= peak.high
    assert covered >= stats.binom.ppf(1e-4, 120, 0.94)
    assert peak.from_seeds == (seeds > 1)


def test_the_lowest_point_is_the_peak_turned_over():
    x = np.repeat(LEVELS, 2)
    y = (np.log(x) - np.log(6)) ** 2 + np.tile([0.01, -0.01], 8)
    low = locate(x, y, lowest=True, generator=rng(10))
    assert low.at == pytest.approx(6, rel=1e-6)
    assert not low.edge
    rising = locate(x, np.log(x), generator=rng(10))
    assert rising.edge
    assert rising.at == pytest.approx(25)
    with pytest.raises(UnknownNameError, match="unimodal"):
        locate(x, y, fit="unimodel", generator=rng(10))


@pytest.mark.statistical
@pytest.mark.parametrize("shape", ["log", "linear", "saturating", "flat", "elbow"])
def test_monotone_curves_are_not_called_u_shaped(shape):
    """The two-lines test holds its 5% on bends of every kind (150 curves; fails once in 10,000 seeds at the
    level).
    """
    functions = {
        "log": np.log,
        "linear": lambda x: x / 10,
        "saturating": lambda x: -1 / x,
        "flat": lambda x: 0 * x,
        "elbow": lambda x: np.maximum(np.log(x / 5), 0),
    }
    generator, x = rng(11), np.repeat(LEVELS, 3)
    alarms = sum(u_shape(x, functions[shape](x) + generator.normal(size=24) * 0.3).holds() for _ in range(150))
    assert alarms <= stats.binom.isf(1e-4, 150, 0.05)


def test_a_clear_u_is_found_either_way_up():
    generator, x = rng(12), np.repeat(LEVELS, 3)
    y = (np.log(x) - np.log(5)) ** 2 + generator.normal(size=24) * 0.3
    upright, inverted = u_shape(x, y), u_shape(x, -y, inverted=True)
    assert upright.holds()
    assert upright.left.value < 0 < upright.right.value
    assert 2 < upright.break_at < 12
    assert upright.quadratic_p_value < 0.001
    assert inverted.p_value == pytest.approx(upright.p_value)
    assert not u_shape(x, y, inverted=True).holds()


@pytest.mark.parametrize("shape", [np.log, lambda x: -1 / x])
def test_a_break_leaves_two_levels_on_either_side(shape):
    """A monotone curve is lowest at its end; one level there bears no slope, which is no slope of the wrong sign."""
    x = np.repeat(LEVELS, 3)
    found = u_shape(x, shape(x) + np.tile([-0.01, 0.0, 0.01], 8))
    assert found.break_at >= LEVELS[2] * (1 - 1e-9)
    assert found.left.value > 0
    assert found.left.p_value > 0.975
    assert not found.holds()


def test_seed_noise_is_measured_without_bias():
    generator, values = rng(13), []
    for _ in range(200):
        x = np.repeat(LEVELS, 3)
        values.append(curve(x, np.sin(x) * 10 + generator.normal(size=24) * 2).sigma ** 2)
    assert np.mean(values) == pytest.approx(4, abs=4 * np.std(values) / np.sqrt(200))
    with pytest.raises(ConfigurationError, match="at least 3 levels"):
        curve([1, 2], [1, 2])
    with pytest.raises(ConfigurationError, match="positive"):
        curve([0, 1, 2], [1, 2, 3])


def three_curves(generator, shift, noise):
    x = np.tile(np.repeat(LEVELS, 3), 3)
    group = np.repeat([0, 1, 2], 24)
    y = 50 - 3 * (np.log(x) - np.log(6)) ** 2 + np.where(group == 2, shift, 0.0) + generator.normal(size=72) * noise
    return x, y, list(group)


@pytest.mark.statistical
def test_coincidence_is_shown_only_within_the_margin():
    """Curves apart by exactly the margin pass for coinciding at most 5% of the time; equal ones mostly do;
    curves far beyond the margin are found to differ; neither verdict when the noise drowns both (100
    repetitions).
    """
    generator = rng(14)
    verdicts = {
        name: [
            coincide(*three_curves(generator, *setting), margin=2.0, resamples=200, generator=generator).verdict
            for _ in range(100)
        ]
        for name, setting in {"equal": (0, 0.6), "edge": (2, 0.6), "far": (6, 0.6), "noisy": (0, 10)}.items()
    }
    assert verdicts["equal"].count("coincide") > 90
    assert verdicts["edge"].count("coincide") <= stats.binom.isf(1e-4, 100, 0.05)
    assert verdicts["edge"].count("differ") <= stats.binom.isf(1e-4, 100, 0.05)
    assert verdicts["far"].count("differ") > 90
    assert verdicts["noisy"].count("undecided") > 90


def test_coincidence_refuses_what_it_cannot_compare():
    x, y, group = three_curves(rng(15), 0, 1)
    with pytest.raises(ConfigurationError, match="margin"):
        coincide(x, y, group, margin=0, generator=rng(15))
    with pytest.raises(ConfigurationError, match="nothing to coincide"):
        coincide(x, y, [0] * len(x), margin=1, generator=rng(15))
