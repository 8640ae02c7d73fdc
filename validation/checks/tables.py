"""Table 1's curvatures, the arithmetic between tables and text, and the ranges of the figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

import sympy as sp

import hessdiag as hd
from theory.claims import IMPROVEMENTS, TABLE1, TABLE2
from theory.claims.model import RANGE
from theory.symbolic import Curvature, curvatures
from theory.symbolic.printed import identities, number_in, orders
from validation.evidence import Evidence, Figure, Finding, exactly, measured, zeros
from validation.register import Run, alike, check

SPECS = {
    "swish": "silu",
    "rct0": "rct:beta=0,alpha=28.0",
    "rct1": "rct:beta=1,alpha=14.0",
    "rct2": "rct:beta=2,alpha=7.0",
}
SMOOTH = "smooth means a continuous slope"
ROBUST = {row.key: Fraction(str(row.robust)) for row in TABLE1}
BASELINES = [key for key in ROBUST if not key.startswith("rct")]
MEMORY = {row.key: Fraction(str(row.memory)) for row in TABLE2}
MINUTES = {row.key: Fraction(str(row.minutes)) for row in TABLE2}


@lru_cache(maxsize=1)
def _curvatures() -> dict[str, Curvature]:
    return {row.name: row for row in curvatures()}


def _engine(key: str, truth: float) -> Finding:
    found = hd.activations.max_curvature(SPECS.get(key, key))
    gap = 0.0 if found == truth else abs(found - truth)
    return measured("the engine's max|σ''| equals the derived one", gap, at_most=1e-8, label="difference")


def _curvature(claim: str, run: Run) -> Evidence:
    key = claim.split(".")[1]
    row = _curvatures()[key]
    value = math.inf if str(row.value) == "oo" else float(row.value)
    low, high = (value, value) if row.enclosure is None else (float(row.enclosure.low), float(row.enclosure.high))
    figure = Figure("max|σ''|", value, low, high, "enclosure")
    printed = float(number_in(claim))
    wrong = f"max|σ''| = {value:.6g} at x = {row.at:.4f}, printed {printed:g}"
    agrees = row.agrees_with(printed)
    found = exactly(f"printed {printed:g}: {row.argument}", agrees, figure=figure, counterexample=wrong)
    note = "" if row.attained else "a supremum, not attained"
    return Evidence(claim, (found, _engine(key, value)), correction="" if agrees else wrong, note=note)


def _improvement(key: str) -> Finding:
    difference, printed = ROBUST[key] - ROBUST["gelu"], Fraction(str(IMPROVEMENTS[key]))
    wrong = f"{float(ROBUST[key])} - {float(ROBUST['gelu'])} = {float(difference)}, printed {float(printed)}"
    return exactly(f"difference {float(difference):g} as printed", difference == printed, counterexample=wrong)


alike({f"T1.{row.key}.curvature": f"Table 1, max|σ''| of {row.key}." for row in TABLE1}, _curvature)
alike(
    {
        f"S4.4.improvement-{key}": f"Section 4.4: the difference of two cells of Table 1 for {key}."
        for key in IMPROVEMENTS
    },
    lambda claim, run: Evidence(claim, (_improvement(claim.rpartition("-")[2]),)),
)


@check("S4.4.improvements")
def check_S4_4_improvements(run: Run) -> Evidence:
    """Section 4.4: 2.88, 3.1 and 2.8 over GELU."""
    return Evidence("S4.4.improvements", tuple(_improvement(key) for key in IMPROVEMENTS), note="percentage points")


@check("S4.4.best-baseline")
def check_S4_4_best_baseline(run: Run) -> Evidence:
    """Section 4.4: GELU's robust accuracy is the largest of the baselines, in print."""
    best = max(BASELINES, key=lambda key: ROBUST[key])
    return Evidence("S4.4.best-baseline", (exactly(f"largest printed: {best}", best == "gelu", counterexample=best),))


@check("S4.4.outperforms-all")
def check_S4_4_outperforms_all(run: Run) -> Evidence:
    """Section 4.4: every RCT-AF row above every baseline row, in print."""
    lowest, highest = min(ROBUST[k] for k in IMPROVEMENTS), max(ROBUST[k] for k in BASELINES)
    text = f"{float(lowest)} > {float(highest)}"
    return Evidence("S4.4.outperforms-all", (exactly(text, lowest > highest, counterexample=text),))


@check("S4.4.relu-infinite")
def check_S4_4_relu_infinite(run: Run) -> Evidence:
    """Section 4.4: σ' of ReLU and leaky ReLU jumps, so its difference quotient is unbounded."""
    rows = [_curvatures()[key] for key in ("relu", "leaky_relu")]
    found = tuple(
        exactly(f"{row.name}: {row.argument}", row.value == number_in("S4.4.relu-infinite"), counterexample=row.name)
        for row in rows
    )
    note = "away from the kink σ'' = 0: almost everywhere the Hessian of a ReLU net is its Gauss-Newton part"
    return Evidence("S4.4.relu-infinite", found, note=note)


@check("S4.4.smooth-at-most-1")
def check_S4_4_smooth_at_most_1(run: Run) -> Evidence:
    """Sections 4.4, 4.5: sup|σ''| <= 1 for GELU, Swish, ELU, Mish; but σ'' of ELU jumps at 0, so it is C¹ only."""
    rows = [_curvatures()[key] for key in ("gelu", "swish", "elu", "mish")]
    bound = float(number_in("S4.4.smooth-at-most-1"))
    found = tuple(
        exactly(f"{row.name}: {float(row.value):.4g} <= {bound:g}", float(row.value) <= bound, condition=SMOOTH)
        for row in rows
    )
    x = sp.Symbol("x", real=True)
    left = sp.limit(sp.diff(sp.exp(x) - 1, x, 2), x, 0, "-")  # and 0 from the right, where ELU is x
    jump = exactly(f"σ'' of ELU jumps from {left} to 0 at x = 0", left == 1, condition=SMOOTH)
    fix = "GELU, Swish and Mish are smooth; ELU has a continuous slope only, and 1 is its supremum, not attained"
    return Evidence("S4.4.smooth-at-most-1", (*found, jump), correction=fix)


@check("S4.4.seven-in-range")
def check_S4_4_seven_in_range(run: Run) -> Evidence:
    """Section 4.4: 4 <= 7 <= 10, and Table 1's rows have 7."""
    rows = [row.curvature for row in TABLE1 if row.key in IMPROVEMENTS]
    low, high = RANGE
    inside = all(low <= value <= high for value in rows)
    return Evidence("S4.4.seven-in-range", (exactly(f"{rows} in [{low}, {high}]", inside, counterexample=str(rows)),))


@check("T1.rct.alpha")
def check_T1_rct_alpha(run: Run) -> Evidence:
    """Table 1, caption: curvature 7 takes α = 28, 14, 7."""
    found = [hd.activations.alpha_for(max_curvature=7.0, beta=b) for b in (0, 1, 2)]
    gap = max(abs(a - b) for a, b in zip(found, (28.0, 14.0, 7.0), strict=True))
    engine = measured("the engine's alpha_for(7)", gap, at_most=1e-12, label="difference")
    return Evidence("T1.rct.alpha", (zeros(identities("T1.rct.alpha")), engine))


def _between(claim: str, text: str, holds: bool) -> Evidence:
    return Evidence(claim, (exactly(text, holds, counterexample=text),))


@check("A6.b0-memory-as-gelu")
def check_A6_b0_memory_as_gelu(run: Run) -> Evidence:
    """Section A.6 against Table 2."""
    a, b = MEMORY["rct0"], MEMORY["gelu"]
    return _between("A6.b0-memory-as-gelu", f"{float(a)} = {float(b)} GB, in print", a == b)


@check("A6.b1-memory-as-mish")
def check_A6_b1_memory_as_mish(run: Run) -> Evidence:
    """Section A.6 against Table 2."""
    a, b = MEMORY["rct1"], MEMORY["mish"]
    return _between("A6.b1-memory-as-mish", f"{float(a)} = {float(b)} GB, in print", a == b)


def _time_between(claim: str, run: Run) -> Evidence:
    low, middle, high = MINUTES["relu"], MINUTES[f"rct{claim[4]}"], MINUTES["gelu"]
    return _between(claim, f"{float(low)} < {float(middle)} < {float(high)} min, in print", low < middle < high)


alike(dict.fromkeys(["A6.b0-time-between", "A6.b1-time-between"], "Section A.6 against Table 2."), _time_between)


@check("A6.b2-highest-cost")
def check_A6_b2_highest_cost(run: Run) -> Evidence:
    """Section A.6 against Table 2."""
    most: Callable[[dict[str, Fraction]], str] = lambda column: max(column, key=lambda key: column[key])  # noqa: E731
    names = (most(MEMORY), most(MINUTES))
    return _between("A6.b2-highest-cost", f"most memory {names[0]}, most time {names[1]}", set(names) == {"rct2"})


@check("F3.range")
def check_F3_range(run: Run) -> Evidence:
    """Figure 3(a), section 4.1: α up to 50 gives max|σ''| up to 12.5, 25 and 50."""
    rows = orders("F3.range")
    text = "; ".join(f"β = {beta}: {float(value):g}" for beta, value, reached in rows if not reached)
    found = (
        exactly("α = 50 reaches max|σ''| = 50 for every β", all(row[2] for row in rows), counterexample=text),
        exactly("it does", rows[2][2], condition="β = 2"),
    )
    fix = "α = 1..50 covers max|σ''| up to 12.5, 25, 50 for β = 0, 1, 2; for β = 0 covering 50 takes α = 200"
    return Evidence("F3.range", found, correction=fix)


@check("F3.b0-beyond-15")
def check_F3_b0_beyond_15(run: Run) -> Evidence:
    """Figure 3(b): with α <= 50 the curve of β = 0 ends at 12.5."""
    first, *others = orders("F3.b0-beyond-15")
    text = f"β = 0 ends at max|σ''| = {float(first[1]):g} for α = 50"
    found = (
        exactly("β = 0 reaches 15 with α <= 50", first[2], counterexample=text),
        exactly("the others do", all(row[2] for row in others), condition="β = 1, 2"),
    )
    return Evidence("F3.b0-beyond-15", found, correction="three curves can be compared up to 12.5 only")


TEXT = frozenset({"DAJAT", "DKL", "TRADES"})
CAPTION = frozenset({"DAJAT"})


@check("F6.text-and-caption")
def check_F6_text_and_caption(run: Run) -> Evidence:
    """Figure 6: the methods that section 4.3 names and those that the caption names are different sets."""
    wrong = f"text: {', '.join(sorted(TEXT))}; caption: {', '.join(sorted(CAPTION))}"
    found = exactly("text and caption name the same methods", TEXT == CAPTION, counterexample=wrong)
    return Evidence("F6.text-and-caption", (found,), correction="one of the two is wrong; the paper does not say which")
