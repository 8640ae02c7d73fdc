"""Table 1's last column: max|σ''| of every activation, each with the argument that settles it.

Exact: GELU 2/√(2π), Swish 1/2 (and RCT-AF), ELU 1 (a supremum, approached from the left at 0), ReLU and
leaky ReLU infinite (σ' jumps). Mish by interval arithmetic with a tail bound: 0.6442 at -0.0879; the
paper prints 0.362.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy as sp

from theory._refusals import refuse
from theory.symbolic.intervals import Enclosure, as_enclosure, as_interval, context
from theory.symbolic.maxima import maximum_at_zero
from theory.symbolic.series import ExponentialPolynomial

Expr = Any

x = sp.Symbol("x", real=True)


@dataclass(frozen=True)
class Curvature:
    """sup|σ''|: `value` (exact, or the midpoint of `enclosure`), where, whether attained, and by what
    argument.
    """

    name: str
    value: Expr
    at: float
    attained: bool
    argument: str
    enclosure: Enclosure | None = None

    def agrees_with(self, printed: float) -> bool:
        """The printed number is the true one rounded to the digits printed (three decimals at most)."""
        if self.value == sp.oo:
            return printed == float("inf")
        return abs(float(self.value) - printed) <= 5.0000001e-4


def kink(name: str, left_slope: Expr) -> Curvature:
    """ReLU (`left_slope` 0) and leaky ReLU (0.01): σ' jumps at 0, so its difference quotient there is
    unbounded.
    """
    h = sp.Symbol("h", positive=True)
    quotient = sp.limit((1 - sp.Rational(str(left_slope))) / (2 * h), h, 0, "+")
    return Curvature(name, quotient, 0.0, False, "(σ'(h) - σ'(-h)) / 2h -> oo as h -> 0")


def elu() -> Curvature:
    """ELU with α = 1: σ'' = e^x left of 0 (rising to 1, not attained) and 0 right of it; σ' is continuous."""
    left = sp.exp(x) - 1
    if sp.limit(sp.diff(left, x), x, 0, "-") != 1:
        raise AssertionError("sigma' of ELU joins continuously at 0")
    if not sp.diff(left, x, 3).is_positive:
        raise AssertionError("sigma'' of ELU increases on x < 0")
    return Curvature("elu", sp.limit(sp.diff(left, x, 2), x, 0, "-"), 0.0, False, "σ'' = e^x increases to 1 at 0-")


def gelu() -> Curvature:
    """GELU: σ'' = φ(x)(2 - x²). With u = x²/2, |1 - u| <= e^u since e^u - 1 + u and e^u + 1 - u have no
    negative coefficient.
    """
    sigma = x * (1 + sp.erf(x / sp.sqrt(2))) / 2
    density = sp.exp(-(x**2) / 2) / sp.sqrt(2 * sp.pi)
    if sp.simplify(sp.diff(sigma, x, 2) - density * (2 - x**2)) != 0:
        raise AssertionError("sigma'' of GELU is phi(x)(2 - x^2)")
    u = sp.Symbol("u", positive=True)
    for side in (sp.exp(u) - 1 + u, sp.exp(u) + 1 - u):
        if not ExponentialPolynomial(side, u).signs().nonnegative:
            raise AssertionError("|1 - u| <= exp(u) for u >= 0")
    return Curvature("gelu", 2 / sp.sqrt(2 * sp.pi), 0.0, True, "|1 - u| <= e^u, u = x²/2 (series)")


def rct(name: str, beta: int, curvature: Expr, argument: str) -> Curvature:
    """A member of RCT-AF whose α is chosen for the wanted curvature; the maximum at 0 is proved in
    `maxima`.
    """
    proof = maximum_at_zero(beta)
    if not proof.proved:
        refuse(f"the maximum at 0 is not proved for beta = {beta}")
    symbol = next(iter(proof.value.free_symbols))
    return Curvature(name, proof.value.subs(symbol, sp.solve(proof.value - curvature, symbol)[0]), 0.0, True, argument)


MISH_REACH = 30
MISH_BRACKET = (Fraction(-1, 10), Fraction(-7, 100))


def mish_curvature() -> Expr:
    """σ'' of Mish as a rational function of x and E = e^x: tanh ln(1+E) = (E² + 2E)/(E² + 2E + 2)."""
    e = sp.exp(x)
    return sp.factor(sp.together(sp.diff(x * (e**2 + 2 * e) / (e**2 + 2 * e + 2), x, 2)))


@lru_cache(maxsize=1)
def mish() -> Curvature:
    """Mish by outward-rounded interval arithmetic.

    1. σ''' changes sign inside a bracket around -0.0879 and σ'''' < 0 on it: one maximum there,
       enclosed by bisection.
    2. Everywhere else on [-30, 30], |σ''| < 0.6442 < that maximum, by subdivision.
    3. Beyond 30: |σ''| <= 2|T'| + |x T''| with T = 1 - 2/(E² + 2E + 2), and |T'| <= 2 e^{-|x|}, |T''|
       <= 6 e^{-|x|}.
    """
    ctx = context(30)
    curvature = mish_curvature()
    third = _callable(sp.diff(curvature, x))
    fourth = _callable(sp.diff(curvature, x, 2))
    second = _callable(curvature)
    low, high = MISH_BRACKET
    if not fourth(ctx, as_interval(ctx, low, high)) < 0:
        raise AssertionError("sigma'''' of Mish is negative on the bracket")
    while high - low > Fraction(1, 10**20):
        middle = (low + high) / 2
        if third(ctx, as_interval(ctx, middle, middle)) > 0:
            low = middle
        else:
            high = middle
    peak = as_enclosure(second(ctx, as_interval(ctx, low, high)))
    elsewhere = Fraction(6442, 10**4)
    if not peak.low > elsewhere:
        raise AssertionError("the maximum of Mish exceeds 0.6442")
    for a, b in ((Fraction(-MISH_REACH), MISH_BRACKET[0]), (MISH_BRACKET[1], Fraction(MISH_REACH))):
        _bounded(second, third, ctx, a, b, elsewhere)
    if not mish_tail(sp.Integer(MISH_REACH)) < sp.Rational(1, 1000):
        raise AssertionError("the tail of Mish is small")
    return Curvature(
        "mish",
        sp.Float(peak.middle),
        float((low + high) / 2),
        True,
        "interval arithmetic and a tail bound",
        peak,
    )


def mish_tail(reach: Expr) -> Expr:
    """Bound of |σ''| for |x| >= reach >= 1: (4 + 6|x|) e^{-|x|}, which decreases there.

    T = 1 - 2/(E² + 2E + 2) gives |T'| <= 2 min(E, 1/E) and |T''| <= 6 min(E, 1/E): the differences are
    quotients of polynomials in E > 0 without a negative coefficient, checked here.
    """
    e = sp.Symbol("E", positive=True)
    q = e**2 + 2 * e + 2
    ratio = (e**2 + 2 * e) / q
    first = sp.cancel(e * sp.diff(ratio, e))
    second = sp.cancel(e * sp.diff(first, e))
    for derivative, constant in ((first, 2), (second, 6)):
        for bound in (e, 1 / e):  # e^{-|x|} is min(E, 1/E)
            for side in (1, -1):
                numerator, denominator = sp.fraction(sp.cancel(constant * bound + side * derivative))
                if any(c < 0 for p in (numerator, denominator) for c in sp.Poly(p, e).coeffs()):
                    raise AssertionError(f"|derivative| <= {constant} min(E, 1/E) has a negative coefficient")
    return (4 + 6 * reach) * sp.exp(-reach)


def _callable(expression: Expr) -> Any:
    """An interval function (ctx, X) -> enclosure of a rational function of x and e^x."""
    e = sp.Symbol("e", positive=True)
    numerator, denominator = sp.fraction(sp.together(expression.subs(sp.exp(x), e)))
    forms = [
        sp.lambdify((x, e), sp.horner(sp.Poly(p, e).as_expr(), wrt=e), modules=[]) for p in (numerator, denominator)
    ]
    return lambda ctx, at: forms[0](at, ctx.exp(at)) / forms[1](at, ctx.exp(at))


def _bounded(second: Any, third: Any, ctx: Any, low: Fraction, high: Fraction, bound: Fraction) -> None:
    """|σ''| < bound on [low, high] by subdivision with the mean value form, or an AssertionError."""
    stack = [(low, high)]
    limit = as_interval(ctx, bound, bound)
    while stack:
        a, b = stack.pop()
        whole = as_interval(ctx, a, b)
        middle = as_interval(ctx, (a + b) / 2, (a + b) / 2)
        value = second(ctx, middle) + third(ctx, whole) * (whole - middle)
        if abs(value) < limit:
            continue
        if b - a < Fraction(1, 10**5):
            raise AssertionError(f"|sigma''| of Mish is not below {float(bound)} near {float(a)}")
        stack += [(a, (a + b) / 2), ((a + b) / 2, b)]


def curvatures() -> tuple[Curvature, ...]:
    """Every row of Table 1."""
    half, seven = sp.Rational(1, 2), sp.Integer(7)
    rows = [
        kink("relu", 0),
        kink("leaky_relu", "0.01"),
        elu(),
        gelu(),
        rct("swish", 1, half, "RCT-AF with β = 1, α = 1"),
        mish(),
    ]
    rows += [rct(f"rct{b}", b, seven, f"α = {(28, 14, 7)[b]}, maximum at 0") for b in (0, 1, 2)]
    return tuple(rows)
