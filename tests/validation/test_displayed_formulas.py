"""The formula that a reader sees is the one that is checked: alter any of them, and its check fails or refuses it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pytest

from hessdiag.errors import HessdiagError
from theory.claims import BY_ID, CLAIMS
from theory.symbolic import latex, printed
from validation import ledger as ledgers
from validation.checks.deep import THREE, unexplained
from validation.register import Run

PAIRS = {"E7", "E27", "E28", "E30", "E31", "E32", "E33"}
"""Refuted below the top two layers: what they leave out is known term by term, and nothing else may differ."""
READ = [c.id for c in CLAIMS if c.formula and (c.id in PAIRS or c.id in {"E8", "S2.4.avoids-cancellation"})]
READ += [c.id for c in CLAIMS if c.formula and c.id not in READ and c.kind != "empirical"]
GENERATED = {c for c in READ if c.startswith(("T1.", "S4.4.", "A6.", "F3.")) and c != "T1.rct.alpha"}
"""Numbers of tables and ranges: statement, formula and check are made from the same cells (`theory.claims.model`)."""
READ = [c for c in READ if c not in GENERATED]
OTHER = {"i": "j", "j": "i", "l": "r", "r": "l", "t": "i", "s": "l", "q": "p"}
ALSO_TRUE = {r"I_{ij}\sigma''(z^{(l)}_j)S^{(l)}_i", r"I_{ij}\sigma''(z^{(l)}_i)S^{(l)}_j"}
"""Changed, and as true as before: I_ij is zero unless i = j."""


def mutants(formula: str) -> Iterator[str]:
    """One token changed: numbers, signs, primes, indices, letters, Greek letters, sums, products, relations."""
    for match in latex._TOKEN.finditer(formula):
        token, (a, b) = match.group(), match.span()
        new = {"+": "-", "-": "+", "'": "", "=": "<", r"\sum": r"\prod", r"\prod": r"\sum"}.get(token)
        new = {r"\delta": "S", r"\alpha": "x", r"\sigma": r"\delta", r"\beta": r"\alpha", r"\ne": ","}.get(token, new)
        if re.fullmatch(r"\d+(\.\d+)?", token):
            new = str(int(float(token)) + 1)
        elif len(token) == 1 and token.isalpha():
            new = OTHER.get(token, "q")
        changed = formula if new is None else formula[:a] + new + formula[b:]
        if changed != formula and not any(part in changed for part in ALSO_TRUE):
            yield changed


def accepted(claim: str) -> bool:
    """Whether what is exact in the claim's check stands: zero differences, or those that are known term by term."""
    try:
        if claim == "E8":
            return bool(printed.norm_ratio(4) == 2)
        if claim == "S2.4.avoids-cancellation":
            return printed.zero_only_at_zero(claim)
        if claim in PAIRS:
            return not unexplained(claim, (THREE,))
        rows = printed.identities(claim)
        return bool(rows) and all(row.holds for row in rows)
    except HessdiagError:
        return False


def survivors(claim: str, changed: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found = []
    for formula in changed:
        monkeypatch.setitem(BY_ID, claim, dataclasses.replace(BY_ID[claim], formula=formula))
        if accepted(claim):
            found.append(formula)
    return found


@pytest.mark.parametrize("claim", READ)
def test_every_formula_is_read_and_a_changed_one_is_noticed(claim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula as it stands passes; five changed ones, spread over it, do not."""
    assert accepted(claim)
    changed = list(mutants(BY_ID[claim].formula))
    assert survivors(claim, changed[:: max(1, len(changed) // 5)], monkeypatch) == []


@pytest.mark.slow
@pytest.mark.parametrize("claim", READ)
def test_no_changed_formula_passes(claim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mutant of every formula."""
    assert survivors(claim, list(mutants(BY_ID[claim].formula)), monkeypatch) == []


@pytest.mark.parametrize(
    "claim,old,new",
    [("E4", r"2-\alpha x", r"3-\alpha x"), ("E14", r"x_j^2", r"x_j^3"), ("E24", r"\sigma''", r"\sigma'")],
)
def test_the_verdict_follows_the_displayed_formula(
    claim: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A displayed formula that is wrong is refuted, though nobody prepared a correction; the ledger's errors name it."""
    changed = dataclasses.replace(BY_ID[claim], formula=BY_ID[claim].formula.replace(old, new, 1))
    assert changed.formula != BY_ID[claim].formula
    monkeypatch.setitem(BY_ID, claim, changed)
    record = ledgers.check_claim(claim, Run(quick=True))
    assert (record["verdict"], record["formula"]) == ("refuted", changed.formula)
    assert "derived - displayed" in record["counterexample"]
    assert ledgers.Ledger("quick", {claim: record}).errors


def test_a_formula_without_meaning_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BY_ID, "E13", dataclasses.replace(BY_ID["E13"], formula=r"\frac{\partial f}{\partial q}=0"))
    record = ledgers.check_claim("E13", Run(quick=True))
    assert record["verdict"] == "not tested"
    assert "means nothing" in record["error"]


def test_tables_and_their_formulas_have_one_source() -> None:
    """Each number of a generated formula stands in the claim's statement or in a table."""
    from theory.claims.model import COMPARED, IMPROVEMENTS, RANGE, SWEPT, TABLE1, TABLE2

    cells = {f"{v:g}" for row in (*TABLE1, *TABLE2) for v in dataclasses.astuple(row)[2:]}
    cells |= {f"{v:g}" for v in (*IMPROVEMENTS.values(), *RANGE, SWEPT, COMPARED, 1)}
    for claim in GENERATED:
        for number in re.findall(r"\d+(?:\.\d+)?", BY_ID[claim].formula):
            assert f"{float(number):g}" in cells, (claim, number)


@pytest.mark.parametrize("formula", [r"a=", r"\frac{a}{", r"\sqrt[3]{x}", r"\text{and}", "x = y)", r"\foo", "é"])
def test_what_is_no_formula_is_refused(formula: str) -> None:
    with pytest.raises(HessdiagError, match="formula"):
        latex.parse(formula)
