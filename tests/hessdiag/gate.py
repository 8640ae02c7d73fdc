"""The test that needs no statistics: every one-hot vector in the place of the signs, summed, against p products.

Whatever is random in curvature propagation is a sum over signs; with one-hot vectors in their place the sum over all of
them is what a replicate is on average, to rounding. Products of the Hessian with p unit vectors know nothing of sites.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import beyond_in_the_mean
from torch import Tensor, nn

from hessdiag.graph import Linearisation
from hessdiag.kernels import exact_batch as exact
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate
from hessdiag.methods import reference
from hessdiag.problem.objective import Objective

DOUBLE, SINGLE = 1e-12, 1e-5


def gate(model: nn.Module, x: Any, y: Tensor, loss: Any = "cross_entropy", **options: Any) -> dict[str, Tensor]:
    """Exact and propagation give the truth in float64, and in float32 to its own precision; returns the truth."""
    model = copy.deepcopy(model).double().eval()
    objective = Objective(model, loss, **options)
    truth, outer, _, _ = reference.batch_diagonal(objective, _to(x, torch.float64), _to(y, torch.float64))
    for dtype, tolerance in ((torch.float64, DOUBLE), (torch.float32, SINGLE)):
        own = Objective(copy.deepcopy(model).to(dtype), loss, **options)
        batch = Linearisation(own, _to(x, dtype), _to(y, dtype))
        first, second = exact.batch_diagonal(batch)
        close(first, outer, outer, tolerance)
        close({n: first[n] + second[n] for n in first}, truth, outer, tolerance)
        if not batch.free:
            each = exact.batch_diagonal(batch, per_sample=True)
            for whole, single in zip((first, second), each):
                close({n: t.sum(0) for n, t in single.items()}, whole, truth, tolerance)
        close(one_hot(Propagator(batch)), truth, outer, tolerance)
    return truth


def close(found: Tensors, truth: Tensors, outer: Tensors, tolerance: float) -> None:
    """Within `tolerance` of each tensor's norm; one whose diagonal is zero within that of the whole."""
    whole = float(torch.stack([t.norm() for t in truth.values()]).norm())
    for name, wanted in truth.items():
        size = float(wanted.norm()) + float(outer[name].norm())
        off = float((found[name] - wanted).norm())
        assert off <= tolerance * (size if size > 1e-13 * whole else whole), (name, off, size, whole)


def one_hot(propagator: Propagator) -> Tensors:
    """What propagation gives on average, the Gauss-Newton part exactly."""
    out = beyond_in_the_mean(propagator)
    for part in (propagator.direct(), propagator.gauss_newton()):
        accumulate(out, part)
    return out


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
