"""Curvature propagation: random signs over the sites, what is known exactly taken out of them.

The passes are those of `hessdiag.kernels.propagator`. The Gauss-Newton part is exact where its columns are few.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessdiag.errors import BudgetError, ConfigurationError, NotDeterministicError, nearest
from hessdiag.graph import Linearisation, edge_shape
from hessdiag.graph.nodes import graph_bytes
from hessdiag.kernels import exact_batch as exact
from hessdiag.kernels.deflation import Deflation
from hessdiag.kernels.probes import Group
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate
from hessdiag.methods.base import (
    FUNCTIONAL,
    GAUSS_NEWTON,
    TOTAL,
    Aim,
    FirstPass,
    Forecast,
    Method,
    Tell,
    Work,
    find,
)
from hessdiag.methods.batches import Numbered, fingerprint
from hessdiag.methods.noise import PAYS, choose
from hessdiag.methods.pilot import (
    DEFLATE_BYTES,
    DEFLATE_LEAST,
    PILOT_SAMPLES,
    ROUNDED,
    affordable_rank,
    balance_products,
    choose_groups,
    direction_bytes,
    rounding,
)
from hessdiag.methods.plan import Plan, at_once, replicate_groups
from hessdiag.signs import Signs

if TYPE_CHECKING:
    from hessdiag.measuring.audit import Checks
    from hessdiag.measuring.comparisons import AuditEntry
    from hessdiag.methods.case import Case

EXACT_COLUMNS = 32
"""Loss-factor columns up to which the Gauss-Newton part is taken exactly, in one pass each."""
KEEP_BYTES = 1 << 28
"""What layers hold of a single-batch data set is kept between replicates up to this size."""
HELD_GRAPHS = 3.0
"""Times a forward pass's graph that a batch holds between replicates."""
GIVEN_ROUNDED = 10 * ROUNDED
GIVEN_BYTES = 8 * DEFLATE_BYTES
"""Bytes of directions beyond which a plan that was given is refused."""
LINEARISE, DIRECT, COLUMN, SIGNED = 6.0, 5.0, 4.0, 10.0
DEFLATED = 2.3 * SIGNED
"""In forward passes of the batch, measured on one CPU core for a residual network, an MLP and a ResNet-18."""


class _Batches(Work):
    hands_over = True

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._deflations: dict[int, tuple[Tensor, Deflation | None, dict[Group, Tensor]]] = {}
        """Directions by the first sample, with the fingerprints of the batch."""

    def known(self, batch: Numbered, tell: Tell) -> dict[str, Tensors]:
        """The functional part's closed share and that along directions; what is exact of the Gauss-Newton part."""
        linear = self.case.linearise(batch)
        exact.check_separate(linear)
        propagator = self.kept(batch, lambda: self._propagator(linear, batch))
        propagator.probes.check(self.signs)
        functional = propagator.direct()
        accumulate(functional, propagator.deflated())
        accumulate(functional, propagator.probes.along())
        if self.case.plan.gauss_newton == "exact":
            apart: Tensors = {}
            outer = propagator.gauss_newton(apart)
            accumulate(functional, apart, -1.0)
            return {GAUSS_NEWTON: outer, FUNCTIONAL: functional}
        heads = propagator.heads()
        if self.case.plan.parts:
            return {GAUSS_NEWTON: heads, FUNCTIONAL: functional}
        accumulate(functional, heads)
        return {TOTAL: functional}

    def replicate(self, batch: Numbered, r: int) -> dict[str, Tensors]:
        """The functional part beyond what is known, and the Gauss-Newton part where it is left to signs: by a pass of
        its own, or with the functional one's where nobody asks for the parts.
        """
        propagator: Propagator = self.kept(batch, lambda: self._propagator(self.case.linearise(batch), batch))
        plan, apart = self.case.plan, dict[str, Tensor]()
        if plan.gauss_newton != "exact" and not plan.parts:
            return {TOTAL: propagator.functional(self.signs, r, outer=True)}
        functional = propagator.functional(self.signs, r)
        if plan.gauss_newton == "exact":
            return {FUNCTIONAL: functional}
        outer = propagator.gauss_newton_signed(self.signs, r, apart)
        accumulate(functional, apart, -1.0)
        total = {name: functional[name] + outer[name] for name in outer}
        return {TOTAL: total, GAUSS_NEWTON: outer, FUNCTIONAL: functional}

    def size(self, prepared: Propagator) -> float:
        """The graph, sites and their roots."""
        return HELD_GRAPHS * graph_bytes(prepared.batch.outputs)

    def _propagator(self, linear: Linearisation, batch: Numbered) -> Propagator:
        plan = self.case.plan
        keep = self.case.single and _kept_bytes(linear) <= KEEP_BYTES
        groups, probes = plan.sample_groups, plan.probes
        propagator = Propagator(linear, start=batch.start, groups=groups, keep=keep, probes=probes)
        if plan.ordered:
            self._deflate(propagator, batch)
        return propagator

    def _deflate(self, propagator: Propagator, batch: Numbered) -> None:
        """Give a propagator the directions that belong to its batch: what is exact of them was counted once."""
        marks = fingerprint(batch.inputs, batch.targets)
        plan = self.case.plan
        if batch.start not in self._deflations:
            if plan.probe_rank:
                propagator.probes.find(self.signs, plan.probe_rank)
            found = propagator.deflate(self.signs, plan.deflate)
            self._deflations[batch.start] = (marks, found, propagator.probes.basis)
        seen, propagator.deflation, propagator.probes.basis = self._deflations[batch.start]
        if not torch.allclose(seen, marks, rtol=1e-9, atol=1e-9 * float(seen.abs().max())):  # a sum's order may differ
            raise NotDeterministicError(
                f"batch {batch.index}: other samples than before; a plan with directions (deflate={plan.deflate}, "
                f"probe_rank={plan.probe_rank}) needs the samples in one order: do not shuffle, or give a plan with "
                "deflate=0 and probe_rank=0"
            )


class Propagation(Method):
    """Stochastic, and rests on the site identity."""

    name, work = "propagation", _Batches
    sites = True

    def known(self, plan: Plan) -> tuple[str, ...]:
        """The closed share of the functional part; the Gauss-Newton part, or its share in the output layer alone."""
        return (TOTAL,) if self._merged(plan) else (GAUSS_NEWTON, FUNCTIONAL)

    def streams(self, plan: Plan) -> tuple[str, ...]:
        """The functional part alone where the other is exact; both as one where the plan does not ask for the parts."""
        if self._merged(plan):
            return (TOTAL,)
        return (FUNCTIONAL,) if plan.gauss_newton == "exact" else (TOTAL, GAUSS_NEWTON, FUNCTIONAL)

    @staticmethod
    def _merged(plan: Plan) -> bool:
        return plan.gauss_newton != "exact" and not plan.parts

    def plan(self, case: Case, aim: Aim, reason: str) -> Plan:
        """Groups, balance and directions by a pilot on the first samples."""
        batch = case.few(PILOT_SAMPLES)
        gauss_newton = "exact" if batch.columns <= EXACT_COLUMNS else "signs"
        balance = balance_products(batch, case.seed)
        if balance:
            batch = case.few(PILOT_SAMPLES, balance)
        chosen = choose_groups(batch, case.seed)
        groups, together = replicate_groups(case.objective.size), at_once(case)
        ordered = case.survey.checked and not case.survey.shuffled  # the samples are known to come in one order
        samples = case.survey.samples
        outer = gauss_newton == "exact"
        found = choose(batch, case.seed, samples=samples, aim=aim, ordered=ordered, groups=chosen, outer=outer)
        if found.hutchinson * PAYS < found.price:
            gain = found.price / found.hutchinson
            reason = f"{reason}; but Hutchinson's replicates are quieter here, {gain:.1f} times at equal time (pilot)"
            return find("hutchinson").plan(case, replace(aim, open=False), reason)
        return Plan(
            self.name,
            gauss_newton,
            groups,
            together,
            chosen,
            balance,
            found.deflate,
            reason=reason,
            probes=found.probes,
            probe_rank=found.probe_rank,
        )

    def check(self, case: Case, plan: Plan) -> None:
        """Refuse a plan whose directions would fill the memory, or be lost in rounding, or whose layers are not there:
        it was made for others.
        """
        sizes = {layer.name: edge_shape((layer.node, 0)).numel() for _, layer in Propagator.probed(case.linear)}
        for name in plan.probes:
            if name not in sizes:
                raise ConfigurationError(f"a plan with probes for {name!r}: {nearest(name, sorted(sizes))}")
        held = 8 * plan.probe_rank * sum(sizes[name] for name in plan.probes) / case.linear.samples
        if held * case.survey.samples > GIVEN_BYTES:
            raise BudgetError(
                f"a plan with probe_rank={plan.probe_rank} would hold {held * case.survey.samples / 1e9:.1f} GB of "
                f"directions for {case.survey.samples} samples; give one with probe_rank=0, or fewer samples"
            )
        if not plan.deflate:
            return
        size = plan.deflate * direction_bytes(case.linear, case.survey.samples)
        if size > GIVEN_BYTES:
            raise BudgetError(
                f"a plan with deflate={plan.deflate} would hold {size / 1e9:.1f} GB of directions for "
                f"{case.survey.samples} samples; give one with deflate=0, or fewer samples"
            )
        few = case.few(PILOT_SAMPLES, plan.balance)
        propagator = Propagator(few, start=case.first.start, probes=plan.probes)
        if not propagator.batch.sites:
            return
        signs, known = Signs(0, case.objective.device), propagator.direct()
        outer = plan.gauss_newton == "exact"
        apart: Tensors = {}
        accumulate(known, propagator.gauss_newton(apart) if outer else propagator.gauss_newton_signed(signs, 0, apart))
        accumulate(known, apart, -1.0)
        off = rounding(propagator, signs, known, min(plan.deflate, DEFLATE_LEAST))
        if off > GIVEN_ROUNDED:
            raise ConfigurationError(
                f"a plan with deflate={plan.deflate} would lose up to {off:.0e} of the diagonal in "
                f"{case.objective.dtype}: the halves of its products cancel (balance of another model?); use float64, "
                "or give a plan with deflate=0"
            )

    def cost(self, case: Case, first: FirstPass) -> Forecast:
        """With directions taken out of the signs as far as memory allows."""
        batches = case.survey.batches
        refused = self.refusal(case)
        if refused:
            return Forecast(self.name, refused, batches)
        linear = case.linear
        samples = linear.samples * batches
        taken = first.columns <= EXACT_COLUMNS
        rank = affordable_rank(linear, samples)
        once = LINEARISE + DIRECT + (COLUMN * first.columns if taken else 0.0) + rank * DEFLATED
        each = SIGNED * (1.0 if taken else 2.0) + (LINEARISE / 8 if batches > 1 else 0.0)
        streams, vector = 1 if taken else 3, 8 * case.objective.size
        held = int(HELD_GRAPHS * first.graph) + (streams * (replicate_groups(case.objective.size) + 1) + 3) * vector
        held += 2 * rank * int(direction_bytes(linear, samples))
        time_ = first.seconds * batches
        passes = (first.columns if taken else 0) + 4 * rank  # a direction is found in two passes and squared in two
        return Forecast(self.name, None, batches, passes, 2 if taken else 4, None, held, once * time_, each * time_)

    def audit(self, checks: Checks) -> list[AuditEntry]:
        """The site identity, the layers' gradients, their squares as they are summed, and the closed shares of both
        parts.
        """
        return [*checks.identity(), *checks.squares(), *checks.sums(), *checks.closed(), *checks.heads()]


def _kept_bytes(batch: Linearisation) -> int:
    """Bytes that layers hold between passes, if told to keep them."""
    return sum(layer.kind.kept_bytes(layer) for layer in batch.layers)
