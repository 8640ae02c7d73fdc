"""Checks by claim id: `@check("E28")` over a function `check_E28(run)` that returns its `Evidence`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hessdiag.errors import AuditError, ConfigurationError, UnknownNameError, nearest
from theory.claims import BY_ID
from validation.evidence import Evidence


@dataclass(frozen=True)
class Run:
    """How to check: `quick` leaves out what takes long; `results` holds what experiments have stored."""

    quick: bool = False
    results: Path = Path("results")


Function = Callable[[Run], Evidence]


@dataclass(frozen=True)
class Check:
    """A registered check: where it stands, and whether its evidence comes from stored results."""

    claim: str
    function: Function
    module: str
    name: str
    reads_results: bool

    @property
    def place(self) -> str:
        """module:function, for a reader who wants the code."""
        return f"{self.module}:{self.name}"

    def __call__(self, run: Run) -> Evidence:
        """The evidence, its claim verified."""
        evidence = self.function(run)
        if evidence.claim != self.claim:
            raise AuditError(f"the check of {self.claim} returned evidence for {evidence.claim}")
        return evidence if evidence.test else replace(evidence, test=self.place)


CHECKS: dict[str, Check] = {}


def slug(claim: str) -> str:
    """The claim's id as part of a Python name: E28, S4_2_2beta_1_extrema."""
    return re.sub(r"\W", "_", claim)


def check(claim: str, *, reads_results: bool = False) -> Callable[[Function], Function]:
    """Register a function as the check of a claim; it must be called check_<claim>, and be the only one."""

    def register(function: Function) -> Function:
        if claim not in BY_ID:
            raise UnknownNameError(f"no claim {claim!r}; {nearest(claim, [*BY_ID])}")
        if claim in CHECKS:
            raise ConfigurationError(f"claim {claim} has two checks: {CHECKS[claim].place} and {function.__name__}")
        if function.__name__ != f"check_{slug(claim)}":
            raise ConfigurationError(f"the check of {claim} must be called check_{slug(claim)}")
        CHECKS[claim] = Check(claim, function, function.__module__, function.__name__, reads_results)
        return function

    return register


def alike(docs: Mapping[str, str], evidence: Callable[[str, Run], Evidence], *, reads_results: bool = False) -> None:
    """Register checks that are made alike, each under the name that one of its own would have, with its own line."""
    for claim, doc in docs.items():

        def function(run: Run, claim: str = claim) -> Evidence:
            return evidence(claim, run)

        function.__name__, function.__doc__, function.__module__ = f"check_{slug(claim)}", doc, evidence.__module__
        check(claim, reads_results=reads_results)(function)
