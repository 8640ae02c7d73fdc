"""Hutchinson's estimator of the diagonal: v * (H v) with Rademacher v (M. F. Hutchinson 1989; Bekas et al. 2007).

Unbiased for any twice-differentiable model, which makes it the fallback; the variance of entry k is the sum over j != k
of H_kj^2. The Hessian is a sum over samples, so each block b of samples takes a probe of its own,

    d = sum_b v_b * (H_b v_b),   var d_k = sum_b sum_{j != k} (H_b)_kj^2,

at the price of drawing one probe a block: no more products, since each is with its own block's Hessian alone. Blocks
are runs of `Plan.block` sample numbers (0: all data are one); a batch that straddles two is cut there, so that neither
batching nor sharding changes an estimate. The Gauss-Newton part is v * (G v), G v = J^T (d2l/df2) J v.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from hessdiag.graph.nodes import graph_bytes
from hessdiag.kernels.products import Products
from hessdiag.kernels.tensors import Tensors, accumulate, zeros
from hessdiag.methods.base import FUNCTIONAL, GAUSS_NEWTON, TOTAL, FirstPass, Forecast, Method, Work
from hessdiag.methods.batches import Numbered
from hessdiag.methods.plan import Plan, replicate_groups
from hessdiag.problem.objective import Objective
from hessdiag.signs import Signs

if TYPE_CHECKING:
    from hessdiag.measuring.audit import Checks
    from hessdiag.measuring.comparisons import AuditEntry
    from hessdiag.methods.case import Case

PROBE = 2  # stream of signs
HELD_GRAPHS = 4
"""Times a forward pass's graph that a batch holds between replicates."""
PRODUCTS, HESSIAN, OUTER = 8.0, 6.0, 5.0
"""In forward passes of the batch, measured on one CPU core for a residual network, an MLP and a ResNet-18."""


def probe(objective: Objective, signs: Signs, replicate: int, *block: int) -> Tensors:
    """The Rademacher vector of one replicate, and of one block of samples where that is given."""
    return {
        name: signs.plain(parameter, replicate, PROBE, number, *block)
        for number, (name, parameter) in enumerate(objective.parameters.items())
    }


class _Batches(Work):
    def replicate(self, batch: Numbered, r: int) -> dict[str, Tensors]:
        """Every block of the batch under its own probe."""
        objective, plan = self.case.objective, self.case.plan
        graphs = self.kept(batch, lambda: [(b, self._products(part)) for b, part in blocks(batch, plan.block)])
        found = {name: zeros(objective.parameters) for name in ((TOTAL, GAUSS_NEWTON) if plan.parts else (TOTAL,))}
        for block, products in graphs:
            v = probe(objective, self.signs, r, *((block,) if plan.block else ()))
            accumulate(found[TOTAL], {name: v[name] * hv for name, hv in products.hessian(v).items()})
            if plan.parts:
                accumulate(found[GAUSS_NEWTON], {name: v[name] * gv for name, gv in products.gauss_newton(v).items()})
        if plan.parts:
            found[FUNCTIONAL] = {name: t - found[GAUSS_NEWTON][name] for name, t in found[TOTAL].items()}
        return found

    def size(self, prepared: list[tuple[int, Products]]) -> float:
        """The graphs of the gradient."""
        return HELD_GRAPHS * sum(graph_bytes(products.outputs) for _, products in prepared)

    def _products(self, part: Numbered) -> Products:
        case = self.case
        outputs = case.outputs_of(part)
        return Products(
            case.objective, part.inputs, part.targets, index=part.index, parts=case.plan.parts, outputs=outputs
        )


def blocks(batch: Numbered, size: int) -> Iterator[tuple[int, Numbered]]:
    """A batch cut at the multiples of `size` of the sample numbers, each part with the number of its block."""
    count = len(batch.targets)
    if not size or batch.start // size == (batch.start + count - 1) // size:
        yield (batch.start // size if size else 0), batch
        return
    low = 0
    while low < count:
        block = (batch.start + low) // size
        high = min((block + 1) * size - batch.start, count)
        yield block, batch.part(torch.arange(low, high, device=batch.targets.device))
        low = high


class Hutchinson(Method):
    """Stochastic, for any model that can be differentiated twice."""

    name, work = "hutchinson", _Batches

    def streams(self, plan: Plan) -> tuple[str, ...]:
        """The parts as well, if the plan asks for them."""
        return (TOTAL, GAUSS_NEWTON, FUNCTIONAL) if plan.parts else (TOTAL,)

    def cost(self, case: Case, first: FirstPass) -> Forecast:
        """Two products a replicate, the Hessian's and the Gauss-Newton matrix's."""
        batches, size = case.survey.batches, case.objective.size
        held = HELD_GRAPHS * first.graph + 3 * (replicate_groups(size) + 2) * 8 * size
        time_ = first.seconds * batches
        each = HESSIAN + OUTER + (PRODUCTS / 8 if batches > 1 else 0.0)
        return Forecast(self.name, None, batches, 2, 3, None, held, PRODUCTS * time_, each * time_)

    def audit(self, checks: Checks) -> list[AuditEntry]:
        """The double backward's symmetry: no identity is needed."""
        return [checks.symmetry()]
