"""The net of E[10] with symbols for everything; E[9]-E[18] are held against it in `theory.symbolic.printed`.

σ is undefined, so what holds here holds for every activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy as sp

from theory.symbolic.functions import sigma, sigma2

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


def output_layer_is_free_of_curvature(inputs: int = 2, neurons: int = 2) -> bool:
    """Section A.3.2: the entries of W2 and b2 hold no σ''."""
    net = network(inputs, neurons)
    return not any(sp.diff(net.loss, p, 2).has(sigma2) for p in (*net.w2, net.b2))
