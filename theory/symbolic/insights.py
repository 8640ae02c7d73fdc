"""Section A.5 and what else the text reads off the derivation, decided on the exact polynomials.

In the symbolic net v stands for σ'', u for σ', R for f - y; an exact Hessian entry is a polynomial in them.
"""

from __future__ import annotations

from typing import Any

import sympy as sp

from theory.symbolic.deep import DeepNet
from theory.symbolic.deep_identities import R, exact_entries

Expr = Any


def _curvatures(net: DeepNet, lowest: int = 1) -> list[Expr]:
    return [net.v(r, j) for r in range(lowest, net.depth) for j in range(net.width(r))]


def is_linear_in_curvature(widths: tuple[int, ...], layer: int) -> bool:
    """A.5: the exact D^(l) is homogeneous of degree 1 in the σ'' of all sites, u and W held fixed.

    (Not in α or max|σ''|: changing those changes σ and σ' too.)
    """
    net = DeepNet(widths)
    poly = sp.Poly(net.exact_hessian(layer, 0, 0), *_curvatures(net))
    return all(sum(powers) == 1 for powers, _ in poly.terms())


def uses_every_later_site(widths: tuple[int, ...], layer: int) -> bool:
    """Sections 3.2, A.4.4: D_0^(l) holds σ'' of its own unit, of every unit of every later layer, and no
    other.
    """
    net = DeepNet(widths)
    found = {s for s in net.exact_hessian(layer, 0, 0).free_symbols if s in _curvatures(net)}
    return found == {net.v(layer, 0), *_curvatures(net, layer + 1)}


def is_amplified_by_residual(widths: tuple[int, ...]) -> bool:
    """A.5: in every exact entry the σ'' part carries the factor f - y once, and the rest neither σ'' nor f -
    y.
    """
    net = DeepNet(widths)
    curvatures = _curvatures(net)
    for entry in exact_entries(widths).values():
        poly = sp.Poly(entry, R, *curvatures)
        if any(powers[0] != sum(powers[1:]) or powers[0] > 1 for powers, _ in poly.terms()):
            return False
    return True


def output_layer_holds_no_curvature(widths: tuple[int, ...]) -> bool:
    """Section A.3.2 for any depth: entries of W^(L), b^(L) hold no σ''."""
    net = DeepNet(widths)
    top = {name: e for name, e in exact_entries(widths).items() if str(name)[1:].startswith(str(net.depth))}
    return len(top) == 2 and not any(e.has(v) for e in top.values() for v in _curvatures(net))
