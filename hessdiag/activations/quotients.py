"""Derivatives of a function of one variable held against difference quotients, on a grid of both signs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AGREE = 1e-5
"""Of a derivative with the difference quotient, relative to the larger of the derivative there and `FLOOR` of the
largest on the grid."""
FLOOR = 1e-3


def grid() -> Tensor:
    """Points of both signs, away from round numbers, on which kinks sit."""
    side = torch.logspace(-3, 1.6, 160, dtype=torch.float64) * 1.0123
    middle = torch.linspace(-6.0123, 6.0345, 300, dtype=torch.float64)
    return torch.cat([-side, side, middle]).sort().values


def deviation(told: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Deviation from central differences at the better of two steps; 0 where the two disagree with one another."""
    quotients = []
    for step in (1e-5, 3e-5):
        h = step * x.abs().clamp(min=1e-1)
        up, down = x + h, x - h
        quotients.append((function(up) - function(down)) / (up - down))
    scale = torch.maximum(told.abs(), quotients[0].abs()).clamp(min=max(FLOOR * float(told.abs().max()), 1e-9))
    off = torch.minimum(*[(told - q).abs() / scale for q in quotients])
    rough = (quotients[0] - quotients[1]).abs() / scale > AGREE
    return torch.where(rough, torch.zeros_like(off), off)
