"""Coefficients of the derivatives of the RCT-AF family, derived once per (beta, order) in exact arithmetic.

E[1], E[3] and E[5] of the paper (arXiv 2603.23860) are the first members of f -> f'·x started from the
softplus. With t = alpha·x, s = sigmoid(t) and the Euler operator (t d/dt)^beta = Σ_k S(beta, k) t^k d^k/dt^k
(S: Stirling numbers of the second kind), Leibniz gives every member and every derivative of it the form

    d^n/dt^n [(t d/dt)^beta softplus(t)] = base + Σ_p c_p t^p s^(p+n-1),

where base is softplus for n = 0, beta = 0; t·s for n = 0, beta > 0; s for n = 1; nothing for n > 1, and the
sum has only true derivatives of s. With v = s (1 - s) and u = 1 - 2s these are

    s^(m) = v · P_m(v) for odd m,   s^(m) = v · u · P_m(v) for even m.

v carries the exponential decay, u is bounded and vanishes at 0: nothing overflows, and nothing cancels in the
tails. (In powers of u instead of v the polynomials cancel there: seven digits are lost at beta = 10.)
"""

from __future__ import annotations

from functools import cache
from math import comb, perm

Polynomial = tuple[float, ...]  # coefficients of 1, v, v², ...


@cache
def sigmoid_polynomial(order: int) -> tuple[int, ...]:
    """P_order of the module's formula, from v' = v·u, u' = -2v, u² = 1 - 4v.

    >>> sigmoid_polynomial(1), sigmoid_polynomial(3), sigmoid_polynomial(5)
    ((1,), (1, -6), (1, -30, 120))
    """
    if order == 1:
        return (1,)
    last = sigmoid_polynomial(order - 1)
    following = [0] * (len(last) + 1)
    for power, c in enumerate(last):
        following[power] += c * (1 + power)
        if order % 2:  # the factor u is differentiated too
            following[power + 1] -= c * (6 + 4 * power)
    while following[-1] == 0:
        following.pop()
    return tuple(following)


def stirling_second(n: int, k: int) -> int:
    """Stirling number of the second kind: (t d/dt)^n = Σ_k S(n, k) t^k d^k/dt^k.

    >>> [stirling_second(3, k) for k in range(4)]
    [0, 1, 3, 1]
    """
    row = [1]
    for _ in range(n):
        row = [j * (row[j] if j < len(row) else 0) + (row[j - 1] if j else 0) for j in range(len(row) + 1)]
    return row[k] if k < len(row) else 0


@cache
def remainder(beta: int, order: int) -> tuple[Polynomial, ...]:
    """c_p·P_{p+order-1} for p = 0, 1, ...: the sum of the module's formula, over v and without the factors u.

    >>> remainder(1, 2)  # d²/dt² of t·s is v·(2 + t·u)
    ((2.0,), (1.0,))
    >>> remainder(0, 1), remainder(2, 0)  # s; t·s + t²·v
    ((), ((), (), (1.0,)))
    """
    weights: dict[int, int] = {}
    if beta == 0 and order >= 2:
        weights[0] = 1
    for k in range(1, beta + 1):
        for j in range(min(order, k) + 1):  # j derivatives fall on t^k, order - j on s^(k-1)
            power, falls = k - j, k - 1 + order - j
            if falls > 0:  # else it is the base
                weight = stirling_second(beta, k) * comb(order, j) * perm(k, j)
                weights[power] = weights.get(power, 0) + weight
    return tuple(
        tuple(float(weights[p] * c) for c in sigmoid_polynomial(p + order - 1)) if p in weights else ()
        for p in range(max(weights, default=-1) + 1)
    )
