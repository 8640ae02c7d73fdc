"""Ground truth for small models: one Hessian-vector product per parameter, by double backward.

Knows nothing of sites, layers or squares: H e_k from the gradient's graph, and the Gauss-Newton entry as the quadratic
form (J e_k)^T (d2l/df2) (J e_k) of the outputs' change J e_k. Unit vectors go in chunks through one vectorised double
backward where the model's operations allow it, one by one where they do not.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..objective import Objective
from .hutchinson import Products, once_more
from .parts import Tensors

Progress = Callable[[int, int], None]


def batch_diagonal(
    objective: Objective,
    inputs: Any,
    targets: Tensor,
    *,
    index: int = 0,
    chunk: int = 64,
    progress: Progress | None = None,
) -> tuple[Tensors, Tensors, float, int]:
    """(total, Gauss-Newton, weight, samples), summed over one batch: p products for each part."""
    products = Products(objective, inputs, targets, index=index)
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
    if pulled is None or products._dummy is None:
        return torch.zeros(count, dtype=torch.float64, device=units.device)
    pushed = _grad_batched(pulled, products._dummy, units)
    assert pushed is not None
    flat = pushed.double().reshape(count, products.samples, -1)
    along = torch.einsum("knc,snc->ksn", flat, products._factor)
    return (along.square() * products._signs[None, :, None]).sum((1, 2))


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
