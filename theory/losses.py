"""Losses with their first two derivatives in the outputs, one value per sample, for
`theory.hessian_diagonal`.

A loss with its targets bound is a callable outputs [N, C] -> `LossDerivatives`; any twice differentiable
one is made by `from_callable`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from theory._refusals import refuse


@dataclass(frozen=True)
class LossDerivatives:
    """ℓ [N], g = ∂ℓ/∂f [N, C], ∇²ℓ [N, C, C]."""

    value: Tensor
    gradient: Tensor
    hessian: Tensor


Loss = Callable[[Tensor], LossDerivatives]


def half_squared(targets: Tensor) -> Loss:
    """The paper's ½(f - y)², summed over outputs; g = f - y, ∇²ℓ = 1."""

    def loss(outputs: Tensor) -> LossDerivatives:
        y = _fit(targets, outputs)
        residual = outputs - y
        eye = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        return LossDerivatives((residual**2).sum(1) / 2, residual, eye.repeat(len(outputs), 1, 1))

    return loss


def cross_entropy(targets: Tensor) -> Loss:
    """Softmax cross-entropy with integer classes: g = p - e_y, ∇²ℓ = diag p - p pᵀ."""

    def loss(outputs: Tensor) -> LossDerivatives:
        if targets.shape != outputs.shape[:1] or targets.is_floating_point():
            refuse(
                f"classes must be {len(outputs)} integers, got {tuple(targets.shape)} {targets.dtype}",
                error="TargetError",
            )
        if bool(((targets < 0) | (targets >= outputs.shape[1])).any()):
            refuse(f"a class lies outside 0..{outputs.shape[1] - 1}", error="TargetError")
        logs = torch.log_softmax(outputs, 1)
        p = logs.exp()
        hot = torch.nn.functional.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
        return LossDerivatives(-(logs * hot).sum(1), p - hot, torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1))

    return loss


def binary_cross_entropy(targets: Tensor) -> Loss:
    """Σ_c log(1 + e^f) - y f: g = s - y, ∇²ℓ = diag s(1-s)."""

    def loss(outputs: Tensor) -> LossDerivatives:
        y = _fit(targets, outputs)
        s = torch.sigmoid(outputs)
        value = torch.nn.functional.softplus(outputs) - y * outputs
        return LossDerivatives(value.sum(1), s - y, torch.diag_embed(s * torch.sigmoid(-outputs)))

    return loss


def from_callable(function: Callable[[Tensor, Tensor], Tensor], targets: Tensor) -> Loss:
    """Any twice differentiable `function(outputs, targets) -> loss per sample [N]`, derivatives by
    autograd.
    """

    def loss(outputs: Tensor) -> LossDerivatives:
        with torch.enable_grad():
            f = outputs.detach().requires_grad_(True)
            value = function(f, targets)
            if value.shape != f.shape[:1]:
                refuse(f"the loss returned {tuple(value.shape)}; {len(f)} values, one per sample, are needed")
            (g,) = torch.autograd.grad(value.sum(), f, create_graph=True)
            rows = []
            for c in range(f.shape[1]):
                row = torch.zeros_like(f)
                if g.requires_grad:
                    (row,) = torch.autograd.grad(g[:, c].sum(), f, retain_graph=True, materialize_grads=True)
                rows.append(row)
        return LossDerivatives(value.detach(), g.detach(), torch.stack(rows, 1).detach())

    return loss


def _fit(targets: Tensor, outputs: Tensor) -> Tensor:
    y = targets.unsqueeze(1) if targets.ndim == 1 and outputs.shape[1] == 1 else targets
    if y.shape != outputs.shape:
        refuse(f"targets {tuple(targets.shape)} do not fit outputs {tuple(outputs.shape)}", error="TargetError")
    return y.to(outputs.dtype)
