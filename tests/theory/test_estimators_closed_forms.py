"""`theory.estimators`: each closed form by full enumeration of the signs, or by seeded simulation."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hessdiag.errors import ConfigurationError
from theory import estimators

torch.set_num_threads(1)


def symmetric(n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=g, dtype=torch.float64)
    return (a + a.T) / 2


def all_signs(n: int) -> Tensor:
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(1, 7), st.integers(0, 10**6))
def test_hutchinson_by_enumeration(n: int, seed: int) -> None:
    """All 2^n probes: mean diag H, variance Σ_{j≠k} H_kj², covariance H_kl², plug-in bias ‖H‖_F² - ‖diag‖²."""
    h = symmetric(n, seed)
    v = all_signs(n)
    draws = v * (v @ h)
    centred = draws - h.diagonal()
    assert torch.allclose(draws.mean(0), h.diagonal(), atol=1e-12)
    assert torch.allclose((centred**2).mean(0), estimators.hutchinson_variance(h), atol=1e-12)
    assert torch.allclose(centred.T @ centred / len(v), estimators.hutchinson_covariance(h), atol=1e-12)
    bias = (draws**2).sum(1).mean() - (h.diagonal() ** 2).sum()
    assert torch.isclose(bias, estimators.plug_in_bias(h), atol=1e-12)
    assert torch.isclose(bias, (h**2).sum() - (h.diagonal() ** 2).sum(), atol=1e-12)


def test_plug_in_norm_of_many_probes() -> None:
    """Bias ÷ m: two probes by enumeration of all pairs."""
    h = symmetric(4, 1)
    v = all_signs(4)
    draws = v * (v @ h)
    values = [(((a + b) / 2) ** 2).sum() for a, b in itertools.product(draws, draws)]
    bias = torch.stack(values).mean() - (h.diagonal() ** 2).sum()
    assert torch.isclose(bias, estimators.plug_in_bias(h, probes=2), rtol=1e-10)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 10**6))
def test_propagation_variance_by_enumeration(sites: int, parameters: int, seed: int) -> None:
    """Var (Σ s w)² = 2[(Σw²)² - Σw⁴] over all signs; its mean is Σw²."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(sites, parameters, generator=g, dtype=torch.float64)
    draws = (all_signs(sites) @ w) ** 2
    assert torch.allclose(draws.mean(0), (w**2).sum(0), rtol=1e-10)
    assert torch.allclose(draws.var(0, correction=0), estimators.propagation_variance(w), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mixed", [False, True])
def test_whole_estimate_by_enumeration(mixed: bool) -> None:
    """(1/N) Σ (a_n² - b_n²) per sample, and with samples mixed, over every sign of both kinds of site."""
    g = torch.Generator().manual_seed(2)
    n = 3
    positive = torch.randn(n, 2, 2, generator=g, dtype=torch.float64)
    negative = torch.randn(n, 1, 2, generator=g, dtype=torch.float64)
    draws = []
    for signs in all_signs(3 * n):
        a = torch.einsum("ns,nsk->nk", signs[: 2 * n].view(n, 2), positive)
        b = torch.einsum("ns,nsk->nk", signs[2 * n :].view(n, 1), negative)
        square = a.sum(0) ** 2 - b.sum(0) ** 2 if mixed else (a**2 - b**2).sum(0)
        draws.append(square / n)
    stacked = torch.stack(draws)
    truth = ((positive**2).sum((0, 1)) - (negative**2).sum((0, 1))) / n
    assert torch.allclose(stacked.mean(0), truth, rtol=1e-10)
    closed = estimators.propagation_estimate_variance(positive, negative, mixed=mixed)
    assert torch.allclose(stacked.var(0, correction=0), closed, rtol=1e-10)


def test_mixing_samples_costs_about_n_times_the_variance() -> None:
    g = torch.Generator().manual_seed(3)
    w = torch.randn(32, 50, 4, generator=g, dtype=torch.float64)
    none = torch.zeros(32, 0, 4, dtype=torch.float64)
    mixed, single = (estimators.propagation_estimate_variance(w, none, mixed=m) for m in (True, False))
    assert float((mixed / single).min()) > 25
    assert float((mixed / single).max()) < 45


def test_unbiased_norm_by_enumeration() -> None:
    """T over all pairs and triples of probes: mean ‖d‖² exactly, variance 4d'Vd/m + 2 tr V²/(m(m-1))."""
    h = symmetric(3, 5)
    v = all_signs(3)
    draws = v * (v @ h)
    d, covariance = h.diagonal(), estimators.hutchinson_covariance(h)
    for m in (2, 3):
        values = torch.stack(
            [estimators.unbiased_squared_norm(torch.stack(rows)) for rows in itertools.product(draws, repeat=m)]
        )
        assert torch.isclose(values.mean(), (d**2).sum(), rtol=1e-10)
        closed = estimators.unbiased_variance(d, covariance, m)
        assert torch.isclose(values.var(correction=0), closed, rtol=1e-10)


def test_normal_quantile_undercovers() -> None:
    """With 4 replicates the normal quantile covers 86%."""
    assert estimators.coverage_of_normal_quantile(4) == pytest.approx(0.855, abs=5e-3)
    assert estimators.coverage_of_normal_quantile(10_000) == pytest.approx(0.95, abs=1e-3)


def test_refusals() -> None:
    with pytest.raises(ConfigurationError, match="at least 2 replicates"):
        estimators.unbiased_squared_norm(torch.ones(1, 3))
    with pytest.raises(ConfigurationError, match="square matrix"):
        estimators.hutchinson_variance(torch.ones(2, 3))
