"""How strongly two measured quantities go together over the configurations of a sweep.

The unit of observation is a configuration (one activation, say): its seeds are averaged first, since runs
that differ by their seed only are no independent evidence about what the activation does. Intervals come
from resampling configurations with all of their seeds (the cluster bootstrap: Davison and Hinkley 1997,
section 3.8), bias-corrected and accelerated (Efron 1987); p-values from permuting configurations, which
needs no distribution. Given covariates, the residuals are permuted (Freedman and Lane 1983).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from experiments.correlation.coefficients import Array, partial
from hessdiag.errors import ConfigurationError

MINIMUM = 4  # configurations below which no interval is given


@dataclass(frozen=True)
class Association:
    """A correlation with its interval and its permutation p-value."""

    kind: str
    value: float
    low: float
    high: float
    p_value: float
    configurations: int
    runs: int
    confidence: float
    given: tuple[str, ...] = ()


def associate(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    cluster: Sequence[object],
    kind: str = "spearman",
    covariates: Mapping[str, npt.ArrayLike] | None = None,
    strata: Sequence[object] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    generator: np.random.Generator,
) -> Association:
    """The correlation of x and y over clusters, given the covariates, resampled within `strata` of
    clusters.
    """
    names = tuple(covariates or {})
    columns = [np.asarray(column, dtype=float) for column in (x, y, *(covariates or {}).values())]
    finite = np.asarray(np.isfinite(columns).all(0))
    labels = [label for label, keep in zip(cluster, finite, strict=True) if keep]
    means, index = _means([column[finite] for column in columns], labels)
    number = means.shape[1]
    layers = _layers(strata, finite, index, number)
    kept = (kind, number, int(finite.sum()), confidence, names)
    if number < MINIMUM + len(names):
        return _result(kept, np.nan, np.nan, np.nan, np.nan)

    def statistic(data: Array) -> Array:
        return partial(kind, data[0], data[1], list(data[2:]))

    value = float(statistic(means))
    if not np.isfinite(value):
        return _result(kept, np.nan, np.nan, np.nan, np.nan)
    choice = np.empty((resamples, number), dtype=int)
    for members in layers:
        choice[:, members] = members[generator.integers(len(members), size=(resamples, len(members)))]
    boot = statistic(means[:, choice])
    left_out = np.array([[j for j in range(number) if j != i] for i in range(number)])
    low, high = bca(boot, value, statistic(means[:, left_out]), confidence)
    p_value = _permutation(means, kind, value, layers, resamples, generator)
    return _result(kept, value, low, high, p_value)


def bca(boot: Array, value: float, jackknife: Array, confidence: float) -> tuple[float, float]:
    """Efron's bias-corrected and accelerated interval; the plain percentile one where it is undefined.

    A resample without a coefficient (all of its values tied) could have any: it counts as -1 for the lower end and as
    +1 for the upper. Left out, two runs that differ from a constant would look like evidence.
    """
    undefined = np.ones((~np.isfinite(boot)).sum())
    boot, jackknife = boot[np.isfinite(boot)], jackknife[np.isfinite(jackknife)]
    if len(boot) < 20:
        return float("nan"), float("nan")
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    below = ((boot < value).sum() + 0.5 * (boot == value).sum()) / len(boot)
    centred = jackknife.mean() - jackknife
    spread = (centred**2).sum()
    if 0 < below < 1 and spread > 0:
        bias, acceleration = stats.norm.ppf(below), (centred**3).sum() / (6 * spread**1.5)
        moved = bias + stats.norm.ppf(tails)
        tails = stats.norm.cdf(bias + moved / (1 - acceleration * moved))
    low, high = (np.quantile([*boot, *(end * undefined)], tail) for end, tail in zip((-1, 1), tails, strict=True))
    return float(low), float(high)


def _means(columns: list[Array], labels: list[object]) -> tuple[Array, npt.NDArray[np.int64]]:
    """Means over the runs of each cluster, and the first run of each."""
    order: dict[object, int] = {}
    member = np.array([order.setdefault(label, len(order)) for label in labels], dtype=int)
    number = len(order)
    if not number:
        return np.empty((len(columns), 0)), np.empty(0, dtype=np.int64)
    counts = np.bincount(member, minlength=number)
    means = np.stack([np.bincount(member, column, number) / counts for column in columns])
    first = np.array([int(np.argmax(member == i)) for i in range(number)], dtype=np.int64)
    return means, first


def _layers(
    strata: Sequence[object] | None, finite: npt.NDArray[np.bool_], first: npt.NDArray[np.int64], number: int
) -> list[npt.NDArray[np.int64]]:
    if strata is None:
        return [np.arange(number)]
    if len(strata) != len(finite):
        raise ConfigurationError(f"strata: {len(strata)} labels for {len(finite)} runs; give one per run")
    kept = [label for label, keep in zip(strata, finite, strict=True) if keep]
    groups: dict[object, list[int]] = {}
    for position, run in enumerate(first):
        groups.setdefault(kept[int(run)], []).append(position)
    return [np.array(members) for members in groups.values()]


def _permutation(
    means: Array,
    kind: str,
    value: float,
    layers: list[npt.NDArray[np.int64]],
    resamples: int,
    generator: np.random.Generator,
) -> float:
    data = means if kind == "pearson" else stats.rankdata(means, axis=-1)
    number = data.shape[1]
    design = np.stack([np.ones(number), *data[2:]], axis=1)
    fitted = design @ np.linalg.lstsq(design, data[1], rcond=None)[0]
    residual = data[1] - fitted
    choice = np.empty((resamples, number), dtype=int)
    for members in layers:
        choice[:, members] = generator.permuted(np.tile(members, (resamples, 1)), axis=1)
    permuted = fitted + residual[choice]
    shape = permuted.shape
    others = [np.broadcast_to(column, shape) for column in data[2:]]
    drawn = partial(kind, np.broadcast_to(data[0], shape), permuted, others)
    drawn = drawn[np.isfinite(drawn)]
    return float((1 + (np.abs(drawn) >= abs(value) - 1e-12).sum()) / (1 + len(drawn)))


def _result(
    kept: tuple[str, int, int, float, tuple[str, ...]], value: float, low: float, high: float, p: float
) -> Association:
    kind, number, runs, confidence, names = kept
    return Association(kind, value, low, high, p, number, runs, confidence, names)
