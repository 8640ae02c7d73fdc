"""`theory.shapes`: derivatives in closed form against autograd, sympy and the engine's activations."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
from mpmath import mp

from hessdiag import activations
from hessdiag.errors import ConfigurationError
from theory import shapes
from theory.error import study
from theory.net import make_net
from theory.path_expansion import exact_recursion
from theory.symbolic.rct import alpha, rct, x

torch.set_num_threads(1)
GRID = torch.linspace(-4, 4, 161, dtype=torch.float64) + 1e-3


@pytest.mark.parametrize(
    "shape",
    [*(shapes.rct(a, b) for a in (0.5, 6.0) for b in (0, 1, 2)), shapes.tanh(), shapes.sine(), shapes.quadratic(0.3)],
    ids=lambda s: s.name,
)
def test_closed_derivatives_against_autograd(shape: shapes.Shape) -> None:
    auto = shapes.triple(shape.sigma)
    assert torch.allclose(shape.d1(GRID), auto.d1(GRID), rtol=1e-10, atol=1e-12)
    assert torch.allclose(shape.d2(GRID), auto.d2(GRID), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_rct_against_sympy(beta: int) -> None:
    """E[1]-E[6] derived, at α = 3, in 40 digits."""
    shape = shapes.rct(3.0, beta)
    for order, function in enumerate((shape.sigma, shape.d1, shape.d2)):
        truth = sp.lambdify(x, sp.diff(rct(beta), x, order).subs(alpha, 3), "mpmath")
        for v in (-7.0, -1.25, 0.0, 0.5, 6.0):
            found = float(function(torch.tensor([v], dtype=torch.float64))[0])
            with mp.workdps(40):
                expected = float(truth(mp.mpf(v)))
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_far_out_nothing_overflows(beta: int) -> None:
    """αx = ±10⁴ in float32: σ is x or 0, σ'' is 0 (E[5] as printed gives NaN from αx ≈ 44)."""
    far = torch.tensor([-1e4, 1e4])
    shape = shapes.rct(1.0, beta)
    assert shape.sigma(far).tolist() == [0.0, 1e4]
    assert shape.d1(far).tolist() == [0.0, 1.0]
    assert shape.d2(far).tolist() == [0.0, 0.0]
    e = torch.exp(torch.tensor(89.0))
    assert not bool(torch.isfinite((e**2 + 90 * e) / (e**2 + 2 * e + 1)))


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_the_engines_activation_is_the_same_function(beta: int) -> None:
    """A module with .d1 and .d2 serves as activation, and gives the same D."""
    module = activations.RCTAF(alpha=5.0, beta=beta)
    weights = [torch.eye(3, dtype=torch.float64), torch.ones(3, 3).double() / 3, torch.ones(1, 3).double()]
    inputs = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    found = exact_recursion(make_net(weights, None, module), inputs)
    truth = exact_recursion(make_net(weights, None, shapes.rct(5.0, beta)), inputs)
    for a, b in zip(found.values, truth.values):
        assert torch.allclose(a.detach(), b, rtol=1e-10, atol=1e-13)


def test_error_study_is_reproducible_and_nonzero_only_below_the_top_two() -> None:
    def measure(seed: int) -> object:
        generator = torch.Generator().manual_seed(seed)
        return study(shapes.rct(7.0, 2), hidden=4, width=5, generator=generator, nets=6)

    first = measure(0)
    assert first == measure(0)
    assert first != measure(1)
    assert max(first.by_layer[2:]) < 1e-12  # type: ignore[attr-defined]
    assert min(first.by_layer[:2]) > 1e-3  # type: ignore[attr-defined]
    assert first.overall > 3 * first.standard_error > 0  # type: ignore[attr-defined]


def test_refusals() -> None:
    with pytest.raises(ConfigurationError, match="rct needs alpha > 0"):
        shapes.rct(-1.0, 1)
    with pytest.raises(ConfigurationError, match="is no activation"):
        shapes.triple("silu")
    with pytest.raises(ConfigurationError, match="hidden >= 3"):
        study(shapes.tanh(), hidden=2, width=3, generator=torch.Generator())
