"""RCT-AF: the family by its recursion f -> f'·x (E[1]-E[6] as printed are held against it in `printed`).

Everything is rational in x, α and E = e^{αx} (the symbol `E`), with dE/dx = αE: differences of two closed
forms are decided by polynomial arithmetic, never by sampling. Only β = 0 needs a logarithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy as sp

from theory._refusals import refuse

Expr = Any

x = sp.Symbol("x", real=True)
alpha = sp.Symbol("alpha", positive=True)
E = sp.exp(alpha * x)


@dataclass(frozen=True)
class Identity:
    """A formula as displayed against its derivation: `difference` is derived minus displayed, simplified."""

    equation: str
    statement: str
    difference: Expr

    @property
    def holds(self) -> bool:
        """The two sides are the same function: their difference is the number zero."""
        return bool(self.difference == 0)


def zero(expression: Expr) -> Expr:
    """Normal form of an expression rational in x, α, e^{αx}: 0 exactly when it vanishes identically."""
    return sp.cancel(sp.together(sp.expand(expression, power_exp=True)))


@lru_cache(maxsize=16)
def rct(beta: int) -> Expr:
    """σ_{α,β}(x) from the recursion of section 3.1: ln(1+e^{αx})/α, then β times f -> f'·x."""
    if beta < 0 or beta != int(beta):
        refuse(f"beta = {beta} is no order of the recursion; give 0, 1, 2, ...")
    if beta == 0:
        return sp.log(1 + E) / alpha
    return sp.factor(sp.together(sp.diff(rct(beta - 1), x) * x))


@lru_cache(maxsize=16)
def second_derivative(beta: int) -> Expr:
    """σ''_{α,β}(x), derived."""
    return sp.factor(sp.together(sp.diff(rct(beta), x, 2)))


@lru_cache(maxsize=16)
def unit_curvature(beta: int) -> Expr:
    """τ_β(x) = σ''_{1,β}(x); then σ''_{α,β}(x) = α τ_β(αx) (see `rescaling_identity`)."""
    return second_derivative(beta).subs(alpha, 1)


def curvature_at_zero(beta: int) -> Expr:
    """σ''_{α,β}(0) = 2^{β-2} α: α/4, α/2, α. (f -> f'·x doubles the coefficient of x².)"""
    return sp.simplify(second_derivative(beta).subs(x, 0))


def integral(beta: int) -> Expr:
    """∫σ'' over the real line = σ'(∞) - σ'(-∞) = 1: max|σ''| is the reciprocal of a transition width."""
    slope = sp.diff(rct(beta), x).subs(alpha, 1)  # α is a change of variable that leaves the integral alone
    decaying = sp.together(slope.subs(sp.exp(x), 1 / sp.Symbol("e", positive=True)))
    e = sp.Symbol("e", positive=True)  # e = exp(-x)
    upper = sp.limit(decaying.subs(e, sp.exp(-x)), x, sp.oo)
    lower = sp.limit(slope, x, -sp.oo)
    return upper - lower


def rescaling_identity(beta: int) -> Identity:
    """σ_{α,β}(x) = σ_{1,β}(αx)/α: α is a change of coordinates."""
    other = rct(beta).subs(alpha, 1).subs(x, alpha * x) / alpha
    difference = rct(beta) - other
    return Identity("S3.1.rescaling", f"alpha rescales, beta={beta}", 0 if difference == 0 else zero(difference))


def sharp_limit(beta: int) -> tuple[Expr, Expr]:
    """Lim σ_{α,β}(x) for α -> oo, at x > 0 and at x < 0: x and 0, the ReLU (figure 1)."""
    p = sp.Symbol("p", positive=True)
    e = sp.exp(-alpha * p)  # decays; written so that no limit is of the form oo/oo
    decaying = sp.Symbol("d", positive=True)
    limits = []
    for side in (p, -p):
        value = sp.expand_log(rct(beta).subs(x, side), force=True)
        if beta == 0 and side == p:
            value = p + sp.log(1 + e) / alpha  # ln(1 + e^{αp}) = αp + ln(1 + e^{-αp})
        value = sp.cancel(value.subs(sp.exp(alpha * p), 1 / decaying)) if beta else value
        limits.append(sp.limit(value.subs(decaying, e), alpha, sp.oo))
    return limits[0], limits[1]


def flat_limit_slope(beta: int) -> Expr:
    """Lim σ'_{α,β}(x) for α -> 0 at any fixed x: 1/2, so on a fixed range of inputs σ becomes affine."""
    return sp.limit(sp.diff(rct(beta), x), alpha, 0, "+")
