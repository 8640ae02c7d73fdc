"""Verdicts are consequences: the rules, and that none can be typed in."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest

from hessdiag.errors import AuditError, ConfigurationError, UnknownNameError
from validation.evidence import VERDICTS, Evidence, Figure, Finding, Report, exactly, measured, zeros
from validation.register import CHECKS, Run, check


def test_no_way_to_give_a_verdict() -> None:
    assert "verdict" not in inspect.signature(Evidence).parameters
    found = Evidence("E1", (exactly("x", True),))
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        found.verdict = "refuted"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Evidence("E1", verdict="proved")  # type: ignore[call-arg]


TRUE, FALSE = exactly("a", True), exactly("a", False, counterexample="x = 1")
SEEN, UNSEEN = measured("m", 0.0, at_most=1.0), measured("m", 2.0, at_most=1.0)
SMALL = exactly("a", True, reach="up to five layers")
SCOPED = exactly("s", True, condition="in a scope")


@pytest.mark.parametrize(
    "findings,verdict",
    [
        ((), "not tested"),
        ((TRUE,), "proved"),
        ((TRUE, SMALL), "verified exactly"),
        ((SMALL, SEEN), "verified exactly"),
        ((exactly("s", False, condition="in a scope"),), "refuted"),
        ((measured("m", 2.0, at_most=1.0, condition="in a scope"),), "contradicted by measurement"),
        ((TRUE, SEEN), "proved"),
        ((SEEN,), "holds numerically"),
        ((UNSEEN,), "contradicted by measurement"),
        ((FALSE,), "refuted"),
        ((FALSE, UNSEEN, SCOPED), "refuted"),
        ((SCOPED,), "holds under conditions"),
        ((SCOPED, TRUE), "proved"),
    ],
)
def test_rules(findings: tuple[Finding, ...], verdict: str) -> None:
    assert Evidence("E2", findings, correction="c").verdict == verdict
    assert verdict in VERDICTS


def test_definitions_and_printed_numbers_have_words_of_their_own() -> None:
    """What fixes a symbol is not proved, nor what compares two cells of a table; both can be refuted."""
    assert Evidence("E1", (TRUE, SEEN)).verdict == "as defined"
    assert Evidence("S4.4.improvements", (TRUE,)).verdict == "consistent in print"
    assert Evidence("E1", (FALSE,)).verdict == Evidence("S4.4.improvements", (FALSE,)).verdict == "refuted"


def test_exact_algebra_says_how_far_it_reaches() -> None:
    found = Evidence("E23", (SMALL, SEEN)).to_dict()
    assert (found["verdict"], found["reach"]) == ("verified exactly", "up to five layers")
    assert Evidence("E2", (TRUE,)).to_dict()["reach"] == ""


def test_contradictions_within_a_check_are_errors() -> None:
    with pytest.raises(AuditError, match="a measurement disagrees"):
        _ = Evidence("E2", (TRUE, UNSEEN), correction="c").verdict


def test_what_fails_is_said_though_nothing_was_prepared() -> None:
    """No correction, no counterexample, a condition that fails as well: refuted, and listed as a surprise."""
    found = Evidence("E2", (exactly("a", False),))
    assert (found.verdict, found.counterexample) == ("refuted", "not so: a")
    assert "nothing of what holds instead" in found.surprises[0]
    assert Evidence("E2", (UNSEEN,)).verdict == "contradicted by measurement"
    prepared = Evidence("E2", (FALSE, SCOPED), correction="c")
    assert (prepared.counterexample, prepared.surprises) == ("x = 1", ())
    scope = Evidence("E2", (FALSE, exactly("s", False, condition="in a scope")), correction="c")
    assert scope.verdict == "refuted"
    assert scope.surprises == ("even under 'in a scope' not: s",)


def test_measurements_are_held_to_their_bound() -> None:
    assert not measured("m", math.nan, at_most=1.0).holds
    assert measured("m", 3.0, at_least=2.0).holds
    assert not measured("m", 1.0, at_least=2.0).holds
    assert Figure("x", 1.0).text() == "x 1"


def test_nothing_compared_is_an_error() -> None:
    with pytest.raises(AuditError, match="nothing was compared"):
        zeros([])


def test_experiments_cannot_prove() -> None:
    with pytest.raises(ConfigurationError, match="no verdict that experiments give"):
        Report("proved", "t", "results/verdicts.json")
    with pytest.raises(ConfigurationError, match="exclude each other"):
        Evidence("E1", (TRUE,), report=Report("not tested", "t", "s"))


def test_registering() -> None:
    def wrong_name(run: Run) -> Evidence:
        return Evidence("E28")

    with pytest.raises(UnknownNameError, match="no claim 'E34'"):
        check("E34")(wrong_name)
    before = CHECKS.pop("E28", None)
    try:
        with pytest.raises(ConfigurationError, match="must be called check_E28"):
            check("E28")(wrong_name)
    finally:
        if before is not None:
            CHECKS["E28"] = before
