"""Pearson, Spearman and Kendall correlations, plain and partial, of many resamples at once.

Arrays have the shape (..., n): resamples first, observations last. Partial coefficients come from the
inverse of the correlation matrix R of (x, y, covariates): -P_xy / sqrt(P_xx P_yy), P = R⁻¹. For Kendall's
tau this is Kendall's own definition of a partial tau (Kendall 1942).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

from hessdiag.errors import UnknownNameError, nearest

Array = npt.NDArray[np.float64]
KINDS = ("spearman", "kendall", "pearson")


def correlation(kind: str, x: Array, y: Array) -> Array:
    """The coefficient of `kind` along the last axis; NaN where x or y is constant. Kendall's is tau-b."""
    if kind == "spearman":
        return _pearson(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1))
    if kind == "pearson":
        return _pearson(x, y)
    if kind == "kendall":
        return _kendall(x, y)
    raise UnknownNameError(f"correlation {kind!r}: {nearest(kind, list(KINDS))}")


def partial(kind: str, x: Array, y: Array, covariates: list[Array]) -> Array:
    """The coefficient of `kind` between x and y given the covariates; NaN where these determine x or y."""
    if not covariates:
        return correlation(kind, x, y)
    variables = [x, y, *covariates]
    size = len(variables)
    matrix = np.broadcast_to(np.eye(size), (*np.shape(x)[:-1], size, size)).copy()
    for i in range(size):
        for j in range(i):
            matrix[..., i, j] = matrix[..., j, i] = correlation(kind, variables[i], variables[j])
    good = np.asarray(np.isfinite(matrix).all((-1, -2)))
    good &= np.linalg.det(np.where(good[..., None, None], matrix, np.eye(size))) > 1e-12
    inverse = np.linalg.inv(np.where(good[..., None, None], matrix, np.eye(size)))
    with np.errstate(invalid="ignore"):
        value = -inverse[..., 0, 1] / np.sqrt(inverse[..., 0, 0] * inverse[..., 1, 1])
    return np.where(good, value, np.nan)


def _pearson(x: Array, y: Array) -> Array:
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    clipped: Array = np.clip(value, -1.0, 1.0)
    return clipped


def _kendall(x: Array, y: Array) -> Array:
    shape = np.broadcast_shapes(np.shape(x), np.shape(y))
    rows = [np.broadcast_to(a, shape).reshape(-1, shape[-1]) for a in (x, y)]
    value = np.empty(rows[0].shape[0])
    step = max(1, 4_000_000 // shape[-1] ** 2)
    for start in range(0, len(value), step):
        signs = [np.sign(a[start : start + step, :, None] - a[start : start + step, None, :]) for a in rows]
        agree = (signs[0] * signs[1]).sum((-1, -2))
        untied = [np.abs(sign).sum((-1, -2)) for sign in signs]
        with np.errstate(invalid="ignore", divide="ignore"):
            value[start : start + step] = agree / np.sqrt(untied[0] * untied[1])
    return value.reshape(shape[:-1])
