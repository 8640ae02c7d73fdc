"""Closed forms for stochastic diagonals and their norms: what the estimators' errors are, before any is
drawn.

d = diag H throughout; d̂ an estimate; m the number of independent probes or replicates.
"""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

from theory._refusals import refuse


def hutchinson_variance(hessian: Tensor, *, probes: int = 1) -> Tensor:
    """Var of entry k of v ⊙ Hv, v Rademacher: Σ_{j≠k} H_kj² (÷ probes)."""
    _square(hessian)
    return ((hessian**2).sum(1) - hessian.diagonal() ** 2) / probes


def hutchinson_covariance(hessian: Tensor, *, probes: int = 1) -> Tensor:
    """Cov of entries k, l of v ⊙ Hv for symmetric H: H_kl² off the diagonal, Σ_{j≠k} H_kj² on it.

    E[v_k v_l v_a v_b H_ka H_lb] for k ≠ l leaves (a, b) = (k, l), which is d_k d_l, and (l, k), which is
    H_kl².
    """
    _square(hessian)
    squares = hessian**2
    off = squares - torch.diag_embed(squares.diagonal())
    return (off + torch.diag_embed(off.sum(1))) / probes


def plug_in_bias(hessian: Tensor, *, probes: int = 1) -> Tensor:
    """E‖d̂‖² - ‖d‖² for Hutchinson: (‖H‖_F² - ‖diag H‖²)/m. The plug-in norm measures the Frobenius norm."""
    return hutchinson_variance(hessian, probes=probes).sum()


def propagation_variance(weights: Tensor) -> Tensor:
    """Var (Σ_j s_j w_j)² over independent signs: 2[(Σ w²)² - Σ w⁴], summed over the sites in dimension -2.

    w_j = √|c_j| ∂z_j/∂θ_k, one column per parameter k. (E a⁴ = 3(Σw²)² - 2Σw⁴, E a² = Σw².)
    """
    squares = weights**2
    return 2 * (squares.sum(-2) ** 2 - (squares**2).sum(-2))


def propagation_estimate_variance(
    positive: Tensor, negative: Tensor, *, mixed: bool = False, replicates: int = 1
) -> Tensor:
    """Var of (1/N) Σ_n (a_n² - b_n²) for [N, sites, parameters] weights of the positive and negative sites.

    Per sample: Σ_n (Var a_n² + Var b_n²)/N². `mixed`: signs are shared over one square of the whole batch,
    ((Σ_n a_n)² - (Σ_n b_n)²)/N, so the same formula with joint sums: about N times as much.
    """
    if positive.ndim != 3 or negative.ndim != 3 or positive.shape[0] != negative.shape[0]:
        refuse("weights of the sites must be [N, sites, parameters], with the same N for both signs")
    n = len(positive)
    total = torch.zeros_like(positive[0, 0] if positive.shape[1] else negative[0, 0])
    for part in (positive, negative):
        total = total + (propagation_variance(part.flatten(0, 1)) if mixed else propagation_variance(part).sum(0))
    return total / n**2 / replicates


def unbiased_squared_norm(replicates: Tensor) -> Tensor:
    """T = (‖Σ d̂_i‖² - Σ ‖d̂_i‖²) / (m(m-1)), unbiased for ‖d‖²; may be negative."""
    m = len(replicates)
    if m < 2:
        refuse(f"T needs at least 2 replicates, got {m}")
    return ((replicates.sum(0) ** 2).sum() - (replicates**2).sum()) / (m * (m - 1))


def unbiased_variance(mean: Tensor, covariance: Tensor, m: int) -> Tensor:
    """Var T = 4 dᵀVd/m + 2 tr V²/(m(m-1)), exact for any law of d̂ with mean d and covariance V.

    T is a U-statistic with kernel d̂_iᵀd̂_j: ζ_1 = dᵀVd, ζ_2 = tr V² + 2 dᵀVd, Var = 2/(m(m-1))
    [2(m-2)ζ_1 + ζ_2].
    """
    if m < 2:
        refuse(f"T needs at least 2 replicates, got {m}")
    return 4 * (mean @ covariance @ mean) / m + 2 * (covariance**2).sum() / (m * (m - 1))


def coverage_of_normal_quantile(m: int, *, confidence: float = 0.95) -> float:
    """What an interval mean ± z·s/√m of m Gaussian replicates really covers: with m = 4, 86% and not 95%."""
    if m < 2:
        refuse(f"a standard error needs at least 2 replicates, got {m}")
    z = stats.norm.ppf((1 + confidence) / 2)
    return float(2 * stats.t.cdf(z, m - 1) - 1)


def _square(hessian: Tensor) -> None:
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        refuse(f"the Hessian has shape {tuple(hessian.shape)}; a square matrix is needed")
