"""Where the σ'' of the RCT-AF family has its maximum (section 3.1) and how many extrema (figure 2, section 4.2)."""

from __future__ import annotations

import hessdiag as hd
from theory.symbolic import extrema, maximum_at_zero
from theory.symbolic.printed import displayed, identities
from theory.symbolic.rct import alpha
from validation.evidence import Evidence, Figure, exactly, measured, zeros
from validation.register import Run, alike, check

BETAS = {"S3.1.alpha-over-4": 0, "S3.1.alpha-over-2": 1, "S3.1.alpha": 2}
BETAS |= {"F2.b0-one-extremum": 0, "F2.b1-three-extrema": 1, "F2.b2-five-extrema": 2}


def _maximum(claim: str, run: Run) -> Evidence:
    beta = BETAS[claim]
    proof = maximum_at_zero(beta)
    printed = displayed(claim)
    value = zeros(identities(claim), statement=f"max σ'' = σ''(0) = {printed}")
    bound = exactly(
        "|σ''(x)| < σ''(0) for every x ≠ 0: no Taylor coefficient of either bound is negative", proof.proved
    )
    found = hd.activations.max_curvature(f"rct:beta={beta},alpha=8.0")
    truth = float(printed.subs(alpha, 8))
    engine = measured("the engine's max|σ''| at α = 8", abs(found - truth), at_most=1e-12)
    return Evidence(claim, (value, bound, engine))


def _extrema(claim: str, run: Run) -> Evidence:
    beta = BETAS[claim]
    found = extrema(beta)
    centre = next(p for p in found.points if p.place.low == p.place.high == 0)
    count = Figure("extrema", found.count, 2 * beta + 1, found.at_most, "certain, at most")
    kinds = [p.kind for p in found.points]
    wanted = [["maximum"], ["minimum", "maximum", "minimum"], ["maximum", "minimum", "maximum", "minimum", "maximum"]]
    places = ", ".join(f"{p.place.middle:.12g}" for p in found.points)
    alternate = centre.kind == "maximum" and kinds == wanted[beta]
    there = (
        exactly(f"exactly {2 * beta + 1}", found.exact and found.count == 2 * beta + 1, figure=count),
        exactly("a maximum at 0, the others in symmetric pairs", alternate, detail=f"αx = {places}"),
    )
    return Evidence(claim, there)


alike(
    {
        "S3.1.alpha-over-4": "Section 3.1: max σ'' = α/4 at 0 for β = 0.",
        "S3.1.alpha-over-2": "Section 3.1: max σ'' = α/2 at 0 for β = 1.",
        "S3.1.alpha": "Section 3.1: max σ'' = α at 0 for β = 2.",
    },
    _maximum,
)
alike(
    {
        "F2.b0-one-extremum": "Figure 2(a).",
        "F2.b1-three-extrema": "Figure 2(b).",
        "F2.b2-five-extrema": "Figure 2(c).",
    },
    _extrema,
)


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
