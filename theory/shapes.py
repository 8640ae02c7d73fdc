"""Activations as plain triples (σ, σ', σ''): what the expansions of this package take.

`rct` writes E[1]-E[6] with s = sigmoid(αx), which neither overflows nor cancels; `triple` makes a triple
from any twice differentiable function, or from a module with `.d1` and `.d2`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from theory._refusals import refuse

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """σ with its first two derivatives, each elementwise."""

    sigma: Function
    d1: Function
    d2: Function
    name: str = "sigma"


def triple(sigma: Any, d1: Function | None = None, d2: Function | None = None, *, name: str = "sigma") -> Shape:
    """A `Shape` from three callables, one with methods `.d1` and `.d2`, or σ alone (by autograd)."""
    if isinstance(sigma, Shape):
        return sigma
    if not callable(sigma):
        refuse(f"{sigma!r} is no activation; give a callable, or (sigma, d1, d2)")
    first, second = d1 or getattr(sigma, "d1", None), d2 or getattr(sigma, "d2", None)
    if first is None or second is None:
        return Shape(sigma, _derivative(sigma, 1), _derivative(sigma, 2), name)
    return Shape(sigma, first, second, name)


def _derivative(sigma: Function, order: int) -> Function:
    def derivative(x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            value = sigma(at)
            for _ in range(order):
                if not value.requires_grad:  # σ or its slope is constant in x
                    return torch.zeros_like(x)
                (value,) = torch.autograd.grad(value.sum(), at, create_graph=True, materialize_grads=True)
        return value.detach()

    return derivative


def rct(alpha: float, beta: int) -> Shape:
    """RCT-AF, E[1]-E[6], for β = 0, 1, 2; with t = αx, s = sigmoid(t), q = s(1-s), r = 1-2s (so q' = qr, r'
    = -2q).
    """
    if beta not in (0, 1, 2) or not alpha > 0:
        refuse(f"rct needs alpha > 0 and beta in (0, 1, 2), got alpha = {alpha}, beta = {beta}")

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = alpha * x
        s, other = torch.sigmoid(t), torch.sigmoid(-t)
        return t, s, s * other, other - s

    def sigma(x: Tensor) -> Tensor:
        t, s, q, _ = parts(x)
        if beta == 0:
            return (torch.clamp(t, min=0) + torch.log1p(torch.exp(-t.abs()))) / alpha
        return x * s if beta == 1 else x * (s + t * q)

    def d1(x: Tensor) -> Tensor:
        t, s, q, r = parts(x)
        return (s, s + t * q, s + 3 * t * q + t**2 * q * r)[beta]

    def d2(x: Tensor) -> Tensor:
        t, _, q, r = parts(x)
        return alpha * q * (1, 2 + t * r, 4 + 5 * t * r + t**2 * (r**2 - 2 * q))[beta]

    return Shape(sigma, d1, d2, f"rct:beta={beta},alpha={alpha:g}")


def tanh() -> Shape:
    """tanh: σ' = 1 - σ², σ'' = -2σσ'."""
    return Shape(
        torch.tanh,
        lambda x: 1 - torch.tanh(x) ** 2,
        lambda x: -2 * torch.tanh(x) * (1 - torch.tanh(x) ** 2),
        "tanh",
    )


def sine() -> Shape:
    """sin: σ' vanishes on a lattice, σ'' = -σ."""
    return Shape(torch.sin, torch.cos, lambda x: -torch.sin(x), "sine")


def linear(slope: float = 1.0) -> Shape:
    """σ(x) = slope · x: no curvature, so every form of D is zero."""
    return Shape(lambda x: slope * x, lambda x: torch.full_like(x, slope), torch.zeros_like, f"linear:slope={slope:g}")


def quadratic(curvature: float = 1.0) -> Shape:
    """σ(x) = x + curvature · x²/2: σ'' constant."""
    return Shape(
        lambda x: x + curvature * x**2 / 2,
        lambda x: 1 + curvature * x,
        lambda x: torch.full_like(x, curvature),
        f"quadratic:curvature={curvature:g}",
    )
