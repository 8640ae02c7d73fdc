"""The exact diagonal, both parts, by the site identity (see `hessdiag.kernels.exact_batch`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessdiag.errors import HessdiagError
from hessdiag.kernels import exact_batch as exact
from hessdiag.kernels.tensors import Tensors
from hessdiag.methods.base import FUNCTIONAL, GAUSS_NEWTON, FirstPass, Forecast, Method, Tell, Work
from hessdiag.methods.batches import Numbered

if TYPE_CHECKING:
    from hessdiag.measuring.audit import Checks
    from hessdiag.measuring.comparisons import AuditEntry
    from hessdiag.methods.case import Case

LINEARISE, COLUMN = 6.0, 4.0
"""In forward passes of the batch, measured on one CPU core for a residual network, an MLP and a ResNet-18."""


class _Batches(Work):
    hands_over = True

    def known(self, batch: Numbered, tell: Tell) -> dict[str, Tensors]:
        """Both parts."""
        outer, inner = exact.batch_diagonal(self.case.linearise(batch), progress=tell)
        return {GAUSS_NEWTON: outer, FUNCTIONAL: inner}

    def per_sample(self, batch: Numbered) -> dict[str, dict[str, Tensor]]:
        """Both parts, the samples as first axis."""
        linear = self.case.linearise(batch)
        if not linear.free:
            outer, inner = exact.batch_diagonal(linear, per_sample=True)
            return {GAUSS_NEWTON: outer, FUNCTIONAL: inner}
        # what is computed from parameters alone bends for all samples together: then one after the other
        numbers = torch.arange(len(batch.targets), device=batch.targets.device)
        each = [exact.batch_diagonal(self.case.linearise(batch.part(one))) for one in torch.split(numbers, 1)]
        stacked = [{name: torch.stack([pair[k][name] for pair in each]) for name in each[0][k]} for k in (0, 1)]
        return {GAUSS_NEWTON: stacked[0], FUNCTIONAL: stacked[1]}


class Exact(Method):
    """Deterministic, and rests on the site identity."""

    name, work = "exact", _Batches
    deterministic = sites = singles = True

    def multiplications(self, case: Case) -> float:
        """Counted on the first batch."""
        return exact.cost(case.linear).flops * case.survey.samples / case.linear.samples

    def cost(self, case: Case, first: FirstPass) -> Forecast:
        """Counts are exact; seconds are the multiplications at the speed of the forward pass."""
        batches = case.survey.batches
        try:
            price = exact.cost(case.linear)
        except HessdiagError as error:
            return Forecast(self.name, str(error), batches)
        seconds = price.flops * first.seconds / first.work + (LINEARISE + COLUMN * first.columns) * first.seconds
        return Forecast(
            self.name,
            None,
            batches,
            passes_once=price.passes + first.columns,
            multiplications=price.flops * batches,
            bytes=price.bytes + 3 * first.graph + 4 * 8 * case.objective.size,
            seconds_once=seconds * batches,
        )

    def audit(self, checks: Checks) -> list[AuditEntry]:
        """The site identity, the layers' gradients, and entries against Hessian-vector products."""
        return [*checks.identity(), *checks.squares(), *checks.entries(exact.batch_diagonal)]
