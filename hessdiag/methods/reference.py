"""Ground truth for small models: one Hessian-vector product per parameter, by double backward.

Knows nothing of sites, layers or squares: H e_k from the gradient's graph, and the Gauss-Newton entry as the quadratic
form (J e_k)^T (d2l/df2) (J e_k) of the outputs' change J e_k. Unit vectors go in chunks through one vectorised double
backward where the model's operations allow it, one by one where they do not.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.kernels.products import Products, once_more
from hessdiag.kernels.tensors import Tensors
from hessdiag.methods.base import FUNCTIONAL, GAUSS_NEWTON, FirstPass, Forecast, Method, Tell, Work
from hessdiag.methods.batches import Numbered
from hessdiag.problem.objective import Objective

if TYPE_CHECKING:
    from hessdiag.measuring.audit import Checks
    from hessdiag.measuring.comparisons import AuditEntry
    from hessdiag.methods.case import Case

PRODUCTS, ENTRY = 8.0, 1.0
"""In forward passes of the batch, measured on one CPU core for a residual network, an MLP and a ResNet-18."""


class _Batches(Work):
    hands_over = True

    def known(self, batch: Numbered, tell: Tell) -> dict[str, Tensors]:
        """Both parts, the functional one by subtraction."""
        outputs = self.case.outputs_of(batch)
        total, outer, _, _ = batch_diagonal(
            self.case.objective, batch.inputs, batch.targets, index=batch.index, progress=tell, outputs=outputs
        )
        return {GAUSS_NEWTON: outer, FUNCTIONAL: {name: total[name] - outer[name] for name in total}}


class Reference(Method):
    """Deterministic, for small models."""

    name, work = "reference", _Batches
    deterministic = True

    def multiplications(self, case: Case) -> float:
        """Two products a parameter, each a few passes that touch every parameter at least once per sample."""
        return 8.0 * case.objective.size**2 * case.survey.samples

    def cost(self, case: Case, first: FirstPass) -> Forecast:
        """Two products a parameter."""
        batches, size = case.survey.batches, case.objective.size
        return Forecast(
            self.name,
            None,
            batches,
            passes_once=2 * size + 2,
            bytes=64 * first.graph + 4 * 8 * size,
            seconds_once=(PRODUCTS + ENTRY * size) * first.seconds * batches,
        )

    def audit(self, checks: Checks) -> list[AuditEntry]:
        """The double backward's symmetry."""
        return [checks.symmetry()]


def batch_diagonal(
    objective: Objective,
    inputs: Any,
    targets: Tensor,
    *,
    index: int = 0,
    chunk: int = 64,
    progress: Tell | None = None,
    outputs: Tensor | None = None,
) -> tuple[Tensors, Tensors, float, int]:
    """(total, Gauss-Newton, weight, samples), summed over one batch: p products for each part.

    `outputs` are the model's, with their graph, where they are at hand.
    """
    products = Products(objective, inputs, targets, index=index, outputs=outputs)
    total: Tensors = {}
    outer: Tensors = {}
    done, size = 0, objective.size
    for position, name in enumerate(products.names):
        parameter = objective.parameters[name]
        flat_total = torch.zeros(parameter.numel(), dtype=torch.float64, device=parameter.device)
        flat_outer = torch.zeros_like(flat_total)
        for low in range(0, parameter.numel(), chunk):
            high = min(low + chunk, parameter.numel())
            units = torch.zeros(high - low, parameter.numel(), dtype=parameter.dtype, device=parameter.device)
            rows = torch.arange(high - low, device=parameter.device)
            units[rows, rows + low] = 1
            units = units.reshape(-1, *parameter.shape)
            flat_total[low:high] = _own_entries(products, position, units, low)
            flat_outer[low:high] = _quadratic_forms(products, position, units)
            done += high - low
            if progress:
                progress(done, size)
        total[name] = flat_total.reshape(parameter.shape)
        outer[name] = flat_outer.reshape(parameter.shape)
    return total, outer, products.weight, products.samples


def _own_entries(products: Products, position: int, units: Tensor, low: int) -> Tensor:
    gradient = products._gradient[position]
    count = len(units)
    if gradient is None or not gradient.requires_grad:
        return torch.zeros(count, dtype=torch.float64, device=units.device)
    parameter = products._parameters[position]
    rows = _grad_batched(gradient, parameter, units)
    if rows is None:
        return torch.zeros(count, dtype=torch.float64, device=units.device)
    places = torch.arange(count, device=rows.device)
    picked = rows.reshape(count, -1)[places, places + low]
    return picked.double()


def _quadratic_forms(products: Products, position: int, units: Tensor) -> Tensor:
    pulled = products._pulled[position]
    count = len(units)
    pushed = None
    if pulled is not None and pulled.requires_grad and products._dummy is not None:
        pushed = _grad_batched(pulled, products._dummy, units)
    if pushed is None:  # no path, or one through steps alone
        return torch.zeros(count, dtype=torch.float64, device=units.device)
    flat = pushed.double().reshape(count, products.samples, -1)
    curvature = products._curvature
    return torch.stack([(v * curvature.times(v)).sum() for v in flat])


def _grad_batched(output: Tensor, wrt: Tensor, vectors: Tensor) -> Tensor | None:
    with contextlib.suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (found,) = torch.autograd.grad(
            output, wrt, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return None if found is None else found.detach()
    with once_more():
        rows = [torch.autograd.grad(output, wrt, v, retain_graph=True, allow_unused=True)[0] for v in vectors]
    return None if rows[0] is None else torch.stack(rows).detach()
