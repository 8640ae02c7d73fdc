"""E[9]-E[18]: the Hessian diagonal of a net with one hidden layer, from the loss itself and against print.

The net of E[10] with d inputs and m neurons is written out, ½(f - y)² is differentiated twice in every
parameter, and the printed right-hand side is subtracted. σ is undefined, so what holds here holds for
every activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy as sp

from theory.symbolic.functions import sigma, sigma1, sigma2
from theory.symbolic.rct import Identity

Expr = Any


@dataclass(frozen=True)
class OneHiddenLayer:
    """Symbols of E[10]: f = Σ_i W2_i σ(z_i) + b2, z_i = Σ_j W1_ij x_j + b1_i, and the loss ½(f - y)²."""

    x: tuple[Expr, ...]
    w1: tuple[tuple[Expr, ...], ...]
    b1: tuple[Expr, ...]
    w2: tuple[Expr, ...]
    b2: Expr
    z: tuple[Expr, ...]
    f: Expr
    y: Expr

    @property
    def loss(self) -> Expr:
        """½(f - y)²."""
        return (self.f - self.y) ** 2 / 2

    def parameters(self) -> tuple[Expr, ...]:
        """Every weight and bias."""
        return (*(w for row in self.w1 for w in row), *self.b1, *self.w2, self.b2)


def network(inputs: int = 2, neurons: int = 2) -> OneHiddenLayer:
    """E[10] with symbols for everything."""
    x = sp.symbols(f"x1:{inputs + 1}")
    w1 = tuple(sp.symbols(f"W1_{i}_1:{inputs + 1}") for i in range(1, neurons + 1))
    b1 = sp.symbols(f"b1_1:{neurons + 1}")
    w2 = sp.symbols(f"W2_1:{neurons + 1}")
    b2, y = sp.symbols("b2 y")
    z = tuple(sum(w * v for w, v in zip(row, x)) + b for row, b in zip(w1, b1))
    f = sum(w * sigma(v) for w, v in zip(w2, z)) + b2
    return OneHiddenLayer(x, w1, b1, w2, b2, z, f, y)


def _identity(equation: str, statement: str, derived: Expr, printed: Expr) -> Identity:
    return Identity(equation, statement, sp.expand(derived - printed))


def identities(inputs: int = 2, neurons: int = 2) -> tuple[Identity, ...]:
    """E[9] and E[11]-E[18] for every parameter: derived minus printed, term by term."""
    net = network(inputs, neurons)
    f, y, loss = net.f, net.y, net.loss
    rows = []
    for p in net.parameters():
        split = sp.diff(f, p) ** 2 + (f - y) * sp.diff(f, p, 2)
        rows.append(_identity("E9", f"diagonal splits at {p}", sp.diff(loss, p, 2), split))
    rows.append(_identity("E11", "f is linear in b2", sp.diff(f, net.b2, 2), 0))
    rows.append(_identity("E12", "entry of b2", sp.diff(loss, net.b2, 2), 1))
    for i, w2 in enumerate(net.w2):
        z = net.z[i]
        rows.append(_identity("E11", f"f is linear in {w2}", sp.diff(f, w2, 2), 0))
        rows.append(_identity("E12", f"entry of {w2}", sp.diff(loss, w2, 2), sigma(z) ** 2))
        for w1, x in zip(net.w1[i], net.x):
            first, second = w2 * sigma1(z) * x, w2 * sigma2(z) * x**2
            rows.append(_identity("E13", f"df/d{w1}", sp.diff(f, w1), first))
            rows.append(_identity("E14", f"d2f/d{w1}2", sp.diff(f, w1, 2), second))
            rows.append(_identity("E15", f"entry of {w1}", sp.diff(loss, w1, 2), first**2 + (f - y) * second))
        first, second = w2 * sigma1(z), w2 * sigma2(z)
        b1 = net.b1[i]
        rows.append(_identity("E16", f"df/d{b1}", sp.diff(f, b1), first))
        rows.append(_identity("E17", f"d2f/d{b1}2", sp.diff(f, b1, 2), second))
        rows.append(_identity("E18", f"entry of {b1}", sp.diff(loss, b1, 2), first**2 + (f - y) * second))
    return tuple(rows)


def output_layer_is_free_of_curvature(inputs: int = 2, neurons: int = 2) -> bool:
    """Section A.3.2: the entries of W2 and b2 hold no σ''."""
    net = network(inputs, neurons)
    return not any(sp.diff(net.loss, p, 2).has(sigma2) for p in (*net.w2, net.b2))
