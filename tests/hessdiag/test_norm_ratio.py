"""Shares and ratios: closed forms, and what common replicates cancel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hessdiag.errors import ConfigurationError
from hessdiag.norm import NormEstimate, Replicates, cosine, estimate, exact_norm, ratio, share


def measured(rows: np.ndarray, **options: object) -> NormEstimate:
    out = Replicates({"w": torch.zeros(rows.shape[1])})
    for index, row in enumerate(rows):
        out.add({"w": torch.from_numpy(row)}, index)
    return estimate(out, **options).total  # type: ignore[arg-type]


def rows(seed: int, count: int = 12, p: int = 30, noise: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.ones(p) + noise * rng.standard_normal((count, p))


def test_exact_norms_have_an_exact_ratio() -> None:
    a, b = (exact_norm({"w": torch.full((4,), value)}).total for value in (6.0, 2.0))
    got = ratio(a, b)
    assert (got.value, got.low, got.high, got.error) == (3.0, 3.0, 3.0, 0.0)
    assert share(b, a).value == pytest.approx(1 / 9)
    assert share(b, a).error == 0.0


def test_what_is_common_cancels() -> None:
    """Replicates that are three times those of another have a ratio of three without error, when paired."""
    a = rows(0)
    paired = ratio(measured(3.0 * a), measured(a), paired=True)
    assert paired.value == pytest.approx(3.0)
    assert paired.high - paired.low < 1e-10
    apart = ratio(measured(3.0 * a), measured(a))
    assert apart.high - apart.low > 0.01
    assert share(measured(a), measured(a)).high == pytest.approx(1.0)


def test_independent_ratio_is_the_delta_method() -> None:
    a, b = measured(rows(1)), measured(2.0 * rows(2))
    got = ratio(a, b)
    relative = [(e.square_error / e.square) ** 2 for e in (a, b)]
    assert got.error == pytest.approx(0.5 * math.sqrt(sum(relative)))
    assert got.dof == pytest.approx(sum(relative) ** 2 / sum(r**2 / 11 for r in relative))
    assert math.log(got.high / got.value) == pytest.approx(math.log(got.value / got.low))


def test_a_norm_that_is_not_known_has_no_ratio() -> None:
    rng = np.random.default_rng(0)
    noise = next(e for e in (measured(rng.standard_normal((6, 40))) for _ in range(50)) if e.square < 0)
    got = ratio(noise, measured(rows(0)))
    assert math.isnan(got.value)
    assert (got.low, got.high) == (0.0, math.inf)
    part = share(noise, measured(rows(0, count=6)))
    assert part.value < 0.0
    assert part.low == 0.0 < part.high
    assert math.isnan(share(measured(rows(0, count=6)), noise).value)


def test_the_cosine_of_exact_parts_is_that_of_the_vectors() -> None:
    rng = np.random.default_rng(5)
    f, g = rng.standard_normal(40), 1e-4 * rng.standard_normal(40)
    whole, a, b = (exact_norm({"w": torch.from_numpy(v)}).total for v in (f + g, f, g))
    got = cosine(a, b, whole)
    assert got.value == pytest.approx(f @ g / np.linalg.norm(f) / np.linalg.norm(g), rel=1e-10)
    assert (got.low, got.high, got.error) == (got.value, got.value, 0.0)
    assert cosine(a, a, exact_norm({"w": torch.from_numpy(2 * f)}).total).value == pytest.approx(1.0)
    assert cosine(a, a, exact_norm({"w": torch.zeros(40)}).total).value == pytest.approx(-1.0)


def test_the_cosine_with_an_exact_part_is_the_mean_of_the_other() -> None:
    """|g + d|^2 - |g|^2 - |d|^2 leaves 2 <g, mean of d>: nothing of the pairs of noises is in the product."""
    g = np.random.default_rng(6).standard_normal(30)
    offset = {"w": torch.from_numpy(g)}
    part, known = measured(rows(7)), exact_norm(offset).total
    got = cosine(known, part, measured(rows(7), offset=offset))
    expected = g @ rows(7).mean(0) / np.linalg.norm(g) / part.norm
    assert got.value == pytest.approx(expected, rel=1e-12)


def test_a_part_that_vanishes_has_no_angle() -> None:
    one, nothing = exact_norm({"w": torch.ones(4)}).total, exact_norm({"w": torch.zeros(4)}).total
    got = cosine(one, nothing, one)
    assert math.isnan(got.value)
    assert (got.low, got.high) == (-1.0, 1.0)
    with pytest.raises(ConfigurationError, match="unlike"):
        cosine(measured(rows(0)), measured(rows(0, count=13)), one)


def test_unlike_replicates_are_not_paired() -> None:
    with pytest.raises(ConfigurationError, match="unlike"):
        ratio(measured(rows(0)), measured(rows(0, count=13)), paired=True)
    with pytest.raises(ConfigurationError, match="confidence"):
        ratio(measured(rows(0)), measured(rows(0)), confidence=0.0)
    two = measured(rows(0, count=2))
    assert ratio(two, two, paired=True).high == math.inf


@pytest.mark.statistical
def test_intervals_of_ratios_and_shares_cover() -> None:
    """200 of each kind; 95% within 89 to 99.6%: false alarm about once in 1,000 runs."""
    rng = np.random.default_rng(3)
    p, m, repeats = 30, 12, 200
    f, g = rng.standard_normal(p), rng.standard_normal(p)
    truth = {
        "share": (f @ f) / ((f + g) @ (f + g)),
        "offset": (g @ g) / ((f + g) @ (f + g)),
        "paired": math.sqrt((f @ f) / (g @ g)),
        "apart": math.sqrt((f @ f) / (g @ g)),
        "angle": f @ g / math.sqrt((f @ f) * (g @ g)),
        "angle of an offset": f @ g / math.sqrt((f @ f) * (g @ g)),
    }
    hits = dict.fromkeys(truth, 0)
    offset = {"w": torch.from_numpy(g)}
    known = exact_norm(offset).total
    for _ in range(repeats):
        shared = rng.standard_normal((m, p))
        a = f + 0.5 * shared
        b = g + 0.5 * shared * rng.choice([0.8, 1.2], (m, p))
        c = g + 0.5 * rng.standard_normal((m, p))
        part, whole = measured(a), measured(a, offset=offset)
        got = {
            "share": share(part, whole),
            "offset": share(known, whole),
            "paired": ratio(part, measured(b), paired=True),
            "apart": ratio(part, measured(c)),
            "angle": cosine(part, measured(b), measured(a + b)),
            "angle of an offset": cosine(part, known, whole),
        }
        for name, interval in got.items():
            hits[name] += interval.low <= truth[name] <= interval.high
    for name, count in hits.items():
        assert 0.89 <= count / repeats <= 0.996, (name, count)
