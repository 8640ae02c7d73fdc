"""Auto-PGD in Linf, from its publication (Croce & Hein 2020, arXiv 2003.01690, algorithm 1).

Start x_0 = x + eps u / max|u|, u ~ U(-1, 1), in the box; step size 2 eps per sample, then per iteration

    z = Pi(x_k + eta sign g),    x_{k+1} = Pi(x_k + a (z - x_k) + (1 - a)(x_k - x_{k-1})),    a = 0.75,
    first 1

At the checkpoints (the first after 22% of the steps; the gaps shrink by 3% down to 6%) a sample halves its
eta and goes back to its best point if at most rho = 75% of the steps since the last checkpoint raised its
loss, or if its eta was kept there and its best loss has not moved since.

From the same start the iterates are pyautoattack's bit for bit, except where that code counts the first iteration
as a rise by comparing its loss with an unfilled entry (0) and not with the loss at the start, as the paper does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.problem.ascent import AttackLoss, Forward, ascend_linf, input_gradient, project_linf

MOMENTUM = 0.75
RHO = 0.75
STEPS = 100


@dataclass(frozen=True)
class APGDRun:
    """One run from one start, per sample: was an iterate misclassified, the last such, the highest loss."""

    fooled: Tensor
    last: Tensor
    best: Tensor
    best_loss: Tensor
    flat: Tensor
    finite: Tensor


def checkpoints(steps: int) -> dict[int, int]:
    """After how many iterations a sample's step size is judged, and how many iterations that looks back."""
    gap, least, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, position = {}, gap
    while position <= steps:
        found[position] = gap
        gap = max(gap - shrink, least)
        position += gap
    return found


def apgd(
    forward: Forward,
    x: Tensor,
    start: Tensor,
    labels: Tensor,
    target: Any,
    *,
    eps: float,
    steps: int,
    loss: AttackLoss,
    rho: float = RHO,
    autocast: torch.dtype | None = None,
) -> APGDRun:
    """One run of `steps` iterations on every sample given: tensor operations only, no branch on data."""
    points, previous = start, start
    values, gradient, logits = input_gradient(forward, points, target, loss, autocast)
    finite = values.isfinite() & gradient.flatten(1).isfinite().all(1)
    flat = (gradient.flatten(1) == 0).all(1)
    fooled, last = logits.argmax(1) != labels, points
    best, best_gradient, best_loss = points, gradient, values
    last_loss, best_then = values, values
    rises = torch.zeros_like(values)
    halved = torch.ones_like(fooled)
    wide = (-1,) + (1,) * (x.ndim - 1)
    size = torch.full_like(values, 2.0 * eps, dtype=x.dtype).view(wide)
    schedule = checkpoints(steps)
    for iteration in range(1, steps + 1):
        weight = MOMENTUM if iteration > 1 else 1.0
        ahead = ascend_linf(points, gradient, x, eps, size)
        drifted = points + weight * (ahead - points) + (1.0 - weight) * (points - previous)
        previous, points = points, project_linf(drifted, x, eps)
        values, gradient, logits = input_gradient(forward, points, target, loss, autocast)
        finite = finite & values.isfinite() & gradient.flatten(1).isfinite().all(1)
        wrong, better = logits.argmax(1) != labels, values > best_loss
        fooled, last = fooled | wrong, torch.where(wrong.view(wide), points, last)
        best = torch.where(better.view(wide), points, best)
        best_gradient = torch.where(better.view(wide), gradient, best_gradient)
        best_loss = torch.where(better, values, best_loss)
        rises, last_loss = rises + (values > last_loss), values
        if iteration in schedule:
            halve = (rises <= rho * schedule[iteration]) | (~halved & (best_loss <= best_then))
            size = torch.where(halve.view(wide), size / 2, size)
            points = torch.where(halve.view(wide), best, points)
            gradient = torch.where(halve.view(wide), best_gradient, gradient)
            halved, best_then, rises = halve, best_loss, torch.zeros_like(rises)
    return APGDRun(fooled, last, best, best_loss, flat, finite)
