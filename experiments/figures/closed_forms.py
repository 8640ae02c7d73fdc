"""Figures 1 and 2: RCT-AF and its second derivative, from E[1]-E[6]; nothing is trained for them."""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.figures.style import canvas, label, looks
from hessdiag.activations import rct, rct_d2

ALPHAS = (1, 5, 10, 15, 20)


def figure1(path: Path) -> None:
    """σ for α = 1, 5, 10, 15, 20 and β = 0, 1, 2."""
    x = torch.linspace(-2, 2, 801, dtype=torch.float64)
    with canvas(path, 1, 3) as axes:
        for beta, axis in enumerate(axes[0]):
            for index, alpha in enumerate(ALPHAS):
                axis.plot(x, rct(x, float(alpha), beta), label=f"α = {alpha}", markevery=100, **looks(index))
            axis.set(title=f"β = {beta}", xlabel="x", ylabel="σ(x)" if beta == 0 else "")
        axes[0][0].legend()
        label(axes[0][0], "closed forms, E[1], E[3], E[5]")


def figure2(path: Path) -> None:
    """σ'' for the same, with the maxima α/4, α/2, α marked at 0."""
    x = torch.linspace(-2, 2, 1601, dtype=torch.float64)
    with canvas(path, 1, 3) as axes:
        for beta, axis in enumerate(axes[0]):
            for index, alpha in enumerate(ALPHAS):
                axis.plot(x, rct_d2(x, float(alpha), beta), label=f"α = {alpha}", markevery=200, **looks(index))
                axis.plot([-2, 0], [alpha * 2**beta / 4] * 2, color="#888888", linewidth=0.5, linestyle=":")
            axis.set(
                title=f"β = {beta}: maximum α{('/4', '/2', '')[beta]}", xlabel="x", ylabel="σ''(x)" if beta == 0 else ""
            )
        axes[0][0].legend()
        label(axes[0][0], "closed forms, E[2], E[4], E[6]; dotted: the maxima at 0")
