"""Where the σ'' of the RCT-AF family has its maximum (section 3.1) and how many extrema (figure 2, section 4.2)."""

from __future__ import annotations

import hessdiag as hd
from theory.symbolic import extrema, maximum_at_zero
from theory.symbolic.printed import displayed, identities
from theory.symbolic.rct import alpha
from validation.evidence import Evidence, Figure, Finding, exactly, measured, zeros
from validation.register import Run, check


def _maximum(claim: str, beta: int) -> tuple[Finding, ...]:
    proof = maximum_at_zero(beta)
    printed = displayed(claim)
    value = zeros(identities(claim), statement=f"max σ'' = σ''(0) = {printed}")
    bound = exactly(
        "|σ''(x)| < σ''(0) for every x ≠ 0: no Taylor coefficient of either bound is negative", proof.proved
    )
    found = hd.activations.max_curvature(f"rct:beta={beta},alpha=8.0")
    truth = float(printed.subs(alpha, 8))
    return (value, bound, measured("the engine's max|σ''| at α = 8", abs(found - truth), at_most=1e-12))


@check("S3.1.alpha-over-4")
def check_S3_1_alpha_over_4(run: Run) -> Evidence:
    """Section 3.1: max σ'' = α/4 at 0 for β = 0."""
    return Evidence("S3.1.alpha-over-4", _maximum("S3.1.alpha-over-4", 0))


@check("S3.1.alpha-over-2")
def check_S3_1_alpha_over_2(run: Run) -> Evidence:
    """Section 3.1: max σ'' = α/2 at 0 for β = 1."""
    return Evidence("S3.1.alpha-over-2", _maximum("S3.1.alpha-over-2", 1))


@check("S3.1.alpha")
def check_S3_1_alpha(run: Run) -> Evidence:
    """Section 3.1: max σ'' = α at 0 for β = 2."""
    return Evidence("S3.1.alpha", _maximum("S3.1.alpha", 2))


def _extrema(beta: int) -> tuple[Finding, ...]:
    found = extrema(beta)
    centre = next(p for p in found.points if p.place.low == p.place.high == 0)
    count = Figure("extrema", found.count, 2 * beta + 1, found.at_most, "certain, at most")
    kinds = [p.kind for p in found.points]
    wanted = [["maximum"], ["minimum", "maximum", "minimum"], ["maximum", "minimum", "maximum", "minimum", "maximum"]]
    places = ", ".join(f"{p.place.middle:.12g}" for p in found.points)
    return (
        exactly(f"exactly {2 * beta + 1}", found.exact and found.count == 2 * beta + 1, figure=count),
        exactly("a maximum at 0, the others in symmetric pairs", centre.kind == "maximum" and kinds == wanted[beta],
                detail=f"αx = {places}"),
    )  # fmt: skip


@check("F2.b0-one-extremum")
def check_F2_b0_one_extremum(run: Run) -> Evidence:
    """Figure 2(a)."""
    return Evidence("F2.b0-one-extremum", _extrema(0))


@check("F2.b1-three-extrema")
def check_F2_b1_three_extrema(run: Run) -> Evidence:
    """Figure 2(b)."""
    return Evidence("F2.b1-three-extrema", _extrema(1))


@check("F2.b2-five-extrema")
def check_F2_b2_five_extrema(run: Run) -> Evidence:
    """Figure 2(c)."""
    return Evidence("F2.b2-five-extrema", _extrema(2))


@check("S4.2.2beta+1-extrema")
def check_S4_2_2beta_1_extrema(run: Run) -> Evidence:
    """Section 4.2, for the three β of the paper, and β = 3 beyond it."""
    orders = (0, 1, 2) if run.quick else (0, 1, 2, 3)
    rows = [extrema(b) for b in orders]
    holds = all(row.exact and row.count == 2 * row.beta + 1 for row in rows)
    counts = ", ".join(f"β = {row.beta}: {row.count}" for row in rows)
    found = (
        zeros(identities("S4.2.2beta+1-extrema")),
        exactly("Descartes' bound meets certain zeros", holds, detail=counts),
    )
    return Evidence("S4.2.2beta+1-extrema", found)
