"""`theory.dynamics`: closed forms against the Lyapunov equation at 1e-10 and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hessdiag.errors import ConfigurationError
from theory import dynamics


def problem(seed: int, n: int, *, commuting: bool, indefinite: bool = False) -> tuple[np.ndarray, ...]:
    """H with eigenvalues in (0.05, 3), C positive definite, sharing H's eigenvectors if commuting."""
    g = np.random.default_rng(seed)
    basis = np.linalg.qr(g.standard_normal((n, n)))[0]
    h = g.uniform(0.05, 3.0, n)
    if indefinite:
        h[: max(1, n // 2)] *= -0.5
    c = g.uniform(0.1, 2.0, n)
    root = g.standard_normal((n, n))
    hessian = (basis * h) @ basis.T
    noise = (basis * c) @ basis.T if commuting else root @ root.T + 0.1 * np.eye(n)
    return (hessian + hessian.T) / 2, (noise + noise.T) / 2, basis, h, c


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.linalg.norm(a - b) <= 1e-10 * max(np.linalg.norm(b), 1e-300))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.01, 0.6), st.floats(0, 0.95))
def test_stationary_commuting_closed_form_is_the_lyapunov_solution(
    seed: int, n: int, lr: float, momentum: float
) -> None:
    """Σ = ηc(1+μ)/(h(1-μ)(2(1+μ)-ηh)), momentum included, against scipy's discrete Lyapunov solver."""
    hessian, noise, basis, h, c = problem(seed, n, commuting=True)
    closed = dynamics.stationary_variance(h, c, lr, momentum=momentum)
    solved = dynamics.stationary_covariance(hessian, noise, lr, momentum=momentum)
    assert close(solved, (basis * closed) @ basis.T)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.01, 0.6))
def test_stationary_closed_form_for_any_noise(seed: int, n: int, lr: float) -> None:
    """η C_ij/(h_i + h_j - η h_i h_j) in H's eigenbasis, C not commuting with H."""
    hessian, noise, *_ = problem(seed, n, commuting=False)
    assert close(
        dynamics.stationary_closed_form(hessian, noise, lr),
        dynamics.stationary_covariance(hessian, noise, lr),
    )


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.001, 0.5), st.integers(0, 60), st.booleans())
def test_transient_closed_form_is_the_recursion(seed: int, n: int, lr: float, steps: int, indefinite: bool) -> None:
    """Σ_t = Σ_s A^s η²C A^s + A^t Σ_0 A^t, for indefinite H as well."""
    hessian, noise, *_ = problem(seed, n, commuting=False, indefinite=indefinite)
    _, initial, *_ = problem(seed + 1, n, commuting=False)
    assert close(
        dynamics.transient_closed_form(hessian, noise, lr, steps, initial=initial),
        dynamics.transient_covariance(hessian, noise, lr, steps, initial=initial),
    )


def test_flat_direction_grows_linearly() -> None:
    """H = 0: Σ_t = t η² c + Σ_0; and a nearly flat direction loses no digits."""
    sigma = dynamics.transient_closed_form(np.zeros((1, 1)), np.eye(1), 0.1, 50, initial=np.eye(1))
    assert sigma[0, 0] == pytest.approx(50 * 0.01 + 1, rel=1e-14)
    for h in (1e-3, 1e-6, 1e-9, 1e-12, -1e-9):
        args = (np.array([[h]]), np.eye(1), 0.1, 200)
        assert close(dynamics.transient_closed_form(*args), dynamics.transient_covariance(*args))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_transient_becomes_stationary(momentum: float) -> None:
    hessian, noise, *_ = problem(3, 4, commuting=False)
    late = dynamics.transient_covariance(hessian, noise, 0.3, 4000, initial=np.eye(4), momentum=momentum)
    assert close(late, dynamics.stationary_covariance(hessian, noise, 0.3, momentum=momentum))


@pytest.mark.statistical
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("indefinite", [False, True])
def test_transient_against_simulation(momentum: float, indefinite: bool) -> None:
    """Mean and covariance entry by entry within 4.5 standard errors: 9 entries per case, false alarms below
    1e-4.
    """
    hessian, noise, *_ = problem(5, 3, commuting=False, indefinite=indefinite)
    start, initial = np.array([1.0, -2.0, 0.5]), 0.3 * np.eye(3)
    found = dynamics.simulate(
        hessian,
        noise,
        0.2,
        12,
        runs=20_000,
        generator=np.random.default_rng(7),
        momentum=momentum,
        start=start,
        initial=initial,
    )
    truth = dynamics.transient_covariance(hessian, noise, 0.2, 12, initial=initial, momentum=momentum)
    mean = dynamics.mean_path(hessian, 0.2, 12, start, momentum=momentum)
    assert np.all(np.abs(found.covariance - truth) < 4.5 * found.covariance_error)
    assert np.all(np.abs(found.mean - mean) < 4.5 * found.mean_error)
    assert np.all(found.covariance_error < 0.05 * np.abs(np.diag(truth)).max())


@pytest.mark.statistical
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_stationary_against_simulation(momentum: float) -> None:
    """After burn-in, within 4.5 standard errors entry by entry (4 entries: false alarms below 1e-4); Σ is not
    the flow's limit.
    """
    hessian, noise = np.diag([0.5, 2.0]), np.array([[1.0, 0.4], [0.4, 0.8]])
    truth = dynamics.stationary_covariance(hessian, noise, 0.4, momentum=momentum)
    found = dynamics.simulate(
        hessian, noise, 0.4, 250, runs=12_000, generator=np.random.default_rng(11), momentum=momentum
    )
    assert np.all(np.abs(found.covariance - truth) < 4.5 * found.covariance_error)


@pytest.mark.statistical
def test_simulated_errors_are_honest() -> None:
    """The reported standard error of an entry against the spread over 60 simulations: ratio within 0.6..1.5
    (> 4 sigma).
    """
    hessian, noise = np.diag([0.5, 1.0]), np.eye(2)
    draws = [
        dynamics.simulate(hessian, noise, 0.3, 15, runs=400, generator=np.random.default_rng(seed))
        for seed in range(60)
    ]
    spread = np.std([d.covariance for d in draws], axis=0, ddof=1)
    reported = np.mean([d.covariance_error for d in draws], axis=0)
    assert np.all((spread / reported > 0.6) & (spread / reported < 1.5))


def test_stability_condition() -> None:
    """0 < ηh < 2(1+μ): the recursion's spectral radius crosses 1 exactly there."""
    for momentum in (0.0, 0.5, 0.9):
        edge = 2 * (1 + momentum)
        for h, stable in ((edge * 0.999, True), (edge * 1.001, False), (1e-6, True), (-1e-6, False)):
            a, _ = dynamics.state_matrices(np.array([[h]]), np.eye(1), 1.0, momentum=momentum)
            radius = np.abs(np.linalg.eigvals(a if momentum else a[:1, :1])).max()
            assert bool(radius < 1) == stable
            assert dynamics.is_stable(np.array([[h]]), 1.0, momentum=momentum) == stable


def test_flatness() -> None:
    """½ tr(HΣ): with white noise C = c·1 and small η it tends to nηc/4, whatever the curvatures."""
    hessian = np.diag([0.1, 1.0, 3.0])
    sigma = dynamics.stationary_covariance(hessian, 2.0 * np.eye(3), 1e-5)
    assert dynamics.flatness(hessian, sigma) == pytest.approx(3 * 1e-5 * 2.0 / 4, rel=1e-4)


def test_refusals() -> None:
    with pytest.raises(ConfigurationError, match="no stationary covariance"):
        dynamics.stationary_covariance(np.diag([1.0, -0.1]), np.eye(2), 0.1)
    with pytest.raises(ConfigurationError, match="not symmetric"):
        dynamics.stationary_covariance(np.array([[1.0, 0.5], [0.0, 1.0]]), np.eye(2), 0.1)
    with pytest.raises(ConfigurationError, match="has no stationary variance"):
        dynamics.stationary_variance([3.0], [1.0], 1.0)
    with pytest.raises(ConfigurationError, match="lr must be positive"):
        dynamics.stationary_covariance(np.eye(1), np.eye(1), -0.1)
    with pytest.raises(ConfigurationError, match="at least 3 runs"):
        dynamics.simulate(np.eye(1), np.eye(1), 0.1, 3, runs=1, generator=np.random.default_rng(0))
    with pytest.raises(ConfigurationError, match="negative eigenvalue"):
        dynamics.simulate(np.eye(1), -np.eye(1), 0.1, 3, runs=10, generator=np.random.default_rng(0))
