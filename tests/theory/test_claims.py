"""`theory.claims`: complete, unique, free of verdicts, and each numbered equation within one step of its
check.
"""

from __future__ import annotations

import dataclasses
import math

import pytest

from hessdiag.errors import ConfigurationError
from theory.claims import BY_ID, CLAIMS, EQUATIONS, IMPROVEMENTS, TABLE1, TABLE2, Claim


def test_every_numbered_equation_and_every_cell_is_a_claim() -> None:
    assert [c.id for c in EQUATIONS] == [f"E{n}" for n in range(1, 34)]
    assert all(c.formula for c in EQUATIONS)
    for row in TABLE1:
        assert all(f"T1.{row.key}.{column}" in BY_ID for column in ("standard", "robust", "curvature"))
    for cost in TABLE2:
        assert all(f"T2.{cost.key}.{column}" in BY_ID for column in ("memory", "time"))


def test_ids_are_unique_and_kinds_known() -> None:
    assert len(BY_ID) == len(CLAIMS)
    assert {c.kind for c in CLAIMS} <= {"definition", "derivation", "arithmetic", "empirical", "theorem"}


def test_the_claims_named_in_the_text_are_there() -> None:
    named = "S3.1.alpha-over-4 S4.2.2beta+1-extrema S4.2.limits-expressivity S4.2.peak-in-4-10 F3b.overlap-below-15 "
    named += (
        "F7a.u-shape F7a.minimum-in-4-10 A5.linear A5.amplification S4.4.improvements T1.mish.curvature T2.rct2.memory"
    )
    assert all(name in BY_ID for name in named.split())


def test_a_claim_has_no_verdict_and_cannot_be_changed() -> None:
    assert {f.name for f in dataclasses.fields(Claim)} == {"id", "where", "statement", "kind", "formula"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        CLAIMS[0].statement = "holds"  # type: ignore[misc]
    with pytest.raises(ConfigurationError, match="kind 'opinion' is unknown"):
        Claim("X1", "nowhere", "something", "opinion")  # type: ignore[arg-type]


def test_formulas_are_balanced() -> None:
    """Braces and brackets of the LaTeX match, so that a page can set them."""
    for claim in CLAIMS:
        assert claim.formula.count("{") == claim.formula.count("}"), claim.id
        assert claim.formula.count(r"\left") == claim.formula.count(r"\right"), claim.id


def test_printed_tables_carry_the_internal_arithmetic() -> None:
    """Section 4.4's improvements are differences in Table 1, and GELU is the best baseline, in print."""
    robust = {row.key: row.robust for row in TABLE1}
    for key, gain in IMPROVEMENTS.items():
        assert math.isclose(robust[key] - robust["gelu"], gain, abs_tol=1e-9)
    assert max((r for r in TABLE1 if not r.key.startswith("rct")), key=lambda r: r.robust).key == "gelu"
