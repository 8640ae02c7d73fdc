"""Which method a measurement uses: asked for, or the cheapest that serves; audited, and within its budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hessdiag.errors import AuditError, BudgetError, ResumeError, UncoveredModelError
from hessdiag.kernels import exact_batch as exact
from hessdiag.measuring.audit import Audit, audit
from hessdiag.methods import METHODS, Aim, Case, Plan, find
from hessdiag.methods.base import AUTO

AUTO_EXACT_FLOPS = 3e10
"""method='auto' takes the exact diagonal up to this many multiplications (a count, so that the choice repeats)."""
EXACT_BUDGET = 1e14
"""Multiplications beyond which an exact method is refused unless asked for by `budget=` (hours on a few cores)."""
FALLBACK = "hutchinson"


def decide(case: Case, method: str, aim: Aim, *, audit_model: bool) -> tuple[Plan, Audit | None]:
    """Method and plan, audited; with method='auto' what fails falls back to Hutchinson, with the reason kept."""
    wanted, reason = method, "asked for"
    if method in METHODS:
        _require(case, method)
    else:
        try:
            _require_covered(case)
            wanted, reason = _cheapest(case)
            exact.check_served(case.linear)
            checked = _audited(case, wanted) if audit_model else None
            plan = METHODS[wanted].plan(case, replace(aim, open=True), reason)
            if plan.method != wanted and audit_model:
                checked = _audited(case, plan.method)
            return plan, checked
        except (UncoveredModelError, AuditError) as error:
            wanted, reason = FALLBACK, f"the site identity does not serve here: {error}"
    checked = _audited(case, wanted) if audit_model else None
    return METHODS[wanted].plan(case, aim, reason), checked


def _require(case: Case, method: str) -> None:
    """Refuse a method that is known not to serve, before any work."""
    if METHODS[method].sites:
        _require_covered(case)
    elif (reason := METHODS[method].refusal(case)) is not None:
        raise UncoveredModelError(reason)


def _require_covered(case: Case) -> None:
    if case.survey.uncovered:
        raise UncoveredModelError(case.survey.uncovered)


def _audited(case: Case, method: str) -> Audit:
    """The audit, passed, of a few samples of the first batch and of the longest."""
    checked = audit(case.objective, case.first, method=method, seed=case.seed)
    checked.require()
    if case.longest is None:
        return checked
    longest = audit(case.objective, case.longest, method=method, seed=case.seed)
    longest.require()
    return checked.and_of(longest)


def _cheapest(case: Case) -> tuple[str, str]:
    price, share = exact.cost(case.linear), case.survey.samples / case.linear.samples
    flops = price.flops * share
    if price.effort * share <= AUTO_EXACT_FLOPS:
        return "exact", f"covered by the site identity, and exact takes only {flops:.1e} multiplications"
    deep = f" and pass {price.nodes * share:.1e} nodes" if flops <= AUTO_EXACT_FLOPS else ""
    return "propagation", f"covered by the site identity; exact would take {flops:.1e} multiplications{deep}"


def check_budget(case: Case, budget: float | None) -> None:
    """Refuse an exact method whose cost is known to be beyond the budget, before it starts."""
    flops = None if budget is None else find(case.plan.method).multiplications(case)
    if flops is not None and budget is not None and flops > budget:
        raise BudgetError(
            f"method={case.plan.method!r} would take {flops:.1e} multiplications, more than the budget of "
            f"{budget:.1e}; use method='propagation', fewer samples or parameters, or raise budget="
        )


def check_given(case: Case, plan: Plan, *, audit_model: bool) -> Audit | None:
    """The audit of a plan that was given, or taken up, and whether it fits model and data."""
    _require(case, plan.method)
    checked = _audited(case, plan.method) if audit_model else None
    find(plan.method).check(case, plan)
    return checked


def stored_plan(path: Path, stored: Mapping[str, Any], method: str) -> Plan:
    """The plan of a measurement that was begun: a pilot repeated might choose otherwise."""
    plan = Plan.from_dict(stored)
    if method not in (AUTO, plan.method):
        raise ResumeError(f"{path}: was begun with method {plan.method!r}, not {method!r}; remove it to start anew")
    return plan
