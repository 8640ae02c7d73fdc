"""Every derivative of the RCT-AF family in closed form, in plain smooth operations (the formula of `coefficients`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hessdiag.activations.coefficients import Polynomial, remainder

# |t| beyond which exp(-|t|) is zero in the working precision, whatever power of t multiplies it.
TAIL = {torch.float32: 128.0, torch.float64: 1024.0}


def working_dtype(x: Tensor, alpha: float, degree: int) -> torch.dtype:
    """Half types are computed in float32; float32 in float64 where powers of t or alpha leave its range."""
    if x.dtype == torch.float64 or degree > 6 or not 1e-30 < alpha < 1e30:
        return torch.float64
    return torch.float32


def closed_form(x: Tensor, alpha: float, beta: int, order: int = 0) -> Tensor:
    """d^order sigma_{alpha,beta}/dx^order by the formula of `coefficients`, in plain smooth operations."""
    wide = x.to(working_dtype(x, alpha, beta + order))
    t = wide * alpha
    if beta == 0 and order == 0:
        # softplus turns linear at the threshold: at torch's 20 that costs half of float64's digits, at 40 none.
        return F.softplus(wide, beta=alpha, threshold=40).to(x.dtype)
    s = torch.sigmoid(t)
    polynomials = _constant_remainder(len(range(beta)), order)  # range: the compiler of torch 2.6 wants beta constant
    if not any(polynomials):
        return (wide * s if order == 0 else s).to(x.dtype)
    v = s * torch.sigmoid(-t)
    odd = any(c and (power + order) % 2 for power, c in enumerate(polynomials))
    u = -torch.tanh(t / 2) if odd else v
    tail = TAIL[wide.dtype]
    t = t.clamp(-tail, tail)
    bend: Tensor | float = 0.0
    for power in range(len(polynomials) - 1, 0 if order == 0 else -1, -1):  # Horner's rule in t
        part = _polynomial(polynomials[power], v)
        if (power + order) % 2 and polynomials[power]:
            part = part * u
        bend = bend * t + part if isinstance(bend, Tensor) or bend else part
    if order == 0:  # one power of t is the factor x
        return (wide * (s + v * bend)).to(x.dtype)
    return (s + v * bend if order == 1 else v * bend * alpha ** (order - 1)).to(x.dtype)


def _constant_remainder(beta: int, order: int) -> tuple[Polynomial, ...]:
    """`remainder`, as a constant for the compiler."""
    return remainder(beta, order)


# What `torch.compiler.assume_constant_result` sets. The decorator itself imports the compiler, which takes longer than
# all of this package, and a process that never compiles would pay for it too.
_constant_remainder._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _polynomial(coefficients: Polynomial, v: Tensor) -> Tensor | float:
    """Horner's rule in v; a number where the polynomial is one."""
    total: Tensor | float = 0.0
    for c in reversed(coefficients):
        total = total * v + c if isinstance(total, Tensor) or total else c
    return total
