"""E[7], E[20]-E[33]: the derivation for deep nets, by subtraction on symbolic nets and on the engine's networks.

E[27] drops the ways through a neighbour; all that follows from it keeps pairs of equal paths only. Each of these
checks shows: the identity at l >= L-2 (holds), at every l (fails, with the missing term), the engine against autograd,
the printed form against autograd, and the special nets on which it is exact.
"""

from __future__ import annotations

from functools import lru_cache

import sympy as sp
import torch

from theory import shapes
from theory.net import make_net, random_net
from theory.path_expansion import paper_recursion
from theory.symbolic import LayerIdentity, subtract
from theory.symbolic.deep import DeepNet, chain_rule_gap
from theory.symbolic.deep_identities import R, parameter_derivatives
from theory.symbolic.printed import deep_identities, forward_identities
from validation.bridge import TOLERANCE
from validation.evidence import Evidence, Finding, exactly, measured, zeros
from validation.numbers import largest, linear_net, random_nets, special_nets
from validation.register import Run, alike, check

TOP = "l >= L-2, the top two hidden layers and the output"
THREE, FOUR = (2, 2, 2), (2, 2, 2, 2)
REACH = "up to five layers (hidden widths (2, 2, 2) and (2, 2, 2, 2))"
ANY_DEPTH = "for any number of layers and any widths: proof in docs/derivation.md"


def rows_of(equation: str) -> list[LayerIdentity]:
    """Derived minus displayed at every layer of nets with three and with four hidden layers."""
    if equation == "E19":
        return [row for widths in ((2,), (2, 2), (2, 3, 2), FOUR) for row in forward_identities("E19", widths=widths)]
    return [row for widths in (THREE, FOUR) for row in deep_identities(equation, widths)]


def holds(equation: str, *more: Finding, note: str = "") -> Evidence:
    """Evidence from the displayed formula alone, at every layer of both nets."""
    return Evidence(equation, (zeros(rows_of(equation), reach=REACH), *more), note=note)


@lru_cache(maxsize=2)
def _sources(widths: tuple[int, ...]) -> dict[str, sp.Expr]:
    return {f"{theta} in hidden widths {widths}": c for _, theta, c, _ in parameter_derivatives(widths)}


def missing(equation: str, row: LayerIdentity, widths: tuple[int, ...]) -> sp.Expr:
    """What pairs of different paths (for E[27]: the neighbours) contribute, and an equation of the paper leaves out."""
    if row.distance == 0:
        return sp.Integer(0)
    if equation == "E27":
        return chain_rule_gap(widths, row.layer, 0, DeepNet(widths).width(row.layer + 1) - 1)[1]
    pairs = sp.Add(*(pair.term for pair in subtract(widths, row.layer).pairs))
    return pairs * R * _sources(widths)[row.statement] ** 2 if row.statement in _sources(widths) else pairs


def unexplained(equation: str, nets: tuple[tuple[int, ...], ...] = (THREE, FOUR)) -> list[LayerIdentity]:
    """Rows in which derived minus displayed is not exactly what `missing` says."""
    return [
        row
        for widths in nets
        for row in deep_identities(equation, widths)
        if sp.expand(row.difference - missing(equation, row, widths)) != 0
    ]


def _engine(run: Run) -> tuple[Finding, ...]:
    cases = random_nets(run.quick)
    return (
        measured("the exact form of theory equals autograd", max(c.theory for c in cases), at_most=TOLERANCE),
        measured("the engine's exact diagonal equals autograd", max(c.engine for c in cases), at_most=TOLERANCE),
    )


def _printed(equation: str, run: Run, correction: str, *, note: str = "") -> Evidence:
    """A form that keeps equal paths only: exact at the top and on nets with one path, wrong below in general."""
    rows = rows_of(equation)
    failing = [row for row in rows if not row.holds]
    example = ""
    if failing:
        shown = min(failing, key=lambda row: len(str(row.difference)))
        ones = shown.difference.subs(dict.fromkeys(shown.difference.free_symbols, 1))
        example = f"hidden widths (2, 2, 2), l = 1, {shown.statement}: derived - displayed = {shown.difference} "
        example += f"({ones} if every factor is 1)"
    below = [value for case in random_nets(run.quick) for value in case.below]
    middle = float(torch.tensor(below, dtype=torch.float64).median())
    top = largest([case.paper_top for case in random_nets(run.quick)])
    findings = [
        zeros([row for row in rows if row.distance <= 2], condition=TOP),
        exactly(
            "at every hidden layer",
            not failing,
            detail=f"{len(failing)} of {len(rows)} layers of nets with three and four hidden layers differ",
            counterexample=example,
        ),
        exactly(
            "what is missing is the way through the neighbours, term by term"
            if equation == "E27"
            else "what is missing is every product along two different paths, each twice, and nothing else",
            not unexplained(equation),
            condition="l < L-2",
        ),
        measured("as printed against autograd, engine's nets", top, at_most=TOLERANCE, condition=TOP),
        measured(
            f"as printed against autograd below (median of {len(below)} layers, functional part)",
            middle,
            at_most=TOLERANCE,
            label="relative error",
        ),
        *(
            measured("as printed against autograd", max(case.paper_top, *case.below), at_most=TOLERANCE, condition=name)
            for name, case in special_nets().items()
        ),
        measured("largest |D| of both forms", linear_net(), at_most=0.0, condition="linear σ"),
    ]
    agreed = tuple(f for f in _engine(run))
    scoped = tuple(Finding(f.statement, f.holds, False, "the exact form", f.detail, f.figure) for f in agreed)
    note = note + "; " if note else ""
    note += "sizes: study error_size; proofs: docs/derivation.md"
    return Evidence(equation, (*findings, *scoped), correction=correction, note=note)


EXACT = "D_i^(l) = Σ_{r>=l} Σ_j σ''(z_j^r) S_j^r (∂z_j^r/∂z_i^l)², with the sum over paths squared (pairs of paths)"
MATRIX = "H^(l) = diag(σ''S) + diag(σ') Wᵀ H^(l+1) W diag(σ'), H^(L) = 0, D^(l) = diag H^(l)"
INSTEAD = {
    "E7": EXACT,
    "E27": "∂δ_t/∂z_i = Σ_t' H_tt' W_t'i σ'(z_i): the sum over all t', not t' = t alone",
    "E28": MATRIX,
    "E31": EXACT,
    "E32": "(δ c)² + (f - y) c² D with D = diag H, " + MATRIX,
    "E33": "(δ c)² + (f - y) c² D, " + EXACT,
}
"""What holds in place of a printed form."""


alike(
    {
        "E20": "E[20]: δ by backpropagation equals ∂f/∂z.",
        "E23": "E[23]: ∂²f/∂θ² = D c² with the exact D = ∂δ/∂z.",
    },
    lambda claim, run: holds(claim, *_engine(run)),
)
alike(
    {
        "E21": "E[21], a definition: ∂z/∂θ in its own layer is an input, or 1.",
        "E24": "E[24]: the product rule for D.",
        "E25": "E[25], a definition: one layer of E[19].",
        "E26": "E[26]: ∂z_t^(l+1)/∂z_i^(l) = W_ti σ'(z_i).",
    },
    lambda claim, run: holds(claim),
)
alike(
    {
        "E7": "E[7] = E[33]: exact for l >= L-2, wrong below.",
        "E27": "E[27]: the chain rule through the own pre-activation alone; the way through the neighbours is missing.",
        "E28": "E[28]: the recurrence for D, exact for l >= L-2, wrong below.",
        "E31": "E[31]: the same polynomial as E[28], hence the same scope.",
        "E32": "E[32]: the entry with E[30] inside.",
        "E33": "E[33]: the entry with E[31] inside.",
    },
    lambda claim, run: _printed(claim, run, INSTEAD[claim], note="E[7] repeats E[33]" if claim == "E7" else ""),
)


@check("E22")
def check_E22(run: Run) -> Evidence:
    """E[22]: ∂f/∂θ = δ c; squared it is the engine's Gauss-Newton part for one output."""
    split = max(case.gauss_newton for case in random_nets(run.quick))
    return holds("E22", measured("the engine's Gauss-Newton part is Σ (δ c)∇²ℓ(δ c)", split, at_most=TOLERANCE))


@check("E29")
def check_E29(run: Run) -> Evidence:
    """E[29]: S = δ/σ' where σ' ≠ 0, as the text says; σ' of RCT-AF has a zero for β = 1, 2."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    negative = [b for b in (0, 1, 2) if bool((shapes.rct(1.0, b).d1(x) < 0).any())]
    note = f"σ' changes sign for β = {', '.join(map(str, negative))}, so E[29] has a hole inside the family; S has none"
    return holds("E29", note=note)


@check("E30")
def check_E30(run: Run) -> Evidence:
    """E[30]: E[28] with δ/σ' for S, and 0/0 where σ' = 0."""
    flat = make_net([torch.ones(1, 1).double(), torch.ones(1, 1).double()], None, shapes.quadratic(1.0))
    at = torch.tensor([[-1.0]], dtype=torch.float64)
    kept = float(paper_recursion(flat, at).layer(1))
    note = f"at σ'(z) = 0 E[30] is 0/0 while E[28] gives D = {kept:g} (σ = x + x²/2, z = -1)"
    return _printed("E30", run, MATRIX + "; with S, since δ/σ' is 0/0 where σ' = 0", note=note)


@check("A4.2.ck-independent")
def check_A4_2_ck_independent(run: Run) -> Evidence:
    """Section A.4.2: c_k = ∂z/∂θ_k holds no θ_k: ∂²z/∂θ_k² = 0 in every layer, and h^(l-1) holds no W^(l)."""
    net, free = DeepNet(FOUR), True
    for l in range(2, net.depth + 1):
        z = net.forward(l - 1)
        for theta in (net.weight(l, 0, 0), sp.Symbol(f"b{l}_0")):
            free &= all(theta not in z[l - 1, j].free_symbols for j in range(net.width(l - 1)))
    return Evidence(
        "A4.2.ck-independent",
        (
            exactly("h^(l-1) holds no parameter of layer l", bool(free), reach=REACH),
            zeros(rows_of("A4.2.ck-independent"), reach=REACH),
        ),
        note="holds for a parameter used once; weights shared between layers are refused by the engine",
    )


@check("A4.3.base-case")
def check_A4_3_base_case(run: Run) -> Evidence:
    """Section A.4.3: δ^(L) = 1, so D^(L) = 0; for vector outputs too if D carries the functional part."""
    g = torch.Generator().manual_seed(43)
    net = random_net([3, 4, 1], shapes.tanh(), generator=g)
    z = net.weights[1].new_zeros(1).requires_grad_(True)
    (slope,) = torch.autograd.grad((z * 1.0).sum(), z, create_graph=True)
    return Evidence(
        "A4.3.base-case",
        (
            exactly(
                "∂f/∂z^(L) = 1 does not depend on z^(L)", DeepNet((2,)).delta(2, 0) == 1 and not slope.requires_grad
            ),
            zeros(rows_of("A4.3.base-case"), statement="D^(L) = ∂²f/∂(z^(L))² = 0, since f = z^(L)"),
        ),
        note="for any loss: D^(L) = 0 and the Gauss-Newton part added apart; starting from diag ∇²ℓ is worse",
    )
