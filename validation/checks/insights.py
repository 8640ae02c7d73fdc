"""Section A.5 and what the text reads off the derivation: linearity, amplification, cancellation, expressivity."""

from __future__ import annotations

from typing import Any

import sympy as sp
import torch
from torch import nn

import hessdiag as hd
from theory import shapes
from theory.net import random_net
from theory.path_expansion import exact_recursion
from theory.rescaling import mlp_rule, rescale
from theory.symbolic import (
    curvature_at_zero,
    is_amplified_by_residual,
    is_linear_in_curvature,
    subtract,
    uses_every_later_site,
)
from theory.symbolic.printed import identities, zero_only_at_zero
from theory.symbolic.rct import alpha
from validation.bridge import deviation, rct_spec
from validation.checks.deep import rows_of
from validation.evidence import Evidence, Finding, exactly, measured, zeros
from validation.register import Run, check

NETS = ((2, 2, 2), (2, 3, 2), (2, 2, 2, 2))
REACH = "up to five layers (hidden widths (2, 2, 2), (2, 3, 2) and (2, 2, 2, 2))"


def _everywhere(test: object) -> bool:
    assert callable(test)
    return all(test(widths, layer) for widths in NETS for layer in range(1, len(widths) + 1))


@check("S2.4.avoids-cancellation")
def check_S2_4_avoids_cancellation(run: Run) -> Evidence:
    """Sections 2.4, 3.2: a sum of squares is zero only where every entry is; a trace is zero for (1, -1)."""
    entries = (1, -1)
    cancels = sum(entries) == 0 and sum(v**2 for v in entries) == 2
    found = (
        exactly(
            "Σ h² vanishes where every entry does, and nowhere else: it is a positive definite form",
            zero_only_at_zero("S2.4.avoids-cancellation"),
            reach="at four entries",
        ),
        exactly("the trace of diag(1, -1) is 0, its norm √2", cancels),
    )
    return Evidence("S2.4.avoids-cancellation", found)


@check("S3.2.contributes")
def check_S3_2_contributes(run: Run) -> Evidence:
    """Section 3.2: the exact D holds σ'' of its own unit and of every unit in every later layer."""
    found = exactly(
        "σ'' of exactly the own unit and all units above occur in D", _everywhere(uses_every_later_site), reach=REACH
    )
    return Evidence("S3.2.contributes", (found,), note="of the own layer only its own unit's")


@check("A4.4.weighted-sum")
def check_A4_4_weighted_sum(run: Run) -> Evidence:
    """Section A.4.4: a weighted sum of σ'', with weights S_j (∂z_j/∂z_i)²; those printed in E[31] are others."""
    found = (
        exactly("D is linear and homogeneous in σ''", _everywhere(is_linear_in_curvature), reach=REACH),
        exactly("σ'' of all later layers occur", _everywhere(uses_every_later_site), reach=REACH),
    )
    missing = len(subtract((2, 2, 2), 1).terms)
    note = f"the weights printed in E[31] miss {missing} terms at l = 1 of hidden widths (2, 2, 2)"
    return Evidence("A4.4.weighted-sum", found, note=note)


@check("A5.linear")
def check_A5_linear(run: Run) -> Evidence:
    """Section A.5: linear in σ'' site by site, σ and σ' held fixed; not linear in α, which moves all three."""
    fixed = "σ and σ' held fixed, site by site"
    found = [
        exactly("every term of the exact D has degree 1 in σ''", _everywhere(is_linear_in_curvature), condition=fixed),
        _linear_on_a_net(fixed),
    ]
    growth = _growth_with_alpha()
    note = f"as α doubles (same weights) the functional part of a net grows by {growth:.2f}, not by 2"
    return Evidence("A5.linear", tuple(found), note=note, correction="not linear in α or max|σ''|, which move σ and σ'")


def _linear_on_a_net(condition: str) -> Finding:
    base = shapes.tanh()
    g = torch.Generator().manual_seed(4)
    net = random_net([3, 4, 4, 4, 1], base, generator=g)
    x = torch.randn(5, 3, generator=g, dtype=torch.float64)

    def with_curvature(d2: shapes.Function) -> torch.Tensor:
        other = type(net)(net.weights, net.biases, shapes.Shape(base.sigma, base.d1, d2))
        return torch.cat([d.reshape(-1) for d in exact_recursion(other, x).values])

    mixed = with_curvature(lambda v: 2 * torch.sin(v) - 3 * torch.cos(v))
    gap = deviation(mixed, 2 * with_curvature(torch.sin) - 3 * with_curvature(torch.cos))
    return measured("D with σ'' = 2 sin - 3 cos is that combination", gap, at_most=1e-12, condition=condition)


def _growth_with_alpha() -> float:
    norms = []
    for a in (7.0, 14.0):
        g = torch.Generator().manual_seed(5)
        net = random_net([6, 16, 16, 16, 1], shapes.rct(a, 1), generator=g)
        x = torch.randn(64, 6, generator=g, dtype=torch.float64)
        norms.append(float(torch.cat([d.reshape(-1) for d in exact_recursion(net, x).values]).norm()))
    return norms[1] / norms[0]


@check("A5.amplification")
def check_A5_amplification(run: Run) -> Evidence:
    """Section A.5: the σ'' part carries f - y exactly once, for ½(f - y)²."""
    holds = all(is_amplified_by_residual(w) for w in NETS)
    note = "for another loss the factor is ∂ℓ/∂f, for cross-entropy p - y"
    found = (
        exactly("the σ'' part is (f - y) times the rest", holds, reach=REACH),
        zeros(rows_of("A5.amplification"), reach=REACH),
    )
    return Evidence("A5.amplification", found, note=note)


@check("S4.2.limits-expressivity")
def check_S4_2_limits_expressivity(run: Run) -> Evidence:
    """Sections 4.2, 4.5: nets with any α compute the same functions, so curvature limits none of them."""
    rows = identities("S4.2.limits-expressivity")
    same = all(row.holds for row in rows)
    gap = largest_gap()
    smaller = curvature_at_zero(1).subs(alpha, sp.Rational(1, 10))
    counterexample = (
        f"β = 1, max|σ''| = {smaller} (α = 1/10) and 7 (α = 14): nets of equal width that compute the same function, "
        f"largest difference of outputs {gap:.1e}"
    )
    found = (
        exactly("a smaller max|σ''| makes the class of functions smaller", not same, counterexample=counterexample),
        zeros(rows, statement="σ_{α,β}(x) = σ_{1,β}(αx)/α"),
        measured("the engine's nets with α = 14 and α = 0.1 agree", gap, at_most=1e-10, label="deviation"),
    )
    return Evidence(
        "S4.2.limits-expressivity",
        found,
        correction="α acts through initialisation, learning rate and weight decay of the rescaled groups only",
    )


def largest_gap() -> float:
    """Outputs of an engine MLP with α = 14 against the rescaled one with α = 0.1."""
    options: dict[str, Any] = {"num_classes": 3, "in_features": 4, "widths": (8, 8, 8), "seed": 0}
    one = hd.networks.build("mlp", activation=rct_spec(14.0, 1), **options).double()
    two = hd.networks.build("mlp", activation=rct_spec(0.1, 1), **options).double()
    layers = [name for name, m in one.named_modules() if isinstance(m, nn.Linear)]
    rule = mlp_rule(list(one.state_dict()), layers)
    two.load_state_dict(rescale(one.state_dict(), rule, 14.0 / 0.1))
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        return deviation(two(x), one(x))
