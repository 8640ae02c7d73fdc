"""What double precision itself leaves uncertain in an audit.

On a fitted sample a loss's gradient p - y has lost its digits in any code that subtracts, autograd's included: its
Hessian-vector products are then off by rounding relative to a gradient of order one, however small the Hessian. `unit`
gives the linearisation whose loss has such a gradient; agreement is not asked for beyond `ROUNDINGS` of its entries.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from hessdiag.graph import Linearisation
from hessdiag.problem.objective import Objective
from hessdiag.problem.persample import Curvature, Diagonals, Loss

ROUNDINGS = 256.0


def length(tensor: Tensor) -> float:
    """Its norm, in double."""
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))


class _UnitLoss(Loss):
    """The loss with a gradient of random signs and a Hessian of ones, both as large as the outputs."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.name = loss, loss.name

    def by_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As the loss does."""
        return self.loss.by_sample(outputs, targets)

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
        columns = Diagonals(torch.full_like(f, size**0.5))
        signs = torch.ones(columns.count, dtype=f.dtype, device=f.device)
        return Curvature(gradient.sum(1), gradient, columns, signs)


def unit(objective: Objective, inputs: Any, targets: Tensor, index: int) -> Linearisation:
    """The linearisation under the unit loss."""
    twin = copy.copy(objective)
    twin.loss = _UnitLoss(objective.loss)
    return Linearisation(twin, inputs, targets, index=index)
