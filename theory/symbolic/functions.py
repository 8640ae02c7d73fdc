"""σ left undefined: a sympy function whose derivatives are again functions, σ -> σ' -> σ'' -> σ'''."""

from __future__ import annotations

from typing import Any

import sympy as sp

Expr = Any


class sigma3(sp.Function):  # type: ignore[misc]
    """σ'''; never differentiated here."""


class sigma2(sp.Function):  # type: ignore[misc]
    """σ''."""

    def fdiff(self, argindex: int = 1) -> Expr:
        """σ'''."""
        return sigma3(self.args[0])


class sigma1(sp.Function):  # type: ignore[misc]
    """σ'."""

    def fdiff(self, argindex: int = 1) -> Expr:
        """σ''."""
        return sigma2(self.args[0])


class sigma(sp.Function):  # type: ignore[misc]
    """An arbitrary twice differentiable activation."""

    def fdiff(self, argindex: int = 1) -> Expr:
        """σ'."""
        return sigma1(self.args[0])
