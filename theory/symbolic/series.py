"""Exact proofs about exponential polynomials F(y) = Σ_k P_k(y) e^{ky} by the signs of their power series.

With c_m = F^(m)(0), F(y) = Σ_m c_m y^m / m!, and c_m is itself explicit in m:

    c_m = Σ_k Σ_j p_kj · m (m-1)...(m-j+1) · k^(m-j),      P_k(y) = Σ_j p_kj y^j.

Two facts turn signs of coefficients into theorems about F on y > 0:

* if every c_m >= 0 and one is positive, F > 0 on y > 0;
* Descartes' rule for everywhere convergent power series (divide by a power, differentiate, Rolle): the
  number of
  zeros in y > 0, with multiplicity, is at most the number of sign changes of (c_m).

All arithmetic is in exact rationals; the infinitely many coefficients beyond a threshold are settled by
domination of the largest rate, an induction whose two premises are checked at the threshold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy as sp

from theory._refusals import refuse

Expr = Any  # sympy ships no usable types

M = sp.Symbol("m", integer=True, nonnegative=True)
SEARCH_LIMIT = 400


@dataclass(frozen=True)
class CoefficientSigns:
    """Signs of all c_m: `head` explicitly for m < `threshold`, `tail` for every later m (of the right
    parity).
    """

    head: tuple[tuple[int, int], ...]
    threshold: int
    tail: int

    @property
    def changes(self) -> int:
        """Number of sign changes, zeros skipped: Descartes' bound on the zeros in y > 0."""
        signs = [s for _, s in self.head if s] + ([self.tail] if self.tail else [])
        return sum(a != b for a, b in itertools.pairwise(signs))

    @property
    def nonnegative(self) -> bool:
        """No coefficient is negative and at least one is positive."""
        signs = {s for _, s in self.head} | {self.tail}
        return -1 not in signs and 1 in signs


class ExponentialPolynomial:
    """F(y) = Σ_k P_k(y) e^{ky} with rational k and rational coefficients, even, odd, or with rates k >= 0
    only.
    """

    def __init__(self, expression: Expr, variable: Expr) -> None:
        self.variable = variable
        self.terms = _collect(expression, variable)
        self.expression = sp.Add(*(c * variable**j * sp.exp(k * variable) for (k, j), c in self.terms.items()))
        self.parity = self._parity()

    def _parity(self) -> int | None:
        """0 for even, 1 for odd, None for neither: read off p_(-k)j = ±(-1)^j p_kj."""
        for parity in (0, 1):
            if all(self.terms.get((-k, j), 0) == (-1) ** (j + parity) * c for (k, j), c in self.terms.items()):
                return parity
        if any(k < 0 for k, _ in self.terms):
            refuse("a series with negative rates must be even or odd; split it into its two parts first")
        return None

    def indices(self, start: int = 0) -> Iterator[int]:
        """The m for which c_m can differ from zero, upward from `start`."""
        step = 1 if self.parity is None else 2
        first = start if self.parity is None or start % 2 == self.parity else start + 1
        while True:
            yield first
            first += step

    def coefficient(self, m: int) -> Expr:
        """c_m = F^(m)(0), an exact rational."""
        total = sp.Integer(0)
        for (k, j), c in self.terms.items():
            if j <= m:
                total += c * sp.ff(m, j) * sp.Integer(1) * (k ** (m - j) if k or m > j else 1)
        return total

    def rates(self) -> dict[Expr, Expr]:
        """Q_K(m) for each K > 0, so that c_m = Σ_K K^m Q_K(m) beyond the degree of P_0."""
        found: dict[Expr, Expr] = {}
        factor = 1 if self.parity is None else 2  # k and -k contribute alike where the parity lets c_m differ from 0
        for (k, j), c in self.terms.items():
            if k > 0:
                found[k] = found.get(k, 0) + factor * c * sp.expand_func(sp.ff(M, j)) / k**j
        return {k: sp.Poly(sp.expand(q), M) for k, q in found.items() if sp.expand(q) != 0}

    def signs(self) -> CoefficientSigns:
        """Signs of every coefficient, the tail by domination of the largest rate (see `_dominates`)."""
        rates = self.rates()
        finite = max((j for (k, j), _ in self.terms.items() if k == 0), default=0)
        head: list[tuple[int, int]] = []
        for m in self.indices():
            if m > finite and _dominates(rates, m):
                top = rates[max(rates)] if rates else sp.Poly(0, M)
                return CoefficientSigns(tuple(head), m, int(sp.sign(top.eval(m))))
            if m > SEARCH_LIMIT:
                refuse(f"no threshold below m = {SEARCH_LIMIT}: the largest rate dominates too late")
            head.append((m, int(sp.sign(self.coefficient(m)))))
        raise AssertionError("unreachable: indices() never ends")


def _collect(expression: Expr, variable: Expr) -> dict[tuple[Expr, int], Expr]:
    """Terms {(k, j): p_kj} of an expression that is a sum of p · y^j · e^{ky}."""
    terms: dict[tuple[Expr, int], Expr] = {}
    expanded = sp.expand(sp.expand(expression.rewrite(sp.exp)), power_exp=True)
    for term in sp.Add.make_args(sp.powsimp(expanded)):
        constant, rest = term.as_independent(variable)
        rate, power = sp.Integer(0), 0
        for factor in sp.Mul.make_args(rest):
            if isinstance(factor, sp.exp):
                rate += factor.args[0] / variable
            elif factor == variable:
                power += 1
            elif factor.is_Pow and factor.base == variable and factor.exp.is_Integer and factor.exp > 0:
                power += int(factor.exp)
            elif factor != 1:
                refuse(f"{factor} is no factor of an exponential polynomial in {variable}")
        if not (rate.is_Rational and constant.is_Rational):
            refuse(f"{term} has an irrational rate or coefficient; only rational ones are decided exactly")
        key = (rate, power)
        terms[key] = terms.get(key, sp.Integer(0)) + constant
    return {key: c for key, c in terms.items() if c != 0}


def _dominates(rates: dict[Expr, Expr], m: int) -> bool:
    """True if from m on the term of the largest rate K exceeds all others together.

    Premises, in exact rationals: Q_K has no root and no turning point at or beyond m, so |Q_K| >=
    |Q_K(m)| from there on; |Q_K(m)| K^m > Σ B_k(m) k^m with B_k = Σ|coefficients| m^j; and each B_k(m)
    (k/K)^m no longer grows, which ((m+1)/m)^deg · k/K <= 1 gives for every later m as well.
    """
    if not rates:
        return True
    if m < 1:
        return False
    top = max(rates)
    leading = rates[top]
    if leading.degree() > 0:
        turning = [leading, leading.diff(M)] if leading.degree() > 1 else [leading]
        if any(poly.count_roots(m, sp.oo) for poly in turning):
            return False
    bound = sp.Integer(0)
    for k, poly in rates.items():
        if k == top:
            continue
        if sp.Rational(m + 1, m) ** poly.degree() * k > top:
            return False
        bound += sum(abs(c) * sp.Integer(m) ** j for (j,), c in poly.terms()) * k**m
    return bool(abs(leading.eval(m)) * top**m > bound)
