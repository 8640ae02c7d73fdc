"""max|σ''| = σ''(0), proved for every x: "the maximum second derivative occurs at x = 0" (E[2], E[4], E[6]).

With y = αx/2 and τ(y) = σ''(x)/α, the two inequalities τ(0) - τ(y) >= 0 and τ(0) + τ(y) > 0 are
multiplied by (2 cosh y)^p > 0. What remains are exponential polynomials, and all their Taylor
coefficients turn out nonnegative: e.g. for β = 2 and p = 4 the second has the coefficients 4^n +
4(n-1)(n-2) of (2y)^{2n}/(2n)!.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy as sp

from theory.symbolic.rct import curvature_at_zero, unit_curvature, x
from theory.symbolic.series import CoefficientSigns, ExponentialPolynomial

Expr = Any

y = sp.Symbol("y", real=True)
"""y = αx/2, the variable in which every rate below is an integer."""


def cleared(expression: Expr, power: int) -> ExponentialPolynomial:
    """`expression`, rational in x and e^x over a power of 1 + e^x, times (2 cosh(x/2))^power, as a function
    of y = x/2.
    """
    e = sp.Symbol("e", positive=True)
    rational = sp.cancel(sp.together(expression.subs(sp.exp(x), e)) * (1 + e) ** power)
    return ExponentialPolynomial((rational.subs(x, 2 * y)).subs(e, sp.exp(2 * y)) * sp.exp(-power * y), y)


@dataclass(frozen=True)
class MaximumProof:
    """|σ''_{α,β}(x)| <= σ''(0) = `value`, with equality at x = 0 alone: the signs of all coefficients of
    both sides.
    """

    beta: int
    value: Expr
    below: CoefficientSigns
    above: CoefficientSigns
    above_at_zero: Expr

    @property
    def proved(self) -> bool:
        """τ(0) - τ has only coefficients >= 0, some > 0 (so > 0 off zero); τ(0) + τ likewise, and is
        positive at zero.
        """
        return self.below.nonnegative and self.above.nonnegative and bool(self.above_at_zero > 0)


@lru_cache(maxsize=16)
def maximum_at_zero(beta: int) -> MaximumProof:
    """The proof for β (0, 1, 2 in the paper); for larger β `proved` says whether this argument still
    decides.
    """
    tau = unit_curvature(beta)
    peak = sp.simplify(tau.subs(x, 0))
    power = 2 * ((beta + 3) // 2)  # even, at least β + 2: the power of 1 + e^x in the denominator of τ
    above = cleared(peak + tau, power)
    return MaximumProof(
        beta=beta,
        value=curvature_at_zero(beta),
        below=cleared(peak - tau, power).signs(),
        above=above.signs(),
        above_at_zero=above.coefficient(0),
    )
