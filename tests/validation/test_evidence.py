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
SCOPED = exactly("s", True, condition="in a scope")


@pytest.mark.parametrize(
    "findings,verdict",
    [
        ((), "not tested"),
        ((TRUE,), "proved"),
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
    assert Evidence("E1", findings, correction="c").verdict == verdict
    assert verdict in VERDICTS


def test_contradictions_within_a_check_are_errors() -> None:
    with pytest.raises(AuditError, match="a measurement disagrees"):
        _ = Evidence("E1", (TRUE, UNSEEN), correction="c").verdict
    with pytest.raises(AuditError, match="even under"):
        _ = Evidence("E1", (exactly("s", False, condition="in a scope"),), correction="c").verdict


def test_a_refutation_names_counterexample_and_correction() -> None:
    with pytest.raises(AuditError, match="without a counterexample"):
        Evidence("E1", (exactly("a", False),), correction="c")
    with pytest.raises(AuditError, match="must say what holds instead"):
        Evidence("E1", (FALSE,))
    assert Evidence("E1", (FALSE,), correction="c").counterexample == "x = 1"


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
