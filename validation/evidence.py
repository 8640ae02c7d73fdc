"""What a check found, and the verdict that follows. No verdict can be given: it is computed from the findings.

A *finding* is one comparison that was carried out. It is exact (symbolic, interval or rational arithmetic) or
measured (floating point, with the bound it was held to), and it is about the claim as stated, or about the claim
within a named condition.

    any exact finding about the claim as stated fails                  refuted
    any measured one fails                                             contradicted by measurement
    all hold, one at least exact, and every exact one covers all cases proved
    all hold, an exact one covers the cases that its `reach` names     verified exactly
    all hold, measured only                                            holds numerically
    all hold, and the claim is a definition                            as defined
    all hold, and the claim compares printed numbers                   consistent in print
    there are only findings within conditions, and all hold            holds under conditions
    there are only findings within conditions, and one fails           refuted / contradicted by measurement
    there is nothing                                                   not tested

What fails is said whether or not the check was prepared for it: `Evidence.surprises` lists what it was not prepared for
(a refutation without a correction, a condition under which the claim fails as well).

Claims that rest on experiments carry one `Report`, read from stored results, and nothing else. Their words are those
of `experiments.correlation.verdicts`: "holds" and "contradicts" come from the paper's own setting only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from hessdiag.errors import AuditError, ConfigurationError
from theory.claims import BY_ID

Verdict = Literal[
    "proved",
    "verified exactly",
    "as defined",
    "consistent in print",
    "refuted",
    "holds numerically",
    "holds under conditions",
    "not tested",
    "contradicted by measurement",
    "holds",
    "contradicts",
    "transfers",
    "does not transfer",
    "no difference beyond δ",
    "depends on the setting",
    "inconclusive",
]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
FROM_EXPERIMENTS: tuple[Verdict, ...] = (*VERDICTS[VERDICTS.index("holds") :], "not tested")


@dataclass(frozen=True)
class Figure:
    """A number with the interval it is known to lie in: a bound, a confidence interval or an enclosure."""

    label: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    interval: str = ""

    def text(self) -> str:
        """One line."""
        shown = f"{self.label} {self.value:.6g}"
        if math.isnan(self.low) and math.isnan(self.high):
            return shown
        kind = f" ({self.interval})" if self.interval else ""
        return f"{shown} [{self.low:.6g}, {self.high:.6g}]{kind}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values as strict JSON has them: NaN is null, infinities are strings."""
        parts = {"value": self.value, "low": self.low, "high": self.high}
        return {"label": self.label, "interval": self.interval} | {k: plain(v) for k, v in parts.items()}


@dataclass(frozen=True)
class Finding:
    """One comparison. `condition` empty: about the claim as stated; else about the claim within that condition.

    `reach` names the cases that an exact finding covers; empty: all that the claim speaks of.
    """

    statement: str
    holds: bool
    exact: bool
    condition: str = ""
    detail: str = ""
    figure: Figure | None = None
    counterexample: str = ""
    reach: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        found = {
            "statement": self.statement,
            "holds": self.holds,
            "exact": self.exact,
            "condition": self.condition,
            "detail": self.detail,
            "counterexample": self.counterexample,
            "reach": self.reach,
        }
        return found | {"figure": None if self.figure is None else self.figure.to_dict()}


@dataclass(frozen=True)
class Report:
    """What stored results of experiments say of a claim."""

    answer: Verdict
    text: str
    source: str
    figure: Figure | None = None
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    """Row of the matrix (the claim, or the claim by another norm) -> setting -> word."""

    def __post_init__(self) -> None:
        if self.answer not in FROM_EXPERIMENTS:
            raise ConfigurationError(
                f"{self.source}: {self.answer!r} is no verdict that experiments give; {', '.join(FROM_EXPERIMENTS)} are"
            )


@dataclass(frozen=True)
class Evidence:
    """Everything that one check has to say of its claim; `verdict` is a consequence, never an argument."""

    claim: str
    findings: tuple[Finding, ...] = ()
    report: Report | None = None
    test: str = ""
    correction: str = ""
    note: str = ""
    counterexample: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.report is not None and self.findings:
            raise ConfigurationError(f"claim {self.claim}: findings and a report of experiments exclude each other")
        failing = [f for f in self.findings if not f.holds]
        shown = [f.counterexample for f in failing if f.counterexample] or [f"not so: {f.statement}" for f in failing]
        object.__setattr__(self, "counterexample", "; ".join(shown))

    @property
    def verdict(self) -> Verdict:
        """What follows from the findings (see the module's head)."""
        if self.report is not None:
            return self.report.answer
        stated = [f for f in self.findings if not f.condition]
        decisive = stated or [f for f in self.findings if f.condition]
        if any(not f.holds and f.exact for f in decisive):
            return "refuted"
        if any(not f.holds for f in decisive):
            if any(f.exact for f in stated):
                raise AuditError(f"claim {self.claim}: proved by algebra, but a measurement disagrees")
            return "contradicted by measurement"
        if not stated:
            return "holds under conditions" if decisive else "not tested"
        return self._when_all_hold(stated)

    def _when_all_hold(self, stated: list[Finding]) -> Verdict:
        kind = BY_ID[self.claim].kind if self.claim in BY_ID else ""
        if kind == "definition":
            return "as defined"
        if kind == "arithmetic":
            return "consistent in print"
        if not any(f.exact for f in stated):
            return "holds numerically"
        return "verified exactly" if self.reach else "proved"

    @property
    def reach(self) -> str:
        """The cases that exact findings cover, where they are not all."""
        return "; ".join(dict.fromkeys(f.reach for f in self.findings if f.exact and not f.condition and f.reach))

    @property
    def surprises(self) -> tuple[str, ...]:
        """What the check was not prepared for: each wants a look, whatever the verdict says."""
        found = [f"even under {f.condition!r} not: {f.statement}" for f in self.findings if f.condition and not f.holds]
        if self.findings and self.verdict in ("refuted", "contradicted by measurement") and not self.correction:
            found.append(f"{self.verdict}, and the check says nothing of what holds instead")
        return tuple(found)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Every number found."""
        found = [f.figure for f in self.findings if f.figure is not None]
        if self.report is not None and self.report.figure is not None:
            found.append(self.report.figure)
        return tuple(found)

    @property
    def summary(self) -> str:
        """The findings in one line."""
        if self.report is not None:
            return self.report.text
        return "; ".join(_line(f) for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "verdict": self.verdict,
            "reach": self.reach if self.verdict == "verified exactly" else "",
            "surprises": list(self.surprises),
            "summary": self.summary,
            "findings": [f.to_dict() for f in self.findings],
            "source": "" if self.report is None else self.report.source,
            "settings": {} if self.report is None else self.report.settings,
            "figures": [f.to_dict() for f in self.figures],
            "test": self.test,
            "correction": self.correction,
            "counterexample": self.counterexample,
            "note": self.note,
        }


def _line(finding: Finding) -> str:
    words = [f"[{finding.condition}] " if finding.condition else "", finding.statement]
    words.append(": holds" if finding.holds else ": FAILS")
    if finding.figure is not None:
        words.append(f", {finding.figure.text()}")
    return "".join(words)


def plain(value: float) -> float | str | None:
    """A float as strict JSON knows it."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def exactly(
    statement: str,
    holds: bool,
    *,
    condition: str = "",
    detail: str = "",
    counterexample: str = "",
    figure: Figure | None = None,
    reach: str = "",
) -> Finding:
    """A finding of exact arithmetic."""
    return Finding(statement, bool(holds), True, condition, detail, figure, counterexample, reach)


def zeros(rows: Iterable[Any], *, condition: str = "", statement: str = "", reach: str = "") -> Finding:
    """Identities of `theory.symbolic`, each `difference` to be zero; the first that is not is the counterexample."""
    listed = list(rows)
    if not listed:
        raise AuditError(f"{statement or 'an identity'}: nothing was compared")
    failing = [row for row in listed if not row.holds]
    name = statement or f"derived - displayed = 0 ({len(listed)} identities)"
    shown = f"{failing[0].statement}: derived - displayed = {failing[0].difference}" if failing else ""
    return exactly(name, not failing, condition=condition, counterexample=shown, reach=reach)


def measured(
    statement: str,
    value: float,
    *,
    at_most: float = math.inf,
    at_least: float = -math.inf,
    condition: str = "",
    detail: str = "",
    counterexample: str = "",
    label: str = "measured",
) -> Finding:
    """A measured number held to a bound; NaN fails."""
    holds = at_least <= value <= at_most
    low = at_least if math.isfinite(at_least) else float("nan")
    high = at_most if math.isfinite(at_most) else float("nan")
    shown = Figure(label, value, low, high, "allowed" if not (math.isnan(low) and math.isnan(high)) else "")
    example = counterexample or f"{statement}: {value:.6g}"
    return Finding(statement, holds, False, condition, detail, shown, "" if holds else example)
