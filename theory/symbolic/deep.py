"""E[19]-E[33] on a symbolic deep net: the printed recursion and the exact second derivative, expanded and
subtracted.

The net has a scalar output, hidden layers 1..L-1 of the given widths and an undefined σ. Exact quantities
come from differentiating f itself (nothing of the derivation is used); then σ'(z_i^l), σ''(z_i^l) are
named u_l_i, v_l_i, and both sides are polynomials in u, v and the weights. δ and S are expanded as well,
down to single paths.

Result: E[20], E[24]-E[26] hold; E[27] fails as soon as z_i^l reaches z_t^{l+1}'s gradient by way of a
neighbour; the paper's D is exact for l >= L-2, and below every missing term is 2 × a product along two
*different* paths (`Subtraction.pairs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise, product
from typing import Any

import sympy as sp

from theory._refusals import refuse
from theory.symbolic.functions import sigma, sigma1, sigma2

Expr = Any
Path = tuple[int, ...]


@dataclass(frozen=True)
class DeepNet:
    """L-layer net of E[19], L = len(widths) + 1: symbols by layer, counted from 1 as in the paper."""

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            refuse(f"widths {self.widths} must name at least one hidden layer of at least one neuron")

    @property
    def depth(self) -> int:
        """L, the output layer included."""
        return len(self.widths) + 1

    def width(self, layer: int) -> int:
        """n_l, with n_L = 1."""
        return self.widths[layer - 1] if layer < self.depth else 1

    def weight(self, layer: int, to: int, source: int) -> Expr:
        """W^(l)_{to, source}."""
        return sp.Symbol(f"W{layer}_{to}_{source}")

    def u(self, layer: int, i: int) -> Expr:
        """σ'(z_i^(l))."""
        return sp.Symbol(f"u{layer}_{i}")

    def v(self, layer: int, i: int) -> Expr:
        """σ''(z_i^(l))."""
        return sp.Symbol(f"v{layer}_{i}")

    def z(self, layer: int, i: int) -> Expr:
        """The free variable z_i^(l) of the layer from which a forward pass starts."""
        return sp.Symbol(f"z{layer}_{i}")

    def forward(self, start: int) -> dict[tuple[int, int], Expr]:
        """z_i^(r) for r >= start as expressions in the free z^(start), E[19]."""
        z = {(start, i): self.z(start, i) for i in range(self.width(start))}
        for r in range(start + 1, self.depth + 1):
            for t in range(self.width(r)):
                total = sum(self.weight(r, t, j) * sigma(z[r - 1, j]) for j in range(self.width(r - 1)))
                z[r, t] = total + sp.Symbol(f"b{r}_{t}")
        return z

    def named(self, expression: Expr, z: dict[tuple[int, int], Expr]) -> Expr:
        """`expression` with σ'(z), σ''(z) replaced by u, v, expanded to a polynomial."""
        names = {sigma1(value): self.u(*key) for key, value in z.items() if key[0] < self.depth}
        names |= {sigma2(value): self.v(*key) for key, value in z.items() if key[0] < self.depth}
        return sp.expand(expression.xreplace(names))

    def exact_gradient(self, layer: int, i: int) -> Expr:
        """δ_i^(l) = ∂f/∂z_i^(l) by differentiating f."""
        z = self.forward(layer)
        return self.named(sp.diff(z[self.depth, 0], self.z(layer, i)), z)

    def exact_hessian(self, layer: int, i: int, j: int) -> Expr:
        """∂²f/∂z_i∂z_j of layer l by differentiating f twice; D_i^(l) for i = j, E[23]."""
        z = self.forward(layer)
        return self.named(sp.diff(z[self.depth, 0], self.z(layer, i), self.z(layer, j)), z)

    def delta(self, layer: int, i: int) -> Expr:
        """δ by E[20]."""
        return sp.expand(self.u(layer, i) * self.s(layer, i)) if layer < self.depth else sp.Integer(1)

    def s(self, layer: int, i: int) -> Expr:
        """S_i^(l) = Σ_t δ_t W_ti of E[28]."""
        upper = range(self.width(layer + 1))
        return sp.expand(sum(self.delta(layer + 1, t) * self.weight(layer + 1, t, i) for t in upper))

    def paper_recursion(self, layer: int, i: int, *, form: str = "E28") -> Expr:
        """D_i^(l) by E[28], or by E[30] (S written δ/σ', E[29])."""
        if layer == self.depth:
            return sp.Integer(0)
        s = self.s(layer, i) if form == "E28" else sp.cancel(self.delta(layer, i) / self.u(layer, i))
        upper = sum(
            self.paper_recursion(layer + 1, t, form=form) * self.weight(layer + 1, t, i) ** 2
            for t in range(self.width(layer + 1))
        )
        return sp.expand(self.v(layer, i) * s + self.u(layer, i) ** 2 * upper)

    def paths(self, start: int, i: int, end: int, j: int) -> tuple[Path, ...]:
        """All paths (l,i) -> (r,j): the neuron taken in each layer from l to r."""
        if start == end:
            return ((i,),) if i == j else ()
        return tuple((i, *mid, j) for mid in product(*(range(self.width(s)) for s in range(start + 1, end))))

    def gain(self, start: int, path: Path) -> Expr:
        """Π_s σ'(z_{i_s}^(s)) W^(s+1)_{i_{s+1}, i_s} along one path; summed over paths it is
        ∂z_j^(r)/∂z_i^(l).
        """
        steps = enumerate(pairwise(path), start)
        return sp.Mul(*(self.u(s, a) * self.weight(s + 1, b, a) for s, (a, b) in steps))

    def bends(self, layer: int) -> list[tuple[int, int]]:
        """The sites (r, j) with l <= r <= L-1 at which σ'' enters."""
        return [(r, j) for r in range(layer, self.depth) for j in range(self.width(r))]

    def path_sum(self, layer: int, i: int) -> Expr:
        """D_i^(l) by the printed path expansion E[31]: every path with its own gain squared."""
        total = sum(
            self.v(r, j) * self.s(r, j) * self.gain(layer, path) ** 2
            for r, j in self.bends(layer)
            for path in self.paths(layer, i, r, j)
        )
        return sp.expand(total)

    def pair_sum(self, layer: int, i: int) -> Expr:
        """The exact expansion: pairs of paths with a common end, Σ v S (Σ_P gain_P)²."""
        total = sum(
            self.v(r, j) * self.s(r, j) * self.gain(layer, a) * self.gain(layer, b)
            for r, j in self.bends(layer)
            for a, b in product(self.paths(layer, i, r, j), repeat=2)
        )
        return sp.expand(total)

    def tails(self, layer: int, j: int) -> list[Expr]:
        """The single terms of S_j^(r): gains of the paths from (r, j) to the output without the first σ'."""
        return list(sp.Add.make_args(self.s(layer, j)))


@dataclass(frozen=True)
class MissingPair:
    """One monomial that the paper's form leaves out: σ'' at `bend`, a tail to the output, two different
    paths to it.
    """

    bend: tuple[int, int]
    tail: Expr
    first: Path
    second: Path
    term: Expr


@dataclass(frozen=True)
class Subtraction:
    """Exact minus paper's D_i^(l), both expanded, and the pairs of different paths that should explain it."""

    net: DeepNet
    layer: int
    neuron: int
    exact: Expr
    paper: Expr

    @cached_property
    def difference(self) -> Expr:
        """D exact minus D of E[30]/[31]/[33]."""
        return sp.expand(self.exact - self.paper)

    @property
    def terms(self) -> tuple[Expr, ...]:
        """The monomials of the difference."""
        return () if self.difference == 0 else sp.Add.make_args(self.difference)

    @cached_property
    def pairs(self) -> tuple[MissingPair, ...]:
        """All unordered pairs of different paths (l,i) -> (r,j), times every tail: enumerated, not read
        off.
        """
        net, found = self.net, []
        for r, j in net.bends(self.layer):
            for first, second in combinations(net.paths(self.layer, self.neuron, r, j), 2):
                for tail in net.tails(r, j):
                    both = net.gain(self.layer, first) * net.gain(self.layer, second)
                    found.append(MissingPair((r, j), tail, first, second, 2 * net.v(r, j) * tail * both))
        return tuple(found)

    @property
    def explained(self) -> bool:
        """Every monomial of the difference is one such pair, and every pair is one monomial."""
        terms = [pair.term for pair in self.pairs]
        return len(set(terms)) == len(terms) and set(terms) == set(self.terms)


def subtract(widths: tuple[int, ...], layer: int, neuron: int = 0) -> Subtraction:
    """Exact D_i^(l) from differentiating the net, minus E[28]."""
    net = DeepNet(widths)
    if not 1 <= layer < net.depth or not 0 <= neuron < net.width(layer):
        refuse(f"neuron {neuron} of layer {layer} is no hidden neuron of a net with hidden widths {widths}")
    return Subtraction(net, layer, neuron, net.exact_hessian(layer, neuron, neuron), net.paper_recursion(layer, neuron))


def chain_rule_gap(widths: tuple[int, ...], layer: int, i: int, t: int) -> tuple[Expr, Expr]:
    """E[27]: ∂δ_t^(l+1)/∂z_i^(l) exactly, minus D_t W_ti σ'(z_i); and what it is: Σ_{t' != t} H_tt' W_t'i
    σ'(z_i).
    """
    net = DeepNet(widths)
    upper = range(net.width(layer + 1))
    if layer + 1 == net.depth:
        return sp.Integer(0), sp.Integer(0)
    z = net.forward(layer)
    lifted = net.forward(layer + 1)
    derivative = sp.diff(lifted[net.depth, 0], net.z(layer + 1, t))
    substituted = derivative.xreplace({net.z(layer + 1, s): z[layer + 1, s] for s in upper})
    exact = net.named(sp.diff(substituted, net.z(layer, i)), z)
    hessian = {s: net.exact_hessian(layer + 1, t, s) for s in upper}
    step = {s: net.weight(layer + 1, s, i) * net.u(layer, i) for s in upper}
    gap = sp.expand(exact - hessian[t] * step[t])
    return gap, sp.expand(sum(hessian[s] * step[s] for s in upper if s != t))
