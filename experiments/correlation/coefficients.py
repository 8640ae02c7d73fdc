"""Pearson, Spearman and Kendall correlations, plain and partial.

Partial coefficients come from the inverse of the correlation matrix R of (x, y, covariates): -P_xy / sqrt(P_xx P_yy),
P = R⁻¹. For Kendall's tau this is Kendall's own definition of a partial tau (Kendall 1942).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

from hessdiag.errors import UnknownNameError, nearest

Array = npt.NDArray[np.float64]
KINDS = ("spearman", "kendall", "pearson")


def correlation(kind: str, x: Array, y: Array) -> float:
    """The coefficient of `kind`; NaN where x or y is constant. Kendall's is tau-b."""
    if kind == "spearman":
        x, y = stats.rankdata(x), stats.rankdata(y)
    elif kind == "kendall":
        x, y = (np.sign(a[:, None] - a).ravel() for a in (x, y))  # their means are 0
    elif kind != "pearson":
        raise UnknownNameError(f"correlation {kind!r}: {nearest(kind, list(KINDS))}")
    x, y = x - x.mean(), y - y.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.clip((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()), -1.0, 1.0))


def partial(kind: str, x: Array, y: Array, covariates: list[Array]) -> float:
    """The coefficient of `kind` between x and y given the covariates; NaN where these determine x or y."""
    variables = [x, y, *covariates]
    matrix = np.eye(len(variables))
    for i, one in enumerate(variables):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = correlation(kind, one, variables[j])
    if len(variables) == 2:
        return float(matrix[0, 1])
    if not np.isfinite(matrix).all() or np.linalg.det(matrix) <= 1e-12:
        return float("nan")
    inverse = np.linalg.inv(matrix)
    return float(-inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1]))
