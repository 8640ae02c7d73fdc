"""Coefficients of the derivatives of the RCT-AF family, derived once per (beta, order) in exact arithmetic.

E[1], E[3] and E[5] of the paper (arXiv 2603.23860) are the first members of f -> f'·x started from the
softplus. With t = alpha·x, s = sigmoid(t) and the Euler operator (t d/dt)^beta = Σ_k S(beta, k) t^k d^k/dt^k
(S: Stirling numbers of the second kind), every member and every derivative of it has the form

    d^n/dt^n [(t d/dt)^beta softplus(t)] = base + v · Σ_k t^k R_k(u),   v = s (1 - s),  u = 1 - 2s,

where base is softplus for n = 0, beta = 0; t·s for n = 0, beta > 0; s for n = 1; nothing for n > 1.
`remainder(beta, n)` returns the polynomials R_k. v carries the exponential decay and u is odd and bounded by
one, hence nothing in this form overflows or cancels in the tails.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from math import comb, perm

Polynomial = tuple[float, ...]  # coefficients of 1, u, u², ...

_SIGMOID_DERIVATIVES: list[list[Fraction]] = [[Fraction(1)]]


def _sigmoid_derivative(order: int) -> list[Fraction]:
    """Q with s^(order) = v·Q(u) for order >= 1: Q_1 = 1, Q_{m+1} = u·Q_m - (1 - u²)/2 · Q_m'."""
    known = _SIGMOID_DERIVATIVES
    while len(known) < order:
        last = known[-1]
        following = [Fraction(0)] * (len(last) + 1)
        for power, c in enumerate(last):
            following[power + 1] += c
            if power:
                following[power - 1] -= c * power / 2
                following[power + 1] += c * power / 2
        known.append(following)
    return known[order - 1]


def stirling_second(n: int, k: int) -> int:
    """Stirling number of the second kind: (t d/dt)^n = Σ_k S(n, k) t^k d^k/dt^k.

    >>> [stirling_second(3, k) for k in range(4)]
    [0, 1, 3, 1]
    """
    row = [1]
    for _ in range(n):
        row = [j * (row[j] if j < len(row) else 0) + (row[j - 1] if j else 0) for j in range(len(row) + 1)]
    return row[k] if k < len(row) else 0


@lru_cache(maxsize=None)
def remainder(beta: int, order: int) -> tuple[Polynomial, ...]:
    """The polynomials R_k(u) of the module's formula, k = 0, 1, ...; empty where there is no such part.

    >>> remainder(1, 2)  # d²/dt² of t·s is v·(2 + t·u)
    ((2.0,), (0.0, 1.0))
    >>> remainder(0, 1), remainder(2, 0)  # s; t·s + t²·v
    ((), ((), (), (1.0,)))
    """
    parts: dict[int, list[Fraction]] = {}

    def add(power: int, factor: int, sigmoid_order: int) -> None:
        if sigmoid_order == 0 or factor == 0:
            return  # the base, which the caller adds
        terms = _sigmoid_derivative(sigmoid_order)
        kept = parts.setdefault(power, [])
        kept.extend([Fraction(0)] * (len(terms) - len(kept)))
        for i, c in enumerate(terms):
            kept[i] += factor * c

    if beta == 0:
        if order >= 2:
            add(0, 1, order - 1)
    else:
        for k in range(1, beta + 1):
            for j in range(min(order, k) + 1):  # Leibniz: j derivatives fall on t^k
                add(k - j, stirling_second(beta, k) * comb(order, j) * perm(k, j), k - 1 + order - j)
    if not parts:
        return ()
    return tuple(tuple(float(c) for c in parts.get(k, ())) for k in range(max(parts) + 1))
