"""The RCT-AF family as functions: closed forms of every derivative, and the autograd function behind them.

sigma_0 = softplus(alpha·x)/alpha, sigma_{beta+1} = x · sigma_beta' (E[1], E[3], E[5] of arXiv 2603.23860).
E[5] as printed overflows float32 beyond alpha·x = 44; the form used here (see `coefficients`) does not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hessdiag.activations import blocks, gpu
from hessdiag.activations.formula import closed_form, working_dtype
from hessdiag.errors import ConfigurationError, DtypeError

MAX_BETA = 16
"""Up to it sigma'' is right to 1e-10 of its largest value in float64; the alternating sums grow with beta."""


def check_alpha(alpha: object) -> float:
    """`alpha` as a float if it is a positive finite number, else a `ConfigurationError`."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ConfigurationError(
            f"alpha must be a plain number, got {type(alpha).__name__}: alpha is configuration, never learned"
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigurationError(f"alpha must be positive and finite, got {alpha}")
    return float(alpha)


def check_beta(beta: object) -> int:
    """`beta` if it is an integer from 0 to `MAX_BETA`, else a `ConfigurationError`."""
    if isinstance(beta, bool) or not isinstance(beta, int):
        raise ConfigurationError(f"beta must be an integer, got {beta!r}")
    if not 0 <= beta <= MAX_BETA:
        raise ConfigurationError(f"beta must lie between 0 and {MAX_BETA}, got {beta}")
    return beta


def rct(x: Tensor, alpha: float, beta: int) -> Tensor:
    """sigma_{alpha,beta}(x): E[1] for beta = 0, E[3] for 1, E[5] for 2, and the recursion beyond."""
    return derivative(x, check_alpha(alpha), check_beta(beta), 0)


def rct_d1(x: Tensor, alpha: float, beta: int) -> Tensor:
    """sigma'(x). With t = alpha·x, v = s(1-s), u = 1-2s: s; s + t·v; s + t·v·(3 + t·u) for beta = 0, 1, 2."""
    return derivative(x, check_alpha(alpha), check_beta(beta), 1)


def rct_d2(x: Tensor, alpha: float, beta: int) -> Tensor:
    """sigma''(x): alpha·v·{1; 2 + t·u; 4 + 5·t·u + t²·(1 - 6v)} for beta = 0, 1, 2 (E[2], E[4], E[6])."""
    return derivative(x, check_alpha(alpha), check_beta(beta), 2)


def derivative(x: Tensor, alpha: float, beta: int, order: int) -> Tensor:
    """The derivative of the given order, itself differentiable any number of times."""
    if not x.is_floating_point():
        raise DtypeError(f"RCT-AF needs a real floating-point tensor, got {x.dtype}: convert the input first")
    if torch.compiler.is_compiling():  # it fuses plain operations, and recomputes what they would save
        return closed_form(x, alpha, beta, order)
    result: Tensor = RCTFunction.apply(x, alpha, beta, order)
    return result


class RCTFunction(torch.autograd.Function):
    """Derivative `order` of an RCT-AF as one autograd node; its backward is the node of order + 1.

    The node carries `alpha`, `beta` and `order`, and saves its input and nothing else, for every beta: as
    nn.SiLU does. Backward is made of such nodes, so it can be differentiated as often as wanted.

    Under torch.func and forward-mode AD, `apply` runs the closed form as plain operations instead: a custom
    function inside two forward-mode levels loses its second-order term silently, plain operations do not.
    """

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """One node in eager reverse mode; plain differentiable operations under every other transform."""
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return closed_form(*args, **kwargs)
        return super().apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float, beta: int, order: int = 0) -> Tensor:
        """The closed form, on the CPU block by block, on a GPU in one kernel; no temporary outlives the call.

        Without `setup_context`, for whose sake torch would bind the arguments of every call by `inspect`.
        """
        ctx.save_for_backward(x)
        ctx.alpha, ctx.beta, ctx.order = alpha, beta, order
        if blocks.served(x):
            return blocks.value(x, alpha, beta, order)
        result = gpu.value(x, alpha, beta, order) if gpu.served(x) else None
        return closed_form(x, alpha, beta, order) if result is None else result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Incoming gradient times the derivative of order + 1, multiplied before rounding to a half type."""
        (x,) = ctx.saved_tensors
        (g,) = grad_outputs
        rest = [None] * (len(ctx.needs_input_grad) - 1)
        if not torch.is_grad_enabled():  # nobody differentiates further: no node, no wide copy
            if blocks.served(x, g):
                return blocks.product(g, x, ctx.alpha, ctx.beta, ctx.order + 1), *rest
            if gpu.served(x, g) and (result := gpu.product(g, x, ctx.alpha, ctx.beta, ctx.order + 1)) is not None:
                return result, *rest
        slope = derivative(x.to(working_dtype(x, ctx.alpha, 0)), ctx.alpha, ctx.beta, ctx.order + 1)
        return (g.to(slope.dtype) * slope).to(g.dtype), *rest
