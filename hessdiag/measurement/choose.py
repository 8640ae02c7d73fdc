"""Which method a measurement uses: asked for, or the cheapest that serves; audited, and within its budget."""

from __future__ import annotations

from pathlib import Path

from ..diagonal import exact
from ..diagonal.parts import accumulate
from ..diagonal.propagation import Propagator
from ..errors import AuditError, BudgetError, ConfigurationError, ResumeError, UncoveredModelError
from ..graph import Linearisation
from ..objective import Objective
from ..signs import Signs
from ..stream import Numbered, Survey
from .audit import Audit, audit
from .pilot import DEFLATE_BYTES, DEFLATE_LEAST, PILOT_SAMPLES, ROUNDED, direction_bytes, rounding
from .plan import SITE_METHODS, Plan, make_plan
from .resume import restore

AUTO_EXACT_FLOPS = 3e10
"""method='auto' takes the exact diagonal up to this many multiplications (a count, so that the choice repeats)."""
EXACT_BUDGET = 1e14
"""Multiplications beyond which an exact method is refused unless asked for by `budget=` (hours on a few cores)."""
GIVEN_ROUNDED = 10 * ROUNDED
GIVEN_BYTES = 8 * DEFLATE_BYTES
"""Bytes of directions beyond which a plan that was given is refused."""


def decide(
    objective: Objective,
    first: Numbered,
    facts: Survey,
    method: str,
    seed: int,
    audit_model: bool,
    *,
    rtol: float = 0.05,
    replicates: int | None = None,
) -> tuple[Plan, Audit | None]:
    """Method and plan, audited; with method='auto' what fails falls back to Hutchinson, with the reason kept."""

    def plan(method: str, reason: str) -> Plan:
        if method == "exact":  # propagation's pilot linearises
            Linearisation(objective, first.inputs, first.targets, index=first.index)  # coverage, also without an audit
        return make_plan(
            objective,
            first,
            method=method,
            seed=seed,
            samples=facts.samples,
            batches=facts.batches,
            ordered=facts.checked and not facts.shuffled,
            rtol=rtol,
            replicates=replicates,
            reason=reason,
        )

    wanted, reason = method, "asked for"
    check_covered(facts, method)
    if method == "auto":
        try:
            if facts.uncovered:
                raise UncoveredModelError(facts.uncovered)
            wanted, reason = _cheapest(objective, first, facts)
            checked = _audited(objective, first, wanted, seed) if audit_model else None
            return plan(wanted, reason), checked
        except (UncoveredModelError, AuditError) as error:
            wanted, reason = "hutchinson", f"the site identity does not serve here: {error}"
    checked = _audited(objective, first, wanted, seed) if audit_model else None
    return plan(wanted, reason), checked


def check_covered(facts: Survey, method: str) -> None:
    """Refuse a method of sites where some batch is known not to be covered, before any work."""
    if facts.uncovered and method in SITE_METHODS:
        raise UncoveredModelError(facts.uncovered)


def _audited(objective: Objective, first: Numbered, method: str, seed: int) -> Audit:
    """The audit, passed."""
    checked = audit(objective, first, method=method, seed=seed)
    checked.require()
    return checked


def _cheapest(objective: Objective, first: Numbered, facts: Survey) -> tuple[str, str]:
    linear = Linearisation(objective, first.inputs, first.targets, index=first.index)
    price, share = exact.cost(linear), facts.samples / linear.samples
    flops = price.flops * share
    if price.effort * share <= AUTO_EXACT_FLOPS:
        return "exact", f"covered by the site identity, and exact takes only {flops:.1e} multiplications"
    deep = f" and pass {price.nodes * share:.1e} nodes" if flops <= AUTO_EXACT_FLOPS else ""
    return "propagation", f"covered by the site identity; exact would take {flops:.1e} multiplications{deep}"


def check_budget(objective: Objective, first: Numbered, facts: Survey, plan: Plan, budget: float | None) -> None:
    """Refuse an exact method whose cost is known to be beyond the budget, before it starts."""
    if budget is None or not plan.deterministic:
        return
    if plan.method == "exact":
        linear = Linearisation(objective, first.inputs, first.targets, index=first.index)
        flops = exact.cost(linear).flops * facts.samples / linear.samples
    else:  # two products a parameter, each a few passes that touch every parameter at least once per sample
        flops = 8.0 * objective.size**2 * facts.samples
    if flops > budget:
        raise BudgetError(
            f"method={plan.method!r} would take {flops:.1e} multiplications, more than the budget of {budget:.1e}; "
            "use method='propagation', fewer samples or parameters, or raise budget="
        )


def check_given(
    objective: Objective, first: Numbered, facts: Survey, plan: Plan, seed: int, audit_model: bool
) -> Audit | None:
    """The audit of a plan that was given, or taken up, and whether it fits model and data."""
    check_covered(facts, plan.method)
    checked = _audited(objective, first, plan.method, seed) if audit_model else None
    check_directions(objective, first, facts, plan)
    return checked


def check_directions(objective: Objective, first: Numbered, facts: Survey, plan: Plan) -> None:
    """Refuse a given plan whose directions would fill the memory, or be lost in rounding: it was made for others."""
    if plan.method != "propagation" or not plan.deflate:
        return
    linear = Linearisation(objective, first.inputs, first.targets, index=first.index)
    size = plan.deflate * direction_bytes(linear, facts.samples)
    if size > GIVEN_BYTES:
        raise BudgetError(
            f"a plan with deflate={plan.deflate} would hold {size / 1e9:.1f} GB of directions for {facts.samples} "
            "samples; give one with deflate=0, or fewer samples"
        )
    few = first.few(PILOT_SAMPLES)
    propagator = Propagator(
        Linearisation(objective, few.inputs, few.targets, index=few.index, balance=plan.balance), start=few.start
    )
    if not propagator.batch.sites:
        return
    signs, known = Signs(0, objective.device), propagator.direct()
    outer = plan.gauss_newton == "exact"
    accumulate(known, propagator.gauss_newton() if outer else propagator.gauss_newton_signed(signs, 0))
    off = rounding(propagator, signs, known, min(plan.deflate, DEFLATE_LEAST))
    if off > GIVEN_ROUNDED:
        raise ConfigurationError(
            f"a plan with deflate={plan.deflate} would lose up to {off:.0e} of the diagonal in {objective.dtype}: the "
            "halves of its products cancel (balance of another model?); use float64, or give a plan with deflate=0"
        )


def stored_plan(path: Path, method: str) -> Plan:
    """The plan of a measurement that was begun: a pilot repeated might choose otherwise."""
    _, progress, _ = restore(path, identity=None)
    plan = Plan.from_dict(progress["plan"])
    if method not in ("auto", plan.method):
        raise ResumeError(f"{path}: was begun with method {plan.method!r}, not {method!r}; remove it to start anew")
    return plan
