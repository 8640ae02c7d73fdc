"""E[1]-E[6] and what section 3.1, figure 2 and section 4.5 say of the RCT-AF family, its extrema aside."""

from __future__ import annotations

from functools import lru_cache

import sympy as sp
import torch
from mpmath import mp  # type: ignore[import-untyped]

from hessdiag.activations import rct as engine_rct
from hessdiag.activations import rct_d2
from theory.symbolic import curvature_at_zero, maximum_at_zero, second_derivative
from theory.symbolic.printed import displayed, identities
from theory.symbolic.rct import alpha, flat_limit_slope, integral, rescaling_identity, x
from validation.evidence import Evidence, Finding, exactly, measured, zeros
from validation.register import Run, alike, check


def engine_deviation(number: int) -> Finding:
    """The engine's σ or σ'' in float64 against the displayed formula in 50 digits, relative to its largest value."""
    return _engine_deviation(number, displayed(f"E{number}"))


@lru_cache(maxsize=8)
def _engine_deviation(number: int, formula: sp.Expr) -> Finding:
    beta, curved = (number - 1) // 2, number % 2 == 0
    printed = sp.lambdify((x, alpha), formula, "mpmath")
    worst = 0.0
    for a in (0.5, 7.0, 30.0):
        at = torch.linspace(-40.0, 40.0, 41, dtype=torch.float64) / a
        found = rct_d2(at, a, beta) if curved else engine_rct(at, a, beta)
        with mp.workdps(50):
            truth = torch.tensor([float(printed(mp.mpf(v), mp.mpf(a))) for v in at.tolist()], dtype=torch.float64)
        worst = max(worst, float((found - truth).abs().max() / truth.abs().max()))
    return measured("the engine's closed form equals the displayed one", worst, at_most=1e-14, label="deviation")


def _equation(number: int, *, note: str = "") -> Evidence:
    same = zeros(identities(f"E{number}"))
    if not same.holds:  # the engine is held to the formula only where that is the family's
        return Evidence(f"E{number}", (same,), note=note)
    return Evidence(f"E{number}", (same, engine_deviation(number)), note=note)


alike(
    {
        "E1": "E[1], a definition: base of the recursion, and what the engine evaluates.",
        "E2": "E[2]: σ'' of E[1] minus print is zero.",
        "E3": "E[3]: (σ_0)'·x minus print is zero.",
        "E4": "E[4]: σ'' of E[3] minus print is zero.",
        "E6": "E[6]: σ'' of E[5] minus print is zero.",
    },
    lambda claim, run: _equation(int(claim[1:])),
)


@check("E5")
def check_E5(run: Run) -> Evidence:
    """E[5]: ((σ_0)'·x)'·x minus print is zero. Right, but not fit for float32 as printed."""
    t = torch.arange(1.0, 120.0)
    e = torch.exp(t)
    first = float(t[~torch.isfinite((e**2 + (t + 1) * e) * t / (e**2 + 2 * e + 1))][0])
    stable = bool(torch.isfinite(engine_rct(t, 1.0, 2)).all())
    note = f"evaluated as printed in float32 it is NaN from αx = {first:g} on; the engine's form is finite: {stable}"
    return _equation(5, note=note)


@check("S3.1.is-softplus")
def check_S3_1_is_softplus(run: Run) -> Evidence:
    """Section 3.1: β = 0, α = 1 is ln(1 + e^x)."""
    at = torch.linspace(-30, 30, 61, dtype=torch.float64)
    far = float((engine_rct(at, 1.0, 0) - torch.nn.functional.softplus(at)).abs().max())
    same = measured("the engine's β = 0 equals torch's softplus", far, at_most=1e-8, label="largest difference")
    return Evidence("S3.1.is-softplus", (zeros(identities("S3.1.is-softplus")), same))


@check("S3.1.is-swish")
def check_S3_1_is_swish(run: Run) -> Evidence:
    """Section 3.1: β = 1, α = 1 is x/(1 + e^-x)."""
    at = torch.linspace(-30, 30, 61, dtype=torch.float64)
    far = float((engine_rct(at, 1.0, 1) - torch.nn.functional.silu(at)).abs().max())
    same = measured("the engine's β = 1 equals torch's silu", far, at_most=1e-14, label="largest difference")
    return Evidence("S3.1.is-swish", (zeros(identities("S3.1.is-swish")), same))


@check("S3.1.linear-in-alpha")
def check_S3_1_linear_in_alpha(run: Run) -> Evidence:
    """Section 3.1: the peak is α times the peak at α = 1 (value at 0, and the maximum stands at 0)."""
    found = (
        zeros(identities("S3.1.linear-in-alpha"), statement="max σ''_{α,β} = α max σ''_{1,β}, β = 0, 1, 2"),
        exactly("the maximum stands at 0", all(maximum_at_zero(b).proved for b in (0, 1, 2))),
    )
    return Evidence("S3.1.linear-in-alpha", found)


@check("S3.1.rectification")
def check_S3_1_rectification(run: Run) -> Evidence:
    """Section 3.1, figure 1: σ_α tends to max(x, 0), and σ_α(x) = σ_1(αx)/α makes α the sharpness."""
    found = (
        zeros(identities("S3.1.rectification"), statement="σ_α(x) -> x for x > 0 and 0 for x < 0 as α -> oo"),
        zeros(
            [rescaling_identity(b) for b in (0, 1, 2)],
            statement="σ_{α,β}(x) = σ_{1,β}(αx)/α, hence sup|σ_α - max(x, 0)| = sup|σ_1 - max(x, 0)|/α",
        ),
    )
    at = torch.linspace(0.1, 8.0, 1000, dtype=torch.float64)
    here = torch.stack([engine_rct(torch.tensor([-1.0], dtype=torch.float64), float(a), 2) for a in at]).reshape(-1)
    rising = int((here.abs().diff() > 0).sum())
    note = f"at a single x < 0 and β = 2 |σ_α(x)| is not monotone in α: at x = -1 it rises in {rising} of 999 steps"
    return Evidence("S3.1.rectification", found, note=note)


@check("S3.1.independent-control")
def check_S3_1_independent_control(run: Run) -> Evidence:
    """Section 3.1: α, β and the curvature κ = 2^(β-2) α are three names for two degrees of freedom."""
    kappa = sp.Symbol("kappa", positive=True)
    solved = [sp.solve(curvature_at_zero(b) - kappa, alpha) for b in (0, 1, 2)]
    free = exactly(
        "each β reaches every κ > 0, by one α each: 4κ, 2κ, κ",
        solved == [[4 * kappa], [2 * kappa], [kappa]],
        condition="two of α, β, max|σ''| chosen, the third follows",
    )
    distinct = exactly(
        "the three α that give one κ differ, so at equal curvature α is not free",
        len({s[0] for s in solved}) == 3,
        condition="two of α, β, max|σ''| chosen, the third follows",
    )
    return Evidence(
        "S3.1.independent-control",
        (free, distinct),
        correction="α and β fix the curvature; rectification cannot be varied at given β and curvature",
    )


@check("F2.even")
def check_F2_even(run: Run) -> Evidence:
    """Figure 2: σ''(-x) - σ''(x) = 0 for β = 0, 1, 2; beside it ∫σ'' = 1."""
    areas = [integral(b) for b in (0, 1, 2)]
    note = f"∫σ'' = {', '.join(str(a) for a in areas)} for β = 0, 1, 2: max|σ''| is the reciprocal of a width"
    return Evidence("F2.even", (zeros(identities("F2.even")),), note=note)


@check("S4.5.near-linear")
def check_S4_5_near_linear(run: Run) -> Evidence:
    """Section 4.5: on a fixed range of pre-activations σ' tends to 1/2; with rescaled weights nothing changes."""
    slopes = [flat_limit_slope(b) for b in (0, 1, 2)]
    reach = sp.Symbol("r", positive=True)
    gone = all(sp.limit(second_derivative(b).subs(x, reach), alpha, 0, "+") == 0 for b in (0, 1, 2))
    bounded = "pre-activations stay in a fixed range while α falls"
    found = (
        exactly("σ' -> 1/2 for α -> 0", all(s == sp.Rational(1, 2) for s in slopes), condition=bounded),
        exactly("σ'' -> 0 for α -> 0", gone, condition=bounded),
        zeros([rescaling_identity(b) for b in (0, 1, 2)], condition="else σ_α is σ_1 in other coordinates"),
    )
    return Evidence(
        "S4.5.near-linear", found, correction="with pre-activations growing like 1/α the activation acts as σ_1 does"
    )
