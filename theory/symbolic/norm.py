"""E[8]: ‖diag(H)/p‖ = sqrt((1/p) Σ h²) as printed. The two sides differ by the factor sqrt(p)."""

from __future__ import annotations

from typing import Any

import sympy as sp

Expr = Any


def left_side(entries: tuple[Expr, ...]) -> Expr:
    """‖diag/p‖₂ = (1/p) sqrt(Σ h²): the mean-scaled norm."""
    p = len(entries)
    return sp.sqrt(sum((h / p) ** 2 for h in entries))


def right_side(entries: tuple[Expr, ...]) -> Expr:
    """sqrt((1/p) Σ h²): the root mean square."""
    p = len(entries)
    return sp.sqrt(sum(h**2 for h in entries) / p)


def ratio(parameters: int) -> Expr:
    """Right side over left side of E[8] for p symbols: sqrt(p), whatever the entries."""
    entries = sp.symbols(f"h1:{parameters + 1}", positive=True)
    return sp.sqrt(sp.cancel(right_side(entries) ** 2 / left_side(entries) ** 2))
