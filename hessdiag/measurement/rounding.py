"""What double precision itself leaves uncertain in an audit, and whether autograd's second derivatives are the model's.

On a fitted sample a loss's gradient p - y has lost its digits in any code that subtracts, autograd's included: its
Hessian-vector products are then off by rounding relative to a gradient of order one, however small the Hessian. `unit`
gives the linearisation whose loss has such a gradient; agreement is not asked for beyond `ROUNDINGS` of its entries.

`difference` holds the double backward itself to account: a custom function whose backward detaches, a straight-through
estimator or a hook that alters gradients give a symmetric, plausible and wrong Hessian. H u is compared with the
difference quotient of the gradient, at parameters moved off the kinks that zeros sit on.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..diagonal.hutchinson import Products
from ..objective import Objective
from ..persample import Curvature, Loss
from ..signs import Signs
from ..sites import Linearisation

ROUNDINGS = 256.0
STEPS = (1e-6, 1e-7, 1e-8)
"""Relative steps of the difference quotients; so small that no unit of a piecewise-linear network changes sides."""
MOVED = 1e-3


class _UnitLoss(Loss):
    """The loss with a gradient of random signs and a Hessian of ones, both as large as the outputs."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.name = loss, loss.name

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """As the loss does."""
        self.loss.check(outputs, targets)

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As the loss does."""
        return self.loss.weights(outputs, targets)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Curvature:
        """Signs and an identity, scaled."""
        f = outputs.detach().double().reshape(len(outputs), -1)
        size = max(float(f.abs().max()), 1.0)
        gradient = size * torch.cos(torch.arange(f.numel(), device=f.device) * 2.3).sign().to(f).reshape(f.shape)
        eye = torch.eye(f.shape[1], dtype=f.dtype, device=f.device) * size**0.5
        factor = eye[:, None, :].expand(-1, len(f), -1)
        return Curvature(gradient.sum(1), gradient, factor, torch.ones(len(eye), dtype=f.dtype, device=f.device))


def unit(objective: Objective, inputs: Any, targets: Tensor, index: int) -> Linearisation:
    """The linearisation under the unit loss."""
    twin = copy.copy(objective)
    twin.loss = _UnitLoss(objective.loss)
    return Linearisation(twin, inputs, targets, index=index)


def difference(objective: Objective, inputs: Any, targets: Tensor, index: int, signs: Signs, *parts: int) -> float:
    """|quotient - H u| / |H u| in float64, the smallest over steps; `objective` is a copy that may be moved."""
    parameters = objective.parameters
    along = {}
    with torch.no_grad():
        for number, (name, p) in enumerate(parameters.items()):
            size = float(p.square().mean().sqrt()) or 1e-3
            p.add_(signs.plain(p, *parts, 2 * number), alpha=MOVED * size)
            along[name] = signs.plain(p, *parts, 2 * number + 1) * size
    products = Products(objective, inputs, targets, index=index, parts=False)
    curved = torch.cat([t.reshape(-1).double() for t in products.hessian(along).values()])
    best = float("inf")
    for step in STEPS:
        ends = [_gradient(objective, inputs, targets, index, along, sign * step) for sign in (1.0, -1.0)]
        quotient = (ends[0] - ends[1]) / (2 * step)
        noise = ROUNDINGS * torch.finfo(torch.float64).eps * float(ends[0].norm()) / step
        size = max(float(quotient.norm()), float(curved.norm()))
        off = max(float((quotient - curved).norm()) - noise, 0.0)
        best = min(best, off / size if off else 0.0)
    return best


def _gradient(
    objective: Objective, inputs: Any, targets: Tensor, index: int, along: dict[str, Tensor], step: float
) -> Tensor:
    """The gradient at parameters moved by `step * along`, which are moved back."""
    parameters = objective.parameters
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.add_(along[name], alpha=step)
    with torch.enable_grad():
        loss, _ = objective.summed_loss(inputs, targets, index=index)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(before[name])
    flat = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters.values())]
    return torch.cat([g.detach().reshape(-1).double() for g in flat])
