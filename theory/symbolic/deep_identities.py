"""What differentiating one symbolic deep net gives, parameter by parameter, and what the forms say of each other.

Parameters are differentiated in the whole net, from the input to ½(f - y)²; nothing of the derivation is
assumed. `R` stands for the residual f - y and `h` for the activations that enter as c_k (E[21]). The printed
equations E[19]-E[33] are held against it in `theory.symbolic.printed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy as sp

from theory.symbolic.deep import DeepNet
from theory.symbolic.functions import sigma
from theory.symbolic.rct import Identity

Expr = Any

R = sp.Symbol("R")


@dataclass(frozen=True)
class LayerIdentity(Identity):
    """An identity at one layer l of a net with L layers (output included)."""

    layer: int
    depth: int

    @property
    def distance(self) -> int:
        """L - l: the paper's D is exact where this is at most 2."""
        return self.depth - self.layer


@dataclass(frozen=True)
class _Whole:
    """The whole net from one input x: pre-activations of every layer with z^(1) = W^(1) x + b^(1)."""

    net: DeepNet

    def forward(self) -> dict[tuple[int, int], Expr]:
        z: dict[tuple[int, int], Expr] = {}
        for r in range(1, self.net.depth + 1):
            for t in range(self.net.width(r)):
                z[r, t] = sp.Symbol(f"b{r}_{t}") + sum(
                    self.net.weight(r, t, j) * (sigma(z[r - 1, j]) if r > 1 else sp.Symbol("x"))
                    for j in range(self.net.width(r - 1) if r > 1 else 1)
                )
        return z

    def named(self, expression: Expr, z: dict[tuple[int, int], Expr]) -> Expr:
        """σ', σ'' as u, v; f - y as R; remaining σ(z) as h."""
        f = z[self.net.depth, 0]
        polynomial = self.net.named(expression.xreplace({sp.Symbol("y"): f - R}), z)
        activations = {sigma(v): sp.Symbol(f"h{r}_{i}") for (r, i), v in z.items()}
        return sp.expand(polynomial.xreplace(activations))


@lru_cache(maxsize=8)
def whole_net(widths: tuple[int, ...]) -> dict[tuple[int, int], Expr]:
    """z_i^(l) of every layer as expressions in one input x."""
    return _Whole(DeepNet(widths)).forward()


@lru_cache(maxsize=8)
def parameter_derivatives(widths: tuple[int, ...]) -> tuple[tuple[int, Expr, Expr, dict[str, Expr]], ...]:
    """One weight and one bias of every layer (neurons are alike by symmetry): layer, parameter, c_k,
    derivatives.
    """
    net = DeepNet(widths)
    whole = _Whole(net)
    z = whole.forward()
    f = z[net.depth, 0]
    loss = (f - sp.Symbol("y")) ** 2 / 2
    found = []
    for layer in range(1, net.depth + 1):
        last = 0 if layer == 1 else net.width(layer - 1) - 1
        source = sp.Symbol("x") if layer == 1 else sp.Symbol(f"h{layer - 1}_{last}")
        for parameter, c in ((net.weight(layer, 0, last), source), (sp.Symbol(f"b{layer}_0"), sp.Integer(1))):
            derivatives = {
                "z": whole.named(sp.diff(z[layer, 0], parameter), z),
                "first": whole.named(sp.diff(f, parameter), z),
                "second": whole.named(sp.diff(f, parameter, 2), z),
                "entry": whole.named(sp.diff(loss, parameter, 2), z),
            }
            found.append((layer, parameter, c, derivatives))
    return tuple(found)


def exact_entries(widths: tuple[int, ...]) -> dict[Expr, Expr]:
    """The Hessian diagonal of ½(f - y)² by differentiating the loss, for the parameters of `parameter_derivatives`."""
    return {parameter: derivatives["entry"] for _, parameter, _, derivatives in parameter_derivatives(widths)}


def expansion_identities(widths: tuple[int, ...]) -> tuple[LayerIdentity, ...]:
    """E[30] and E[31] against E[28], and the exact pair sum against differentiation: what the forms say of
    each other.
    """
    net = DeepNet(widths)
    rows = []
    for layer in range(1, net.depth):
        where = f"layer {layer} of hidden widths {widths}"
        d = net.paper_recursion(layer, 0)
        differences = {
            "E30=E28": d - net.paper_recursion(layer, 0, form="E30"),
            "E31=E28": d - net.path_sum(layer, 0),
            "exact=pairs": net.exact_hessian(layer, 0, 0) - net.pair_sum(layer, 0),
        }
        rows += [LayerIdentity(n, where, sp.expand(v), layer, net.depth) for n, v in differences.items()]
    return tuple(rows)
