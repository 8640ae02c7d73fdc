"""The arithmetic behind a norm without bias: a U-statistic of replicate groups, and how far it can be off.

Everything here is a function of small arrays: the Gram matrix `K[g, h] = F_g . F_h` of the group sums
`F_g = sum of the replicates of group g`, the own products `q_g = sum |d_i|^2` over the group, and the group
sizes `n_g`. Leading dimensions are repetitions, computed side by side.

    T = (sum_gh K_gh - sum_g q_g) / (m (m - 1)),   m = sum_g n_g,   E[T] = |d|^2       (a U-statistic of
    degree two)

Its variance has two parts (Hoeffding 1948), with S the covariance of one replicate:

    Var T = 4 (d' S d) / m  +  2 tr(S^2) / (m (m - 1)).

The delete-a-group jackknife with unequal groups (Busing, Meijer & van der Leeden 1999) estimates the first
part without bias, but counts the second about twice (Efron & Stein 1981: the jackknife is biased upwards),
which makes intervals 1.4 times too wide where noise dominates. The second part can be seen directly: subtract
from the products of different groups' means their additive part, `X_g . X_h ~ a_g + a_h`, by least squares
with weights `n_g n_h`; the residual sum of squares over its G (G - 3) / 2 degrees of freedom is an unbiased
estimate of tr(S^2). What the jackknife counts too often is then taken off it, exactly, for any group sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class UStatistic:
    """T for every repetition, its estimated variance, and what the estimate is made of."""

    square: Array
    """T, unbiased for the squared norm."""
    variance: Array
    """Estimated variance of T; NaN where too few groups are in use to tell."""
    pair_variance: Array
    """The part of the variance that pairs of noises make, 2 tr(S^2) / (m (m - 1)); NaN below four groups."""
    deleted: Array
    """T without group j, j the last dimension; NaN where fewer than two replicates remain."""
    sizes: tuple[int, ...]
    """Replicates in each group in use."""

    @property
    def dof(self) -> int:
        """Degrees of freedom of the variance: groups in use, less one."""
        return len(self.sizes) - 1


def u_statistic(gram: Array, own: Array, sizes: tuple[int, ...]) -> UStatistic:
    """T, its jackknife values and its variance from group sums; groups without replicates are dropped."""
    used = [g for g, n in enumerate(sizes) if n > 0]
    counts = tuple(int(sizes[g]) for g in used)
    gram, own = gram[..., used, :][..., used], own[..., used]
    n = np.array(counts, dtype=np.float64)
    m = n.sum()
    rows = gram.sum(-1)
    whole = rows.sum(-1) - own.sum(-1)
    square = whole / (m * (m - 1.0))
    # |S - F_j|^2 - (Q - q_j) = (|S|^2 - Q) - 2 S.F_j + K_jj + q_j
    left = whole[..., None] - 2.0 * rows + np.diagonal(gram, axis1=-2, axis2=-1) + own
    pairs = (m - n) * (m - n - 1.0)
    deleted = np.divide(left, pairs, out=np.full_like(left, np.nan), where=pairs > 0)
    nothing = np.full_like(square, np.nan)
    if len(counts) < 2:
        return UStatistic(square, nothing, nothing, deleted, counts)
    variance = jackknife_covariance(square, deleted, square, deleted, counts)
    if len(counts) < 4:
        return UStatistic(square, variance, nothing, deleted, counts)
    noise = pair_noise(gram, n)
    pair = 2.0 / (m * (m - 1.0))
    corrected = np.maximum(variance - (pair_noise_in_jackknife(counts) - pair) * noise, pair * noise)
    return UStatistic(square, corrected, pair * noise, deleted, counts)


def pseudo_values(value: Array, deleted: Array, sizes: tuple[int, ...]) -> Array:
    """h_j T - (h_j - 1) T_(-j), h_j = m / n_j: what group j alone says of T."""
    n = np.array(sizes, dtype=np.float64)
    h = n.sum() / n
    out: Array = h * value[..., None] - (h - 1.0) * deleted
    return out


def ratio_pseudo_values(weights: Array) -> tuple[Array, Array]:
    """(a, b) with which pairs (Y_i, v_i) become replicates d_i = a_i Y_i + b_i d of the ratio d = sum Y / sum v.

    They are the jackknife's pseudo-values k d - (k - 1) d_(-i), d_(-i) the ratio without pair i of k (Quenouille 1956;
    Tukey 1958):

        d_i = d + (k - 1) (Y_i - v_i d) / (V - v_i),   V = sum v.

    For independent pairs of one kind their mean estimates E Y / E v with a bias of order 1/k^2, where that of d is of
    order 1/k and that of the mean of Y_i / v_i is not small at all; what they scatter by is the variance of d, that of
    the weights included. With equal weights d_i = Y_i / v_i. `weights` is [k], its sum without any of them above zero.
    """
    left = (weights.sum() - weights) / (len(weights) - 1.0)
    return 1.0 / left, (left - weights) / left


def jackknife_covariance(a: Array, deleted_a: Array, b: Array, deleted_b: Array, sizes: tuple[int, ...]) -> Array:
    """Delete-a-group jackknife covariance of two statistics of the same replicates, groups of any sizes.

    (1/G) sum_j (a~_j - a~)(b~_j - b~) / (h_j - 1), a~_j the pseudo-values and a~ their mean weighted by group
    size.
    """
    n = np.array(sizes, dtype=np.float64)
    m = n.sum()
    da, db = pseudo_values(a, deleted_a, sizes), pseudo_values(b, deleted_b, sizes)
    da = da - (da * n / m).sum(-1, keepdims=True)
    db = db - (db * n / m).sum(-1, keepdims=True)
    out: Array = (da * db * (n / (m - n))).mean(-1)
    return out


def pair_noise(gram: Array, n: Array) -> Array:
    """Unbiased estimate of tr(S^2): weighted residuals of X_g . X_h ~ a_g + a_h, four groups or more."""
    groups = len(n)
    weights = np.outer(n, n)
    np.fill_diagonal(weights, 0.0)
    normal = weights + np.diag(weights.sum(1))
    cross = gram * (weights > 0)
    effects = np.linalg.solve(normal, cross.sum(-1)[..., None])[..., 0]
    residual = gram / np.outer(n, n) - effects[..., :, None] - effects[..., None, :]
    # Ordered pairs count every residual twice, as does G (G - 3) against its half.
    out: Array = (weights * residual**2).sum((-2, -1)) / (groups * (groups - 3.0))
    return out


@lru_cache(maxsize=256)
def pair_noise_in_jackknife(sizes: tuple[int, ...]) -> float:
    """The number k with E[jackknife variance] = 4 d'Sd / m + k tr(S^2), exact for the group sizes given."""
    n = np.array(sizes, dtype=np.float64)
    m, groups = n.sum(), len(n)
    # Coefficient of the block of products (g, h) in T and in T without group j.
    keep = 1.0 - np.eye(groups)
    full = np.full((groups, groups), 1.0 / (m * (m - 1.0)))
    left = keep[:, :, None] * keep[:, None, :] / ((m - n) * (m - n - 1.0))[:, None, None]
    h = (m / n)[:, None, None]
    pseudo = h * full - (h - 1.0) * left
    pseudo = pseudo - (pseudo / h).sum(0)
    # Products of noises: ordered pairs of replicates in block (g, h).
    count = np.outer(n, n) - np.diag(n)
    each = 2.0 * (pseudo**2 * count).sum((1, 2))
    return float((each * n / (m - n)).mean())


def interval(square: Array, error: Array, quantile: float) -> tuple[Array, Array]:
    """Interval of the squared norm, as `hessdiag.norm.estimates` states it; [0, inf] without an error.

    Where T <= 0 it runs from zero to an upper bound that does not fall with T.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        half = quantile * error
        ratio = np.where(square > 0.0, np.minimum(half / square, 1.0), 1.0)
        stretch = np.where(ratio > 0.0, np.expm1(ratio) / ratio, 1.0)
        low = np.maximum(square - half, 0.0)
        high = np.maximum(square, 0.0) + half * stretch
    known = np.isfinite(half)
    return np.where(known, low, 0.0), np.where(known, high, np.inf)


def student_quantile(confidence: float, dof: float) -> float:
    """Two-sided Student quantile; infinite without a degree of freedom."""
    from scipy.special import stdtrit  # a third of a second, which whoever takes no replicates need not wait for

    return float(stdtrit(dof, 0.5 + 0.5 * confidence)) if dof > 0 else float("inf")
