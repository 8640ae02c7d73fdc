"""First and second derivatives of elementwise autograd nodes, from what the node saved for backward.

Each entry maps a node of the autograd graph to (sigma'(z), sigma''(z)), closed forms in the node's own dtype; None
for sigma'' where the function is piecewise linear (the almost-everywhere derivative is meant at kinks). In-place
variants save their *result*; both forms are listed, since the recorded z is gone by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessdiag.graph.saved import number, number_or_none, tensor, text

Derivatives = tuple[Tensor, Tensor | None]


def _sigmoid(node: Any) -> Derivatives:
    s = tensor(node, "result")
    slope = s * (1 - s)
    return slope, slope * (1 - 2 * s)


def _tanh(node: Any) -> Derivatives:
    t = tensor(node, "result")
    slope = 1 - t * t
    return slope, -2 * t * slope


def _silu(node: Any) -> Derivatives:
    x = tensor(node, "self")
    s, c = torch.sigmoid(x), torch.sigmoid(-x)
    return s * (1 + x * c), s * c * (2 + x * (c - s))


def _gelu(node: Any) -> Derivatives:
    x = tensor(node, "self")
    if text(node, "approximate") == "none":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * density, density * (2 - x * x)
    a, k = 0.044715, math.sqrt(2 / math.pi)
    inner1, inner2 = k * (1 + 3 * a * x * x), 6 * k * a * x
    t = torch.tanh(k * (x + a * x**3))
    t1 = (1 - t * t) * inner1
    t2 = (1 - t * t) * inner2 - 2 * t * t1 * inner1
    return 0.5 * (1 + t) + 0.5 * x * t1, t1 + 0.5 * x * t2


def _softplus(node: Any) -> Derivatives:
    x, beta, threshold = tensor(node, "self"), number(node, "beta"), number(node, "threshold")
    s, c = torch.sigmoid(beta * x), torch.sigmoid(-beta * x)
    linear = beta * x > threshold
    return torch.where(linear, 1.0, s), torch.where(linear, 0.0, beta * s * c)


def _mish(node: Any) -> Derivatives:
    x = tensor(node, "self")
    s, c = torch.sigmoid(x), torch.sigmoid(-x)
    t = torch.tanh(F.softplus(x))
    r = 1 - t * t
    t1 = r * s
    return t + x * t1, 2 * t1 + x * (r * s * c - 2 * t * r * s * s)


def _elu_parts(node: Any, curved: Tensor, z: Tensor) -> Derivatives:
    """`curved` is alpha exp(rate z) below 0, z anything of its sign. At 0 torch takes sigma' from the left and
    sigma'' from the right.
    """
    scale, rate = number(node, "scale"), number(node, "input_scale")
    return torch.where(z <= 0, curved * rate, scale), torch.where(z < 0, curved * rate * rate, 0.0)


def _elu(node: Any) -> Derivatives:
    x = tensor(node, "self")
    rate = number(node, "input_scale")
    curved = number(node, "scale") * number(node, "alpha") * torch.exp(rate * x.clamp(max=0))
    return _elu_parts(node, curved, x)


def _elu_result(node: Any) -> Derivatives:
    r = tensor(node, "result")
    return _elu_parts(node, r + number(node, "scale") * number(node, "alpha"), r)


def _celu_parts(alpha: float, slope: Tensor, z: Tensor) -> Derivatives:
    return torch.where(z <= 0, slope, 1.0), torch.where(z < 0, slope / alpha, 0.0)


def _celu(node: Any) -> Derivatives:
    x, alpha = tensor(node, "self"), number(node, "alpha")
    return _celu_parts(alpha, torch.exp(x.clamp(max=0) / alpha), x)


def _celu_result(node: Any) -> Derivatives:
    r, alpha = tensor(node, "result"), number(node, "alpha")
    return _celu_parts(alpha, r / alpha + 1, r)


def _log_sigmoid(node: Any) -> Derivatives:
    x = tensor(node, "self")
    c = torch.sigmoid(-x)
    return c, -c * torch.sigmoid(x)


def _hardswish(node: Any) -> Derivatives:
    x = tensor(node, "self")
    inside = x.abs() < 3
    return torch.where(inside, (2 * x + 3) / 6, (x > 0).to(x)), inside.to(x) / 3


def _pow(node: Any) -> Derivatives:
    x, n = tensor(node, "self"), number(node, "exponent")
    first = n * x.pow(n - 1) if n != 0 else torch.zeros_like(x)
    second = n * (n - 1) * x.pow(n - 2) if n not in (0.0, 1.0) else torch.zeros_like(x)
    return first, second


def _of_self(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Any], Derivatives]:
    return lambda node: (first(tensor(node, "self")), second(tensor(node, "self")))


def _of_result(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Any], Derivatives]:
    return lambda node: (first(tensor(node, "result")), second(tensor(node, "result")))


def _of_function(function: Callable[..., Tensor], *kept: str) -> Callable[[Any], Derivatives]:
    """By autograd on a copy of the input; `kept` names further arguments, numbers or None."""

    def derivatives(node: Any) -> Derivatives:
        further = [number_or_none(node, name) for name in kept]
        with torch.enable_grad():
            x = tensor(node, "self").clone().requires_grad_()
            (first,) = torch.autograd.grad(function(x, *further).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), x, materialize_grads=True)
        return first, second

    return derivatives


def _relu(node: Any) -> Derivatives:
    r = tensor(node, "result")
    return (r > 0).to(r), None


def _leaky(kept: str) -> Callable[[Any], Derivatives]:
    def derivatives(node: Any) -> Derivatives:
        x = tensor(node, kept)
        return torch.where(x > 0, torch.ones_like(x), number(node, "negative_slope")), None

    return derivatives


def _inside(low: str, high: str, *, ends: bool = True, kept: str = "self") -> Callable[[Any], Derivatives]:
    """1 between two bounds, and on them if `ends`: torch's slope is 1 there for clamp, 0 for Hardtanh and ReLU6."""

    def derivatives(node: Any) -> Derivatives:
        x = tensor(node, kept)
        keep = torch.ones_like(x, dtype=torch.bool)
        for name, compare in ((low, torch.ge if ends else torch.gt), (high, torch.le if ends else torch.lt)):
            bound = number_or_none(node, name) if name else None
            if bound is not None:
                keep &= compare(x, bound)
        return keep.to(x), None

    return derivatives


def _abs(node: Any) -> Derivatives:
    return torch.sign(tensor(node, "self")), None


_ROOT_PI = math.sqrt(math.pi)

CURVED: dict[str, Callable[[Any], Derivatives]] = {
    "SigmoidBackward0": _sigmoid,
    "TanhBackward0": _tanh,
    "SiluBackward0": _silu,
    "GeluBackward0": _gelu,
    "SoftplusBackward0": _softplus,
    "MishBackward0": _mish,
    "EluBackward0": _elu,
    "EluBackward1": _elu_result,
    "CeluBackward0": _celu,
    "CeluBackward1": _celu_result,
    "LogSigmoidBackward0": _log_sigmoid,
    "HardswishBackward0": _hardswish,
    "PowBackward0": _pow,
    "ExpBackward0": _of_result(lambda r: r, lambda r: r),
    "Expm1Backward0": _of_result(lambda r: r + 1, lambda r: r + 1),
    "SqrtBackward0": _of_result(lambda r: 0.5 / r, lambda r: -0.25 / r**3),
    "RsqrtBackward0": _of_result(lambda r: -0.5 * r**3, lambda r: 0.75 * r**5),
    "ReciprocalBackward0": _of_result(lambda r: -(r**2), lambda r: 2 * r**3),
    "LogBackward0": _of_self(lambda x: 1 / x, lambda x: -1 / x**2),
    "Log1PBackward0": _of_self(lambda x: 1 / (1 + x), lambda x: -1 / (1 + x) ** 2),
    "SinBackward0": _of_self(torch.cos, lambda x: -torch.sin(x)),
    "CosBackward0": _of_self(lambda x: -torch.sin(x), lambda x: -torch.cos(x)),
    "AtanBackward0": _of_self(lambda x: 1 / (1 + x * x), lambda x: -2 * x / (1 + x * x) ** 2),
    "ErfBackward0": _of_self(
        lambda x: 2 / _ROOT_PI * torch.exp(-x * x), lambda x: -4 / _ROOT_PI * x * torch.exp(-x * x)
    ),
    "ErfcBackward0": _of_self(
        lambda x: -2 / _ROOT_PI * torch.exp(-x * x), lambda x: 4 / _ROOT_PI * x * torch.exp(-x * x)
    ),
    "TanBackward0": _of_result(lambda r: 1 + r * r, lambda r: 2 * r * (1 + r * r)),
    "Exp2Backward0": _of_result(lambda r: math.log(2) * r, lambda r: math.log(2) ** 2 * r),
    "SinhBackward0": _of_self(torch.cosh, torch.sinh),
    "CoshBackward0": _of_self(torch.sinh, torch.cosh),
    "Log2Backward0": _of_self(lambda x: 1 / (math.log(2) * x), lambda x: -1 / (math.log(2) * x**2)),
    "Log10Backward0": _of_self(lambda x: 1 / (math.log(10) * x), lambda x: -1 / (math.log(10) * x**2)),
    "AsinBackward0": _of_function(torch.asin),
    "AcosBackward0": _of_function(torch.acos),
    "AsinhBackward0": _of_function(torch.asinh),
    "AcoshBackward0": _of_function(torch.acosh),
    "AtanhBackward0": _of_function(torch.atanh),
    "SincBackward0": _of_function(torch.sinc),
    "ErfinvBackward0": _of_function(torch.erfinv),
    "LgammaBackward0": _of_function(torch.lgamma),
    "DigammaBackward0": _of_function(torch.digamma),
    "LogitBackward0": _of_function(torch.logit, "eps"),
    "SpecialEntrBackward0": _of_function(torch.special.entr),
    "SpecialLogNdtrBackward0": _of_function(torch.special.log_ndtr),
    "SpecialErfcxBackward0": _of_function(torch.special.erfcx),
    "I0Backward0": _of_function(torch.special.i0),
}
"""Those that curve. What else acts on single entries is found by test (see `tested`), and not merged with others."""

PIECEWISE_LINEAR: dict[str, Callable[[Any], Derivatives]] = {
    "ReluBackward0": _relu,
    "LeakyReluBackward0": _leaky("self"),
    "LeakyReluBackward1": _leaky("result"),
    "HardtanhBackward0": _inside("min_val", "max_val", ends=False),
    "HardtanhBackward1": _inside("min_val", "max_val", ends=False, kept="result"),
    "ClampBackward1": _inside("min", "max"),
    "ClampMinBackward0": _inside("min", ""),
    "ClampMaxBackward0": _inside("", "max"),
    "AbsBackward0": _abs,
    "HardsigmoidBackward0": lambda node: ((tensor(node, "self").abs() < 3).to(tensor(node, "self")) / 6, None),
}
