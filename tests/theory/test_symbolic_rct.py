"""E[1]-E[6], maxima, extrema, Table 1's curvatures: `theory.symbolic` up to `table1`."""

from __future__ import annotations

import math

import pytest
import sympy as sp
from mpmath import mp

from hessdiag.errors import ConfigurationError
from theory.symbolic import curvature_at_zero, curvatures, extrema, maximum_at_zero, rct, second_derivative
from theory.symbolic.printed import identities, number_in
from theory.symbolic.rct import alpha, integral, rescaling_identity, x, zero
from theory.symbolic.series import ExponentialPolynomial
from theory.symbolic.table1 import mish_curvature


@pytest.mark.parametrize("number", range(1, 7))
def test_e1_to_e6(number: int) -> None:
    """E[1]-E[6]: recursion and differentiation minus each displayed side is zero, the step f -> f'·x included."""
    rows = identities(f"E{number}")
    assert len(rows) == (2 if number in (3, 5) else 1)
    assert all(row.holds for row in rows), rows


def test_a_wrong_formula_leaves_a_difference() -> None:
    """The zero test can fail: E[4] with one sign changed, and α/4 for α/2, are not identities."""
    wrong = second_derivative(1).subs(x, x + 1)
    assert zero(second_derivative(1) - wrong) != 0
    assert zero(second_derivative(2) - 2 * second_derivative(1)) != 0


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_maximum_at_zero_is_proved(beta: int) -> None:
    """α/4, α/2, α at x = 0: all Taylor coefficients of both bounds are nonnegative."""
    proof = maximum_at_zero(beta)
    assert proof.proved
    assert proof.value == curvature_at_zero(beta) == alpha * sp.Rational(2) ** (beta - 2)


def test_proof_can_fail() -> None:
    """A bound that is false has a negative coefficient: cosh y - 1 - y² changes sign, 1 - cosh y is negative."""
    y = sp.Symbol("y")
    assert ExponentialPolynomial(sp.cosh(y) - 1 - y**2, y).signs().changes == 1
    assert not ExponentialPolynomial(1 - sp.cosh(y), y).signs().nonnegative
    assert ExponentialPolynomial(sp.cosh(y) - 1 - y**2 / 2, y).signs().nonnegative


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_proof_coefficients_are_taylor_coefficients(beta: int) -> None:
    """c_m read off the exponentials equals sympy's own Taylor coefficient."""
    from theory.symbolic.maxima import cleared, y
    from theory.symbolic.rct import unit_curvature

    function = cleared(sp.Rational(2) ** (beta - 2) - unit_curvature(beta), 4)
    for m in range(0, 12, 2):
        assert function.coefficient(m) == sp.diff(function.expression, y, m).subs(y, 0)


@pytest.mark.parametrize(
    "beta,places,values",
    [
        (0, [], []),
        (1, [3.435840993535], [-0.0369143731999]),
        (2, [2.162437936154, 5.521064656068], [-0.2314214695518, 0.0252906568602]),
    ],
)
def test_number_and_place_of_extrema(beta: int, places: list[float], values: list[float]) -> None:
    """2β + 1 extrema, no more (Descartes) and no fewer (certain sign changes), enclosed to 1e-28 or better."""
    found = extrema(beta)
    assert found.exact
    assert found.count == 2 * beta + 1
    right = [p for p in found.points if p.place.low > 0]
    assert [p.place.middle for p in right] == pytest.approx(places, abs=1e-11)
    assert [p.value.middle for p in right] == pytest.approx(values, abs=1e-11)
    assert [p.kind for p in right] == ["minimum", "maximum"][:beta]
    assert all(p.place.width < 1e-28 and p.value.width < 1e-28 for p in found.points)
    left = [p for p in found.points if p.place.high < 0]
    assert [-p.place.high for p in left] == [p.place.low for p in reversed(right)]


def test_extrema_are_zeros_of_the_third_derivative() -> None:
    """An oracle of its own: Newton from the place found, on sympy's σ''' in 40 digits, stays where it is."""
    with mp.workdps(40):
        for beta in (1, 2):
            third = sp.lambdify(x, sp.diff(second_derivative(beta), x).subs(alpha, 1), "mpmath")
            for point in extrema(beta).points:
                low, high = (mp.mpf(v.numerator) / v.denominator for v in (point.place.low, point.place.high))
                reach = mp.mpf(10) ** -25
                assert third(low - reach) * third(high + reach) < 0


@pytest.mark.parametrize("beta", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_beyond_the_paper(beta: int) -> None:
    """The 2β + 1 rule goes on for β = 3, 4 and σ''(0) = 2^{β-2} α stays the largest of them."""
    found = extrema(beta)
    assert found.exact
    assert found.count == 2 * beta + 1
    centre = next(p for p in found.points if p.place.low == p.place.high == 0)
    assert all(abs(p.value.low) < centre.value.low for p in found.points if p is not centre)


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_even_and_of_unit_integral(beta: int) -> None:
    """Figure 2: σ''(-x) = σ''(x); ∫σ'' = 1; σ_{α,β}(x) = σ_{1,β}(αx)/α."""
    assert all(row.holds for row in identities("F2.even"))
    assert integral(beta) == 1
    assert rescaling_identity(beta).holds


def test_table1_curvatures() -> None:
    """Every row of Table 1 agrees with print but Mish: 0.6442 at -0.0879, printed 0.362."""
    rows = {row.name: row for row in curvatures()}
    assert [n for n, row in rows.items() if not row.agrees_with(float(number_in(f"T1.{n}.curvature")))] == ["mish"]
    assert rows["relu"].value == rows["leaky_relu"].value == sp.oo
    assert rows["gelu"].value == 2 / sp.sqrt(2 * sp.pi)
    assert (rows["elu"].value, rows["elu"].attained) == (1, False)
    assert rows["swish"].value == sp.Rational(1, 2)
    mish = rows["mish"]
    assert mish.enclosure is not None
    assert mish.enclosure.within(0.644204637, 0.644204638)
    assert mish.at == pytest.approx(-0.0879344, abs=1e-7)


def test_mish_against_a_grid() -> None:
    """A dense sample never exceeds the enclosure, and comes near it."""
    curvature = sp.lambdify(x, mish_curvature(), "math")
    largest = max(abs(curvature(-6 + i * 0.001)) for i in range(12001))
    assert math.isclose(largest, 0.6442046, abs_tol=1e-6)


def test_refusals() -> None:
    with pytest.raises(ConfigurationError, match="no order of the recursion"):
        rct(-1)
    y = sp.Symbol("y")
    with pytest.raises(ConfigurationError, match="no factor of an exponential polynomial"):
        ExponentialPolynomial(sp.log(y), y)
    with pytest.raises(ConfigurationError, match="must be even or odd"):
        ExponentialPolynomial(sp.exp(-y) + 1, y)
