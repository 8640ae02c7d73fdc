"""Covariance of SGD near the minimum of a quadratic loss (after Xu & Zhang, arXiv 2410.07719).

Gradient Hθ + ξ with noise covariance C, step η, momentum μ (v <- μv + g, θ <- θ - ηv). Deviations from
the mean path have Σ_{t+1} = A Σ_t Aᵀ + Q in the doubled state (θ, v); without momentum A = 1 - ηH, Q =
η²C. A stationary Σ exists only for 0 < ηh < 2(1+μ) in every direction: a trained net's H is indefinite,
so there one takes its Gauss-Newton part, or the transient (`transient_covariance`), which exists for
every H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_discrete_lyapunov

from theory._refusals import refuse

Array = npt.NDArray[np.float64]


def _checked(hessian: Any, noise: Any) -> tuple[Array, Array]:
    h, c = np.asarray(hessian, dtype=np.float64), np.asarray(noise, dtype=np.float64)
    for name, a in (("Hessian", h), ("noise covariance", c)):
        if a.ndim != 2 or a.shape[0] != a.shape[1] or a.shape != h.shape:
            refuse(f"the {name} has shape {a.shape}; square matrices of one size are needed")
        if not np.allclose(a, a.T, rtol=1e-9, atol=1e-12 * float(np.abs(a).max(initial=0.0))):
            refuse(f"the {name} is not symmetric; symmetrise it first")
    return h, c


def _rates(lr: float, momentum: float) -> None:
    if not lr > 0 or not 0 <= momentum < 1:
        refuse(f"lr must be positive and momentum in [0, 1), got lr = {lr}, momentum = {momentum}")


def is_stable(hessian: Any, lr: float, *, momentum: float = 0.0) -> bool:
    """0 < ηh < 2(1+μ) for every eigenvalue h of H."""
    h = np.linalg.eigvalsh(np.asarray(hessian, dtype=np.float64))
    return bool((h > 0).all() and (lr * h < 2 * (1 + momentum)).all())


def _require_stable(h: Array, lr: float, momentum: float) -> None:
    values = np.linalg.eigvalsh(h)
    if not is_stable(h, lr, momentum=momentum):
        refuse(
            f"no stationary covariance: eigenvalues of H run from {values[0]:.4g} to {values[-1]:.4g}, "
            f"needed is 0 < h < {2 * (1 + momentum) / lr:.4g}; take the Gauss-Newton part, a smaller lr, "
            "or transient_covariance"
        )


def state_matrices(hessian: Any, noise: Any, lr: float, *, momentum: float) -> tuple[Array, Array]:
    """A and Q of the doubled state (θ, v): v' = μv + Hθ + ξ, θ' = θ - ηv'."""
    h, c = _checked(hessian, noise)
    eye = np.eye(len(h))
    a = np.block([[eye - lr * h, -lr * momentum * eye], [h, momentum * eye]])
    q = np.block([[lr**2 * c, -lr * c], [-lr * c, c]])
    return a, q


def stationary_covariance(hessian: Any, noise: Any, lr: float, *, momentum: float = 0.0) -> Array:
    """Σ_∞ of θ from the discrete Lyapunov equation Σ = AΣAᵀ + Q (scipy), for any C."""
    h, c = _checked(hessian, noise)
    _rates(lr, momentum)
    _require_stable(h, lr, momentum)
    if momentum == 0:
        a = np.eye(len(h)) - lr * h
        return np.asarray(solve_discrete_lyapunov(a, lr**2 * c), dtype=np.float64)
    a, q = state_matrices(h, c, lr, momentum=momentum)
    return np.asarray(solve_discrete_lyapunov(a, q), dtype=np.float64)[: len(h), : len(h)]


def stationary_closed_form(hessian: Any, noise: Any, lr: float) -> Array:
    """Without momentum, any C, in H's eigenbasis: Σ_ij = η C_ij / (h_i + h_j - η h_i h_j).

    On the diagonal η C_ii / (h_i (2 - η h_i)), which is all of it where C commutes with H.
    """
    h, c = _checked(hessian, noise)
    _rates(lr, 0.0)
    _require_stable(h, lr, 0.0)
    values, basis = np.linalg.eigh(h)
    i, j = values[:, None], values[None, :]
    return np.asarray(basis @ (lr * (basis.T @ c @ basis) / (i + j - lr * i * j)) @ basis.T)


def stationary_variance(h: Any, c: Any, lr: float, *, momentum: float = 0.0) -> Array:
    """Commuting C, direction by direction: Σ = ηc(1+μ) / (h(1-μ)(2(1+μ) - ηh)) for eigenvalues h, c."""
    _rates(lr, momentum)
    h, c = np.asarray(h, dtype=np.float64), np.asarray(c, dtype=np.float64)
    if not ((h > 0) & (lr * h < 2 * (1 + momentum))).all():
        refuse("a direction has h outside 0 < lr h < 2 (1 + momentum): it has no stationary variance")
    return np.asarray(lr * c * (1 + momentum) / (h * (1 - momentum) * (2 * (1 + momentum) - lr * h)))


def transient_covariance(
    hessian: Any, noise: Any, lr: float, steps: int, *, initial: Any = None, momentum: float = 0.0
) -> Array:
    """Σ_t after `steps` steps from Σ_0 (`initial`, zero if absent), by the recursion; v starts at 0, for any
    symmetric H.

    Σ_t is centred on the mean path (`mean_path`), not on the minimum.
    """
    h, c = _checked(hessian, noise)
    _rates(lr, momentum)
    n = len(h)
    start = np.zeros_like(h) if initial is None else _checked(h, initial)[1]
    a, q = state_matrices(h, c, lr, momentum=momentum)
    sigma = np.zeros((2 * n, 2 * n))
    sigma[:n, :n] = start
    if momentum == 0:
        a, q, sigma = np.eye(n) - lr * h, lr**2 * c, start
    for _ in range(steps):
        sigma = a @ sigma @ a.T + q
    return sigma[:n, :n]


def transient_closed_form(hessian: Any, noise: Any, lr: float, steps: int, *, initial: Any = None) -> Array:
    """Without momentum, in H's eigenbasis with a_i = 1 - ηh_i and p = a_i a_j, for indefinite H as well:

    Σ_t = Σ_{s<t} A^s η²C A^s + A^t Σ_0 A^t, entry ij: η² C_ij (1 - p^t)/(1 - p) + p^t (Σ_0)_ij, and t for
    p = 1.
    """
    h, c = _checked(hessian, noise)
    _rates(lr, 0.0)
    start = np.zeros_like(h) if initial is None else _checked(h, initial)[1]
    values, basis = np.linalg.eigh(h)
    i, j = values[:, None], values[None, :]
    gap = lr * (i + j) - lr**2 * i * j  # 1 - a_i a_j without the cancellation
    power = (1 - lr * i) ** steps * (1 - lr * j) ** steps
    close = (gap < 0.5) & (gap != 0)  # there 1 - p^t cancels: by log1p and expm1 instead
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = np.where(close, -np.expm1(steps * np.log1p(-np.where(close, gap, 0.0))), 1 - power)
        total = np.where(gap == 0, float(steps), lost / gap)
    noisy = lr**2 * (basis.T @ c @ basis) * total
    return np.asarray(basis @ (noisy + power * (basis.T @ start @ basis)) @ basis.T)


def mean_path(hessian: Any, lr: float, steps: int, start: Any, *, momentum: float = 0.0) -> Array:
    """E θ_t from `start` (relative to the minimum), v_0 = 0: the centre of Σ_t."""
    h = np.asarray(hessian, dtype=np.float64)
    _rates(lr, momentum)
    theta = np.asarray(start, dtype=np.float64)
    v = np.zeros_like(theta)
    for _ in range(steps):
        v = momentum * v + h @ theta
        theta = theta - lr * v
    return theta


def flatness(hessian: Any, covariance: Any) -> float:
    """The PAC-Bayes flatness term ½ tr(HΣ); H = h I and Σ = σ² I give ½ n h σ²."""
    h, sigma = _checked(hessian, covariance)
    return float(np.sum(h * sigma) / 2)


@dataclass(frozen=True)
class Simulation:
    """Sample mean and covariance of θ after `steps` steps over `runs` runs, with standard errors entry by
    entry.
    """

    mean: Array
    mean_error: Array
    covariance: Array
    covariance_error: Array
    steps: int
    runs: int


def simulate(
    hessian: Any,
    noise: Any,
    lr: float,
    steps: int,
    *,
    runs: int,
    generator: np.random.Generator,
    momentum: float = 0.0,
    start: Any = None,
    initial: Any = None,
) -> Simulation:
    """`runs` independent SGD runs with Gaussian noise from mean `start` and covariance `initial` (both zero
    if absent).
    """
    h, c = _checked(hessian, noise)
    _rates(lr, momentum)
    if runs < 3:
        refuse(f"a covariance with an error needs at least 3 runs, got {runs}")
    n = len(h)
    root = _root(c)
    theta = np.zeros((runs, n)) if start is None else np.tile(np.asarray(start, dtype=np.float64), (runs, 1))
    if initial is not None:
        theta = theta + generator.standard_normal((runs, n)) @ _root(_checked(h, initial)[1]).T
    v = np.zeros_like(theta)
    for _ in range(steps):
        v = momentum * v + theta @ h + generator.standard_normal((runs, n)) @ root.T
        theta = theta - lr * v
    centred = theta - theta.mean(0)
    products = centred[:, :, None] * centred[:, None, :]
    covariance = products.sum(0) / (runs - 1)
    return Simulation(
        theta.mean(0),
        theta.std(0, ddof=1) / np.sqrt(runs),
        covariance,
        products.std(0, ddof=1) / np.sqrt(runs),
        steps,
        runs,
    )


def _root(covariance: Array) -> Array:
    values, basis = np.linalg.eigh(covariance)
    if values[0] < -1e-10 * max(abs(values[-1]), 1e-300):
        refuse(f"a covariance has the negative eigenvalue {values[0]:.4g}")
    return np.asarray(basis * np.sqrt(np.clip(values, 0, None)))
